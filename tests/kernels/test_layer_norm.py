"""layer_norm: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch

from nanovlm_fast.kernels.layer_norm import (
    layer_norm,
    layer_norm_bwd,
    layer_norm_fwd,
    layer_norm_reference,
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

SHAPES = [(33, 768), (5, 576), (1, 960), (199, 123), (7, 3072), (3, 3), (0, 768)]
STREAMS = [None, torch.float32]


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", STREAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, residual, dtype):
    check_parity(layer_norm, layer_norm_reference, make_inputs(*shape, dtype, DEVICE, residual))


@on_the_gpu_too
@pytest.mark.parametrize("residual", [torch.float32, *DTYPES[:-1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_the_bias_before_it(shape, residual):
    """Wide and narrow streams: the bias's gradient is summed before the stream's is rounded."""
    inputs = make_inputs(*shape, DTYPES[0], DEVICE, residual, with_delta_bias=True)
    check_parity(layer_norm, layer_norm_reference, inputs)


@on_the_gpu_too
def test_parity_at_nanovlms_size(monkeypatch):
    rows = 50176
    if (
        DEVICE == "cpu"
    ):  # fewer rows and programs of the backward: four rounds here too, the last not full
        rows = 131
        monkeypatch.setattr("nanovlm_fast.kernels.layer_norm.WARPS", 40)
    inputs = make_inputs(rows, 768, DTYPES[0], DEVICE, DTYPES[0], with_delta_bias=True)
    check_parity(layer_norm, layer_norm_reference, inputs)


@on_the_gpu_too
@pytest.mark.parametrize("width", [1, 2])
def test_one_and_two_columns_have_a_gradient_of_nothing_but_rounding(width):
    inputs = make_inputs(5, width, torch.float32, DEVICE)
    ours, plain = run(layer_norm, inputs), run(layer_norm_reference, inputs)
    for name, value in plain.items():
        # rstd is 1,000 here, and a GPU fuses a product and a sum where PyTorch rounds between them.
        torch.testing.assert_close(
            ours[name], value, rtol=1e-5, atol=1e-5 if DEVICE == "cpu" else 3e-4
        )


@on_the_gpu_too
@pytest.mark.parametrize("width", [123, 768])
def test_a_large_mean_cancels_nothing(width):
    inputs = make_inputs(9, width, torch.float32, DEVICE)
    inputs["x"] = (
        inputs["x"] * 0.1 + 1000
    )  # E[h^2] - mean^2 in float32 is off by several times the variance here
    truth = torch.nn.functional.layer_norm(
        inputs["x"].double(),
        (width,),
        inputs["weight"].double(),
        inputs["bias"].double(),
        inputs["eps"],
    )
    torch.testing.assert_close(layer_norm(**inputs).double(), truth, rtol=0, atol=5e-3)


@on_the_gpu_too
def test_not_contiguous_and_more_dimensions():
    inputs = make_inputs(12, 64, DTYPES[0], DEVICE, torch.float32)
    inputs["x"] = inputs["x"].view(3, 4, 64).transpose(0, 1)
    inputs["residual"] = torch.randn(4, 3, 128, device=DEVICE)[..., ::2]
    check_parity(layer_norm, layer_norm_reference, inputs)


@on_the_gpu_too
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used_and_gradients_of_stride_zero(used):
    inputs = make_inputs(6, 48, DTYPES[0], DEVICE, torch.float32)
    gradients = []
    for function in (layer_norm, layer_norm_reference):
        leaves = {
            n: v.clone().requires_grad_() if torch.is_tensor(v) else v for n, v in inputs.items()
        }
        function(**leaves)[used].sum().backward()
        gradients.append(
            [v.grad if v.grad is not None else 0 * v for v in leaves.values() if torch.is_tensor(v)]
        )
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


@on_the_gpu_too
@pytest.mark.parametrize(
    ("residual", "with_bias"), [(None, False), (torch.float32, False), (torch.float32, True)]
)
def test_compile_and_opcheck(residual, with_bias):
    inputs = make_inputs(6, 48, DTYPES[0], DEVICE, residual, with_delta_bias=with_bias)
    check_compile(layer_norm, inputs)
    x, weight, bias, stream = inputs["x"], inputs["weight"], inputs["bias"], inputs.get("residual")
    delta_bias = inputs.get("delta_bias")
    _, h, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-6, stream, delta_bias)
    saved = (x if stream is None else h, weight, mean, rstd, with_bias)
    opcheck(layer_norm_bwd, torch.randn_like(x), None, *saved)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    if delta_bias is not None:
        delta_bias.requires_grad_()
    opcheck(layer_norm_fwd, *leaves, 1e-6, stream, delta_bias)


@pytest.mark.parametrize("residual", STREAMS)
def test_reference_gradients(residual):
    with_bias = residual is not None
    inputs = make_inputs(3, 5, torch.float32, "cpu", residual, with_delta_bias=with_bias)
    check_reference_gradients(layer_norm_reference, inputs)


def test_reference_is_pytorchs():
    inputs = make_inputs(4, 48, torch.float32, "cpu")
    plain = torch.nn.functional.layer_norm(
        inputs["x"], (48,), inputs["weight"], inputs["bias"], inputs["eps"]
    )
    torch.testing.assert_close(layer_norm_reference(**inputs), plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"weight": torch.ones(7)}, ValueError, "weight has shape"),
        ({"bias": torch.ones(8, 1)}, ValueError, "bias has shape"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, TypeError, "bias is torch.float64"),
        (
            {"residual": torch.ones(4, 8, dtype=torch.bfloat16)},
            TypeError,
            "residual is torch.bfloat16",
        ),
        ({"residual": torch.ones(5, 8)}, ValueError, "residual has shape"),
        (
            {"residual": torch.ones(4, 8), "delta_bias": torch.ones(4)},
            ValueError,
            "delta_bias has shape",
        ),
        ({"delta_bias": torch.ones(8)}, ValueError, "delta_bias needs a residual"),
        (
            {"x": torch.ones(4, 0), "weight": torch.ones(0), "bias": torch.ones(0)},
            ValueError,
            "N > 0",
        ),
        ({"x": torch.ones(4, 16)[:, ::2]}, ValueError, "x must be contiguous"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(4, 8, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        layer_norm_fwd(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_a_bias_left_on_the_cpu_is_named():
    x = torch.ones(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="bias is on cpu"):
        layer_norm_fwd(x, x[0], torch.ones(8), 1e-6)
