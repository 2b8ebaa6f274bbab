"""Pixel shuffle and linear projection (nanoVLM's modality projector) as one GEMM that gathers.

    A[(b, i, j), (di, dj, c)] = x[b, (i*s + di) * W + j*s + dj, c],        s = factor
    y = A @ weight^T + bias

Shapes and dtypes:
    x (B, H*W, C) bf16, fp16 or fp32: patch features on a grid (H, W)
    weight (N, s*s*C), laid out as nn.Linear's; bias (N,)
    y (B, H/s * W/s, N) in x's dtype
A weight of another dtype is first rounded to x's, as autocast does. Products are summed in float32.

A is never written. Block (di, dj) of one of its rows is a whole row of x, so the loads add one
scalar to row pointers that are computed once, and no K-block crosses from one (di, dj) into the
next. Backward: dx is the GEMM dy @ weight, whose epilogue stores each tile to its patch rows (no
two tiles share a row). dweight = dy^T @ A gathers in the same way. Its rows are cut into parts,
whose number depends only on the sizes; each part gives a float32 partial, and one sum adds them.
Only x and weight are saved.

FLOPs: 2 M N K forward and 4 M N K backward, with M = B * H/s * W/s and K = s*s*C. Bytes: read x and
weight, write y. A shuffled copy would cost one more read and write of x in each direction, and x's
size of memory until the backward.

Tiles in Triton are powers of two, but N = 576 is not. A tile of `BLOCK_N + TAIL_N` columns has two
accumulators (256 + 32) that share one load of A, so that 576 = 2 * 288 needs no padding and a row
of x is loaded twice rather than nine times.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Programs of the weight's gradient: two rounds of an H100's 132 multiprocessors. A constant rather
# than the device's own count, so that the partials are the same on every device.
PROGRAMS = 264
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Columns of a tile as (BLOCK_N, TAIL_N). wgmma takes any of these widths; float32 products are made
# of FMA instructions and want small tiles.
WIDTHS = ((256, 64), (256, 32), (256, 0), (128, 64), (128, 0), (64, 0), (32, 0), (16, 0))
WIDTHS_FLOAT32 = ((64, 32), (64, 0), (32, 0), (16, 0))


def pixel_shuffle_proj_reference(
    x: Tensor, weight: Tensor, factor: int,
    bias: Tensor | None = None, grid: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `pixel_shuffle_proj`."""
    height, width = _grid(x, grid)
    channels = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(wide).reshape(
        *x.shape[:-2], height // factor, factor, width // factor, factor, channels
    )
    rows = blocks.transpose(-4, -3).flatten(-3).flatten(-3, -2)
    y = rows @ weight.to(x.dtype).to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@triton.jit
