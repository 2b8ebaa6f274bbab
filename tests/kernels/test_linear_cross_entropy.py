"""linear_cross_entropy: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm_fast.kernels import linear_cross_entropy as module
from nanovlm_fast.kernels.linear_cross_entropy import (
    cost,
    linear_cross_entropy,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_reference,
    make_inputs,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    run,
)

SHAPES = [
    (33, 97, 576),
    (200, 1001, 48),
    (1, 1001, 576),
    (7, 33000, 16),
    (2, 16384, 8),
    (3, 1, 5),
    (12, 128, 123),
    (0, 97, 16),
]


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype):
    inputs = make_inputs(*shape, dtype, DEVICE, ignored=0.0 if shape[0] == 1 else 0.2)
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs)


@on_the_gpu_too
@pytest.mark.parametrize("chunk", [1, 16, 32, 33, 4096])
def test_parity_in_chunks(chunk):
    inputs = make_inputs(33, 97, 64, DTYPES[0], DEVICE)
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, {**inputs, "chunk": chunk})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="logits of 0.8 GB and more")
@pytest.mark.parametrize("rows", [8192, 20000, 32768])
def test_parity_at_nanovlms_size(rows):
    check_parity(
        linear_cross_entropy,
        linear_cross_entropy_reference,
        make_inputs(rows, 49152, 576, torch.bfloat16, DEVICE),
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_no_sync_and_at_most_one_gigabyte():
    inputs = make_inputs(32768, 49152, 576, torch.bfloat16, DEVICE)
    inputs["h"].requires_grad_(), inputs["weight"].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, count = linear_cross_entropy(**inputs)
        (loss / count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 1e9


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_do_not_overflow(dtype):
    inputs = make_inputs(20, 1001, 48, dtype, DEVICE)
    inputs["h"] *= 100
    results = run(linear_cross_entropy, inputs)
    assert all(value.isfinite().all() for value in results.values())
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs)


@on_the_gpu_too
def test_without_labels_all_is_exactly_zero():
    """Without labels, the loss and all gradients are exactly zero.

    This also holds if a row without a label contains NaN or infinity, as padding may. Only dW,
    which is a sum over the rows, needs finite rows.
    """
    inputs = make_inputs(9, 97, 16, DTYPES[0], DEVICE, ignored=1.0)
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs)
    assert all((value == 0).all() for value in run(linear_cross_entropy, inputs).values())
    inputs["h"][3] = float("nan")
    results = run(linear_cross_entropy, inputs, fixed=("weight",))
    assert all((value == 0).all() for value in results.values())


@on_the_gpu_too
def test_only_what_is_wanted_is_computed():
    inputs = make_inputs(9, 97, 16, DTYPES[0], DEVICE)
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs, fixed=("weight",))
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs, fixed=("h",))
    with_gradients = run(linear_cross_entropy, inputs)
    loss, count = linear_cross_entropy(**inputs)
    assert torch.equal(loss, with_gradients["out0"]) and torch.equal(count, with_gradients["out1"])
    assert not loss.requires_grad and not count.requires_grad and count.dtype == torch.int64
    dh, dweight = linear_cross_entropy_fwd(*inputs.values(), 4, False, False)[1:]
    assert dh.numel() == dweight.numel() == 0


@on_the_gpu_too
def test_the_mean_and_a_second_derivative():
    inputs = make_inputs(9, 97, 16, torch.float32, DEVICE)
    h, weight = inputs["h"].requires_grad_(), inputs["weight"].requires_grad_()
    loss, count = linear_cross_entropy(**inputs)
    ours = torch.autograd.grad(loss / count, (h, weight), create_graph=True)
    theirs = torch.autograd.grad(
        torch.nn.functional.cross_entropy(h @ weight.T, inputs["labels"]), (h, weight)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (ours[0] * h).sum().backward()


@on_the_gpu_too
def test_not_contiguous_and_more_dimensions():
    inputs = make_inputs(12, 40, 16, DTYPES[0], DEVICE)
    inputs["h"] = inputs["h"].view(3, 4, 16).transpose(0, 1)
    inputs["labels"] = inputs["labels"].view(3, 4).T
    inputs["weight"] = torch.randn(40, 32, device=DEVICE).to(DTYPES[0])[:, ::2]
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, inputs)


@on_the_gpu_too
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_16_bit_hidden_states(weight_dtype, monkeypatch):
    """The 16-bit type is float16, because the interpreter rounds it correctly.

    CPUs have no float16 product that adds to float32, so the test replaces it there.
    """
    if DEVICE == "cpu":

        def add_product(total, a, b, first):
            product = a.float() @ b.float()
            total.copy_(product if first else total + product)

        monkeypatch.setattr(module, "_add_product", add_product)
    inputs = make_inputs(45, 301, 64, torch.float16, DEVICE)
    inputs["weight"] = inputs["weight"].to(weight_dtype)
    check_parity(linear_cross_entropy, linear_cross_entropy_reference, {**inputs, "chunk": 16})


class Recorder(TorchDispatchMode):
    """The operators that run, and what they return."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.results: list[torch.Tensor] = []  # kept alive, so that no storage is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.results.append(result)
        return result


