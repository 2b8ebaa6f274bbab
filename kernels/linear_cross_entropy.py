"""Language-model head and softmax cross-entropy in one operation that never holds all logits.

    logits = h W^T                                      (L, V), rounded to h's dtype, as a GEMM does
    loss_sum = sum over labelled rows of logsumexp(logits) - logits[label]
    count = number of labelled rows
    d logits = softmax(logits) - onehot(label),  d h = d logits W,  d W = d logits^T h

Shapes and dtypes:
    h (L, H) bf16, fp16 or fp32
    weight (V, H) of h's dtype or float32 (rounded to h's dtype for the products)
    labels (L,) int64, -100 where a row carries no loss: its gradient is exactly zero

Any other label outside [0, V) is an error of the caller. Raising an exception would need a host
synchronisation, so the loss and the gradients of that row become NaN instead, and with them
loss_sum. (The reference raises IndexError on a CPU.)

Rows are processed in chunks of thousands. For each chunk cuBLAS writes the logits, one kernel
replaces them in place by their gradient, and two products consume it. The gradients are therefore
computed in the forward, for an upstream gradient of 1, and the backward only scales them. (For the
same reason, scaling an fp16 loss does not protect d logits from underflow.)

In memory a row of logits is as long as the next multiple of LANE values. So every row is aligned to
16 bytes whatever V is (49,218 = 2 x 24,609 with tokens for images), for the kernel's 128-bit loads
and for cuBLAS.

The kernel reads a row twice: forwards for the statistics, then backwards for the gradient, so that
the second pass starts with what the caches still hold. Programs of 16 warps and 64 registers keep
two rows of 98 KB (bf16, V = 49152) on a multiprocessor, 26 MB on an H100, with about 96 KB of loads
in flight. dW is accumulated in float32 by the product itself (out = dW + A B), without a temporary.

FLOPs: 6 L V H; 2 L V H without gradients. Bytes per chunk of C rows: C V values are written, read,
written, and read twice; V H float32 values are read and written. The latter is what makes chunks of
a few hundred rows slow: 226 MB per chunk at V = 49152, H = 576.

Computing gradients in the forward, chunk by chunk, follows Liger's fused linear cross-entropy; see
also Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
IGNORE = -100
# d h of a chunk is 44 tiles of 128 rows x 3 tiles of 192 columns: one tile for each of an H100's
# 132 multiprocessors, so the product is one full wave. `cost` says what memory this takes.
CHUNK = 5632
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LANE = 8  # neighbours that one thread loads: 16 bytes of bf16
SCALE_BLOCK = 4096  # elements per program of the backward
# exp(x) is computed as exp2(x * LOG2E), which is a single instruction.
LOG2E = tl.constexpr(1.4426950408889634)


def linear_cross_entropy_reference(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch with all logits at once; same signature as `linear_cross_entropy`.

    The logits are rounded to h's dtype; from there on everything is at least float32.
    """
    logits = F.linear(h.flatten(0, -2), weight.to(h.dtype))
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (labels >= 0).sum()


@triton.jit
def _add_block(largest, total, x):
    """Update the running maximum and sum of exp(x - maximum) of each row with block x."""
    x = x.to(tl.float32)
    higher = tl.maximum(largest, tl.max(x, axis=1))
    total *= tl.exp2((largest - higher) * LOG2E)  # the old terms, relative to the new maximum
    return higher, total + tl.sum(tl.exp2((x - higher[:, None]) * LOG2E), axis=1)


@triton.jit
def _load_block(logits_ptr, columns, values, stride, PADDED: tl.constexpr):
    """Columns of a row with so many values, -inf beyond. In memory it is `stride` long."""
    # A mask of `values` could change within the 16 bytes of a load, which would be split then.
    x = tl.load(logits_ptr + columns, mask=columns < stride, other=float("-inf"))
    if PADDED:
        x = tl.where(columns < values, x, float("-inf"))
    return x


