"""Attention of every patch of an image to all its patches, from the packed projection to its bias.

    q, k, v = qkv + bias                     per head, each (P, D)
    out = softmax(q k^T / sqrt(D)) v

Shapes and dtypes:
    qkv (N, P, 3 C) bf16, fp16 or fp32: queries, keys and values of C / D heads, as the projection
        without its bias writes them; P is at most LARGEST
    bias (3 C,) of any of these types: the projection's, added here
    out (N, P, C)

A program takes one image and one head. All keys are on chip, so softmax needs no running maximum
(that of FlashAttention, Dao et al., 2022, is for rows longer than a tile). Only qkv and bias are
saved for the backward, which scores again. It keeps the gradients of keys and values in registers
while it goes over blocks of queries, writes the gradient of qkv in its packed layout, and adds up
its columns: the bias's gradient costs no second reading of it. It needs no atomics, no float32 copy
of the queries' gradient, and no gathering of three gradients into one tensor. Every run gives the
same bits.

q, k and v are rounded to qkv's type. Scores, softmax and sums are float32; the probabilities and
the scores' gradient are rounded to qkv's type for the matrix products, as FlashAttention does.

Bytes: forward reads qkv and writes out; backward reads qkv and d out and writes d qkv.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 256  # patches: the gradients of all keys and values stay in registers
HEAD_DIMS = (32, 64)


def fits(patches: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether images of so many patches and heads of head_dim suit the kernel.

    In float32 the tiles of large images take twice the room, and minutes to compile.
    """
    largest = LARGEST if dtype.itemsize == 2 else LARGEST // 2
    return 1 <= patches <= largest and head_dim in HEAD_DIMS


def image_attention_reference(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `image_attention`."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    biased = (qkv.to(wide) + bias.to(wide)).to(qkv.dtype).to(wide)
    q, k, v = biased.unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, P, D)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


@triton.jit
def _load_biased(
    x_ptr, bias_ptr, rows, inside, STRIDE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """One head's (rows, D) plus its bias, in x's type; rows outside are the bias alone."""
    columns = tl.arange(0, D)
    place = rows[:, None].to(tl.int64) * STRIDE + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside[:, None], other=0.0)
    bias = tl.load(bias_ptr + columns).to(tl.float32)
    return (x.to(tl.float32) + bias[None, :]).to(x.dtype)


