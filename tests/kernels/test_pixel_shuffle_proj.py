"""pixel_shuffle_proj: see kernel_checks.py for what is proved."""

from __future__ import annotations

import pytest
import torch

from nanovlm_fast.kernels import pixel_shuffle_proj as module
from nanovlm_fast.kernels.pixel_shuffle_proj import (
    make_inputs,
    pixel_shuffle_proj,
    pixel_shuffle_proj_bwd,
    pixel_shuffle_proj_fwd,
    pixel_shuffle_proj_reference,
)
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    check_compile,
    check_parity,
    check_reference_gradients,
    on_the_gpu_too,
    opcheck,
    transposed,
)

# batch, height, width, channels, n, factor, and with a bias or not
SHAPES = [
    ((1, 14, 14, 768, 96, 2), False),  # an image of nanoVLM's
    ((3, 4, 6, 64, 576, 2), True),  # nanoVLM's N, not square
    ((1, 8, 4, 960, 24, 4), False),  # 960 channels, the last columns of a tile are padding
    ((5, 6, 10, 7, 33, 2), True),  # odd C, images that share a tile of rows
    ((2, 9, 6, 35, 17, 3), False),  # odd C above a K-block, odd factor
    ((11, 6, 6, 20, 123, 1), True),  # no shuffle, a ragged second accumulator
    ((1, 2, 2, 5, 1, 2), True),  # one row, one column
    ((199, 1, 1, 12, 24, 1), False),
    ((0, 4, 4, 8, 24, 2), True),
]


@on_the_gpu_too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "bias"), SHAPES)
def test_parity(shape, bias, dtype):
    check_parity(
        pixel_shuffle_proj, pixel_shuffle_proj_reference, make_inputs(*shape, dtype, DEVICE, bias)
    )


@on_the_gpu_too
def test_parity_at_nanovlms_size(monkeypatch):
    """On a CPU, smaller: the tiles of bf16, two of 256 + 32 columns, over float32 numbers."""
    batch, channels = 256, 768
    if DEVICE == "cpu":
        batch, channels, launch = 3, 192, module._launch
        monkeypatch.setattr(module, "_launch", lambda n, c, dtype: launch(n, c, torch.bfloat16))
    inputs = make_inputs(batch, 14, 14, channels, 576, 2, DTYPES[0], DEVICE)
    check_parity(pixel_shuffle_proj, pixel_shuffle_proj_reference, inputs)


@on_the_gpu_too
def test_parity_at_the_size_of_a_tile(monkeypatch):
    """512 pixels: a shuffle by 4, 12,288 columns in the weight. On a CPU, a corner of the tile."""
    if DEVICE == "cpu":
        launch = module._launch
        monkeypatch.setattr(module, "_launch", lambda n, c, dtype: launch(n, c, torch.bfloat16))
        inputs = make_inputs(1, 8, 8, 768, 96, 4, DTYPES[0], DEVICE)
    else:
        inputs = make_inputs(64, 32, 32, 768, 960, 4, DTYPES[0], DEVICE)
    assert inputs["weight"].shape[1] == 12_288
    check_parity(pixel_shuffle_proj, pixel_shuffle_proj_reference, inputs)


@on_the_gpu_too
def test_several_blocks_of_rows_to_a_part(monkeypatch):
    """The weight's gradient in three parts of rows, the last one shorter."""
    monkeypatch.setattr(module, "PROGRAMS", 12)  # for four tiles
    check_parity(
        pixel_shuffle_proj,
        pixel_shuffle_proj_reference,
        make_inputs(9, 12, 12, 24, 40, 2, DTYPES[0], DEVICE),
    )


