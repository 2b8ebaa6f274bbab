"""Token embeddings and image tokens gathered into one (T, C) buffer; no atomics in the backward.

    h[t] = image_tokens[image_rows[t]] if image_rows[t] >= 0 else table[input_ids[t]]

Shapes and dtypes:
    input_ids (T,) int64, image_rows (T,) int32
    table (V, C), image_tokens (R, C) with R >= 0: bf16, fp16 or fp32
    h (T, C) in the table's dtype, or the one that is asked for
Ids at or above V and rows at or above R are not checked: the host would have to wait for the
device to see them.

Backward: d table[v] and d image_tokens[r] are float32 sums of dh over the positions that show the
row (several documents may show one image), rounded once. The forward saves one key per position
and nothing else: the token id, or V + the image row. A stable sort brings equal keys together.
The sorted positions are cut into chunks of CHUNK positions, regardless of where a run of equal
keys begins or ends:

1. A program walks many chunks side by side, one sorted position of each at a time, and keeps the
   float32 sum of the current run. A run that begins and ends inside its chunk is complete and is
   stored in its row of the gradient. For a run that crosses chunk boundaries, each chunk stores a
   partial sum: in `parts[0, chunk]` if the run entered from the previous chunk (including a run
   that fills the chunk and continues), in `parts[1, chunk]` if the run begins here and continues.
   A chunk therefore stores at most one partial of each kind, and no long run (eos, for example)
   is walked from end to end by a single program.
2. The chunk in which such a run begins adds up the partials of the run, a block of chunks at a
   time.

Every position is read once and every row has one writer, in a fixed order: the same inputs give
the same bits. The number of chunks depends on T alone, so shapes are static and the host never
synchronises. Rows that no position shows keep the zeros of a memset. The gradients are dense
because the table is also the head's weight matrix, whose gradient is dense.

Bytes, forward: read T rows, write T rows. Backward: read dh, write both gradients (rows in use
twice: once by the memset). Where the head shares the table (`embed_splice_tied`), d table is added
to the head's gradient: rows in use are read and written, and no others. Giving every program the
same amount of work, rather than one run, is the idea of segmented reduction (Blelloch; CUB);
PyTorch's embedding backward sorts as well.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 16  # sorted positions per chunk; a constant, so that sums are always added in one order


def embed_splice_reference(
    input_ids: Tensor,
    table: Tensor,
    image_rows: Tensor,
    image_tokens: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch, same signature and dtypes as `embed_splice`.

    It only copies, so there is nothing to compute in float32.
    """
    text = F.embedding(input_ids, table)
    if len(image_tokens) == 0:  # then there is no row 0 for the clamped rows to read
        return text.to(dtype or table.dtype)
    shown = F.embedding(image_rows.clamp(min=0), image_tokens).to(table.dtype)
    return torch.where(image_rows[:, None] >= 0, shown, text).to(dtype or table.dtype)