@triton.jit
def _probabilities(q, k, known, scale):
    """softmax(k q^T * scale) over the known keys, (keys, queries) float32.

    Keys come first: in the backward, the products for the gradients of keys and values then take
    their left operand from registers as it is.
    """
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    scores = tl.where(known[:, None], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@triton.jit
def _image_attention_fwd_kernel(
    qkv_ptr, bias_ptr, out_ptr, scale,
    P: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One image and one head; KEYS is at least P."""
    C: tl.constexpr = HEADS * D
    program = tl.program_id(0)
    image = (program // HEADS).to(tl.int64)
    head = program % HEADS
    # Pointers to the head's queries; its keys and values begin C and 2 C later.
    qkv_ptr += image * P * 3 * C + head * D
    bias_ptr += head * D
    out_ptr += image * P * C + head * D

    keys = tl.arange(0, KEYS)
    known = keys < P
    k = _load_biased(qkv_ptr + C, bias_ptr + C, keys, known, 3 * C, D)
    v = _load_biased(qkv_ptr + 2 * C, bias_ptr + 2 * C, keys, known, 3 * C, D)
    for first in range(0, P, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        inside = rows < P
        q = _load_biased(qkv_ptr, bias_ptr, rows, inside, 3 * C, D)
        p = _probabilities(q, k, known, scale)
        out = tl.dot(tl.trans(p.to(v.dtype)), v, input_precision="ieee")
        place = rows[:, None].to(tl.int64) * C + tl.arange(0, D)[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _image_attention_bwd_kernel(
    qkv_ptr, bias_ptr, dout_ptr, dqkv_ptr, dbias_ptr, scale,
    P: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of one image's head, and its sum over the patches in dbias (N, 3 C) float32."""
    C: tl.constexpr = HEADS * D
    program = tl.program_id(0)
    image = (program // HEADS).to(tl.int64)
    head = program % HEADS
    qkv_ptr += image * P * 3 * C + head * D
    dqkv_ptr += image * P * 3 * C + head * D
    dout_ptr += image * P * C + head * D
    dbias_ptr += image * 3 * C + head * D
    bias_ptr += head * D
    dtype = dqkv_ptr.dtype.element_ty

    keys = tl.arange(0, KEYS)
    known = keys < P
    columns = tl.arange(0, D)
    k = _load_biased(qkv_ptr + C, bias_ptr + C, keys, known, 3 * C, D)
    v = _load_biased(qkv_ptr + 2 * C, bias_ptr + 2 * C, keys, known, 3 * C, D)
    dk = tl.zeros((KEYS, D), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)
    dq_sum = tl.zeros((D,), tl.float32)
    for first in range(0, P, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        inside = rows < P
        place = rows[:, None].to(tl.int64) * C + columns[None, :]
        # Zero beyond the image, where p is not: these queries then add nothing to any gradient.
        dout = tl.load(dout_ptr + place, mask=inside[:, None], other=0.0)
        q = _load_biased(qkv_ptr, bias_ptr, rows, inside, 3 * C, D)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        p = _probabilities(q, k, known, scale)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dscores = (p * (dp - tl.sum(p * dp, axis=0)[None, :]) * scale).to(k.dtype)
        dk = tl.dot(dscores, q, dk, input_precision="ieee")
        # (D, queries): a block of queries has too few rows for a wgmma, but enough columns.
        dq = tl.dot(tl.trans(k), dscores, input_precision="ieee")
        dq_sum += tl.sum(dq, axis=1)
        place = rows[:, None].to(tl.int64) * (3 * C) + columns[None, :]
        tl.store(dqkv_ptr + place, tl.trans(dq).to(dtype), mask=inside[:, None])

    place = keys[:, None].to(tl.int64) * (3 * C) + columns[None, :]
    tl.store(dqkv_ptr + (place + C), dk.to(dtype), mask=known[:, None])
    tl.store(dqkv_ptr + (place + 2 * C), dv.to(dtype), mask=known[:, None])
    tl.store(dbias_ptr + columns, dq_sum)
    # Rows beyond the image hold zeros: no probability and no gradient of a score reaches them.
    tl.store(dbias_ptr + C + columns, tl.sum(dk, axis=0))
    tl.store(dbias_ptr + 2 * C + columns, tl.sum(dv, axis=0))


def _launch(patches: int, backward: bool) -> dict[str, int]:
    """Tiles and warps.

    Sums for the keys and values of 256 patches take half of all registers. Beside them there is
    room for the scores of 16 queries; 32 queries spilled 8 bytes on sm_90.
    """
    keys = max(16, triton.next_power_of_2(patches))
    queries = 16 if backward and keys == LARGEST else 64
    warps = 8 if keys > 64 else 4
    return {"KEYS": keys, "QUERIES": min(keys, queries), "num_warps": warps, "num_stages": 1}


def _check(qkv: Tensor, bias: Tensor, n_heads: int) -> None:
    op = "image_attention"
    if qkv.dim() != 3:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)}, expected three dimensions, (N, P, 3 C)"
        )
    if n_heads < 1 or qkv.shape[2] % (3 * n_heads):
        raise ValueError(
            f"{op}: qkv has {qkv.shape[2]} columns, expected a multiple of 3 * n_heads; n_heads is "
            f"{n_heads}"
        )
    head_dim = qkv.shape[2] // (3 * n_heads)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{op}: heads have {head_dim} columns, expected one of {HEAD_DIMS}")
    if not 1 <= qkv.shape[1] <= LARGEST:
        raise ValueError(f"{op}: an image has {qkv.shape[1]} patches, expected 1 to {LARGEST}")
    for name, tensor, shape in (("qkv", qkv, qkv.shape), ("bias", bias, qkv.shape[2:])):
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(str, DTYPES))
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected one of {expected}")
        if tensor.device != qkv.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, qkv is on {qkv.device}")
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, its strides are {tensor.stride()}")


