"""Rotary position embedding (half rotation) of the packed QKV projection (Su et al., 2021).

    y[i]         = x[i] * cos - x[i + D/2] * sin          i < D/2, for every query and key head
    y[i + D/2]   = x[i + D/2] * cos + x[i] * sin          cos, sin = table[position_ids[token], i]

Shapes and dtypes:
    qkv (T, (n_q + 2 n_kv) D) bf16, fp16 or fp32: n_q query heads, n_kv key heads and n_kv value
        heads, in the layout that the projection writes
    cos, sin (positions, D/2) float32
    position_ids (T,) int32, each below `positions` (not checked: the host would have to wait for
        the device to see them)

Arithmetic is float32. One launch rotates query and key heads. The value heads are copied, or left
alone when the rotation is in place. The backward is the same kernel with the sine negated; it saves
the tables and position_ids, nothing of qkv's size.

Bytes: read and write qkv; in place, only its first n_q + n_kv heads. The tables stay in L2. A
program takes a block of tokens and four heads, so that a row of the tables is read once for four
heads. Both halves of a head belong to the same program, which reads them before it writes them:
this is what makes the in-place rotation safe.

In place, the operator mutates the flat output of the projection (marking a *view* dirty would cost
autograd a copy). The linear layer before it does not save its output, so nothing that autograd
saved is overwritten. Inductor keeps the mutation: the projection writes a buffer and the operator
works on that buffer.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rotary_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    n_q: int,
    n_kv: int,
    inplace: bool = False,
) -> Tensor:
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `rotary`."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.to(wide).unflatten(1, (n_q + 2 * n_kv, 2 * cos.shape[1]))
    first, second = heads[:, : n_q + n_kv].chunk(2, dim=-1)
    c = cos[position_ids][:, None]  # (T, 1, D/2), the same for every head
    s = sin[position_ids][:, None]
    rotated = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    out = torch.cat([rotated, heads[:, n_q + n_kv :]], dim=1).flatten(1).to(qkv.dtype)
    return qkv.copy_(out) if inplace else out


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, position_ptr, y_ptr, T,
    HEADS: tl.constexpr, ROTATED: tl.constexpr, STRIDE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    """Process the first HEADS heads of each row and rotate the first ROTATED of them; y may be x.

    A row has STRIDE elements.
    """
    # One flat grid: the second and third grid axes are limited to 65,535 programs.
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    program = tl.program_id(0)
    tokens = (program // groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    heads = program % groups * GROUP + tl.arange(0, GROUP)
    columns = tl.arange(0, BLOCK_HALF)
    token_start = tokens[:, None, None] * STRIDE
    row = token_start + heads[None, :, None] * (2 * HALF) + columns[None, None, :]
    inside = (tokens < T)[:, None, None] & (heads < HEADS)[None, :, None]
    inside = inside & (columns < HALF)[None, None, :]
    # Both halves are loaded before either is stored, because y may be x.
    first = tl.load(x_ptr + row, mask=inside, other=0.0)
    second = tl.load(x_ptr + (row + HALF), mask=inside, other=0.0)

    positions = tl.load(position_ptr + tokens, mask=tokens < T, other=0).to(tl.int64)
    entry = positions[:, None] * HALF + columns[None, :]
    known = (tokens < T)[:, None] & (columns < HALF)[None, :]
    cos = tl.load(cos_ptr + entry, mask=known, other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + entry, mask=known, other=0.0)[:, None, :]
    if CONJUGATE:
        sin = -sin
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    if HEADS > ROTATED:
        rotate = (heads < ROTATED)[None, :, None]
        turned_a = tl.where(rotate, turned_a, a)  # value heads are copied unchanged
        turned_b = tl.where(rotate, turned_b, b)
    tl.store(y_ptr + row, turned_a.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + (row + HALF), turned_b.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(half: int) -> dict[str, int]:
    """Tile and warps for heads of 2 * half: about 2,048 pairs per program, four heads per token."""
    block = triton.next_power_of_2(half)
    return {"BLOCK_HALF": block, "TOKENS": max(1, 512 // block), "GROUP": 4, "num_warps": 4}


def _run(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, y: Tensor,
    n_q: int, n_kv: int, conjugate: bool,
) -> None:  # fmt: skip
    """Rotate x (T, heads * D) into y, which has x's shape or is x itself."""
    _check(x, cos, sin, position_ids, n_q, n_kv)
    t = len(x)
    half = cos.shape[1]
    launch = _launch(half)
    # In place the value heads already are where they belong: they are neither read nor written.
    heads = n_q + (n_kv if y is x else 2 * n_kv)
    if t:
        grid = (triton.cdiv(heads, launch["GROUP"]) * triton.cdiv(t, launch["TOKENS"]),)
        _rotary_kernel[grid](
            x, cos, sin, position_ids, y, t,
            HEADS=heads, ROTATED=n_q + n_kv, STRIDE=x.shape[1], HALF=half,
            CONJUGATE=conjugate, **launch,
        )  # fmt: skip


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> None:
    if qkv.dim() != 2:
        raise ValueError(
            f"rotary: qkv has shape {tuple(qkv.shape)}, expected two dimensions, (T, heads * D)"
        )
    if n_q < 1 or n_kv < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (2 * (n_q + 2 * n_kv)):
        raise ValueError(
            f"rotary: qkv has {qkv.shape[1]} columns, expected n_q + 2 * n_kv heads of an even "
            f"size; n_q is {n_q}, n_kv is {n_kv}"
        )
    half = qkv.shape[1] // (n_q + 2 * n_kv) // 2
    for name, tensor, shape, dtypes in (
        ("qkv", qkv, qkv.shape, DTYPES),
        ("cos", cos, (len(cos) if cos.dim() else 0, half), (torch.float32,)),
        ("sin", sin, cos.shape, (torch.float32,)),
        ("position_ids", position_ids, qkv.shape[:1], (torch.int32,)),
    ):
        if tensor.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise TypeError(f"rotary: {name} is {tensor.dtype}, expected one of {expected}")
        if tensor.device != qkv.device:
            raise ValueError(f"rotary: {name} is on {tensor.device}, qkv is on {qkv.device}")
        if tensor.shape != shape:
            raise ValueError(
                f"rotary: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"rotary: {name} must be contiguous, its strides are {tensor.stride()}"
            )


