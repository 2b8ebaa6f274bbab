"""The vision tower's MLP: two products, the GELU between them in their epilogues.

    h = x @ weight1^T + bias1
    a = gelu(h) = h * s,        s = sigmoid(2 u),    u = sqrt(2 / pi) * (h + 0.044715 h^3)
    y = a @ weight2^T [+ bias2]
    d h = (dy @ weight2) * (s + h * s * (1 - s) * 2 u'),    d bias1 = sum of d h over rows

This is the tanh approximation of GELU (Hendrycks & Gimpel, 2016), as 1 + tanh(u) = 2 sigmoid(2 u).

Shapes and dtypes:
    x (..., C) bf16, fp16 or fp32 -> y (..., C) in x's dtype; h and a (M, I) in it too
    weight1 (I, C), weight2 (C, I), laid out as nn.Linear's; bias1 (I,), bias2 (C,) or None
C and I are multiples of 16. Weights of another dtype are first rounded to x's, as autocast does.
Products are summed in float32; h and a are rounded, as by two linear layers. Biases are not.

The first product writes h and a from its sums, and the backward's product dy @ weight2 turns its
sums into d h and into partial sums of d bias1, one for every 128 rows, without atomics. The other
products, y, d weight1, d weight2 and d x, are PyTorch's. Saved are x, h and a; without
`keep_activation` a is not kept, and the backward's epilogue writes it again.

Bytes per row: the epilogues save reading h (2 I) forward; backward, reading and writing d a (4 I)
and reading h and d a once more for d bias1 (4 I). FLOPs: 4 M C I forward, 8 M C I backward.

At 50,000 rows of 768 and 3072 a product alone should take 340 us, GELU after it 215 us, its
gradient and the bias's 430 us. So the products pay as long as they keep 61% of cuBLAS's rate
forward and 44% backward. On an H100 they cost 0.6% of the step, as if they kept about half.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MULTIPLE = 16  # of C and I: the smallest tile of a product
# 2 u = h * (LINEAR + CUBIC * h^2)
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


def gelu_mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None = None
) -> Tensor:
    """Plain PyTorch; same signature and dtypes as `gelu_mlp`.

    At least float32 inside, and rounded to x's dtype where two linear layers round: h, a and y.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = rows.to(wide) @ weight.to(x.dtype).to(wide).T
        return (y if bias is None else y + bias.to(wide)).to(x.dtype)

    a = F.gelu(linear(x, weight1, bias1).to(wide), approximate="tanh").to(x.dtype)
    return linear(a, weight2, bias2)


@triton.jit
def _grouped(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    # Row and column of a tile. Programs that run together share GROUP rows of tiles, so that their
    # loads of rows and weight hit the L2 cache.
    first = program // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % group, inside // group


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The left and the right half of a tile. A thread holds whole rows of a wgmma's sums, so this
    # only names its registers.
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _gelu(h, bias_ptr, h_ptr, a_ptr, rows, columns, M, N: tl.constexpr, STORE_H: tl.constexpr):
    # h and a of one part of a tile's columns, given its sums in float32.
    offsets = rows[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None]
    h += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    # Rounded first: the backward knows no other h.
    rounded = h.to(a_ptr.dtype.element_ty)
    if STORE_H:
        tl.store(h_ptr + offsets, rounded, mask=inside)
    h = rounded.to(tl.float32)
    a = h * tl.sigmoid(h * (LINEAR + CUBIC * h * h))
    tl.store(a_ptr + offsets, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_mlp_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, a_ptr, M, K, N: tl.constexpr, STORE_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), N // BLOCK_N, GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows outside repeat the last one. They are computed but not stored, which saves a mask on
    # every load of the loop.
    x_offsets = tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    weight_offsets = columns[None, :] * K + k[:, None]
    h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # K is not a constant: the compiler would unroll the whole loop.
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + x_offsets)
        weight = tl.load(weight_ptr + start + weight_offsets)
        h = tl.dot(x, weight, h, input_precision="ieee")
    # In quarters, which take fewer registers at a time.
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = _halves(h, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, QUARTER)
    _gelu(first, bias_ptr, h_ptr, a_ptr, rows, columns, M, N, STORE_H)
    columns += QUARTER
    _gelu(second, bias_ptr, h_ptr, a_ptr, rows, columns, M, N, STORE_H)
    columns += QUARTER
    _gelu(third, bias_ptr, h_ptr, a_ptr, rows, columns, M, N, STORE_H)
    columns += QUARTER
    _gelu(fourth, bias_ptr, h_ptr, a_ptr, rows, columns, M, N, STORE_H)