@triton.jit
def _gradient(x, largest, inverse, is_label, counted):
    probability = tl.exp2((x.to(tl.float32) - largest) * LOG2E) * inverse
    return tl.where(counted, tl.where(is_label, probability - 1.0, probability), 0.0)


# Chunks start at any row, so these two pointers are aligned in some chunks and not in others;
# without the option Triton would compile a variant for each case.
@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "loss_ptr"])
def _linear_cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, loss_ptr,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK_V: tl.constexpr, LANE: tl.constexpr,
    IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inside = (label >= 0) & (label < V)
    logits_ptr += row * STRIDE
    # Read the label's logit now: the gradient overwrites it below.
    target = tl.load(logits_ptr + label, mask=inside, other=0.0).to(tl.float32)
    # Columns as (BLOCK_V / LANE, LANE): the LANE neighbours are the 16 bytes that one thread loads,
    # so reductions over LANE inside the loop need no other thread.
    lanes = tl.arange(0, BLOCK_V // LANE)[:, None].to(tl.int64) * LANE
    columns = lanes + tl.arange(0, LANE)[None, :]
    # A finite start, not -inf: a lane that sees only padding then adds exp2(-huge) = 0 and no NaN.
    largest = tl.full((BLOCK_V // LANE,), -1.0e38, dtype=tl.float32)
    total = tl.zeros((BLOCK_V // LANE,), dtype=tl.float32)
    padded: tl.constexpr = STRIDE != V
    x = _load_block(logits_ptr, columns, V, STRIDE, padded)
    for start in range(BLOCK_V, V, BLOCK_V):  # the next block is loading while x is processed
        ahead = _load_block(logits_ptr + start, columns, V - start, STRIDE - start, padded)
        largest, total = _add_block(largest, total, x)
        x = ahead
    largest, total = _add_block(largest, total, x)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp2((largest - row_largest) * LOG2E), axis=0)
    counted = label != IGNORED
    loss = row_largest - target + tl.log(row_total)
    loss = tl.where(inside, loss, tl.where(counted, float("nan"), 0.0))
    tl.store(loss_ptr + row, loss)
    if WITH_GRADIENT:
        # Threads overwrite logits from here on, so every warp must have read the label's logit.
        tl.debug_barrier()
        inverse = tl.where(inside, 1.0 / row_total, float("nan"))
        last: tl.constexpr = (V - 1) // BLOCK_V * BLOCK_V
        # Backwards: x still holds the last block, and the blocks before it are in the caches.
        for step in range(0, last, BLOCK_V):
            start = last - step
            # The next block is loaded before this one is stored, to keep loads in flight.
            ahead = tl.load(logits_ptr + start - BLOCK_V + columns)
            gradient = _gradient(x, row_largest, inverse, start + columns == label, counted)
            tl.store(logits_ptr + start + columns, gradient, mask=columns < STRIDE - start)
            x = ahead
        gradient = _gradient(x, row_largest, inverse, columns == label, counted)
        tl.store(logits_ptr + columns, gradient, mask=columns < STRIDE)


@triton.jit
def _linear_cross_entropy_bwd_kernel(x_ptr, scale_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, x * tl.load(scale_ptr).to(tl.float32), mask=offsets < N)


def _launch(v: int) -> dict[str, int]:
    """Block and warps for rows of v values.

    16 elements per thread are two 128-bit loads of bf16, with two more of the next block in flight.
    """
    block = min(8192, max(64, triton.next_power_of_2(v)))
    warps = max(4, block // 512)
    return {"STRIDE": _row(v), "BLOCK_V": block, "LANE": LANE, "num_warps": warps}


def _row(v: int) -> int:
    """Values that a row of v takes in memory."""
    return triton.cdiv(v, LANE) * LANE


def _check(h: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> None:
    def fail(error: type[Exception], text: str) -> None:
        raise error(f"linear_cross_entropy: {text}")

    weight_dtypes = (h.dtype, torch.float32)
    for name, tensor, dtypes in (
        ("h", h, DTYPES),
        ("weight", weight, weight_dtypes),
        ("labels", labels, (torch.int64,)),
    ):
        if tensor.dtype not in dtypes:
            expected = ", ".join(map(str, dict.fromkeys(dtypes)))
            fail(TypeError, f"{name} is {tensor.dtype}, expected one of {expected}")
        if tensor.device != h.device:
            fail(ValueError, f"{name} is on {tensor.device}, h is on {h.device}")
        if not tensor.is_contiguous():
            fail(ValueError, f"{name} must be contiguous, its strides are {tensor.stride()}")
    if h.dim() != 2 or h.shape[1] < 1:
        fail(ValueError, f"h has shape {tuple(h.shape)}, expected (L, H) with H > 0")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != h.shape[1]:
        expected = f"(V, {h.shape[1]}) with V > 0"
        fail(ValueError, f"weight has shape {tuple(weight.shape)}, expected {expected}")
    if labels.shape != h.shape[:1]:
        fail(ValueError, f"labels has shape {tuple(labels.shape)}, expected {tuple(h.shape[:1])}")
    if chunk < 1:
        fail(ValueError, f"chunk is {chunk}, expected at least 1")


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Set total (float32) to a @ b if `first`, else add a @ b to it.

    The addition happens in float32 inside the product, so there is no temporary.
    """
    beta = 0 if first else 1  # beta = 0 does not read `total`, which is uninitialised at first
    if a.dtype == total.dtype or not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    else:  # 16-bit factors with a float32 result: only CUDA has this product
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


def _empty_gradients(
    h: Tensor, weight: Tensor, h_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised d h in h's dtype and d weight in float32; (0,) where one is not asked for."""
    dh = torch.empty_like(h) if h_gradient else h.new_empty(0)
    if weight_gradient:
        return dh, torch.empty_like(weight, dtype=torch.float32)
    return dh, h.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("nanovlm_fast::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int, h_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of h (L, H); raises if an argument does not fit.

    Returns loss_sum () float32, d h (L, H) in h's dtype and d weight (V, H) in float32. The
    gradients are those of loss_sum; a gradient that is not asked for is empty.
    """
    _check(h, weight, labels, chunk)
    rows = h.shape[0]
    vocabulary = weight.shape[0]
    with_gradient = h_gradient or weight_gradient
    dh, dweight = _empty_gradients(h, weight, h_gradient, weight_gradient)
    if rows == 0:
        return h.new_zeros((), dtype=torch.float32), dh, dweight.zero_()
    head = weight.to(h.dtype)
    chunk = triton.cdiv(rows, triton.cdiv(rows, chunk))  # as many chunks, but all of one size
    # The only logits: every chunk reuses this buffer.
    buffer = h.new_empty((chunk, _row(vocabulary)))[:, :vocabulary]
    losses = h.new_empty(rows, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = buffer[: part.stop - start]
        torch.mm(h[part], head.t(), out=logits)
        _linear_cross_entropy_fwd_kernel[(len(logits),)](
            logits, labels[part], losses[part],
            V=vocabulary, IGNORED=IGNORE, WITH_GRADIENT=with_gradient, **_launch(vocabulary),
        )  # fmt: skip
        # `logits` now holds d logits.
        if h_gradient:
            torch.mm(logits, head, out=dh[part])
        if weight_gradient:
            _add_product(dweight, logits.t(), h[part], first=start == 0)
    return losses.sum(), dh, dweight


@linear_cross_entropy_fwd.register_fake
def _(h, weight, labels, chunk, h_gradient, weight_gradient):
    dh, dweight = _empty_gradients(h, weight, h_gradient, weight_gradient)
    return h.new_empty((), dtype=torch.float32), dh, dweight


@torch.library.custom_op("nanovlm_fast::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient (contiguous) * scale (): multiplied in float32, rounded once to dtype."""
    out = torch.empty_like(gradient, dtype=dtype)
    if n := gradient.numel():
        _linear_cross_entropy_bwd_kernel[(triton.cdiv(n, SCALE_BLOCK),)](
            gradient, scale, out, n, BLOCK=SCALE_BLOCK, num_warps=8
        )
    return out


@linear_cross_entropy_bwd.register_fake
def _(gradient, scale, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, weight, _, _, ctx.h_gradient, ctx.weight_gradient = inputs
    # The gradients are saved as outputs that require a gradient themselves, so that a second
    # derivative raises an error instead of being silently wrong.
    ctx.save_for_backward(*output[1:])
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _ddh, _ddweight):
    needs_h, needs_weight, *_ = ctx.needs_input_grad
    if needs_h > ctx.h_gradient or needs_weight > ctx.weight_gradient:
        raise RuntimeError(
            "linear_cross_entropy: the forward was not asked to make a gradient that is needed now"
        )
    dh, dweight = ctx.saved_tensors
    if dloss is None:
        return (None,) * 6
    dh = linear_cross_entropy_bwd(dh, dloss, dh.dtype) if needs_h else None
    dweight = linear_cross_entropy_bwd(dweight, dloss, ctx.dtype) if needs_weight else None
    return dh, dweight, None, None, None, None


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return (loss_sum, count): the summed cross-entropy (float32), and the labelled rows (int64).

    h (..., H), labels (...), weight (V, H). Differentiable in h and weight, once. At most `chunk`
    rows of logits exist at a time. Inputs that are not contiguous are copied. A CPU tensor runs the
    reference (or Triton's interpreter under TRITON_INTERPRET=1). Raises TypeError or ValueError
    that names the argument; the module docstring says what wrong labels do.
    """
    if not (h.is_cuda or INTERPRET):
        return linear_cross_entropy_reference(h, weight, labels, chunk)
    # Under no_grad the operator skips the gradients, which are two thirds of its FLOPs.
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (h, weight)]
    h2d = h.reshape(-1, h.shape[-1]).contiguous()
    flat_labels = labels.reshape(-1).contiguous()
    loss_sum = linear_cross_entropy_fwd(h2d, weight.contiguous(), flat_labels, chunk, *wanted)[0]
    # Outside of the operator: who does not need it, as training, then does not compute it.
    return loss_sum, (flat_labels >= 0).sum()


def make_inputs(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: str,
    ignored: float = 0.2, seed: int = 0,
) -> dict:  # fmt: skip
    """Arguments of `linear_cross_entropy`: h (rows, width) and weight give logits of scale 1.

    `ignored` is the share of the labels that are -100.
    """
    generator = torch.Generator(device).manual_seed(seed)
    h = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device=device)
    weight = weight.mul(width**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    skipped = torch.rand(rows, generator=generator, device=device) < ignored
    return {"h": h, "weight": weight, "labels": labels.masked_fill(skipped, IGNORE)}


def cost(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, chunk: int = CHUNK
) -> dict[str, tuple[int, int] | int]:
    """Fewest bytes and FLOPs with both gradients, and the peak memory.

    {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs), 'memory': peak bytes beside inputs}

    The fewest bytes are those of inputs and outputs; the logits of the chunks add 5 rows *
    vocabulary values to them. The peak is in the forward: one chunk of logits, the float32 dW, d h
    and the losses of the rows. cuBLAS' workspace and, beside 16-bit h, the rounded copy of a
    float32 weight are not counted.
    """
    h = rows * width * dtype.itemsize
    weight = vocabulary * width * dtype.itemsize
    dweight = vocabulary * width * 4
    chunk = triton.cdiv(rows, max(1, triton.cdiv(rows, chunk)))
    logits = chunk * _row(vocabulary) * dtype.itemsize
    return {
        "forward": (2 * h + weight + dweight + 12 * rows, 6 * rows * vocabulary * width),
        "backward": (2 * h + weight + dweight, (rows + vocabulary) * width),
        "memory": logits + dweight + h + 4 * rows,
    }
