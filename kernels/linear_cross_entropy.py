"""Head product and softmax cross-entropy in one operation, with both gradients, without ever holding all logits.

    logits = h W^T                                      (L, V), rounded to h's dtype as the head's product is
    loss_sum = sum over rows of logsumexp(logits) - logits[label],        count = number of such rows
    d logits = softmax(logits) - onehot(label),  d h = d logits W,  d W = d logits^T h

h (L, H) bf16, fp16 or fp32; weight (V, H) of h's dtype or float32 (rounded to h's dtype for the products); labels (L,)
int64, -100 where a row carries no loss: its gradient is exactly zero. Any other label outside [0, V) is the caller's
mistake. There is no host sync, so no exception can tell: the row's loss and gradients, and so loss_sum, become NaN (the
reference raises IndexError on a CPU).

Rows go through in chunks of thousands: cuBLAS writes the chunk's logits, one kernel turns them in place into their
gradient, two products use it. The gradients are therefore made in the forward, for an upstream gradient of 1, and the
backward scales them (a scaled fp16 loss does not keep d logits from underflowing). The kernel reads a row twice,
forwards for the statistics and backwards for the gradient, so that the second reading comes from the caches: programs
of 16 warps and 64 registers keep two rows of 98 KB (bf16, V = 49152) on a multiprocessor, 26 MB on an H100, with about
96 KB of loads in flight. dW is accumulated in float32 by the product itself (out = dW + A B, no temporary).

FLOPs: 6 L V H, 2 L V H without gradients. Bytes a chunk of C rows: C V values written, read and written, read twice;
V H float32 read and written, which is what makes chunks of a few hundred rows slow: 226 MB each at V = 49152, H = 576.
Gradients in the forward and chunks as in Liger's fused linear cross-entropy; cf. Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024).
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
CHUNK = 5632  # 44 tiles of 128 rows x 3 of 192 columns of d h: one wave on 132 multiprocessors; memory see `cost`
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_BLOCK = 4096  # elements a program of the backward
LOG2E = tl.constexpr(1.4426950408889634)


def linear_cross_entropy_reference(h: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK):
    """Plain PyTorch, all logits at once: rounded to h's dtype, at least float32 from there; same signature."""
    logits = F.linear(h.flatten(0, -2), weight.to(h.dtype))
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (labels >= 0).sum()


@triton.jit
def _add_block(largest, total, x):
    """Running maximum and sum of exp(x - maximum) of each row of x."""
    x = x.to(tl.float32)
    higher = tl.maximum(largest, tl.max(x, axis=1))
    total *= tl.exp2((largest - higher) * LOG2E)
    return higher, total + tl.sum(tl.exp2((x - higher[:, None]) * LOG2E), axis=1)


@triton.jit
def _gradient(x, largest, inverse, is_label, counted):
    probability = tl.exp2((x.to(tl.float32) - largest) * LOG2E) * inverse
    return tl.where(counted, tl.where(is_label, probability - 1.0, probability), 0.0)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "loss_ptr"])  # one variant, wherever a chunk starts