@torch.library.custom_op("nanovlm_fast::rotary_fwd", mutates_args=())
def rotary_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> Tensor:
    """Return qkv (T, (n_q + 2 n_kv) D), rotated; raises if an argument does not fit."""
    y = torch.empty_like(qkv)
    _run(qkv, cos, sin, position_ids, y, n_q, n_kv, conjugate=False)
    return y


@torch.library.custom_op("nanovlm_fast::rotary_bwd", mutates_args=())
def rotary_bwd(
    dy: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> Tensor:
    """Return d qkv: dy (T, (n_q + 2 n_kv) D) rotated back."""
    dx = torch.empty_like(dy)
    _run(dy, cos, sin, position_ids, dx, n_q, n_kv, conjugate=True)
    return dx


@torch.library.custom_op("nanovlm_fast::rotary_inplace", mutates_args=("qkv",))
def rotary_inplace(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> None:
    """Rotate the query and key heads of qkv (T, (n_q + 2 n_kv) D) in place.

    This operator has no gradient of its own; `rotary` is the differentiable function.
    """
    _run(qkv, cos, sin, position_ids, qkv, n_q, n_kv, conjugate=False)


@rotary_fwd.register_fake
@rotary_bwd.register_fake
def _(x, cos, sin, position_ids, n_q, n_kv):
    return torch.empty_like(x)


@rotary_inplace.register_fake
def _(qkv, cos, sin, position_ids, n_q, n_kv):
    return None


def _setup_context(ctx, inputs, output) -> None:
    *_, cos, sin, position_ids, n_q, n_kv = inputs
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.heads = n_q, n_kv


def _backward(ctx, dy):
    dqkv = rotary_bwd(dy.contiguous(), *ctx.saved_tensors, *ctx.heads)
    return dqkv, None, None, None, None, None


rotary_fwd.register_autograd(_backward, setup_context=_setup_context)


class _RotaryInPlace(torch.autograd.Function):
    """The gradient of the in-place rotation: `register_autograd` refuses mutating operators."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, position_ids, n_q, n_kv):
        rotary_inplace(qkv, cos, sin, position_ids, n_q, n_kv)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.heads = n_q, n_kv
        return qkv

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, dy)


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    n_q: int,
    n_kv: int,
    inplace: bool = False,
) -> Tensor:
    """Return qkv (T, (n_q + 2 n_kv) D) with query and key heads rotated by each token's position.

    Differentiable in qkv. Out of place, inputs that are not contiguous are copied. With `inplace`,
    qkv's own memory is used and qkv is returned. Continue with the returned tensor (older
    torch.compile loses the gradient of the old name: pytorch issue 184113), and pass the output of
    the projection itself, neither a view nor a leaf.

    A CPU tensor runs the reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises
    TypeError or ValueError that names the argument.
    """
    if not (qkv.is_cuda or INTERPRET):
        return rotary_reference(qkv, cos, sin, position_ids, n_q, n_kv, inplace)
    rest = cos.contiguous(), sin.contiguous(), position_ids.contiguous(), n_q, n_kv
    if inplace:
        return _RotaryInPlace.apply(qkv, *rest)
    return rotary_fwd(qkv.contiguous(), *rest)


def make_inputs(
    t: int, n_q: int, n_kv: int, head_dim: int, dtype: torch.dtype, device: str,
    positions: int = 8192, seed: int = 0,
) -> dict:  # fmt: skip
    """Arguments of `rotary` for t tokens at random positions, with tables of base 100,000."""
    generator = torch.Generator(device).manual_seed(seed)
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.arange(positions, device=device)[:, None] / 1e5**exponents
    width = (n_q + 2 * n_kv) * head_dim
    qkv = torch.randn(t, width, generator=generator, device=device).to(dtype)
    position_ids = torch.randint(
        positions, (t,), generator=generator, device=device, dtype=torch.int32
    )
    return {
        "qkv": qkv,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "position_ids": position_ids,
        "n_q": n_q,
        "n_kv": n_kv,
    }


def cost(
    t: int, n_q: int, n_kv: int, head_dim: int, dtype: torch.dtype, inplace: bool = False
) -> dict:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    rotated = (n_q + n_kv) * head_dim
    row = (n_q + 2 * n_kv) * head_dim
    flops = 3 * t * rotated
    shared = 4 * t  # position_ids; the tables are small, shared by all tokens and come from L2
    return {
        "forward": (2 * t * (rotated if inplace else row) * dtype.itemsize + shared, flops),
        "backward": (2 * t * row * dtype.itemsize + shared, flops),
    }
