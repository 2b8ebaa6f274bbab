"""LayerNorm over the last dimension, fused with the residual addition before it (Ba et al., 2016).

    h = x + residual + delta_bias                     (h = x without a residual)
    y = (h - mean) * rstd * weight + bias,            rstd = 1 / sqrt(mean((h - mean)^2) + eps)

Shapes and dtypes:
    x (..., N) bf16, fp16 or fp32; weight, bias (N,)
    residual, h: x's shape; x's dtype or fp32 (a float32 residual stream)
    delta_bias (N,) or none: the bias of the projection that made x
    y: x's shape and dtype

Statistics, sums and products are float32. The variance is computed in a second pass over the row,
which is still in registers: E[h^2] - mean^2 would cancel when the mean is large. Only mean and
rstd (rows,) are saved for the backward. The backward adds the gradient that arrives for h inside
the kernel, and sums the gradients of weight and bias into float32 partials, each over a fixed set
of rows. With them it sums the gradient of delta_bias, which is h's: a projection that added its
bias itself would have to read its output's gradient a second time for that sum.

Bytes, forward: read x and residual, write y and h. Backward: read dy, dh and h, write dx (and
d residual, if its dtype is not x's). A row of up to 768 columns is held by one warp, so that sums
need no barrier. In the forward, many such programs per multiprocessor keep enough loads in flight,
as in Liger and QuACK; in the backward, a pipeline through shared memory does.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Warps of the backward: eight for each of an H100's 132 multiprocessors. A constant rather than the
# device's own count, so that the partials are added in the same order on every device.
WARPS = 1056
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    delta_bias: Tensor | None = None,
):
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if delta_bias is not None:
        h = h + delta_bias.to(wide)
    if residual is not None:
        h = h + residual.to(wide)
    centred = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd * weight.to(wide) + bias.to(wide)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), h.to(residual.dtype))


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, delta_bias_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, M,
    N: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_DELTA_BIAS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    h = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA_BIAS:
        delta_bias = tl.load(delta_bias_ptr + columns, mask=columns < N, other=0.0)
        h += delta_bias.to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + offsets, h, mask=inside)
    mean = tl.sum(h, axis=1) / N
    # Columns past N must be zero again: subtracting the mean made them -mean.
    centred = tl.where((columns < N)[None, :], h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + EPS)
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + offsets, centred * rstd[:, None] * weight[None, :] + bias[None, :], mask=inside
    )
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, ddelta_bias_ptr, M,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    HAS_DH: tl.constexpr, TWO_GRADIENTS: tl.constexpr, HAS_DELTA_BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_N)
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    ddelta_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Three stages: while one row is computed, the next two are copied to shared memory. They need
    # up to 24 bytes per column there, hence the limit on BLOCK_N, and copies of 16 bytes, which are
    # only aligned where N is a multiple of 8.
    stages: tl.constexpr = 3 if BLOCK_N <= 8192 and N % 8 == 0 else 1
    for start in tl.range(program * ROWS, M, tl.num_programs(0) * ROWS, num_stages=stages):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        offsets = rows[:, None] * N + columns[None, :]
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        # Elements outside load as 0, so they add nothing to the sums below.
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_DH:
            dh = tl.load(dh_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        normed = (h - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * normed, axis=0)
        dbias += tl.sum(dy, axis=0)
        dnormed = dy * weight[None, :]
        slope = tl.sum(dnormed * normed, axis=1) / N
        shift = tl.sum(dnormed, axis=1) / N
        dx = (dnormed - normed * slope[:, None] - shift[:, None]) * rstd[:, None]
        if HAS_DH:
            dx += dh
        if HAS_DELTA_BIAS:
            ddelta_bias += tl.sum(dx, axis=0)
        tl.store(dx_ptr + offsets, dx, mask=inside)
        if TWO_GRADIENTS:
            # The residual has another dtype, so it needs its own copy, rounded from float32.
            tl.store(dresidual_ptr + offsets, dx, mask=inside)
    # One row of partials per program; the caller sums them. Atomics would add in varying order.
    partial = program.to(tl.int64) * N + columns
    tl.store(dweight_ptr + partial, dweight, mask=columns < N)
    tl.store(dbias_ptr + partial, dbias, mask=columns < N)
    if HAS_DELTA_BIAS:
        tl.store(ddelta_bias_ptr + partial, ddelta_bias, mask=columns < N)


def _launch(n: int) -> dict[str, int]:
    """Tile and warps for rows of n columns.

    One warp per 768 columns: that is 24 elements per thread, which the backward keeps in registers.
    """
    block = triton.next_power_of_2(n)
    warps = triton.next_power_of_2(triton.cdiv(n, 768))
    return {"BLOCK_N": block, "ROWS": max(1, 1024 // block), "num_warps": min(8, warps)}


def _check(
    name: str, tensor: Tensor, like: Tensor, shape: torch.Size | tuple[int, ...], dtypes: tuple
) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"layer_norm: {name} is {tensor.dtype}, expected one of {expected}")
    if tensor.device != like.device:
        raise ValueError(f"layer_norm: {name} is on {tensor.device}, x is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"layer_norm: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"layer_norm: {name} must be contiguous, its strides are {tensor.stride()}"
        )


@torch.library.custom_op("nanovlm_fast::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of x (M, N); raises if an argument does not fit.

    Returns y (M, N), h (M, N) (empty without a residual), mean and rstd (M,) float32.
    """
    _check("x", x, x, x.shape, DTYPES)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"layer_norm: x has shape {tuple(x.shape)}, expected (M, N) with N > 0")
    _check("weight", weight, x, x.shape[1:], DTYPES)
    _check("bias", bias, x, x.shape[1:], DTYPES)
    if residual is not None:
        _check("residual", residual, x, x.shape, (x.dtype, torch.float32))
    if delta_bias is not None:
        _check("delta_bias", delta_bias, x, x.shape[1:], DTYPES)
        if residual is None:  # then h would be returned for its sake alone
            raise ValueError("layer_norm: delta_bias needs a residual")
    m, n = x.shape
    y = torch.empty_like(x)
    mean = x.new_empty(m, dtype=torch.float32)
    rstd = x.new_empty(m, dtype=torch.float32)
    h = torch.empty_like(residual) if residual is not None else x.new_empty(0)
    if m:
        launch = _launch(n)
        _layer_norm_fwd_kernel[(triton.cdiv(m, launch["ROWS"]),)](
            x, residual, delta_bias, weight, bias, y, h, mean, rstd, m,
            N=n, EPS=eps, HAS_RESIDUAL=residual is not None,
            HAS_DELTA_BIAS=delta_bias is not None, **launch,
        )  # fmt: skip
    return y, h, mean, rstd


