"""The language model's MLP: two products, the SwiGLU between them in their epilogues.

    gate_up = x @ gate_up_weight^T,        gate, up = the halves of its columns
    a = silu(gate) * up,                   silu(g) = g * sigmoid(g)    (Shazeer, 2020)
    y = a @ down_weight^T
    da = dy @ down_weight
    d up = da * silu(gate)
    d gate = da * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Shapes and dtypes:
    x (..., C) bf16, fp16 or fp32 -> y (..., C); also in x's dtype: gate_up (M, 2 I) and a (M, I)
    gate_up_weight (2 I, C), the gate's rows first; down_weight (C, I), laid out as nn.Linear's
C and I are multiples of 16. Weights of another dtype are first rounded to x's, as autocast does.
Products are summed in float32; gate_up and a are rounded, silu(gate) is not.

A program of the first product computes matching tiles of gate and up, which share one load of x,
and writes them and a. The backward's product dy @ down_weight turns its sums into the packed
d gate_up. The other products, y, d down_weight, d gate_up_weight and d x, are PyTorch's. Saved are
x, gate_up and a; without `keep_activation` a is not kept, and the backward's epilogue writes it
again.

Bytes per row: the epilogues save reading gate_up (2 I) forward, and writing and reading da (2 I)
backward. FLOPs: 6 M C I forward, 12 M C I backward.

At 20,700 rows of 576 and 1536 the forward's product alone should take 105 us and SwiGLU after it
67 us, so it pays as long as it keeps 61% of cuBLAS's rate. The backward's product should be bound
by memory: 52 us of product and 112 us of SwiGLU's gradient become 280 MB, 95 us. On an H100 both
together save 0.4% of the step, as if the products kept about half of cuBLAS's rate.
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


def swiglu_mlp_reference(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """Plain PyTorch; same signature and dtypes as `swiglu_mlp`.

    At least float32 inside, and rounded to x's dtype where two linear layers round: gate_up, a, y.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        return (rows.to(wide) @ weight.to(x.dtype).to(wide).T).to(x.dtype)

    gate, up = linear(x, gate_up_weight).to(wide).chunk(2, dim=-1)
    return linear((F.silu(gate) * up).to(x.dtype), down_weight)


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
def _swiglu_mlp_fwd_kernel(
    x_ptr, weight_ptr, gate_up_ptr, a_ptr, M, K, N: tl.constexpr, STORE_GATE_UP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), N // BLOCK_N, GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows outside repeat the last one. They are computed but not stored, which saves a mask on
    # every load of the loop.
    x_offsets = tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    gate_offsets = columns[None, :] * K + k[:, None]
    up_offsets = (columns + N)[None, :] * K + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # K is not a constant: the compiler would unroll the whole loop.
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + x_offsets)
        gate_weight = tl.load(weight_ptr + start + gate_offsets)
        up_weight = tl.load(weight_ptr + start + up_offsets)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
    dtype = a_ptr.dtype.element_ty
    inside = (rows < M)[:, None]
    # Rounded first: the backward knows no other gate and up.
    rounded_gate = gate.to(dtype)
    rounded_up = up.to(dtype)
    if STORE_GATE_UP:
        offsets = rows[:, None] * (2 * N) + columns[None, :]
        tl.store(gate_up_ptr + offsets, rounded_gate, mask=inside)
        tl.store(gate_up_ptr + (offsets + N), rounded_up, mask=inside)
    gate = rounded_gate.to(tl.float32)
    a = gate * tl.sigmoid(gate) * rounded_up.to(tl.float32)
    tl.store(a_ptr + (rows[:, None] * N + columns[None, :]), a.to(dtype), mask=inside)


@triton.jit
def _swiglu_gradient(
    da, gate_up_ptr, dgate_up_ptr, a_ptr, rows, columns, M, N: tl.constexpr, WITH_A: tl.constexpr
):
    # d gate and d up of one part of a tile's columns, given its d a in float32.
    dtype = gate_up_ptr.dtype.element_ty
    inside = (rows < M)[:, None]
    offsets = rows[:, None] * (2 * N) + columns[None, :]
    gate = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (offsets + N), mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = da * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dgate_up_ptr + offsets, dgate.to(dtype), mask=inside)
    tl.store(dgate_up_ptr + (offsets + N), (da * silu).to(dtype), mask=inside)
    if WITH_A:
        offsets = rows[:, None] * N + columns[None, :]
        tl.store(a_ptr + offsets, (silu * up).to(dtype), mask=inside)


