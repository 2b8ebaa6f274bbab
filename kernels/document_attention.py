"""Causal attention inside short packed documents, rotary embedding included.

    q, k = rotated query and key heads        y[i + D/2], y[i] as in rotary.py (Su et al., 2021)
    p = softmax(q k^T / sqrt(D))              over the earlier tokens of the same document
    out = p v

Shapes and dtypes:
    qkv (T, (n_q + 2 n_kv) D) bf16, fp16 or fp32: n_q query heads, n_kv key heads and n_kv value
        heads, in the layout that the projection writes; n_q is a multiple of n_kv
    cos, sin (positions, D/2) float32
    position_ids (T,) int32, each below `positions` (not checked: the host would have to wait for
        the device to see them)
    cu_seqlens (documents + 1,) int32: where each document starts, from 0 to T; documents may be
        empty, and none is longer than max_seqlen, which is at most LONGEST
    out (T, n_q D)

A program takes one document and one key head with its n_q / n_kv query heads. All scores of a
block of queries are on chip, so softmax needs no running maximum (that of FlashAttention, Dao et
al., 2022, is for documents longer than a tile). Only qkv is saved for the backward, which rotates
and scores again. It keeps the gradients of keys and values in registers while it goes over the
query heads, rotates back, and writes the packed gradient of qkv. It needs no atomics, no float32
copy of the queries' gradient, and no gathering of three gradients into one tensor. Every run gives
the same bits.

Rotated heads are rounded to qkv's type, as they are where rotary is an operator of its own. Scores,
softmax and sums are float32; the probabilities and the scores' gradient are rounded to qkv's type
for the matrix products, as FlashAttention does.

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
LONGEST = 128  # tokens of a document: its keys, values and scores stay on chip
HEAD_DIMS = (32, 64)  # matrix products take halves of a head, of at least 16 columns


def fits(max_seqlen: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether documents of up to max_seqlen tokens and heads of head_dim suit the kernel.

    In float32 the tiles of long documents take twice the room, and minutes to compile.
    """
    longest = LONGEST if dtype.itemsize == 2 else LONGEST // 2
    return 1 <= max_seqlen <= longest and head_dim in HEAD_DIMS


def document_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> Tensor:
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `document_attention`."""
    t = len(qkv)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.to(wide).unflatten(1, (n_q + 2 * n_kv, 2 * cos.shape[1]))
    first, second = heads[:, : n_q + n_kv].chunk(2, dim=-1)
    c = cos[position_ids][:, None]  # (T, 1, D/2), the same for every head
    s = sin[position_ids][:, None]
    rotated = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    rotated = rotated.to(qkv.dtype).to(wide)
    # Each document in rows of its own: (documents, max_seqlen, heads, D)
    token = torch.arange(t, device=qkv.device)
    document = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    slots = document * max_seqlen + token - cu_seqlens[document]
    documents = len(cu_seqlens) - 1
    packed = torch.cat([rotated, heads[:, n_q + n_kv :]], dim=1)
    padded = packed.new_zeros(documents * max_seqlen, *packed.shape[1:]).index_copy(
        0, slots, packed
    )
    padded = padded.unflatten(0, (documents, max_seqlen)).transpose(1, 2)
    q, k, v = padded.split([n_q, n_kv, n_kv], dim=1)
    k = k.repeat_interleave(n_q // n_kv, dim=1)
    v = v.repeat_interleave(n_q // n_kv, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    # Padding follows the document, so the causal mask keeps real queries away from it.
    later = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool, device=qkv.device).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).flatten(0, 1)[slots].flatten(1).to(qkv.dtype)


@triton.jit
def _places(rows, stride: tl.constexpr, width: tl.constexpr):
    """Offsets (rows, width) into a matrix, of its first columns."""
    return rows[:, None].to(tl.int64) * stride + tl.arange(0, width)[None, :]


@triton.jit
def _tables(cos_ptr, sin_ptr, position_ptr, rows, inside, HALF: tl.constexpr):
    """Rows of cos and sin at the positions of a document's rows, each (rows, HALF)."""
    positions = tl.load(position_ptr + rows, mask=inside, other=0)
    entry = _places(positions, HALF, HALF)
    cos = tl.load(cos_ptr + entry, mask=inside[:, None], other=0.0)
    sin = tl.load(sin_ptr + entry, mask=inside[:, None], other=0.0)
    return cos, sin


