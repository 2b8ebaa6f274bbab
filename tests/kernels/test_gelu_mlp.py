"""gelu_mlp: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.kernels import gelu_mlp as module
from nanovlm_fast.kernels.gelu_mlp import (
    gelu_mlp,
    gelu_mlp_bwd,
    gelu_mlp_fwd,
    gelu_mlp_reference,
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
    transposed,
)

# rows, C, I. Tiles are of 128 rows (64 in float32); the third has odd multiples of 16.
SHAPES = [(199, 96, 128), (1, 64, 256), (70, 48, 112), (0, 64, 256)]
TENSORS = ("x", "weight1", "bias1", "weight2", "bias2")


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype):
    check_parity(gelu_mlp, gelu_mlp_reference, make_inputs(*shape, dtype, DEVICE))


@on_the_gpu_too
def test_parity_at_the_models_size():
    rows = 50176 if DEVICE == "cuda" else 3
    inputs = make_inputs(rows, 768, 3072, DTYPES[0], DEVICE, bias=False)
    check_parity(gelu_mlp, gelu_mlp_reference, inputs)


@on_the_gpu_too
def test_an_activation_that_is_not_kept_gives_the_same_bits():
    inputs = make_inputs(99, 32, 64, DTYPES[0], DEVICE)
    check_parity(lambda **i: gelu_mlp(**i, keep_activation=False), gelu_mlp_reference, inputs)
    kept = run(gelu_mlp, inputs)
    for name, value in run(lambda **i: gelu_mlp(**i, keep_activation=False), inputs).items():
        assert torch.equal(value, kept[name]), name


@on_the_gpu_too
def test_it_is_two_linear_layers_with_gelu_between():
    inputs = make_inputs(33, 32, 64, torch.float32, DEVICE)

    def in_steps(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)

    ours = run(gelu_mlp, inputs)
    for name, value in run(in_steps, inputs).items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@on_the_gpu_too
def test_not_contiguous_and_other_dimensions():
    inputs = make_inputs(30, 32, 64, DTYPES[0], DEVICE)
    inputs["x"] = torch.randn(3, 5, 64, device=DEVICE).to(DTYPES[0])[:, :, ::2]
    inputs["weight1"] = inputs["weight1"].T.contiguous().T
    inputs["bias1"] = torch.randn(128, device=DEVICE)[::2]
    check_parity(gelu_mlp, gelu_mlp_reference, inputs)
    check_parity(transposed(gelu_mlp), transposed(gelu_mlp_reference), inputs)


@on_the_gpu_too
@pytest.mark.parametrize("trained", [*TENSORS, "weight1 bias1"])
def test_a_frozen_part_gets_no_gradient_and_the_others_keep_theirs(trained):
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    fixed = tuple(name for name in TENSORS if name not in trained.split())
    check_parity(gelu_mlp, gelu_mlp_reference, inputs, fixed)


@on_the_gpu_too
def test_what_is_frozen_costs_nothing(monkeypatch):
    """Without gradients neither h nor a is kept; with frozen weights only h."""
    asked = []

    def recorded(*arguments):
        asked.append(arguments[-2:])
        return gelu_mlp_fwd(*arguments)

    monkeypatch.setattr(module, "gelu_mlp_fwd", recorded)
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    with torch.no_grad():
        gelu_mlp(**inputs | {"x": inputs["x"].clone().requires_grad_()})
    run(gelu_mlp, inputs, TENSORS[1:])
    run(gelu_mlp, inputs)
    run(gelu_mlp, {**inputs, "keep_activation": False})
    assert asked == [(False, False), (True, False), (True, True), (True, False)]
    _, h, a = gelu_mlp_fwd(*inputs.values(), False, False)
    assert h.numel() == a.numel() == 0
    _, a, dbias = gelu_mlp_bwd(
        inputs["x"], inputs["weight2"], inputs["x"].repeat(1, 2), False, False
    )
    assert a.numel() == dbias.numel() == 0


@on_the_gpu_too
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_values_far_from_zero():
    inputs = make_inputs(7, 16, 16, torch.float32, DEVICE)
    inputs["x"] *= torch.tensor([1e-6, 1.0, 10.0, 1e2, 1e4, 1e6, 0.0], device=DEVICE)[:, None]
    check_parity(gelu_mlp, gelu_mlp_reference, inputs)


@on_the_gpu_too
def test_weights_in_float32_beside_16_bit_rows_get_float32_gradients():
    """As under autocast. In float32 where Triton's interpreter multiplies."""
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    masters = {name: inputs[name].float() for name in TENSORS[1:]}
    gradients = run(gelu_mlp, {**inputs, **masters})
    assert {gradients[f"d {name}"].dtype for name in masters} == {torch.float32}
    check_parity(gelu_mlp, gelu_mlp_reference, {**inputs, **masters})


@on_the_gpu_too
def test_compile_and_opcheck():
    inputs = make_inputs(9, 32, 64, DTYPES[0], DEVICE)
    check_compile(gelu_mlp, inputs)
    check_compile(gelu_mlp, {**inputs, "bias2": None, "keep_activation": False})
    h = torch.randn(9, 64, device=DEVICE).to(DTYPES[0])
    opcheck(gelu_mlp_bwd, inputs["x"], inputs["weight2"], h, True, True)
    opcheck(gelu_mlp_bwd, inputs["x"], inputs["weight2"], h, False, False)
    opcheck(gelu_mlp_fwd, *(v.requires_grad_() for v in inputs.values()), True, True)


def test_reference_gradients():
    check_reference_gradients(gelu_mlp_reference, make_inputs(3, 2, 5, torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 32, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"x": torch.ones(2, 4, 32)}, ValueError, r"x has shape \(2, 4, 32\)"),
        ({"x": torch.ones(4, 24)}, ValueError, "C and I multiples of 16"),
        ({"weight1": torch.ones(72, 32)}, ValueError, "C and I multiples of 16"),
        ({"x": torch.ones(4, 64)[:, ::2]}, ValueError, "x must be contiguous"),
        ({"weight1": torch.ones(64, 48)}, ValueError, r"weight1 has shape \(64, 48\)"),
        ({"weight1": torch.ones(64, 32).half()}, TypeError, "weight1 is torch.float16"),
        ({"weight2": torch.ones(64, 32)}, ValueError, r"weight2 has shape \(64, 32\)"),
        ({"bias1": torch.ones(32)}, ValueError, r"bias1 has shape \(32,\), expected \(64,\)"),
        ({"bias2": torch.ones(32, dtype=torch.int64)}, TypeError, "bias2 is torch.int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 32, 64, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        gelu_mlp_fwd(*inputs.values(), True, True)


def test_wrong_gradients_are_named():
    weight2 = torch.ones(32, 64)
    for dy, error in ((torch.ones(4, 64), "dy has shape"), (torch.ones(4, 64)[:, ::2], "contig")):
        with pytest.raises(ValueError, match=error):
            gelu_mlp_bwd(dy, weight2, torch.ones(4, 64), False, True)