class Launches:
    """Stands in for a kernel: `rows` of each launch."""

    def __init__(self):
        self.rows: list[int] = []

    def __getitem__(self, grid):
        return lambda logits, *_, **__: self.rows.append(len(logits))


@pytest.mark.parametrize("gradient", [False, True])
def test_one_chunk_of_logits_at_a_time(gradient, monkeypatch):
    """The operator's body, traced.

    It has one buffer for the logits, of size chunk x V (a multiple of 8), and the host reads no
    value.
    """
    launches = Launches()
    monkeypatch.setattr(module, "_linear_cross_entropy_fwd_kernel", launches)
    inputs = make_inputs(40, 1001, 8, torch.float32, "cpu")
    with Recorder() as recorder:
        linear_cross_entropy_fwd._init_fn(*inputs.values(), 16, gradient, gradient)
    assert launches.rows == [
        14,
        14,
        12,
    ]  # 40 rows in as many chunks as 16 rows per chunk need, of one size
    theirs = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in recorder.results
    }
    sizes = sorted(size for address, size in storages.items() if address not in theirs)
    wanted = [40 * 8 * 4, 1001 * 8 * 4] if gradient else []  # d h and dW
    assert sizes[-1 - len(wanted) :] == [*wanted, 14 * 1008 * 4]  # and the buffer
    assert sum(sizes) - sum(wanted) - 14 * 1008 * 4 <= 3 * 8 * 40  # of L rows: a few vectors
    assert {"mm", "addmm"} & set(recorder.names) == ({"mm", "addmm"} if gradient else {"mm"})
    assert not {"_local_scalar_dense", "item", "_to_copy", "copy_"} & set(recorder.names)


def test_memory_is_counted():
    memory = cost(32768, 49152, 576, torch.bfloat16)["memory"]
    workspace = 32 << 20  # cuBLAS' on Hopper, as PyTorch sizes it
    assert memory + workspace <= 1e9


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(6, 48, 16, DTYPES[0], DEVICE)
    check_compile(linear_cross_entropy, inputs)
    h, weight, labels = inputs.values()
    opcheck(linear_cross_entropy_fwd, h, weight, labels, 4, False, False)
    opcheck(
        linear_cross_entropy_fwd, h.requires_grad_(), weight.requires_grad_(), labels, 4, True, True
    )
    for dtype in DTYPES:
        opcheck(
            linear_cross_entropy_bwd,
            torch.randn(5, 7, device=DEVICE),
            torch.tensor(0.3, device=DEVICE),
            dtype,
        )


def test_reference_gradients():
    inputs = make_inputs(4, 7, 5, torch.float32, "cpu", ignored=0.3)
    check_reference_gradients(linear_cross_entropy_reference, inputs)


@pytest.mark.skipif(
    DEVICE != "cpu", reason="CPU tensors: beside a GPU the reference answers for them"
)
@pytest.mark.parametrize("label", [97, 2**40, -1])
def test_labels_out_of_range(label):
    """The reference raises an error, and the kernel returns NaN.

    The kernel cannot raise an error without a synchronization. It makes the row and the sums NaN,
    and nothing else.
    """
    inputs = make_inputs(5, 97, 16, torch.float32, "cpu", ignored=0.0)
    inputs["labels"][2] = label
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy_reference(**inputs)
    results = run(linear_cross_entropy, inputs)
    bad = results["d h"].isnan().any(1)
    assert results["out0"].isnan() and bad.tolist() == [False, False, True, False, False]
    assert results["d weight"].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "h is torch.int32"),
        ({"h": torch.ones(2, 2, 8)}, ValueError, "h has shape"),
        ({"h": torch.ones(4, 0), "weight": torch.ones(9, 0)}, ValueError, "H > 0"),
        ({"weight": torch.ones(9, 8, dtype=torch.bfloat16)}, TypeError, "weight is torch.bfloat16"),
        ({"weight": torch.ones(9, 7)}, ValueError, "weight has shape"),
        ({"weight": torch.ones(0, 8)}, ValueError, "V > 0"),
        ({"labels": torch.ones(4, dtype=torch.int32)}, TypeError, "labels is torch.int32"),
        ({"labels": torch.ones(5, dtype=torch.int64)}, ValueError, "labels has shape"),
        ({"h": torch.ones(4, 16)[:, ::2]}, ValueError, "h must be contiguous"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 9, 8, torch.float32, "cpu"), "chunk": 16, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy_fwd(*inputs.values(), True, True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_labels_left_on_the_cpu_are_named():
    inputs = make_inputs(4, 9, 8, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="labels is on cpu"):
        linear_cross_entropy(inputs["h"], inputs["weight"], inputs["labels"].cpu())


def test_a_gradient_that_was_not_made_is_not_taken_for_zero():
    h, weight, labels = make_inputs(4, 9, 8, torch.float32, DEVICE).values()
    loss = linear_cross_entropy_fwd(h.requires_grad_(), weight, labels, 16, False, True)[0]
    with pytest.raises(RuntimeError, match="not asked to make"):
        loss.backward()