@triton.jit
def _gelu_gradient(
    da, h_ptr, dh_ptr, a_ptr, partials_ptr, rows, columns, tile_m, M,
    N: tl.constexpr, WITH_A: tl.constexpr, WITH_BIAS: tl.constexpr,
):  # fmt: skip
    # d h of one part of a tile's columns, given its d a in float32.
    offsets = rows[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None]
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    cubic = CUBIC * h * h
    s = tl.sigmoid(h * (LINEAR + cubic))
    a = h * s
    if WITH_A:
        tl.store(a_ptr + offsets, a.to(dh_ptr.dtype.element_ty), mask=inside)
    dh = da * (s + (a - a * s) * (LINEAR + 3 * cubic))
    tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=inside)
    if WITH_BIAS:
        dbias = tl.sum(tl.where(inside, dh, 0.0), axis=0)
        tl.store(partials_ptr + (tile_m.to(tl.int64) * N + columns), dbias)


@triton.jit
def _gelu_mlp_bwd_kernel(
    dy_ptr, weight_ptr, h_ptr, dh_ptr, a_ptr, partials_ptr, M, K,
    N: tl.constexpr, WITH_A: tl.constexpr, WITH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), N // BLOCK_N, GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dy_offsets = tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    weight_offsets = k.to(tl.int64)[:, None] * N + columns[None, :]
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        dy = tl.load(dy_ptr + start + dy_offsets)
        weight = tl.load(weight_ptr + tl.cast(start, tl.int64) * N + weight_offsets)
        da = tl.dot(dy, weight, da, input_precision="ieee")
    # In quarters, see above: here h and its derivative take registers too.
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = _halves(da, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, QUARTER)
    _gelu_gradient(
        first, h_ptr, dh_ptr, a_ptr, partials_ptr, rows, columns, tile_m, M, N, WITH_A, WITH_BIAS
    )
    columns += QUARTER
    _gelu_gradient(
        second, h_ptr, dh_ptr, a_ptr, partials_ptr, rows, columns, tile_m, M, N, WITH_A, WITH_BIAS
    )
    columns += QUARTER
    _gelu_gradient(
        third, h_ptr, dh_ptr, a_ptr, partials_ptr, rows, columns, tile_m, M, N, WITH_A, WITH_BIAS
    )
    columns += QUARTER
    _gelu_gradient(
        fourth, h_ptr, dh_ptr, a_ptr, partials_ptr, rows, columns, tile_m, M, N, WITH_A, WITH_BIAS
    )


