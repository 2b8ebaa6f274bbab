"""adamw: an update in place, so it has checks of its own beside those of kernel_checks.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.subjects.launches import Recorder
from nanovlm_fast.kernels.adamw import CHUNK, adamw, adamw_reference, cost, make_inputs
from tests.support.kernel_checks import DEVICE, GPU, on_the_gpu_too, opcheck

UPDATED = ("masters", "exp_avgs", "exp_avg_sqs", "steps")
SIZES = [CHUNK, 1, 2 * CHUNK + 3, 576, 0, CHUNK - 1]


def a_copy(inputs: dict) -> dict:
    return copy.deepcopy(inputs)


def assert_near(ours: dict, theirs: dict, names: tuple[str, ...] = UPDATED) -> None:
    """Equal but for the rounding of a few float32 operations per step."""
    for name in names:
        for number, (out, expected) in enumerate(zip(ours[name], theirs[name], strict=True)):
            if expected.numel():
                error = float((out - expected).abs().max() / expected.abs().max())
                assert error <= 4 * 2**-23, f"{name}[{number}]: {error:.1e}"


def assert_same(ours: dict, theirs: dict) -> None:
    for name in (*UPDATED, "working"):
        for number, (out, expected) in enumerate(zip(ours[name], theirs[name], strict=True)):
            assert torch.equal(out, expected), f"{name}[{number}]"


def assert_rounded(inputs: dict) -> None:
    """Working copies are the masters in bfloat16. Triton's interpreter truncates instead."""
    for working, master in zip(inputs["working"], inputs["masters"], strict=True):
        if GPU:
            assert torch.equal(working, master.bfloat16())
        else:
            bits = master.view(torch.int32) & -(2**16)
            assert torch.equal(working.float(), bits.view(torch.float32))


@on_the_gpu_too
@pytest.mark.parametrize("working", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_three_updates_equal_the_reference(dtype, working):
    ours = make_inputs(SIZES, dtype, DEVICE, working)
    theirs = a_copy(ours)
    for master in ours["working"]:
        master.fill_(float("nan"))  # written, never read
    for _ in range(3):
        adamw(**ours)
        adamw_reference(**theirs)
    assert_near(ours, theirs)
    if working:
        assert_rounded(ours)
    assert [int(step) for step in ours["steps"]] == [13] * len(SIZES)
    assert all(torch.equal(*pair) for pair in zip(ours["grads"], theirs["grads"], strict=True))


@on_the_gpu_too
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
def test_five_steps_are_those_of_pytorch():
    """torch.optim.AdamW, fused, from no state at all; two groups with their own settings."""
    torch.manual_seed(0)
    start = [torch.randn(37, 19, device=DEVICE), torch.randn(5000, device=DEVICE)]
    settings = [
        dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        dict(lr=1e-2, betas=(0.8, 0.0), eps=1e-6, weight_decay=0.0),
    ]
    theirs = [torch.nn.Parameter(one.clone()) for one in start]
    groups = [dict(params=[p], **s) for p, s in zip(theirs, settings, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    rates = [[s["lr"], *s["betas"], s["eps"], s["weight_decay"]] for s in settings]
    ours = {
        "masters": [one.clone() for one in start],
        "exp_avgs": [torch.zeros_like(one) for one in start],
        "exp_avg_sqs": [torch.zeros_like(one) for one in start],
        "working": [],
        "steps": [torch.zeros((), device=DEVICE) for _ in start],
        "rates": torch.tensor(rates, dtype=torch.float64, device=DEVICE),
        "groups": [0, 1],
    }
    for _ in range(5):
        grads = [torch.randn_like(one) for one in start]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        adamw(grads=grads, **ours)
    state = [optimizer.state[p] for p in theirs]
    expected = {
        "masters": [p.detach() for p in theirs],
        "exp_avgs": [s["exp_avg"] for s in state],
        "exp_avg_sqs": [s["exp_avg_sq"] for s in state],
        "steps": [s["step"] for s in state],
    }
    assert_near(ours, expected)
    assert (ours["masters"][0] - start[0]).abs().max() > 1e-3, "nothing was updated"


@on_the_gpu_too
def test_where_found_inf_is_one_nothing_changes():
    inputs = make_inputs(SIZES, torch.bfloat16, DEVICE)
    inputs["grads"][0].fill_(float("nan"))
    inputs["factor"].fill_(float("nan"))  # clip / a norm that is not finite
    inputs["found_inf"].fill_(1.0)
    before = a_copy(inputs)
    adamw(**inputs)
    for name in (*UPDATED, "working"):
        assert all(torch.equal(*pair) for pair in zip(inputs[name], before[name], strict=True)), (
            name
        )


@on_the_gpu_too
def test_the_factor_scales_gradients_and_both_scalars_may_be_left_out():
    scaled = make_inputs(SIZES, torch.float32, DEVICE)
    halved = a_copy(scaled)
    halved["grads"] = [grad * 0.5 for grad in scaled["grads"]]  # exact
    for name in ("factor", "found_inf"):
        halved.pop(name)
    adamw(**scaled)
    adamw(**halved)
    # Near: two kernels may fuse products and sums in other ways. On a GPU a first moment that is
    # nearly 0 was off by 3e-5 of itself.
    assert_near(scaled, halved)
    for pair in zip(scaled["working"], halved["working"], strict=True):
        torch.testing.assert_close(*pair, rtol=0 if DEVICE == "cpu" else 2**-7, atol=0)


@on_the_gpu_too
def test_weights_count_their_own_steps_and_read_their_own_group():
    ours = make_inputs([300, 300, 300], torch.float32, DEVICE)
    for step, count in zip(ours["steps"], (0.0, 9.0, 900.0), strict=True):
        step.fill_(count)
    for name in ("grads", "masters", "exp_avgs", "exp_avg_sqs"):
        for one in ours[name][1:]:
            one.copy_(ours[name][0])
    theirs = a_copy(ours)
    adamw(**ours)
    adamw_reference(**theirs)
    assert_near(ours, theirs)
    assert [int(step) for step in ours["steps"]] == [1, 10, 901]
    moved = [(one - ours["masters"][0]).abs().max() for one in ours["masters"][1:]]
    assert min(moved) > 1e-6, "weights with other step counts and groups moved alike"


@on_the_gpu_too
def test_weights_that_are_not_aligned():
    """A view may begin anywhere: it must not be read in pieces of 16 bytes."""
    ours = make_inputs([CHUNK + 5], torch.bfloat16, DEVICE)

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], tensor])[1:]

    theirs = a_copy(ours)
    for name in ("grads", "masters", "exp_avgs", "exp_avg_sqs", "working"):
        ours[name] = [shifted(one) for one in ours[name]]
        assert ours[name][0].data_ptr() % 16
    adamw(**ours)
    adamw_reference(**theirs)
    assert_near(ours, theirs)
    assert_rounded(ours)