@on_the_gpu_too
def test_not_contiguous_and_more_dimensions():
    inputs = make_inputs(6, 4, 4, 32, 24, 2, DTYPES[0], DEVICE, bias=True)
    inputs["x"] = inputs["x"].view(2, 3, 16, 32).transpose(0, 1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["bias"] = torch.randn(48, device=DEVICE)[::2].to(DTYPES[0])
    inputs["grid"] = None
    check_parity(pixel_shuffle_proj, pixel_shuffle_proj_reference, inputs)


@on_the_gpu_too
def test_upstream_gradient_that_is_not_contiguous():
    inputs = make_inputs(2, 4, 4, 16, 24, 2, DTYPES[0], DEVICE)
    check_parity(transposed(pixel_shuffle_proj), transposed(pixel_shuffle_proj_reference), inputs)


@on_the_gpu_too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_of_another_dtype(dtype):
    """The gradients keep the parameters' dtype; the products are taken in x's."""
    if DEVICE == "cpu" and dtype == torch.float32:
        pytest.skip("the interpreter's products of bf16 are wrong")
    x_dtype = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    inputs = make_inputs(2, 4, 4, 16, 24, 2, dtype, DEVICE, bias=True)
    inputs["x"] = inputs["x"].to(x_dtype)
    check_parity(pixel_shuffle_proj, pixel_shuffle_proj_reference, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="reads the device's allocator")
def test_the_shuffled_copy_is_never_allocated():
    inputs = make_inputs(256, 14, 14, 768, 64, 2, DTYPES[0], DEVICE)
    x, weight = inputs["x"], inputs["weight"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = pixel_shuffle_proj_fwd(x, weight, 2, 14)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 2
    gradients = pixel_shuffle_proj_bwd(y, x, weight, 2, 14)
    assert (
        torch.cuda.max_memory_allocated() - before < 1.5 * x.nbytes
        and gradients[0].shape == x.shape
    )


@on_the_gpu_too
@pytest.mark.parametrize("bias", [False, True])
def test_compile_and_opcheck(bias):
    inputs = make_inputs(2, 2, 4, 16, 24, 2, DTYPES[0], DEVICE, bias)
    check_compile(pixel_shuffle_proj, inputs)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    opcheck(
        pixel_shuffle_proj_bwd, torch.randn(2, 2, 24, device=DEVICE).to(x.dtype), x, weight, 2, 4
    )
    bias = bias.requires_grad_() if bias is not None else None
    opcheck(pixel_shuffle_proj_fwd, x.requires_grad_(), weight.requires_grad_(), 2, 4, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_reference_gradients(bias):
    inputs = make_inputs(2, 2, 4, 3, 2, 2, torch.float32, "cpu", bias)
    check_reference_gradients(pixel_shuffle_proj_reference, inputs)


def test_order_is_the_models():
    """The order of the patches of a 4 x 6 grid is that of the models.

    Patch (row, column) goes to image token (row // 2, column // 2), block (row % 2, column % 2).
    """
    x = torch.arange(24.0).view(1, 24, 1)
    shuffled = pixel_shuffle_proj_reference(x, torch.eye(4), 2, grid=(4, 6))
    assert shuffled[0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]] and shuffled[
        0, -1
    ].tolist() == [16, 17, 22, 23]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 16, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"x": torch.ones(2, 15, 8)}, ValueError, r"the grid is \(4, 4\)"),
        ({"x": torch.ones(2, 15, 8), "grid": None}, ValueError, "not a square number"),
        ({"x": torch.ones(8)}, ValueError, "x has shape"),
        ({"x": torch.ones(2, 16, 0)}, ValueError, "C > 0"),
        ({"factor": 3}, ValueError, "not divisible by factor 3"),
        ({"factor": 0}, ValueError, "not divisible by factor 0"),
        ({"weight": torch.ones(24, 31)}, ValueError, "weight has shape"),
        ({"weight": torch.ones(0, 32)}, ValueError, "N > 0"),
        ({"weight": torch.ones(24, 32, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        ({"bias": torch.ones(23)}, ValueError, "bias has shape"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = {**make_inputs(2, 4, 4, 8, 24, 2, torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        pixel_shuffle_proj(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_a_weight_left_on_the_cpu_is_named():
    with pytest.raises(ValueError, match="weight is on cpu"):
        pixel_shuffle_proj_fwd(torch.ones(1, 4, 8, device=DEVICE), torch.ones(8, 32), 2, 2)


def test_strides_are_checked_by_the_operator():
    with pytest.raises(ValueError, match="x must be contiguous"):
        pixel_shuffle_proj_fwd(torch.ones(1, 4, 8)[..., ::2], torch.ones(4, 16), 2, 2)