def _launch(n: int, k: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tiles, warps and stages of a product with n columns and a sum over k.

    16-bit forward: 128 x 256 on two warpgroups, four stages of 48 KB. Per cycle of wgmma that loads
    48 bytes from L2, where a tile of 128 x 128 loads 64. The backward takes 128 x 128 all the same:
    its epilogue is as long as its sum, and two such programs fit a multiprocessor (at most 128
    registers, three stages of 32 KB), so that one multiplies while the other does not.

    float32 products are made of FMA instructions and want small tiles. Tiles of columns and steps
    of the sum divide n and k.
    """
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": math.gcd(64, n), "BLOCK_K": math.gcd(32, k)}
        return {**tile, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    columns = 128 if backward else 256
    tile = {"BLOCK_M": 128, "BLOCK_N": math.gcd(columns, n), "BLOCK_K": math.gcd(64, k)}
    return {**tile, "GROUP": 8, "num_warps": 8, "num_stages": 3 if backward else 4}


def _grid(m: int, n: int, launch: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(m, launch["BLOCK_M"]) * (n // launch["BLOCK_N"]),)


def _check(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"gelu_mlp: {name} is {tensor.dtype}, expected {expected}")
    if tensor.device != like.device:
        raise ValueError(f"gelu_mlp: {name} is on {tensor.device}, x is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"gelu_mlp: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"gelu_mlp: {name} must be contiguous, its strides are {tensor.stride()}")


@torch.library.custom_op("nanovlm_fast::gelu_mlp_fwd", mutates_args=())
def gelu_mlp_fwd(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None,
    keep_h: bool, keep_a: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (M, C), h and a (M, I) of x (M, C); h or a is empty if it is not to be kept.

    Both weights have x's dtype. Raises if an argument does not fit.
    """
    sizes = (*x.shape[1:], *weight1.shape[:1])  # (C, I)
    if x.dim() != 2 or any(size < 1 or size % MULTIPLE for size in sizes):
        raise ValueError(
            f"gelu_mlp: x has shape {tuple(x.shape)} and weight1 {tuple(weight1.shape)}, expected "
            f"(M, C) and (I, C) with C and I multiples of {MULTIPLE}"
        )
    m, c = x.shape
    n = weight1.shape[0]
    _check("x", x, x, (m, c), DTYPES)
    _check("weight1", weight1, x, (n, c), (x.dtype,))
    _check("bias1", bias1, x, (n,), DTYPES)
    _check("weight2", weight2, x, (c, n), (x.dtype,))
    if bias2 is not None:
        _check("bias2", bias2, x, (c,), DTYPES)
    h = x.new_empty(m, n) if keep_h else x.new_empty(0)
    a = x.new_empty(m, n)
    if m:
        launch = _launch(n, c, x.dtype, backward=False)
        _gelu_mlp_fwd_kernel[_grid(m, n, launch)](
            x, weight1, bias1, h, a, m, c, N=n, STORE_H=keep_h, **launch
        )
    if bias2 is None:
        y = torch.mm(a, weight2.t())
    else:
        y = torch.addmm(bias2.to(x.dtype), a, weight2.t())
    return y, h, a if keep_a else x.new_empty(0)


@gelu_mlp_fwd.register_fake
def _(x, weight1, bias1, weight2, bias2, keep_h, keep_a):
    inner = (x.shape[0], weight1.shape[0])
    kept = [x.new_empty(inner) if keep else x.new_empty(0) for keep in (keep_h, keep_a)]
    return torch.empty_like(x), *kept


@torch.library.custom_op("nanovlm_fast::gelu_mlp_bwd", mutates_args=())
def gelu_mlp_bwd(
    dy: Tensor, weight2: Tensor, h: Tensor, with_a: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh (M, I), a (M, I) and d bias1 (I,) float32; the last two only if asked for."""
    m, n = h.shape
    c = weight2.shape[0]
    _check("dy", dy, h, (m, c), (h.dtype,))
    dh = torch.empty_like(h)
    a = torch.empty_like(h) if with_a else h.new_empty(0)
    launch = _launch(n, c, h.dtype, backward=True)
    parts = triton.cdiv(m, launch["BLOCK_M"]) if with_bias else 0
    partials = h.new_empty((parts, n if with_bias else 0), dtype=torch.float32)
    if m:
        _gelu_mlp_bwd_kernel[_grid(m, n, launch)](
            dy, weight2, h, dh, a, partials, m, c,
            N=n, WITH_A=with_a, WITH_BIAS=with_bias, **launch,
        )  # fmt: skip
    return dh, a, partials.sum(0)  # without rows: a sum of nothing, which is zero


@gelu_mlp_bwd.register_fake
def _(dy, weight2, h, with_a, with_bias):
    a = torch.empty_like(h) if with_a else h.new_empty(0)
    dbias = h.new_empty(h.shape[1] if with_bias else 0, dtype=torch.float32)
    return torch.empty_like(h), a, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, bias2, _, ctx.keep_a = inputs
    _, h, a = output
    ctx.save_for_backward(x, weight1, weight2, h, a)
    ctx.bias_dtypes = (bias1.dtype, None if bias2 is None else bias2.dtype)
    ctx.set_materialize_grads(False)  # h and a have no gradients: no zeros in their place


def _backward(ctx, dy, _dh, _da):
    x, weight1, weight2, h, a = ctx.saved_tensors
    for_x, for_weight1, for_bias1, for_weight2, for_bias2, *_ = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    make_a = for_weight2 and not ctx.keep_a
    if for_x or for_weight1 or for_bias1 or make_a:
        dh, made, dbias1 = gelu_mlp_bwd(dy, weight2, h, make_a, for_bias1)
        a = made if make_a else a
        dbias1 = dbias1.to(ctx.bias_dtypes[0]) if for_bias1 else None
    if for_x:
        dx = torch.mm(dh, weight1)
    if for_weight1:
        dweight1 = torch.mm(dh.t(), x)
    if for_weight2:
        dweight2 = torch.mm(dy.t(), a)
    if for_bias2:
        dbias2 = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[1])
    return dx, dweight1, dbias1, dweight2, dbias2, None, None


gelu_mlp_fwd.register_autograd(_backward, setup_context=_setup_context)


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None = None,
    keep_activation: bool = True,
) -> Tensor:  # fmt: skip
    """Return gelu(x @ weight1^T + bias1) @ weight2^T [+ bias2], (..., C), in x's dtype.

    Differentiable in everything; what needs no gradient costs nothing. Without `keep_activation`
    the backward computes gelu again instead of keeping it. Inputs that are not contiguous are
    copied. A CPU tensor runs the reference (or Triton's interpreter under TRITON_INTERPRET=1).
    Raises TypeError or ValueError that names the argument.
    """
    if not (x.is_cuda or INTERPRET):
        return gelu_mlp_reference(x, weight1, bias1, weight2, bias2)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [weight.to(x.dtype).contiguous() for weight in (weight1, weight2)]
    bias2 = None if bias2 is None else bias2.contiguous()
    given = (x, weight1, bias1, weight2)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    keep_a = keep_activation and torch.is_grad_enabled() and weight2.requires_grad
    y, _, _ = gelu_mlp_fwd(rows, weights[0], bias1.contiguous(), weights[1], bias2, trains, keep_a)
    return y.view(x.shape)


def make_inputs(
    m: int, c: int, inner: int, dtype: torch.dtype, device: str, bias: bool = True, seed: int = 0
) -> dict:
    """Arguments of `gelu_mlp` for m rows; `bias`: with bias2 too."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": random(m, c).to(dtype),
        "weight1": (random(inner, c) * 1.5 * c**-0.5).to(dtype),
        "bias1": (random(inner) / 2).to(dtype),
        "weight2": (random(c, inner) * inner**-0.5).to(dtype),
        "bias2": random(c).to(dtype) if bias else None,
    }


def cost(
    m: int, c: int, inner: int, dtype: torch.dtype, bias: bool = True
) -> dict[str, tuple[int, int]]:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}.

    Every product reads its two factors and writes its result.
    """
    flops = 4 * m * c * inner
    narrow = m * c * dtype.itemsize
    wide = m * inner * dtype.itemsize
    weight = c * inner * dtype.itemsize
    biases = dtype.itemsize * (inner + (c if bias else 0))
    return {
        "forward": (2 * narrow + 3 * wide + 2 * weight + biases, flops),
        # dy @ weight2 with h; then d x, d weight1 and d weight2
        "backward": (4 * narrow + 5 * wide + 4 * weight + biases, 2 * flops),
    }