@triton.jit
def _swiglu_mlp_bwd_kernel(
    dy_ptr, weight_ptr, gate_up_ptr, dgate_up_ptr, a_ptr, M, K,
    N: tl.constexpr, WITH_A: tl.constexpr,
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
    # In quarters, which take fewer registers at a time for gate, up and their gradients.
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = _halves(da, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, QUARTER)
    _swiglu_gradient(first, gate_up_ptr, dgate_up_ptr, a_ptr, rows, columns, M, N, WITH_A)
    columns += QUARTER
    _swiglu_gradient(second, gate_up_ptr, dgate_up_ptr, a_ptr, rows, columns, M, N, WITH_A)
    columns += QUARTER
    _swiglu_gradient(third, gate_up_ptr, dgate_up_ptr, a_ptr, rows, columns, M, N, WITH_A)
    columns += QUARTER
    _swiglu_gradient(fourth, gate_up_ptr, dgate_up_ptr, a_ptr, rows, columns, M, N, WITH_A)


def _launch(n: int, k: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tiles, warps and stages of a product with n columns and a sum over k.

    16-bit: 128 columns. Forward they are 128 of gate and 128 of up, on two warpgroups with four
    stages of 48 KB. The backward is bound by memory: two programs fit a multiprocessor (at most 128
    registers, three stages of 32 KB), so that one loads and stores while the other multiplies.

    float32 products are made of FMA instructions and want small tiles. Tiles of columns and steps
    of the sum divide n and k.
    """
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": math.gcd(32, n), "BLOCK_K": math.gcd(32, k)}
        return {**tile, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    tile = {"BLOCK_M": 128, "BLOCK_N": math.gcd(128, n), "BLOCK_K": math.gcd(64, k)}
    return {**tile, "GROUP": 8, "num_warps": 8, "num_stages": 3 if backward else 4}


def _grid(m: int, n: int, launch: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(m, launch["BLOCK_M"]) * (n // launch["BLOCK_N"]),)


def _check(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"swiglu_mlp: {name} is {tensor.dtype}, expected {expected}")
    if tensor.device != like.device:
        raise ValueError(f"swiglu_mlp: {name} is on {tensor.device}, x is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"swiglu_mlp: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"swiglu_mlp: {name} must be contiguous, its strides are {tensor.stride()}"
        )


@torch.library.custom_op("nanovlm_fast::swiglu_mlp_fwd", mutates_args=())
def swiglu_mlp_fwd(
    x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, keep_gate_up: bool, keep_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, C), gate_up (M, 2 I) and a (M, I) of x (M, C).

    What is not to be kept is empty. Both weights have x's dtype. Raises if an argument does not
    fit.
    """
    sizes = (*x.shape[1:], *down_weight.shape[1:])  # (C, I)
    if x.dim() != 2 or down_weight.dim() != 2 or any(s < 1 or s % MULTIPLE for s in sizes):
        raise ValueError(
            f"swiglu_mlp: x has shape {tuple(x.shape)} and down_weight {tuple(down_weight.shape)}, "
            f"expected (M, C) and (C, I) with C and I multiples of {MULTIPLE}"
        )
    m, c = x.shape
    n = down_weight.shape[1]
    _check("x", x, x, (m, c), DTYPES)
    _check("gate_up_weight", gate_up_weight, x, (2 * n, c), (x.dtype,))
    _check("down_weight", down_weight, x, (c, n), (x.dtype,))
    gate_up = x.new_empty(m, 2 * n) if keep_gate_up else x.new_empty(0)
    a = x.new_empty(m, n)
    if m:
        launch = _launch(n, c, x.dtype, backward=False)
        _swiglu_mlp_fwd_kernel[_grid(m, n, launch)](
            x, gate_up_weight, gate_up, a, m, c, N=n, STORE_GATE_UP=keep_gate_up, **launch
        )
    y = torch.mm(a, down_weight.t())
    return y, gate_up, a if keep_a else x.new_empty(0)


@swiglu_mlp_fwd.register_fake
def _(x, gate_up_weight, down_weight, keep_gate_up, keep_a):
    m = x.shape[0]
    n = down_weight.shape[1]
    gate_up = x.new_empty(m, 2 * n) if keep_gate_up else x.new_empty(0)
    return torch.empty_like(x), gate_up, x.new_empty(m, n) if keep_a else x.new_empty(0)


@torch.library.custom_op("nanovlm_fast::swiglu_mlp_bwd", mutates_args=())
def swiglu_mlp_bwd(
    dy: Tensor, down_weight: Tensor, gate_up: Tensor, with_a: bool
) -> tuple[Tensor, Tensor]:
    """Return d gate_up (M, 2 I), and a (M, I) if asked for, else an empty tensor."""
    m = gate_up.shape[0]
    c, n = down_weight.shape
    _check("dy", dy, gate_up, (m, c), (gate_up.dtype,))
    dgate_up = torch.empty_like(gate_up)
    a = gate_up.new_empty(m, n) if with_a else gate_up.new_empty(0)
    if m:
        launch = _launch(n, c, gate_up.dtype, backward=True)
        _swiglu_mlp_bwd_kernel[_grid(m, n, launch)](
            dy, down_weight, gate_up, dgate_up, a, m, c, N=n, WITH_A=with_a, **launch
        )
    return dgate_up, a


@swiglu_mlp_bwd.register_fake
def _(dy, down_weight, gate_up, with_a):
    shape = (gate_up.shape[0], down_weight.shape[1]) if with_a else (0,)
    return torch.empty_like(gate_up), gate_up.new_empty(shape)


def _setup_context(ctx, inputs, output) -> None:
    x, gate_up_weight, down_weight, _, ctx.keep_a = inputs
    _, gate_up, a = output
    ctx.save_for_backward(x, gate_up_weight, down_weight, gate_up, a)
    ctx.set_materialize_grads(False)  # gate_up and a have no gradients: no zeros in their place


def _backward(ctx, dy, _dgate_up, _da):
    x, gate_up_weight, down_weight, gate_up, a = ctx.saved_tensors
    for_x, for_gate_up, for_down, *_ = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = dgate_up_weight = ddown_weight = None
    make_a = for_down and not ctx.keep_a
    if for_x or for_gate_up or make_a:
        dgate_up, made = swiglu_mlp_bwd(dy, down_weight, gate_up, make_a)
        a = made if make_a else a
    if for_x:
        dx = torch.mm(dgate_up, gate_up_weight)
    if for_gate_up:
        dgate_up_weight = torch.mm(dgate_up.t(), x)
    if for_down:
        ddown_weight = torch.mm(dy.t(), a)
    return dx, dgate_up_weight, ddown_weight, None, None


swiglu_mlp_fwd.register_autograd(_backward, setup_context=_setup_context)


def swiglu_mlp(
    x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, keep_activation: bool = True
) -> Tensor:
    """Return (silu(gate) * up) @ down_weight^T, (..., C), in x's dtype.

    gate and up are the halves of x @ gate_up_weight^T. Differentiable in everything; what needs no
    gradient costs nothing. Without `keep_activation` the backward computes silu(gate) * up again
    instead of keeping it. Inputs that are not contiguous are copied. A CPU tensor runs the
    reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises TypeError or ValueError
    that names the argument.
    """
    if not (x.is_cuda or INTERPRET):
        return swiglu_mlp_reference(x, gate_up_weight, down_weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [weight.to(x.dtype).contiguous() for weight in (gate_up_weight, down_weight)]
    given = (x, gate_up_weight, down_weight)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    keep_a = keep_activation and torch.is_grad_enabled() and down_weight.requires_grad
    y, _, _ = swiglu_mlp_fwd(rows, weights[0], weights[1], trains, keep_a)
    return y.view(x.shape)


def make_inputs(
    m: int, c: int, inner: int, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of `swiglu_mlp` for m rows."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": random(m, c).to(dtype),
        "gate_up_weight": (random(2 * inner, c) * 1.5 * c**-0.5).to(dtype),
        "down_weight": (random(c, inner) * inner**-0.5).to(dtype),
    }


def cost(m: int, c: int, inner: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}.

    Every product reads its two factors and writes its result.
    """
    flops = 6 * m * c * inner
    narrow = m * c * dtype.itemsize
    wide = m * inner * dtype.itemsize
    weight = c * inner * dtype.itemsize
    return {
        "forward": (2 * narrow + 4 * wide + 3 * weight, flops),
        # dy @ down_weight with gate_up; then d x, d gate_up_weight and d down_weight
        "backward": (4 * narrow + 9 * wide + 6 * weight, 2 * flops),
    }