@on_the_gpu_too
def test_no_weights_and_addresses_that_come_again():
    """Tables are kept by address: memory that is used again may hold weights of other sizes."""
    empty = make_inputs([], torch.float32, DEVICE)
    adamw(**empty)
    names = ("grads", "masters", "exp_avgs", "exp_avg_sqs")
    memory = [torch.zeros(5000, device=DEVICE) for _ in names]
    for size in (5000, 123, 5000):
        ours = make_inputs([size], torch.float32, DEVICE, working=False)
        for place, name in zip(memory, names, strict=True):
            place[:size] = ours[name][0]
            place[size:] = 7.0
            ours[name] = [place[:size]]
        theirs = a_copy(ours)
        adamw(**ours)
        adamw_reference(**theirs)
        assert_near(ours, theirs)
        assert (memory[1][size:] == 7.0).all(), "it wrote behind the weight"


def test_opcheck():
    inputs = make_inputs([40, 7], torch.float32, DEVICE)
    opcheck(adamw, *inputs.values())


def test_the_cost_is_that_of_the_tensors():
    sizes = [100, 28]
    for working, dtype, bytes_each in ((True, torch.bfloat16, 28), (False, torch.float32, 28)):
        assert cost(sizes, dtype, working)["forward"][0] == 128 * bytes_each


def test_the_compiled_step_counts_what_the_cost_says():
    """The kernel gets addresses, so bench.compiled_step cannot see the tensors behind them."""
    sizes = [4096, 123]
    with FakeTensorMode():
        inputs = make_inputs(sizes, torch.bfloat16, "cpu")
        recorder = Recorder([])
        with recorder:
            adamw(**inputs)
    _, launch = recorder.launches
    assert launch.kind == "kernel" and launch.name.endswith("_adamw_kernel")
    assert launch.bytes == cost(sizes, torch.bfloat16)["forward"][0]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("masters", torch.ones(8).bfloat16(), TypeError, r"masters\[1\] is torch.bfloat16"),
        ("grads", torch.ones(8).bfloat16(), TypeError, r"grads\[1\] is torch.bfloat16"),
        ("grads", torch.ones(9), ValueError, r"grads\[1\] has shape \(9,\), expected \(8,\)"),
        ("exp_avgs", torch.ones(16)[::2], ValueError, r"exp_avgs\[1\] must be contiguous"),
        ("working", torch.ones(8), TypeError, r"working\[1\] is torch.float32"),
        ("steps", torch.ones((), dtype=torch.int64), TypeError, r"steps\[1\] is torch.int64"),
        ("exp_avg_sqs", None, ValueError, "1 exp_avg_sqs, 2 masters"),
    ],
)
def test_wrong_arguments_are_named(name, value, error, message):
    inputs = make_inputs([8, 8], torch.float32, "cpu")
    inputs[name] = inputs[name][:1] + ([] if value is None else [value])
    with pytest.raises(error, match=message):
        adamw(**inputs)
