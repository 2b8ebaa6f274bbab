"""rms_norm: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch

from nanovlm_fast.kernels.rms_norm import (
    make_inputs,
    rms_norm,
    rms_norm_bwd,
    rms_norm_fwd,
    rms_norm_reference,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
)

SHAPES = [(33, 576), (5, 768), (1, 960), (199, 123), (7, 3072), (3, 2), (0, 576)]
STREAMS = [None, torch.float32]


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", STREAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, residual, dtype):
    check_parity(rms_norm, rms_norm_reference, make_inputs(*shape, dtype, DEVICE, residual))


@pytest.mark.slow  # half a minute in the interpreter
@on_the_gpu_too
@pytest.mark.parametrize("rows", [40000])
def test_parity_at_nanovlms_size(rows):
    if DEVICE == "cpu":
        rows = 2113  # more rows than all programs of the backward take in one round
    check_parity(rms_norm, rms_norm_reference, make_inputs(rows, 576, DTYPES[0], DEVICE, DTYPES[0]))


@on_the_gpu_too
def test_not_contiguous_and_more_dimensions():
    inputs = make_inputs(12, 64, DTYPES[0], DEVICE, torch.float32)
    inputs["x"] = inputs["x"].view(3, 4, 64).transpose(0, 1)
    inputs["residual"] = torch.randn(4, 3, 128, device=DEVICE)[..., ::2]
    check_parity(rms_norm, rms_norm_reference, inputs)


@on_the_gpu_too
@pytest.mark.parametrize("residual", STREAMS)
def test_compile_and_opcheck(residual):
    inputs = make_inputs(6, 48, DTYPES[0], DEVICE, residual)
    check_compile(rms_norm, inputs)
    x, weight, stream = inputs["x"], inputs["weight"], inputs.get("residual")
    _, h, rstd = rms_norm_fwd(x, weight, 1e-5, stream)
    opcheck(rms_norm_bwd, torch.randn_like(x), None, x if stream is None else h, weight, rstd)
    opcheck(rms_norm_fwd, x.requires_grad_(), weight.requires_grad_(), 1e-5, stream)


@pytest.mark.parametrize("residual", STREAMS)
def test_reference_gradients(residual):
    check_reference_gradients(rms_norm_reference, make_inputs(3, 5, torch.float32, "cpu", residual))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"weight": torch.ones(7)}, ValueError, "weight has shape"),
        ({"weight": torch.ones(8, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        (
            {"residual": torch.ones(4, 8, dtype=torch.bfloat16)},
            TypeError,
            "residual is torch.bfloat16",
        ),
        ({"residual": torch.ones(5, 8)}, ValueError, "residual has shape"),
        ({"x": torch.ones(4, 0), "weight": torch.ones(0)}, ValueError, "N > 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 8, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        rms_norm_fwd(inputs["x"], inputs["weight"], inputs["eps"], inputs.get("residual"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_a_weight_left_on_the_cpu_is_named():
    with pytest.raises(ValueError, match="weight is on cpu"):
        rms_norm_fwd(torch.ones(4, 8, device=DEVICE), torch.ones(8), 1e-5)


def test_strides_are_checked_by_the_operator():
    with pytest.raises(ValueError, match="x must be contiguous"):
        rms_norm_fwd(torch.ones(8, 8)[:, ::2], torch.ones(4), 1e-5)