def _grouped(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    # Row and column of a tile. Programs that run together share GROUP rows of tiles, so that their
    # loads of x and weight hit the L2 cache.
    first = program // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % group, inside // group


@triton.jit
def _patch_rows(rows, S: tl.constexpr, WIDTH: tl.constexpr):
    # Map rows (b, i, j) of A to rows (b, i*S, j*S) of x, which is block (0, 0) of the row.
    # Block (di, dj) lies di*WIDTH + dj rows further.
    lines = rows // (WIDTH // S)  # b * H/S + i
    return lines.to(tl.int64) * (S * WIDTH) + rows % (WIDTH // S) * S


@triton.jit
def _pixel_shuffle_proj_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M,
    N: tl.constexpr, C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    TILE_N: tl.constexpr = BLOCK_N + TAIL_N
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K  # K-blocks in one (di, dj)
    tiles_n: tl.constexpr = (N + TILE_N - 1) // TILE_N
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * TILE_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns outside repeat the last one inside. They are computed but not stored, which
    # saves a mask on every load of the loop.
    x_offsets = _patch_rows(tl.minimum(rows, M - 1), S, WIDTH)[:, None] * C + k[None, :]
    weight_offsets = tl.minimum(columns, N - 1).to(tl.int64)[None, :] * (S * S * C) + k[:, None]
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TAIL_N:
        tail_columns = tile_n * TILE_N + BLOCK_N + tl.arange(0, TAIL_N)
        tail_rows = tl.minimum(tail_columns, N - 1).to(tl.int64)[None, :] * (S * S * C)
        tail_offsets = tail_rows + k[:, None]
        tail = tl.zeros((BLOCK_M, TAIL_N), dtype=tl.float32)
    for step in range(S * S * STEPS):
        block = step // STEPS
        c = step % STEPS * BLOCK_K
        x_block = x_ptr + ((block // S * WIDTH + block % S) * C + c)
        weight_block = weight_ptr + (block * C + c)
        if C % BLOCK_K == 0:  # known at compile time: no masks at the model's width
            a = tl.load(x_block + x_offsets)
            w = tl.load(weight_block + weight_offsets)
        else:
            a = tl.load(x_block + x_offsets, mask=(k < C - c)[None, :], other=0.0)
            w = tl.load(weight_block + weight_offsets, mask=(k < C - c)[:, None], other=0.0)
        y = tl.dot(a, w, y, input_precision="ieee")
        if TAIL_N:
            if C % BLOCK_K == 0:
                w = tl.load(weight_block + tail_offsets)
            else:
                w = tl.load(weight_block + tail_offsets, mask=(k < C - c)[:, None], other=0.0)
            tail = tl.dot(a, w, tail, input_precision="ieee")
    y_rows = y_ptr + rows.to(tl.int64)[:, None] * N
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y_rows + columns.to(tl.int64)[None, :], y, mask=inside)
    if TAIL_N:
        if HAS_BIAS:
            tail_bias = tl.load(bias_ptr + tail_columns, mask=tail_columns < N, other=0.0)
            tail += tail_bias.to(tl.float32)[None, :]
        inside = (rows < M)[:, None] & (tail_columns < N)[None, :]
        tl.store(y_rows + tail_columns.to(tl.int64)[None, :], tail, mask=inside)


@triton.jit
def _pixel_shuffle_proj_bwd_x_kernel(
    dy_ptr, weight_ptr, dx_ptr, M,
    N: tl.constexpr, C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Column tiles are cut within one (di, dj), so that a tile is stored to whole rows of x.
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), S * S * TILES_C, GROUP)
    block = tile_n // TILES_C
    c = tile_n % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    dy_offsets = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * N + k[None, :]
    weight_offsets = k.to(tl.int64)[:, None] * (S * S * C) + c[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for n in range(0, N, BLOCK_K):
        dy_block = dy_ptr + n
        weight_block = weight_ptr + (tl.cast(n, tl.int64) * (S * S * C) + block * C)
        if N % BLOCK_K == 0 and C % BLOCK_C == 0:
            dy = tl.load(dy_block + dy_offsets)
            w = tl.load(weight_block + weight_offsets)
        else:
            dy = tl.load(dy_block + dy_offsets, mask=(k < N - n)[None, :], other=0.0)
            weight_inside = (k < N - n)[:, None] & (c < C)[None, :]
            w = tl.load(weight_block + weight_offsets, mask=weight_inside, other=0.0)
        dx = tl.dot(dy, w, dx, input_precision="ieee")
    dx_rows = _patch_rows(rows, S, WIDTH) + (block // S * WIDTH + block % S)
    inside = (rows < M)[:, None] & (c < C)[None, :]
    tl.store(dx_ptr + (dx_rows[:, None] * C + c[None, :]), dx, mask=inside)


@triton.jit
def _pixel_shuffle_proj_bwd_weight_kernel(
    dy_ptr, x_ptr, partials_ptr, M, part_rows,
    N: tl.constexpr, C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Computes the transpose of a tile of dweight, (BLOCK_C, BLOCK_N + TAIL_N), over the rows of one
    # part.
    TILE_N: tl.constexpr = BLOCK_N + TAIL_N
    TILES_N: tl.constexpr = (N + TILE_N - 1) // TILE_N
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tile_c = tile // TILES_N
    tile_n = tile % TILES_N
    block = tile_c // TILES_C
    c = tile_c % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tile_n * TILE_N + tl.arange(0, BLOCK_N)
    x_block = x_ptr + (block // S * WIDTH + block % S) * C
    dweight = tl.zeros((BLOCK_C, BLOCK_N), dtype=tl.float32)
    if TAIL_N:
        tail_columns = tile_n * TILE_N + BLOCK_N + tl.arange(0, TAIL_N)
        tail = tl.zeros((BLOCK_C, TAIL_N), dtype=tl.float32)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None]
        a_offsets = _patch_rows(rows, S, WIDTH)[:, None] * C + c[None, :]
        a = tl.load(x_block + a_offsets, mask=inside & (c < C)[None, :], other=0.0)
        dy_rows = rows.to(tl.int64)[:, None] * N
        dy_inside = inside & (columns < N)[None, :]
        dy = tl.load(dy_ptr + (dy_rows + columns[None, :]), mask=dy_inside, other=0.0)
        dweight = tl.dot(tl.trans(a), dy, dweight, input_precision="ieee")
        if TAIL_N:
            tail_inside = inside & (tail_columns < N)[None, :]
            dy = tl.load(dy_ptr + (dy_rows + tail_columns[None, :]), mask=tail_inside, other=0.0)
            tail = tl.dot(tl.trans(a), dy, tail, input_precision="ieee")
    # Each part has its own copy of dweight in `partials`: no two programs add to one address.
    out = partials_ptr + part.to(tl.int64) * (N * S * S * C) + block * C
    offsets = columns.to(tl.int64)[None, :] * (S * S * C) + c[:, None]
    tl.store(out + offsets, dweight, mask=(c < C)[:, None] & (columns < N)[None, :])
    if TAIL_N:
        offsets = tail_columns.to(tl.int64)[None, :] * (S * S * C) + c[:, None]
        tl.store(out + offsets, tail, mask=(c < C)[:, None] & (tail_columns < N)[None, :])


def _width(n: int, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_N, TAIL_N) that covers n columns with the fewest loads by tiles of `rows` rows.

    A tile loads rows + columns values per step of K.
    """
    widths = WIDTHS_FLOAT32 if dtype == torch.float32 else WIDTHS
    return min(widths, key=lambda width: triton.cdiv(n, sum(width)) * (rows + sum(width)))


def _launch(n: int, c: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles, warps and stages of the three GEMMs for n columns and blocks of c channels.

    16-bit at the model's widths: tiles of 128 x 256 to 128 x 320 on two warpgroups, 48 to 56 KB per
    stage. A tile of 128 x 64 needs 96 bytes from L2 per cycle of wgmma, one of 128 x 288 needs 46.
    L2 is assumed to give each multiprocessor about 32 (not measured).
    """
    if dtype == torch.float32:
        rows = 64
        k = 32
        options = {"num_warps": 4, "num_stages": 2}
    else:
        rows = 128
        k = 64
        options = {"num_warps": 8, "num_stages": 4}
    depth = min(k, max(16, triton.next_power_of_2(c)))
    block_n, tail_n = _width(n, rows, dtype)
    widths = (2 * rows, rows, rows // 2, rows // 4)
    block_c = min(widths, key=lambda width: triton.cdiv(c, width) * (rows + width))
    gathered = min(rows, max(64, triton.next_power_of_2(c)))
    columns = {"BLOCK_N": block_n, "TAIL_N": tail_n}
    return {
        "forward": {"BLOCK_M": rows, **columns, "BLOCK_K": depth, "GROUP": 8, **options},
        "x": {"BLOCK_M": rows, "BLOCK_C": block_c, "BLOCK_K": k, "GROUP": 8, **options},
        "weight": {"BLOCK_C": gathered, **columns, "BLOCK_M": k, **options},
    }


def _grid(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) of the patches x (..., H*W, C): `grid` if given, else a square."""
    if x.dim() < 2:
        raise ValueError(
            f"pixel_shuffle_proj: x has shape {tuple(x.shape)}, expected (..., H*W, C)"
        )
    side = math.isqrt(x.shape[-2])
    height, width = (side, side) if grid is None else grid
    if height * width != x.shape[-2]:
        what = f"the grid is {grid}" if grid else "no grid is given and this is not a square number"
        raise ValueError(f"pixel_shuffle_proj: x has {x.shape[-2]} patches, {what}")
    return height, width


def _check(
    name: str, tensor: Tensor, like: Tensor, shape: torch.Size | tuple[int, ...], dtypes: tuple
) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"pixel_shuffle_proj: {name} is {tensor.dtype}, expected one of {expected}")
    if tensor.device != like.device:
        raise ValueError(f"pixel_shuffle_proj: {name} is on {tensor.device}, x is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"pixel_shuffle_proj: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"pixel_shuffle_proj: {name} must be contiguous, its strides are {tensor.stride()}"
        )


def _rows(x: Tensor, factor: int) -> tuple[int, int]:
    """(B, rows per image) of A for x (B, H*W, C)."""
    return x.shape[0], x.shape[1] // factor**2


@torch.library.custom_op("nanovlm_fast::pixel_shuffle_proj_fwd", mutates_args=())
def pixel_shuffle_proj_fwd(
    x: Tensor, weight: Tensor, factor: int, width: int, bias: Tensor | None = None
) -> Tensor:
    """Return y (B, H/s * W/s, N) of x (B, H*W, C), where W = width; check every argument first."""
    _check("x", x, x, x.shape, DTYPES)
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(
            f"pixel_shuffle_proj: x has shape {tuple(x.shape)}, expected (B, H*W, C) with C > 0"
        )
    height = x.shape[1] // max(width, 1)
    if factor < 1 or height * width != x.shape[1] or height % factor or width % factor:
        raise ValueError(
            f"pixel_shuffle_proj: {x.shape[1]} patches, {width} wide, "
            f"are not divisible by factor {factor}"
        )
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(
            f"pixel_shuffle_proj: weight has shape {tuple(weight.shape)}, "
            "expected (N, s*s*C) with N > 0"
        )
    _check("weight", weight, x, (weight.shape[0], factor**2 * x.shape[2]), DTYPES)
    if bias is not None:
        _check("bias", bias, x, weight.shape[:1], DTYPES)
    n = weight.shape[0]
    c = x.shape[2]
    y = x.new_empty((*_rows(x, factor), n))
    if y.numel():
        m = y.shape[0] * y.shape[1]
        launch = _launch(n, c, x.dtype)["forward"]
        tiles_n = triton.cdiv(n, launch["BLOCK_N"] + launch["TAIL_N"])
        _pixel_shuffle_proj_fwd_kernel[(triton.cdiv(m, launch["BLOCK_M"]) * tiles_n,)](
            x, weight.to(x.dtype), bias, y, m,
            N=n, C=c, S=factor, WIDTH=width, HAS_BIAS=bias is not None, **launch,
        )  # fmt: skip
    return y


@pixel_shuffle_proj_fwd.register_fake
def _(x, weight, factor, width, bias=None):
    return x.new_empty((*_rows(x, factor), weight.shape[0]))


@torch.library.custom_op("nanovlm_fast::pixel_shuffle_proj_bwd", mutates_args=())
def pixel_shuffle_proj_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, factor: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return dx in x's dtype and dweight in weight's."""
    n = weight.shape[0]
    c = x.shape[2]
    _check("dy", dy, x, (*_rows(x, factor), n), (x.dtype,))
    dx = torch.empty_like(x)
    if dy.numel() == 0:
        return dx, torch.zeros_like(weight)
    m = dy.shape[0] * dy.shape[1]
    launches = _launch(n, c, x.dtype)
    sizes = dict(N=n, C=c, S=factor, WIDTH=width)
    launch = launches["x"]
    tiles = triton.cdiv(m, launch["BLOCK_M"]) * factor**2 * triton.cdiv(c, launch["BLOCK_C"])
    _pixel_shuffle_proj_bwd_x_kernel[(tiles,)](dy, weight.to(x.dtype), dx, m, **sizes, **launch)
    launch = launches["weight"]
    tiles_n = triton.cdiv(n, launch["BLOCK_N"] + launch["TAIL_N"])
    tiles = factor**2 * triton.cdiv(c, launch["BLOCK_C"]) * tiles_n
    # Cut M into as many parts as PROGRAMS allows, each a whole number of blocks.
    blocks = triton.cdiv(m, launch["BLOCK_M"])
    part_rows = triton.cdiv(blocks, max(PROGRAMS // tiles, 1)) * launch["BLOCK_M"]
    parts = triton.cdiv(m, part_rows)
    partials = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    _pixel_shuffle_proj_bwd_weight_kernel[(tiles, parts)](
        dy, x, partials, m, part_rows, **sizes, **launch
    )
    return dx, partials.sum(0).to(weight.dtype)


@pixel_shuffle_proj_bwd.register_fake
def _(dy, x, weight, factor, width):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.factor, ctx.width, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dy = dy.contiguous()
    dx, dweight = pixel_shuffle_proj_bwd(dy, x, weight, ctx.factor, ctx.width)
    dbias = None
    if ctx.bias_dtype is not None:
        dbias = dy.sum((0, 1), dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dweight, None, None, dbias


pixel_shuffle_proj_fwd.register_autograd(_backward, setup_context=_setup_context)


def pixel_shuffle_proj(
    x: Tensor, weight: Tensor, factor: int,
    bias: Tensor | None = None, grid: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return y (..., H/s * W/s, N) of x (..., H*W, C), in x's dtype.

    `grid` is (H, W), a square if not given. Differentiable in x, weight and bias. Inputs that are
    not contiguous are copied. A CPU tensor runs the reference (or Triton's interpreter under
    TRITON_INTERPRET=1). Raises TypeError or ValueError that names the argument.
    """
    if not (x.is_cuda or INTERPRET):
        return pixel_shuffle_proj_reference(x, weight, factor, bias, grid)
    _, width = _grid(x, grid)
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = pixel_shuffle_proj_fwd(flat, weight.contiguous(), factor, width, bias)
    return y.view(*x.shape[:-2], *y.shape[1:])


def make_inputs(
    batch: int, height: int, width: int, channels: int, n: int, factor: int,
    dtype: torch.dtype, device: str, bias: bool = False, seed: int = 0,
) -> dict:  # fmt: skip
    """Arguments of `pixel_shuffle_proj` for `batch` images of height x width patches."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    k = factor**2 * channels
    return {
        "x": random(batch, height * width, channels).to(dtype),
        "weight": (random(n, k) * k**-0.5).to(dtype),
        "factor": factor,
        "bias": random(n).to(dtype) if bias else None,
        "grid": (height, width),
    }


def cost(
    batch: int, height: int, width: int, channels: int, n: int, factor: int,
    dtype: torch.dtype, bias: bool = False,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    m = batch * height * width // factor**2
    k = factor**2 * channels
    size = (m * k + n * k + m * n + (n if bias else 0)) * dtype.itemsize
    return {
        "forward": (size, 2 * m * n * k),
        "backward": (size + (m * k + n * k) * dtype.itemsize, 4 * m * n * k),
    }
