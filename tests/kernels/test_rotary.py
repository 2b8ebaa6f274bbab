"""rotary: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.kernels.rotary import (
    make_inputs,
    rotary,
    rotary_bwd,
    rotary_fwd,
    rotary_inplace,
    rotary_reference,
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
    transposed,
)

TABLES = ("cos", "sin")
# tokens, query heads, key heads, size of a head
SHAPES = [
    (33, 9, 3, 64),
    (199, 9, 3, 64),
    (1, 15, 5, 64),
    (17, 1, 1, 128),
    (5, 3, 2, 46),
    (7, 2, 1, 2),
    (0, 9, 3, 64),
]


def in_place(**inputs):
    """In place on a tensor that a projection, or here a product, has just written."""
    return rotary(**inputs | {"qkv": inputs["qkv"] * 1}, inplace=True)


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [rotary, in_place])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, op, dtype):
    check_parity(op, rotary_reference, make_inputs(*shape, dtype, DEVICE, positions=64), TABLES)


@on_the_gpu_too
@pytest.mark.parametrize("op", [rotary, in_place])
def test_parity_at_nanovlms_size(op):
    tokens = 300 if DEVICE == "cpu" else 32768
    check_parity(op, rotary_reference, make_inputs(tokens, 9, 3, 64, DTYPES[0], DEVICE), TABLES)


@on_the_gpu_too
def test_not_contiguous():
    inputs = make_inputs(12, 2, 1, 16, DTYPES[0], DEVICE)
    inputs["qkv"] = torch.randn(12, 128, device=DEVICE).to(DTYPES[0])[:, ::2]
    inputs["position_ids"] = inputs["position_ids"].repeat_interleave(2)[::2]
    inputs["sin"] = inputs["sin"].t().contiguous().t()
    check_parity(rotary, rotary_reference, inputs, TABLES)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        rotary(**inputs, inplace=True)


@on_the_gpu_too
@pytest.mark.parametrize("op", [rotary, in_place])
def test_a_gradient_that_is_not_contiguous(op):
    inputs = make_inputs(6, 2, 1, 16, DTYPES[0], DEVICE)
    check_parity(transposed(op), transposed(rotary_reference), inputs, TABLES)


@on_the_gpu_too
def test_the_values_pass_through_whatever_they_hold():
    inputs = make_inputs(4, 2, 1, 8, torch.float32, DEVICE)
    inputs["qkv"][:, 24] = float("inf")
    for inplace in (False, True):
        out = rotary(**inputs | {"qkv": inputs["qkv"].clone()}, inplace=inplace)
        assert torch.equal(out[:, 24:], inputs["qkv"][:, 24:]) and out[:, :24].isfinite().all()


def projected(x, weight, inplace, **inputs):
    """What the model does: project, rotate, split. Returns a loss."""
    qkv = rotary(F.linear(x, weight), **inputs, inplace=inplace)
    q, k, v = qkv.view(len(x), 4, 16).split([2, 1, 1], dim=1)
    return (q * k).square().mean() + (v * k).sum()


@on_the_gpu_too
def test_in_place_after_a_projection_copies_nothing():
    inputs = make_inputs(6, 2, 1, 16, DTYPES[0], DEVICE)
    x = torch.randn(6, 24, device=DEVICE, requires_grad=True)
    qkv = F.linear(x, torch.randn(64, 24, device=DEVICE)).to(DTYPES[0])
    address, version = qkv.data_ptr(), qkv._version
    expected = rotary(**inputs | {"qkv": qkv.detach()})
    out = rotary(**inputs | {"qkv": qkv}, inplace=True)
    assert (
        out is qkv
        and out.data_ptr() == address
        and not out._is_view()
        and torch.equal(out, expected)
    )
    assert qkv._version > version, "autograd must notice the change"
    assert "RotaryInPlace" in out.grad_fn.name()


@on_the_gpu_too
@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_and_out_of_place_give_one_gradient(compiled):
    inputs = make_inputs(6, 2, 1, 16, torch.float32, DEVICE)
    values = {
        "x": inputs.pop("qkv")[:, :24].contiguous(),
        "weight": torch.randn(64, 24, device=DEVICE),
        **inputs,
    }
    results = []
    for inplace in (False, True):
        torch._dynamo.reset()
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"
        loss = torch.compile(projected, fullgraph=True, backend=backend) if compiled else projected
        results.append(
            run(lambda loss=loss, inplace=inplace, **v: loss(inplace=inplace, **v), values, TABLES)
        )
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_leaf_that_is_differentiated_cannot_be_rotated_in_place():
    inputs = make_inputs(6, 2, 1, 16, torch.float32, DEVICE)
    inputs["qkv"].requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        rotary(**inputs, inplace=True)


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(6, 2, 1, 16, DTYPES[0], DEVICE)
    check_compile(rotary, inputs, TABLES)
    check_compile(in_place, inputs, TABLES)
    values = tuple(inputs.values())
    opcheck(rotary_inplace, *values)
    opcheck(rotary_bwd, *values)
    inputs["qkv"].requires_grad_()
    opcheck(rotary_fwd, *values)


def test_reference_gradients():
    inputs = make_inputs(3, 2, 1, 6, torch.float32, "cpu")
    check_reference_gradients(rotary_reference, inputs, TABLES)


def test_the_backward_turns_back():
    inputs = make_inputs(9, 2, 1, 16, torch.float32, DEVICE)
    back = rotary_bwd(rotary(**inputs), *list(inputs.values())[1:])
    torch.testing.assert_close(back, inputs["qkv"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.ones(4, 32, dtype=torch.int32)}, TypeError, "qkv is torch.int32"),
        ({"qkv": torch.ones(4, 2, 16)}, ValueError, "qkv has shape"),
        ({"qkv": torch.ones(4, 36)}, ValueError, "heads of an even size"),
        ({"n_kv": 0}, ValueError, "n_kv is 0"),
        ({"cos": torch.ones(8192, 4, dtype=torch.bfloat16)}, TypeError, "cos is torch.bfloat16"),
        ({"cos": torch.ones(8192, 8)}, ValueError, "cos has shape"),
        ({"sin": torch.ones(8191, 4)}, ValueError, "sin has shape"),
        ({"position_ids": torch.zeros(5, dtype=torch.int32)}, ValueError, "position_ids has shape"),
        (
            {"position_ids": torch.zeros(4, dtype=torch.int64)},
            TypeError,
            "position_ids is torch.int64",
        ),
    ],
)
@pytest.mark.parametrize("op", [rotary_fwd, rotary_inplace])
def test_wrong_arguments_are_named(change, error, message, op):
    inputs = {**make_inputs(4, 2, 1, 8, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        op(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_a_table_left_on_the_cpu_is_named():
    inputs = make_inputs(4, 2, 1, 8, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="cos is on cpu"):
        rotary(**inputs | {"cos": inputs["cos"].cpu()})
