"""swiglu_mlp: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.kernels import swiglu_mlp as module
from nanovlm_fast.kernels.swiglu_mlp import (
    make_inputs,
    swiglu_mlp,
    swiglu_mlp_bwd,
    swiglu_mlp_fwd,
    swiglu_mlp_reference,
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

# rows, C, I. Tiles are of 128 rows (64 in float32); the third has odd multiples of 16.
SHAPES = [(199, 96, 128), (1, 64, 256), (70, 48, 112), (0, 64, 256)]
TENSORS = ("x", "gate_up_weight", "down_weight")


def without_activation(**inputs):
    return swiglu_mlp(**inputs, keep_activation=False)


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype):
    check_parity(swiglu_mlp, swiglu_mlp_reference, make_inputs(*shape, dtype, DEVICE))


@on_the_gpu_too
@pytest.mark.parametrize("sizes", [(576, 1536), pytest.param((960, 2560), marks=pytest.mark.slow)])
def test_parity_at_the_models_sizes(sizes):
    rows = 20736 if DEVICE == "cuda" else 3
    check_parity(swiglu_mlp, swiglu_mlp_reference, make_inputs(rows, *sizes, DTYPES[0], DEVICE))


@on_the_gpu_too
def test_an_activation_that_is_not_kept_gives_the_same_bits():
    inputs = make_inputs(99, 32, 64, DTYPES[0], DEVICE)
    check_parity(without_activation, swiglu_mlp_reference, inputs)
    kept = run(swiglu_mlp, inputs)
    for name, value in run(without_activation, inputs).items():
        assert torch.equal(value, kept[name]), name


@on_the_gpu_too
def test_it_is_two_linear_layers_with_swiglu_between():
    inputs = make_inputs(33, 32, 64, torch.float32, DEVICE)

    def in_steps(x, gate_up_weight, down_weight):
        gate, up = F.linear(x, gate_up_weight).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_weight)

    ours = run(swiglu_mlp, inputs)
    for name, value in run(in_steps, inputs).items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@on_the_gpu_too
def test_not_contiguous_and_other_dimensions():
    inputs = make_inputs(30, 32, 64, DTYPES[0], DEVICE)
    inputs["x"] = torch.randn(3, 5, 64, device=DEVICE).to(DTYPES[0])[:, :, ::2]
    inputs["down_weight"] = inputs["down_weight"].T.contiguous().T
    check_parity(swiglu_mlp, swiglu_mlp_reference, inputs)
    check_parity(transposed(swiglu_mlp), transposed(swiglu_mlp_reference), inputs)


@on_the_gpu_too
@pytest.mark.parametrize("trained", [*TENSORS, "gate_up_weight down_weight"])
def test_a_frozen_part_gets_no_gradient_and_the_others_keep_theirs(trained):
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    fixed = tuple(name for name in TENSORS if name not in trained.split())
    check_parity(swiglu_mlp, swiglu_mlp_reference, inputs, fixed)


@on_the_gpu_too
def test_what_is_frozen_costs_nothing(monkeypatch):
    """Without gradients neither gate_up nor a is kept; with frozen weights only gate_up."""
    asked = []

    def recorded(*arguments):
        asked.append(arguments[-2:])
        return swiglu_mlp_fwd(*arguments)

    monkeypatch.setattr(module, "swiglu_mlp_fwd", recorded)
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    with torch.no_grad():
        swiglu_mlp(**inputs | {"x": inputs["x"].clone().requires_grad_()})
    run(swiglu_mlp, inputs, TENSORS[1:])
    run(swiglu_mlp, inputs)
    run(without_activation, inputs)
    assert asked == [(False, False), (True, False), (True, True), (True, False)]
    _, gate_up, a = swiglu_mlp_fwd(*inputs.values(), False, False)
    assert gate_up.numel() == a.numel() == 0
    gate_up = torch.zeros(9, 128, device=DEVICE, dtype=DTYPES[0])
    assert swiglu_mlp_bwd(inputs["x"], inputs["down_weight"], gate_up, False)[1].numel() == 0


@on_the_gpu_too
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_values_far_from_zero():
    inputs = make_inputs(7, 16, 16, torch.float32, DEVICE)
    inputs["x"] *= torch.tensor([1e-6, 1.0, 10.0, 1e2, 1e4, 1e6, 0.0], device=DEVICE)[:, None]
    check_parity(swiglu_mlp, swiglu_mlp_reference, inputs)


@on_the_gpu_too
def test_weights_in_float32_beside_16_bit_rows_get_float32_gradients():
    """As under autocast. In float32 where Triton's interpreter multiplies."""
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    masters = {name: inputs[name].float() for name in TENSORS[1:]}
    gradients = run(swiglu_mlp, {**inputs, **masters})
    assert {gradients[f"d {name}"].dtype for name in masters} == {torch.float32}
    check_parity(swiglu_mlp, swiglu_mlp_reference, {**inputs, **masters})


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    check_compile(swiglu_mlp, inputs)
    check_compile(without_activation, inputs)
    gate_up = torch.randn(9, 128, device=DEVICE).to(DTYPES[0])
    opcheck(swiglu_mlp_bwd, inputs["x"], inputs["down_weight"], gate_up, True)
    opcheck(swiglu_mlp_bwd, inputs["x"], inputs["down_weight"], gate_up, False)
    opcheck(swiglu_mlp_fwd, *(v.requires_grad_() for v in inputs.values()), True, True)


def test_reference_gradients():
    check_reference_gradients(swiglu_mlp_reference, make_inputs(3, 2, 5, torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 32, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"x": torch.ones(2, 4, 32)}, ValueError, r"x has shape \(2, 4, 32\)"),
        ({"x": torch.ones(4, 24)}, ValueError, "C and I multiples of 16"),
        ({"down_weight": torch.ones(32, 72)}, ValueError, "C and I multiples of 16"),
        ({"x": torch.ones(4, 64)[:, ::2]}, ValueError, "x must be contiguous"),
        ({"down_weight": torch.ones(48, 64)}, ValueError, r"down_weight has shape \(48, 64\)"),
        ({"down_weight": torch.ones(32, 64).half()}, TypeError, "down_weight is torch.float16"),
        ({"gate_up_weight": torch.ones(64, 32)}, ValueError, r"has shape \(64, 32\), expected"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 32, 64, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        swiglu_mlp_fwd(*inputs.values(), True, True)


def test_wrong_gradients_are_named():
    weight = torch.ones(32, 64)
    for dy, error in ((torch.ones(4, 64), "dy has shape"), (torch.ones(4, 64)[:, ::2], "contig")):
        with pytest.raises(ValueError, match=error):
            swiglu_mlp_bwd(dy, weight, torch.ones(4, 128), False)