@torch.library.custom_op("nanovlm_fast::image_attention_fwd", mutates_args=())
def image_attention_fwd(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Return out (N, P, C); raises if an argument does not fit."""
    _check(qkv, bias, n_heads)
    n, patches, width = qkv.shape
    head_dim = width // (3 * n_heads)
    out = qkv.new_empty(n, patches, width // 3)
    if n:
        _image_attention_fwd_kernel[(n * n_heads,)](
            qkv, bias, out, head_dim**-0.5,
            P=patches, HEADS=n_heads, D=head_dim, **_launch(patches, backward=False),
        )  # fmt: skip
    return out


@torch.library.custom_op("nanovlm_fast::image_attention_bwd", mutates_args=())
def image_attention_bwd(
    dout: Tensor, qkv: Tensor, bias: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """Return d qkv (N, P, 3 C) and d bias (3 C,) float32."""
    n, patches, width = qkv.shape
    head_dim = width // (3 * n_heads)
    dqkv = torch.empty_like(qkv)
    dbias = qkv.new_empty(n, width, dtype=torch.float32)
    if n:
        _image_attention_bwd_kernel[(n * n_heads,)](
            qkv, bias, dout, dqkv, dbias, head_dim**-0.5,
            P=patches, HEADS=n_heads, D=head_dim, **_launch(patches, backward=True),
        )  # fmt: skip
    # Here and not by the compiler, which makes two launches of it.
    return dqkv, dbias.sum(0)


@image_attention_fwd.register_fake
def _(qkv, bias, n_heads):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@image_attention_bwd.register_fake
def _(dout, qkv, bias, n_heads):
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[2], dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, n_heads = inputs
    ctx.save_for_backward(qkv, bias)
    ctx.n_heads = n_heads


def _backward(ctx, dout):
    qkv, bias = ctx.saved_tensors
    dqkv, dbias = image_attention_bwd(dout.contiguous(), qkv, bias, ctx.n_heads)
    return dqkv, dbias.to(bias.dtype), None


image_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def image_attention(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """Return (N, P, C): full attention among the patches of each image.

    Differentiable in qkv and bias. Inputs that are not contiguous are copied. A CPU tensor runs the
    reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises TypeError or ValueError
    that names the argument, also for more than LARGEST patches and for heads not of HEAD_DIMS.
    """
    if not (qkv.is_cuda or INTERPRET):
        return image_attention_reference(qkv, bias, n_heads)
    return image_attention_fwd(qkv.contiguous(), bias.contiguous(), n_heads)


def make_inputs(
    n: int, patches: int, n_heads: int, head_dim: int, dtype: torch.dtype, device: str,
    seed: int = 0,
) -> dict:  # fmt: skip
    """Arguments of `image_attention` for n images."""
    generator = torch.Generator(device).manual_seed(seed)
    width = 3 * n_heads * head_dim
    qkv = torch.randn(n, patches, width, generator=generator, device=device).to(dtype)
    bias = torch.randn(width, generator=generator, device=device) / 2
    return {"qkv": qkv, "bias": bias, "n_heads": n_heads}


def cost(n: int, patches: int, n_heads: int, head_dim: int, dtype: torch.dtype) -> dict:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    out = n * patches * n_heads * head_dim
    flops = 4 * patches * out  # scores and weighted values, a multiplication and an addition each
    bias = 4 * 3 * n_heads * head_dim
    return {
        "forward": (4 * out * dtype.itemsize + bias, flops),
        # scores again, and the gradients of values, probabilities, queries and keys
        "backward": (7 * out * dtype.itemsize + bias * (n + 1), flops * 5 // 2),
    }