@triton.jit
def _embed_splice_fwd_kernel(
    ids_ptr, table_ptr, rows_ptr, image_ptr, h_ptr, keys_ptr, T, V,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One flat grid: the second and third grid axes are limited to 65,535 programs.
    across: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    tokens = (program // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    ids = tl.load(ids_ptr + tokens, mask=tokens < T, other=0)
    rows = tl.load(rows_ptr + tokens, mask=tokens < T, other=-1).to(tl.int64)
    if program % across == 0:  # one program per block of tokens writes the keys
        key = tl.where(rows >= 0, V + rows, ids).to(tl.int32)
        tl.store(keys_ptr + tokens, key, mask=tokens < T)
    inside = (tokens < T)[:, None] & (columns < C)[None, :]
    image = inside & (rows >= 0)[:, None]
    text = inside & (rows < 0)[:, None]
    # The masks exclude each other, so every element is read once, from one of the two tables.
    shown = tl.load(image_ptr + (rows[:, None] * C + columns[None, :]), mask=image, other=0.0)
    read = tl.load(table_ptr + (ids[:, None] * C + columns[None, :]), mask=text, other=0.0)
    h = tl.where(image, shown.to(h_ptr.dtype.element_ty), read.to(h_ptr.dtype.element_ty))
    tl.store(h_ptr + (tokens[:, None] * C + columns[None, :]), h, mask=inside)


@triton.jit
def _embed_splice_bwd_chunks_kernel(
    dh_ptr, keys_ptr, order_ptr, dtable_ptr, dimage_ptr, parts_ptr, T, V, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Walk ROWS chunks side by side: keys (T,) sorted, order (T,) where each key came from."""
    chunk = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (columns < C)[None, :]
    start = chunk * CHUNK
    # -1 is no key: it stands before the first position and after the last.
    key = tl.load(keys_ptr + start, mask=start < T, other=-1)
    before = tl.load(keys_ptr + start - 1, mask=(start > 0) & (start < T), other=-1)
    came_in = (start < T) & (key == before)  # the current run began in an earlier chunk
    total = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    from_before = total
    # Loads are issued ahead of the sums that need them: dh by one step, and the positions that dh
    # is gathered from by two, because the address of a gather must arrive before its data.
    position = tl.load(order_ptr + start, mask=start < T, other=0)
    dh = tl.load(
        dh_ptr + (position[:, None] * C + columns[None, :]),
        mask=(start < T)[:, None] & inside,
        other=0.0,
    )
    position = tl.load(order_ptr + start + 1, mask=start + 1 < T, other=0)
    for step in range(CHUNK):
        here = start + step
        ahead = (here + 1 < T) & (step + 1 < CHUNK)
        next_dh = tl.load(
            dh_ptr + (position[:, None] * C + columns[None, :]),
            mask=ahead[:, None] & inside,
            other=0.0,
        )
        position = tl.load(order_ptr + here + 2, mask=here + 2 < T, other=0)
        next_key = tl.load(keys_ptr + here + 1, mask=here + 1 < T, other=-1)
        total += dh.to(tl.float32)
        ends = key != next_key  # past the end both are -1, so the padding ends no run
        done = ends & ~came_in
        row = key.to(tl.int64)
        # Both stores are masked: a row is a row of the table or of the image tokens, never both.
        into = dtable_ptr + (row[:, None] * C + columns[None, :])
        text = (done & (row < V))[:, None] & inside
        if ADD:  # to a row that this program alone reads and writes
            old = tl.load(into, mask=text, other=0.0).to(tl.float32)
            tl.store(into, (old + total).to(dtable_ptr.dtype.element_ty), mask=text)
        else:
            tl.store(into, total.to(dtable_ptr.dtype.element_ty), mask=text)
        tl.store(
            dimage_ptr + ((row - V)[:, None] * C + columns[None, :]),
            total.to(dimage_ptr.dtype.element_ty),
            mask=(done & (row >= V))[:, None] & inside,
        )
        from_before = tl.where((ends & came_in)[:, None], total, from_before)
        total = tl.where(ends[:, None], 0.0, total)
        came_in = came_in & (key == next_key)
        key = next_key
        dh = next_dh
    # `total` now holds the sum of a run that continues into the next chunk. That run either fills
    # this chunk (it came in and never ended) or began here.
    before = tl.load(keys_ptr + start - 1, mask=(start > 0) & (start < T), other=-1)
    first = tl.load(keys_ptr + start, mask=start < T, other=-2)
    last = tl.load(keys_ptr + start + CHUNK - 1, mask=start + CHUNK <= T, other=-1)
    goes_on = last == tl.load(keys_ptr + start + CHUNK, mask=start + CHUNK < T, other=-2)
    part = tl.where((goes_on & (last == before))[:, None], total, from_before)
    tl.store(
        parts_ptr + (chunk[:, None] * C + columns[None, :]),
        part,
        mask=(first == before)[:, None] & inside,
    )
    begun = goes_on & (last != before)
    tl.store(
        parts_ptr + ((chunks + chunk)[:, None] * C + columns[None, :]),
        total,
        mask=begun[:, None] & inside,
    )


@triton.jit
def _embed_splice_bwd_parts_kernel(
    keys_ptr, dtable_ptr, dimage_ptr, parts_ptr, T, V, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """If a run begins in this chunk and continues into the next, sum all partials of that run."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    start = chunk * CHUNK
    behind = start + CHUNK  # the first position of the next chunk
    key = tl.load(keys_ptr + behind - 1, mask=behind - 1 < T, other=-1)
    after = tl.load(keys_ptr + behind, mask=behind < T, other=-2)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1)
    if (key == after) & (key != before):
        total = tl.load(parts_ptr + ((chunks + chunk) * C + columns), mask=inside, other=0.0)
        following = chunk + 1 + tl.arange(0, STEP)
        same = tl.load(keys_ptr + following * CHUNK, mask=following * CHUNK < T, other=-1) == key
        more = 1
        # The chunk that a run begins in owns it, so the partials are added by one program in order.
        # A comparison, not the integer: Triton 3.6 and 3.7 take only a boolean as a condition.
        while more > 0:
            part = tl.load(
                parts_ptr + (following[:, None] * C + columns[None, :]),
                mask=same[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(part, axis=0)
            following += STEP
            going_on = tl.load(keys_ptr + following * CHUNK, mask=following * CHUNK < T, other=-1)
            same = going_on == key
            more = tl.max(same.to(tl.int32), axis=0)
        row = key.to(tl.int64)
        if row < V:
            into = dtable_ptr + row * C + columns
            if ADD:
                total += tl.load(into, mask=inside, other=0.0).to(tl.float32)
            tl.store(into, total.to(dtable_ptr.dtype.element_ty), mask=inside)
        else:
            dimage = total.to(dimage_ptr.dtype.element_ty)
            tl.store(dimage_ptr + (row - V) * C + columns, dimage, mask=inside)


# Blocks of 64 columns are whole 128-byte lines and leave no lane idle at widths such as 576, which
# is 9 * 64. In training T is about 20,000: all 729 programs of CHUNKS are then resident at once on
# an H100, where six fit on a multiprocessor, with 24 KB of a float32 dh in flight.
FORWARD = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4}
CHUNKS = {"CHUNK": CHUNK, "ROWS": 16, "BLOCK_C": 64, "num_warps": 4}
# One warp: most of these programs find no run that crosses their chunk and return at once.
PARTS = {"CHUNK": CHUNK, "STEP": 16, "BLOCK_C": 256, "num_warps": 1}


def _check(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"embed_splice: {name} is {tensor.dtype}, expected one of {expected}")
    if tensor.device != like.device:
        raise ValueError(f"embed_splice: {name} is on {tensor.device}, table is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"embed_splice: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"embed_splice: {name} must be contiguous, its strides are {tensor.stride()}"
        )


@torch.library.custom_op("nanovlm_fast::embed_splice_fwd", mutates_args=())
def embed_splice_fwd(
    input_ids: Tensor,
    table: Tensor,
    image_rows: Tensor,
    image_tokens: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return h (T, C) in `dtype` or the table's, and keys (T,) int32; check every argument."""
    _check("table", table, table, table.shape, DTYPES)
    if dtype not in (None, *DTYPES):
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"embed_splice: dtype is {dtype}, expected one of {expected}")
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(
            f"embed_splice: table has shape {tuple(table.shape)}, expected (V, C) with V, C > 0"
        )
    v, c = table.shape
    if image_tokens.dim() != 2:
        raise ValueError(
            f"embed_splice: image_tokens has shape {tuple(image_tokens.shape)}, expected (R, {c})"
        )
    _check("image_tokens", image_tokens, table, (len(image_tokens), c), DTYPES)
    if v + len(image_tokens) >= 2**31:
        raise ValueError(
            f"embed_splice: table has {v:,} rows, "
            "which together with the image tokens exceed 32-bit keys"
        )
    _check("input_ids", input_ids, table, (input_ids.numel(),), (torch.int64,))
    _check("image_rows", image_rows, table, input_ids.shape, (torch.int32,))
    t = len(input_ids)
    h = table.new_empty(t, c, dtype=dtype)
    keys = torch.empty_like(image_rows)
    if t:
        grid = (triton.cdiv(c, FORWARD["BLOCK_C"]) * triton.cdiv(t, FORWARD["BLOCK_T"]),)
        _embed_splice_fwd_kernel[grid](
            input_ids, table, image_rows, image_tokens, h, keys, t, v, C=c, **FORWARD
        )
    return h, keys


@embed_splice_fwd.register_fake
def _(input_ids, table, image_rows, image_tokens, dtype=None):
    h = table.new_empty(input_ids.shape[0], table.shape[1], dtype=dtype)
    return h, torch.empty_like(image_rows)


@torch.library.custom_op("nanovlm_fast::embed_splice_bwd", mutates_args=())
def embed_splice_bwd(
    dh: Tensor,
    keys: Tensor,
    table_rows: int,
    image_rows: int,
    table_dtype: torch.dtype,
    image_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return d table (table_rows, C) in table_dtype and d image_tokens (image_rows, C).

    d image_tokens has image_dtype. The module docstring describes the two passes.
    """
    # Zeros, not empty: rows that no position shows are never written.
    dtable = dh.new_zeros(table_rows, dh.shape[-1], dtype=table_dtype)
    return dtable, _sum_rows(dh, keys, dtable, image_rows, image_dtype, add=False)


@torch.library.custom_op("nanovlm_fast::embed_splice_bwd_add", mutates_args=("dtable",))
def embed_splice_bwd_add(
    dh: Tensor, keys: Tensor, dtable: Tensor, image_rows: int, image_dtype: torch.dtype
) -> Tensor:
    """As `embed_splice_bwd`, with d table added to `dtable` (V, C); return d image_tokens."""
    _check("dtable", dtable, dh, (len(dtable), dh.shape[-1]), DTYPES)
    return _sum_rows(dh, keys, dtable, image_rows, image_dtype, add=True)


@embed_splice_bwd_add.register_fake
def _(dh, keys, dtable, image_rows, image_dtype):
    return dh.new_empty(image_rows, dh.shape[1], dtype=image_dtype)


def _sum_rows(
    dh: Tensor, keys: Tensor, dtable: Tensor, image_rows: int, image_dtype: torch.dtype, add: bool
) -> Tensor:
    """Write d table into `dtable`, or add it there; return d image_tokens."""
    _check("dh", dh, dh, (len(keys), dh.shape[-1]), DTYPES)
    t, c = dh.shape
    table_rows = len(dtable)
    dimage = dh.new_zeros(image_rows, c, dtype=image_dtype)
    if t:
        keys, order = keys.sort(stable=True)  # stable: equal keys keep one order of summation
        chunks = triton.cdiv(t, CHUNK)
        parts = dh.new_empty(2, chunks, c, dtype=torch.float32)
        grid = (triton.cdiv(chunks, CHUNKS["ROWS"]), triton.cdiv(c, CHUNKS["BLOCK_C"]))
        _embed_splice_bwd_chunks_kernel[grid](
            dh, keys, order, dtable, dimage, parts, t, table_rows, chunks, C=c, ADD=add, **CHUNKS
        )
        if chunks > 1:  # a run that crosses chunks begins in any chunk but the last
            _embed_splice_bwd_parts_kernel[(chunks - 1, triton.cdiv(c, PARTS["BLOCK_C"]))](
                keys, dtable, dimage, parts, t, table_rows, chunks, C=c, ADD=add, **PARTS
            )
    return dimage


@embed_splice_bwd.register_fake
def _(dh, keys, table_rows, image_rows, table_dtype, image_dtype):
    dtable = dh.new_empty(table_rows, dh.shape[1], dtype=table_dtype)
    dimage = dh.new_empty(image_rows, dh.shape[1], dtype=image_dtype)
    return dtable, dimage


def _setup_context(ctx, inputs, output) -> None:
    _, table, _, image_tokens, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.sizes = len(table), len(image_tokens), table.dtype, image_tokens.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dh, _dkeys):
    dtable, dimage = embed_splice_bwd(dh.contiguous(), *ctx.saved_tensors, *ctx.sizes)
    return None, dtable, None, dimage, None


embed_splice_fwd.register_autograd(_backward, setup_context=_setup_context)


def embed_splice(
    input_ids: Tensor,
    table: Tensor,
    image_rows: Tensor,
    image_tokens: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return h (T, C) in `dtype`, by default the table's.

    h[t] is image_tokens[image_rows[t]] where that row is not -1, and table[input_ids[t]] elsewhere.
    Differentiable in table and image_tokens; the ids at image positions are ignored. Inputs that
    are not contiguous are copied. A CPU tensor runs the reference (or Triton's interpreter under
    TRITON_INTERPRET=1). Raises TypeError or ValueError that names the argument.
    """
    if not (table.is_cuda or INTERPRET):
        return embed_splice_reference(input_ids, table, image_rows, image_tokens, dtype)
    inputs = (tensor.contiguous() for tensor in (input_ids, table, image_rows, image_tokens))
    return embed_splice_fwd(*inputs, dtype)[0]


class _Tied(torch.autograd.Function):
    """`embed_splice_tied`. A custom operator may not return its input, hence the other form."""

    @staticmethod
    def forward(ctx, input_ids, table, image_rows, image_tokens, dtype):
        h, keys = embed_splice_fwd(input_ids, table, image_rows, image_tokens, dtype)
        ctx.save_for_backward(keys)
        ctx.sizes = len(image_tokens), image_tokens.dtype
        return h, table.view_as(table)

    @staticmethod
    def backward(ctx, dh, dtable):
        # What arrives may be others' too. The compiler knows, and copies only where that is so.
        if torch.compiler.is_compiling():
            dtable = dtable.contiguous()
        else:
            dtable = dtable.clone(memory_format=torch.contiguous_format)
        dimage = embed_splice_bwd_add(dh.contiguous(), *ctx.saved_tensors, dtable, *ctx.sizes)
        return None, dtable, None, dimage, None


def embed_splice_tied(
    input_ids: Tensor,
    table: Tensor,
    image_rows: Tensor,
    image_tokens: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `embed_splice`'s h and the table, for the head that shares it.

    The table's gradient from there then arrives here, and d table is added to it where it is: two
    gradients of a large table would cost a memset, a second buffer and a pass over both.
    """
    if not (table.is_cuda or INTERPRET):
        return embed_splice_reference(input_ids, table, image_rows, image_tokens, dtype), table
    inputs = (tensor.contiguous() for tensor in (input_ids, table, image_rows, image_tokens))
    return _Tied.apply(*inputs, dtype)


def make_inputs(
    t: int,
    v: int,
    c: int,
    r: int,
    dtype: torch.dtype,
    device: str,
    image_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict:
    """Arguments of `embed_splice`: r image tokens in order at the front, followed by text.

    The image tokens fill at most half of t. A fifth of the text is one frequent token, as eos or a
    comma would be, so that a long run crosses many chunks; the rest is uniform over the vocabulary.
    """
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(v, (t,), generator=generator, device=device)
    frequent = torch.rand(t, generator=generator, device=device) < 0.2
    rows = torch.arange(t, device=device, dtype=torch.int32)
    shown = min(r, t // 2)
    table = torch.randn(v, c, generator=generator, device=device).to(dtype)
    image_tokens = torch.randn(r, c, generator=generator, device=device).to(image_dtype or dtype)
    return {
        "input_ids": torch.where(frequent, v // 2, ids),
        "table": table,
        "image_rows": torch.where(rows < shown, rows, -1),
        "image_tokens": image_tokens,
    }


def cost(
    t: int, v: int, c: int, r: int, dtype: torch.dtype, image_dtype: torch.dtype | None = None
) -> dict:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    row = c * dtype.itemsize
    image = c * (image_dtype or dtype).itemsize
    shown = min(r, t // 2)
    return {
        "forward": (shown * image + (t - shown) * row + t * row + 16 * t, 0),
        "backward": (t * row + v * row + r * image + 4 * t, t * c),
    }