def _linear_cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, loss_ptr,
    V: tl.constexpr, BLOCK_V: tl.constexpr, LANE: tl.constexpr, IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inside = (label >= 0) & (label < V)
    logits_ptr += row * V
    target = tl.load(logits_ptr + label, mask=inside, other=0.0).to(tl.float32)  # before it is overwritten
    # (BLOCK_V / LANE, LANE): LANE neighbours are one thread's 16 bytes, so statistics inside the loop stay in a thread
    columns = tl.arange(0, BLOCK_V // LANE)[:, None].to(tl.int64) * LANE + tl.arange(0, LANE)[None, :]
    largest = tl.full((BLOCK_V // LANE,), -1.0e38, dtype=tl.float32)  # finite: an empty lane adds exp2(-huge) = 0
    total = tl.zeros((BLOCK_V // LANE,), dtype=tl.float32)
    x = tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf"))
    for start in range(BLOCK_V, V, BLOCK_V):  # the next block is under way while one is worked on
        ahead = tl.load(logits_ptr + start + columns, mask=columns < V - start, other=float("-inf"))
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
        tl.debug_barrier()  # no warp writes before every warp has read the label's logit
        inverse = tl.where(inside, 1.0 / row_total, float("nan"))
        last: tl.constexpr = (V - 1) // BLOCK_V * BLOCK_V
        for step in range(0, last, BLOCK_V):  # backwards: the last block is at hand, those before it are in the caches
            start = last - step
            ahead = tl.load(logits_ptr + start - BLOCK_V + columns)
            gradient = _gradient(x, row_largest, inverse, start + columns == label, counted)
            tl.store(logits_ptr + start + columns, gradient, mask=columns < V - start)
            x = ahead
        gradient = _gradient(x, row_largest, inverse, columns == label, counted)
        tl.store(logits_ptr + columns, gradient, mask=columns < V)


@triton.jit
def _linear_cross_entropy_bwd_kernel(x_ptr, scale_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, x * tl.load(scale_ptr).to(tl.float32), mask=offsets < N)


def _launch(v: int) -> dict[str, int]:
    """Block and warps for rows of v: 16 elements a thread, two 128-bit loads of bf16, and two more under way."""
    block = min(8192, max(64, triton.next_power_of_2(v)))
    return {"BLOCK_V": block, "LANE": 8, "num_warps": max(4, block // 512)}


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
            fail(TypeError, f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, dict.fromkeys(dtypes)))}")
        if tensor.device != h.device:
            fail(ValueError, f"{name} is on {tensor.device}, h is on {h.device}")
    if h.dim() != 2 or h.shape[1] < 1:
        fail(ValueError, f"h has shape {tuple(h.shape)}, expected (L, H) with H > 0")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != h.shape[1]:
        fail(ValueError, f"weight has shape {tuple(weight.shape)}, expected (V, {h.shape[1]}) with V > 0")
    if labels.shape != h.shape[:1]:
        fail(ValueError, f"labels has shape {tuple(labels.shape)}, expected {tuple(h.shape[:1])}")
    for name, tensor in (("h", h), ("weight", weight), ("labels", labels)):
        if not tensor.is_contiguous():
            fail(ValueError, f"{name} must be contiguous, its strides are {tensor.stride()}")
    if chunk < 1:
        fail(ValueError, f"chunk is {chunk}, expected at least 1")


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) = a @ b, or += a @ b if not the first, added in float32 inside the product: no temporary."""
    beta = 0 if first else 1  # with 0 what is in `total` is not read
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:  # CUDA alone has a float32 result of 16-bit factors
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


@torch.library.custom_op("nanovlm_fast::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    h: Tensor, weight: Tensor, labels: Tensor, chunk: int, h_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (L, H) -> loss_sum () float32, count () int64, d h (L, H) in h's dtype, d weight (V, H) float32.

    The gradients are those of loss_sum; one that is not asked for is empty. Raises on what does not fit.
    """
    _check(h, weight, labels, chunk)
    rows, vocabulary = h.shape[0], weight.shape[0]
    with_gradient = h_gradient or weight_gradient
    dh = torch.empty_like(h) if h_gradient else h.new_empty(0)
    dweight = torch.empty_like(weight, dtype=torch.float32) if weight_gradient else h.new_empty(0, dtype=torch.float32)
    if rows == 0:
        return h.new_zeros((), dtype=torch.float32), labels.new_zeros(()), dh, dweight.zero_()
    head = weight.to(h.dtype)
    chunk = triton.cdiv(rows, triton.cdiv(rows, chunk))  # as many chunks, of one size
    buffer = h.new_empty((chunk, vocabulary))  # the only logits: every chunk's, one after the other
    losses = h.new_empty(rows, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = buffer[: part.stop - start]
        torch.mm(h[part], head.t(), out=logits)
        _linear_cross_entropy_fwd_kernel[(len(logits),)](
            logits, labels[part], losses[part], V=vocabulary, IGNORED=IGNORE, WITH_GRADIENT=with_gradient,
            **_launch(vocabulary),
        )  # fmt: skip
        if h_gradient:
            torch.mm(logits, head, out=dh[part])
        if weight_gradient:
            _add_product(dweight, logits.t(), h[part], first=start == 0)
    return losses.sum(), (labels >= 0).sum(), dh, dweight


@linear_cross_entropy_fwd.register_fake
def _(h, weight, labels, chunk, h_gradient, weight_gradient):
    dh = torch.empty_like(h) if h_gradient else h.new_empty(0)
    dweight = torch.empty_like(weight, dtype=torch.float32) if weight_gradient else h.new_empty(0, dtype=torch.float32)
    return h.new_empty((), dtype=torch.float32), labels.new_empty(()), dh, dweight


@torch.library.custom_op("nanovlm_fast::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient (contiguous) * scale (), the product in float32, rounded once to dtype."""
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
    ctx.save_for_backward(*output[2:])  # as outputs that need a gradient: deriving them again raises, not guesses
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _dcount, _ddh, _ddweight):
    if ctx.needs_input_grad[0] > ctx.h_gradient or ctx.needs_input_grad[1] > ctx.weight_gradient:
        raise RuntimeError("linear_cross_entropy: a gradient is wanted that the forward was not asked to make")
    dh, dweight = ctx.saved_tensors
    if dloss is None:
        return (None,) * 6
    dh = linear_cross_entropy_bwd(dh, dloss, dh.dtype) if ctx.needs_input_grad[0] else None
    dweight = linear_cross_entropy_bwd(dweight, dloss, ctx.dtype) if ctx.needs_input_grad[1] else None
    return dh, dweight, None, None, None, None


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(loss_sum, count): float32, the cross-entropy summed over the rows with a label, and int64, their number.

    h (..., H), labels (...), weight (V, H). Differentiable in h and weight, once. At most `chunk` rows of logits exist
    at a time. Inputs that are not contiguous are copied. A CPU tensor takes the reference (or Triton's interpreter
    under TRITON_INTERPRET=1). Raises TypeError or ValueError naming the argument; for wrong labels see above.
    """
    if not (h.is_cuda or INTERPRET):
        return linear_cross_entropy_reference(h, weight, labels, chunk)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (h, weight)]
    h2d, flat_labels = h.reshape(-1, h.shape[-1]).contiguous(), labels.reshape(-1).contiguous()
    return linear_cross_entropy_fwd(h2d, weight.contiguous(), flat_labels, chunk, *wanted)[:2]


def make_inputs(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: str, ignored: float = 0.2, seed: int = 0
) -> dict:
    """Arguments of `linear_cross_entropy`: h (rows, width), that share of the labels ignored, logits of scale 1."""
    generator = torch.Generator(device).manual_seed(seed)
    h = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device=device).mul(width**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    skipped = torch.rand(rows, generator=generator, device=device) < ignored
    return {"h": h, "weight": weight, "labels": labels.masked_fill(skipped, IGNORE)}


def cost(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, chunk: int = CHUNK
) -> dict[str, tuple[int, int] | int]:
    """{'forward', 'backward'} -> (fewest bytes, FLOPs) with both gradients, and 'memory', the peak bytes beside inputs.

    The fewest bytes are those of inputs and outputs; the chunks' logits add 5 rows * vocabulary values to them. The
    peak is in the forward: one chunk of logits, the float32 dW, d h and the rows' losses (cuBLAS' workspace and, beside
    16-bit h, the rounded copy of a float32 weight come on top).
    """
    h, weight = rows * width * dtype.itemsize, vocabulary * width * dtype.itemsize
    dweight = vocabulary * width * 4
    logits = triton.cdiv(rows, max(1, triton.cdiv(rows, chunk))) * vocabulary * dtype.itemsize
    return {
        "forward": (2 * h + weight + dweight + 12 * rows, 6 * rows * vocabulary * width),
        "backward": (2 * h + weight + dweight, (rows + vocabulary) * width),
        "memory": logits + dweight + h + 4 * rows,
    }


def aot() -> list[dict]:
    """What is compiled ahead of time for sm_90: rows of 49152 in bf16, and the scaling of the float32 dW to bf16."""
    pointers = dict(logits_ptr="*bf16", labels_ptr="*i64", loss_ptr="*fp32")
    scaling = dict(x_ptr="*fp32", scale_ptr="*fp32", out_ptr="*bf16", N="i32")
    return [
        {"kernel": _linear_cross_entropy_fwd_kernel, "signature": pointers, "launch": _launch(49152),
         "constexprs": {"V": 49152, "IGNORED": IGNORE, "WITH_GRADIENT": True}},
        {"kernel": _linear_cross_entropy_bwd_kernel, "signature": scaling, "launch": {"num_warps": 8},
         "constexprs": {"BLOCK": SCALE_BLOCK}},
    ]  # fmt: skip