@layer_norm_fwd.register_fake
def _(x, weight, bias, eps, residual=None, delta_bias=None):
    h = torch.empty_like(residual) if residual is not None else x.new_empty(0)
    statistic = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), h, statistic, torch.empty_like(statistic)


@torch.library.custom_op("nanovlm_fast::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_delta_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx (M, N) in dy's dtype, d residual, and d [weight, bias] (2, N) float32.

    d residual is in h's dtype; it is empty where that is dy's dtype, because dx serves as both.
    `with_delta_bias` makes d [weight, bias, delta_bias] (3, N) of the last.
    """
    m, n = h.shape
    for name, tensor in (("dy", dy), ("dh", dh), ("h", h)):
        if tensor is not None:
            _check(name, tensor, h, h.shape, DTYPES)
    two = h.dtype != dy.dtype
    dx = torch.empty_like(dy)
    dresidual = torch.empty_like(h) if two else dy.new_empty(0)
    launch = _launch(n)
    programs = min(WARPS // launch["num_warps"], triton.cdiv(m, launch["ROWS"]))
    partials = h.new_empty((2 + with_delta_bias, programs, n), dtype=torch.float32)
    if m:
        _layer_norm_bwd_kernel[(programs,)](
            dy, dh, h, weight, mean, rstd, dx, dresidual,
            partials[0], partials[1], partials[2] if with_delta_bias else None, m,
            N=n, HAS_DH=dh is not None, TWO_GRADIENTS=two,
            HAS_DELTA_BIAS=with_delta_bias, **launch,
        )  # fmt: skip
    return dx, dresidual, partials.sum(1)  # with no rows: a sum over no programs, which is zero


@layer_norm_bwd.register_fake
def _(dy, dh, h, weight, mean, rstd, with_delta_bias=False):
    return (
        torch.empty_like(dy),
        torch.empty_like(h) if h.dtype != dy.dtype else dy.new_empty(0),
        h.new_empty((2 + with_delta_bias, h.shape[1]), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, residual, delta_bias = inputs
    _, h, mean, rstd = output
    # Without a residual h is x. An operator may not return its input, so x itself is saved.
    ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
    ctx.has_residual = residual is not None
    ctx.dtype = x.dtype
    ctx.bias_dtype = bias.dtype
    ctx.delta_bias_dtype = None if delta_bias is None else delta_bias.dtype
    ctx.set_materialize_grads(False)  # dh stays None when h is unused: one read less


def _backward(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h, dtype=ctx.dtype) if dy is None else dy.contiguous()
    dh = dh.contiguous() if ctx.has_residual and dh is not None else None
    dtype = ctx.delta_bias_dtype
    dx, dresidual, sums = layer_norm_bwd(dy, dh, h, weight, mean, rstd, dtype is not None)
    dresidual = (dresidual if h.dtype != dy.dtype else dx) if ctx.has_residual else None
    ddelta_bias = None if dtype is None else sums[2].to(dtype)
    dweight = sums[0].to(weight.dtype)
    return dx, dweight, sums[1].to(ctx.bias_dtype), None, dresidual, ddelta_bias


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    delta_bias: Tensor | None = None,
):
    """Return y, or (y, h) with a residual.

    y (..., N) is in x's dtype, h = x + residual + delta_bias in the residual's. A delta_bias (N,)
    needs a residual. Differentiable in every tensor. Inputs that are not contiguous are copied. A
    CPU tensor runs the reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises
    TypeError or ValueError that names the argument.
    """
    if not (x.is_cuda or INTERPRET):
        return layer_norm_reference(x, weight, bias, eps, residual, delta_bias)
    x2d = x.reshape(-1, x.shape[-1]).contiguous()
    residual2d = None
    if residual is not None:
        residual2d = residual.reshape(-1, residual.shape[-1]).contiguous()
    y, h, _, _ = layer_norm_fwd(x2d, weight, bias, eps, residual2d, delta_bias)
    return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))


def make_inputs(
    m: int, n: int, dtype: torch.dtype, device: str,
    residual: torch.dtype | None = None, seed: int = 0, with_delta_bias: bool = False,
) -> dict:  # fmt: skip
    """Arguments of `layer_norm` for x (m, n), with a residual stream of the given dtype or none."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    wide = torch.float32  # master weights, as in training
    weight = 1 + 0.1 * random(n, dtype=wide)
    bias = 0.1 * random(n, dtype=wide)
    inputs = {"x": random(m, n), "weight": weight, "bias": bias, "eps": 1e-6}
    if residual is not None:
        inputs["residual"] = 2 * random(m, n, dtype=residual)
    if with_delta_bias:
        inputs["delta_bias"] = 0.5 * random(n, dtype=wide)
    return inputs


def cost(
    m: int, n: int, dtype: torch.dtype, residual: torch.dtype | None = None
) -> dict[str, tuple[int, int]]:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    x = m * n * dtype.itemsize
    stream = m * n * residual.itemsize if residual else 0
    split = stream if residual not in (None, dtype) else 0  # d residual, beside dx
    return {
        "forward": (2 * x + 2 * stream + 8 * m, 7 * m * n),
        "backward": (2 * x + (2 * stream if residual else x) + split + 8 * m, 13 * m * n),
    }