@triton.jit
def _load_rotated(
    head_ptr, cos_ptr, sin_ptr, position_ptr, rows, inside,
    STRIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of a rotated head, each (rows, HALF), in its type."""
    cos, sin = _tables(cos_ptr, sin_ptr, position_ptr, rows, inside, HALF)
    place = _places(rows, STRIDE, HALF)
    first = tl.load(head_ptr + place, mask=inside[:, None], other=0.0)
    second = tl.load(head_ptr + (place + HALF), mask=inside[:, None], other=0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def _store_rotated_back(
    head_ptr, a, b, cos_ptr, sin_ptr, position_ptr, rows, inside,
    STRIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate the halves a and b of a head's gradient back, and store them.

    The tables are loaded again, from L1: kept since the rotation, they would take the registers
    that the scores need.
    """
    cos, sin = _tables(cos_ptr, sin_ptr, position_ptr, rows, inside, HALF)
    place = _places(rows, STRIDE, HALF)
    dtype = head_ptr.dtype.element_ty
    tl.store(head_ptr + place, (a * cos + b * sin).to(dtype), mask=inside[:, None])
    tl.store(head_ptr + (place + HALF), (b * cos - a * sin).to(dtype), mask=inside[:, None])


@triton.jit
def _probabilities(q1, q2, k1, k2, rows, keys, length, scale):
    """softmax(k q^T * scale) over the keys, (keys, queries) float32; later keys are masked out.

    Keys come first: in the backward, the products for the gradients of keys and values then take
    their left operand from registers as it is, where (queries, keys) spilled. Rows of queries
    beyond the document are of no use but finite, as they see the document's keys.
    """
    scores = tl.dot(k1, tl.trans(q1), input_precision="ieee")
    scores = tl.dot(k2, tl.trans(q2), scores, input_precision="ieee") * scale
    seen = (keys[:, None] <= rows[None, :]) & (keys < length)[:, None]
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@triton.jit
def _document_attention_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, cu_seqlens_ptr, out_ptr, scale,
    N_KV: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One document and one key head with its GROUP query heads; KEYS is at least max_seqlen."""
    D: tl.constexpr = 2 * HALF
    STRIDE: tl.constexpr = (GROUP + 2) * N_KV * D
    # One flat grid: the second and third grid axes are limited to 65,535 programs.
    program = tl.program_id(0)
    document = program // N_KV
    kv = program % N_KV
    start = tl.load(cu_seqlens_ptr + document).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + document + 1) - start).to(tl.int32)
    position_ptr += start
    query_ptr = qkv_ptr + start * STRIDE + kv * GROUP * D
    key_ptr = qkv_ptr + start * STRIDE + (GROUP * N_KV + kv) * D
    head_out_ptr = out_ptr + start * (GROUP * N_KV * D) + kv * GROUP * D

    keys = tl.arange(0, KEYS)
    known = keys < length
    k1, k2 = _load_rotated(key_ptr, cos_ptr, sin_ptr, position_ptr, keys, known, STRIDE, HALF)
    value_place = _places(keys, STRIDE, D)
    v = tl.load(key_ptr + N_KV * D + value_place, mask=known[:, None], other=0.0)

    # An empty document has no block of queries, so its programs store nothing.
    for first in range(0, length, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        inside = rows < length
        for head in range(GROUP):
            q1, q2 = _load_rotated(
                query_ptr + head * D, cos_ptr, sin_ptr, position_ptr, rows, inside, STRIDE, HALF
            )
            p = _probabilities(q1, q2, k1, k2, rows, keys, length, scale)
            out = tl.dot(tl.trans(p.to(v.dtype)), v, input_precision="ieee")
            place = _places(rows, GROUP * N_KV * D, D)
            dtype = out_ptr.dtype.element_ty
            tl.store(head_out_ptr + head * D + place, out.to(dtype), mask=inside[:, None])


@triton.jit
def _document_attention_bwd_kernel(
    qkv_ptr, dout_ptr, cos_ptr, sin_ptr, position_ptr, cu_seqlens_ptr, dqkv_ptr, scale,
    N_KV: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of one document's GROUP query heads, key head and value head."""
    D: tl.constexpr = 2 * HALF
    STRIDE: tl.constexpr = (GROUP + 2) * N_KV * D
    program = tl.program_id(0)
    document = program // N_KV
    kv = program % N_KV
    start = tl.load(cu_seqlens_ptr + document).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + document + 1) - start).to(tl.int32)
    position_ptr += start
    queries = start * STRIDE + kv * GROUP * D
    key = start * STRIDE + (GROUP * N_KV + kv) * D
    head_dout_ptr = dout_ptr + start * (GROUP * N_KV * D) + kv * GROUP * D

    keys = tl.arange(0, KEYS)
    known = keys < length
    k1, k2 = _load_rotated(qkv_ptr + key, cos_ptr, sin_ptr, position_ptr, keys, known, STRIDE, HALF)
    value_place = _places(keys, STRIDE, D)
    v = tl.load(qkv_ptr + key + N_KV * D + value_place, mask=known[:, None], other=0.0)
    dk1 = tl.zeros((KEYS, HALF), tl.float32)
    dk2 = tl.zeros((KEYS, HALF), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)

    for first in range(0, length, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        inside = rows < length
        for head in range(GROUP):
            query = queries + head * D
            q1, q2 = _load_rotated(
                qkv_ptr + query, cos_ptr, sin_ptr, position_ptr, rows, inside, STRIDE, HALF
            )
            p = _probabilities(q1, q2, k1, k2, rows, keys, length, scale)
            place = _places(rows, GROUP * N_KV * D, D)
            # Zero beyond the document, where p is not: these rows then add nothing to dk and dv.
            dout = tl.load(head_dout_ptr + head * D + place, mask=inside[:, None], other=0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            dscores = p * (dp - tl.sum(p * dp, axis=0)[None, :]) * scale
            dscores = dscores.to(k1.dtype)
            dk1 = tl.dot(dscores, q1, dk1, input_precision="ieee")
            dk2 = tl.dot(dscores, q2, dk2, input_precision="ieee")
            dscores = tl.trans(dscores)
            dq1 = tl.dot(dscores, k1, input_precision="ieee")
            dq2 = tl.dot(dscores, k2, input_precision="ieee")
            _store_rotated_back(
                dqkv_ptr + query, dq1, dq2,
                cos_ptr, sin_ptr, position_ptr, rows, inside, STRIDE, HALF,
            )  # fmt: skip

    _store_rotated_back(
        dqkv_ptr + key, dk1, dk2, cos_ptr, sin_ptr, position_ptr, keys, known, STRIDE, HALF
    )
    dv_ptr = dqkv_ptr + key + N_KV * D + value_place
    tl.store(dv_ptr, dv.to(dqkv_ptr.dtype.element_ty), mask=known[:, None])


def _launch(max_seqlen: int) -> dict[str, int]:
    """Tiles and warps for documents of up to max_seqlen tokens.

    Blocks of 64 queries: scores, their gradient and the sums for keys and values then fit the
    registers of 8 warps at 128 keys.
    """
    keys = max(16, triton.next_power_of_2(max_seqlen))
    warps = 8 if keys > 64 else 4
    stages = 1  # the loop's loads are few and small; more stages only take shared memory
    return {"KEYS": keys, "QUERIES": min(keys, 64), "num_warps": warps, "num_stages": stages}


def _sizes(qkv: Tensor, n_q: int, n_kv: int) -> dict[str, int]:
    return {"N_KV": n_kv, "GROUP": n_q // n_kv, "HALF": qkv.shape[1] // (n_q + 2 * n_kv) // 2}


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> None:
    op = "document_attention"
    if qkv.dim() != 2:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)}, expected two dimensions, (T, heads * D)"
        )
    if n_q < 1 or n_kv < 1 or n_q % n_kv or qkv.shape[1] % (n_q + 2 * n_kv):
        raise ValueError(
            f"{op}: qkv has {qkv.shape[1]} columns, expected n_q + 2 * n_kv heads and n_q a "
            f"multiple of n_kv; n_q is {n_q}, n_kv is {n_kv}"
        )
    head_dim = qkv.shape[1] // (n_q + 2 * n_kv)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{op}: heads have {head_dim} columns, expected one of {HEAD_DIMS}")
    if not 1 <= max_seqlen <= LONGEST:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}, expected 1 to {LONGEST}")
    table = (len(cos) if cos.dim() else 0, head_dim // 2)
    for name, tensor, shape, dtypes in (
        ("qkv", qkv, qkv.shape, DTYPES),
        ("cos", cos, table, (torch.float32,)),
        ("sin", sin, table, (torch.float32,)),
        ("position_ids", position_ids, qkv.shape[:1], (torch.int32,)),
        ("cu_seqlens", cu_seqlens, (cu_seqlens.numel(),), (torch.int32,)),
    ):
        if tensor.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected one of {expected}")
        if tensor.device != qkv.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, qkv is on {qkv.device}")
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, its strides are {tensor.stride()}")


@torch.library.custom_op("nanovlm_fast::document_attention_fwd", mutates_args=())
def document_attention_fwd(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> Tensor:
    """Return out (T, n_q D); raises if an argument does not fit."""
    _check(qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, n_q, n_kv)
    sizes = _sizes(qkv, n_q, n_kv)
    head_dim = 2 * sizes["HALF"]
    out = qkv.new_empty(len(qkv), n_q * head_dim)
    documents = len(cu_seqlens) - 1
    if len(qkv) and documents > 0:
        _document_attention_fwd_kernel[(documents * n_kv,)](
            qkv, cos, sin, position_ids, cu_seqlens, out, head_dim**-0.5,
            **sizes, **_launch(max_seqlen),
        )  # fmt: skip
    return out


@torch.library.custom_op("nanovlm_fast::document_attention_bwd", mutates_args=())
def document_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> Tensor:
    """Return d qkv (T, (n_q + 2 n_kv) D)."""
    sizes = _sizes(qkv, n_q, n_kv)
    head_dim = 2 * sizes["HALF"]
    dqkv = torch.empty_like(qkv)
    documents = len(cu_seqlens) - 1
    if len(qkv) and documents > 0:
        _document_attention_bwd_kernel[(documents * n_kv,)](
            qkv, dout, cos, sin, position_ids, cu_seqlens, dqkv, head_dim**-0.5,
            **sizes, **_launch(max_seqlen),
        )  # fmt: skip
    return dqkv


@document_attention_fwd.register_fake
def _(qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, n_q, n_kv):
    return qkv.new_empty(len(qkv), qkv.shape[1] // (n_q + 2 * n_kv) * n_q)


@document_attention_bwd.register_fake
def _(dout, qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, n_q, n_kv):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, max_seqlen, n_q, n_kv = inputs
    ctx.save_for_backward(*tensors)
    ctx.sizes = max_seqlen, n_q, n_kv


def _backward(ctx, dout):
    dqkv = document_attention_bwd(dout.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return dqkv, None, None, None, None, None, None, None


document_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def document_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> Tensor:
    """Return (T, n_q D): causal attention of each document's rotated heads to itself.

    Differentiable in qkv. Inputs that are not contiguous are copied. A CPU tensor runs the
    reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises TypeError or ValueError
    that names the argument, also for a max_seqlen over LONGEST and for heads not of HEAD_DIMS.
    """
    sizes = max_seqlen, n_q, n_kv
    if not (qkv.is_cuda or INTERPRET):
        return document_attention_reference(qkv, cos, sin, position_ids, cu_seqlens, *sizes)
    tensors = (x.contiguous() for x in (qkv, cos, sin, position_ids, cu_seqlens))
    return document_attention_fwd(*tensors, *sizes)


def make_inputs(
    t: int, max_seqlen: int, n_q: int, n_kv: int, head_dim: int, dtype: torch.dtype, device: str,
    positions: int = 8192, seed: int = 0,
) -> dict:  # fmt: skip
    """Arguments of `document_attention`: t tokens in documents of random lengths, some empty."""
    generator = torch.Generator().manual_seed(seed)
    ends = [0]
    while ends[-1] < t:
        length = int(torch.randint(0, max_seqlen + 1, (), generator=generator))
        ends.append(min(ends[-1] + length, t))
    # Empty ones at the end, as in a batch with room for more documents. With them the number of
    # documents is the same for every seed, but for the rarest draws.
    ends += [t] * max(1, 4 * t // max(max_seqlen, 1) + 8 - len(ends))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    exponents = torch.arange(0, head_dim, 2) / head_dim
    angles = torch.arange(positions)[:, None] / 1e5**exponents
    width = (n_q + 2 * n_kv) * head_dim
    inputs = {
        "qkv": torch.randn(t, width, generator=generator).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "position_ids": torch.randint(positions, (t,), generator=generator, dtype=torch.int32),
        "cu_seqlens": cu_seqlens,
    }
    on_device = {name: value.to(device) for name, value in inputs.items()}
    return on_device | {"max_seqlen": max_seqlen, "n_q": n_q, "n_kv": n_kv}


def cost(t: int, max_seqlen: int, n_q: int, n_kv: int, head_dim: int, dtype: torch.dtype) -> dict:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}.

    FLOPs of the causal pairs that documents of `make_inputs` have on average. Lengths l are drawn
    evenly from 0 to max_seqlen, so a token sees E[l (l + 1) / 2] / E[l] = (max_seqlen + 2) / 3.
    """
    row = (n_q + 2 * n_kv) * head_dim
    out = n_q * head_dim
    pairs = t * (max_seqlen + 2) // 3
    flops = 4 * pairs * out  # scores and weighted values, a multiplication and an addition each
    shared = 4 * t  # position_ids; tables and offsets are small and come from L2
    return {
        "forward": (t * (row + out) * dtype.itemsize + shared, flops),
        # scores again, and the gradients of values, probabilities, queries and keys
        "backward": (t * (2 * row + out) * dtype.itemsize + shared, flops * 5 // 2),
    }
