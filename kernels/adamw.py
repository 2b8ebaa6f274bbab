"""AdamW of all weights at once, with the bfloat16 copies that a model computes with.

    g = grad * factor                               factor: from clipping the gradient norm
    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    working = w rounded to bf16

Shapes and dtypes, per weight and of any shape, contiguous:
    grad bf16 or fp32 (one type per call); master w, exp_avg m, exp_avg_sq v fp32; working bf16
    step t () fp32, one per weight, since weights may have been frozen for a while

Everything is updated in place. Learning rates, decays and betas come from a small tensor, and so do
the factor and `found_inf` (1: change nothing), so that a CUDA graph can be replayed with new ones
and the host never waits.

Weights lie where they are: the kernel gets a table with the addresses, sizes and groups of all
weights, and a list of chunks (weight, number of the chunk in it). Two launches: a small one counts
the steps and computes each weight's scalars in float64, as PyTorch does; the other updates. Tables
are made on the host and kept, since addresses repeat from step to step.

Bytes per element: 2 or 4 for the gradient, 24 for master and moments, 2 for the working copy.

AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019). One launch over chunks
of many tensors is apex' and PyTorch's multi-tensor apply, which passes addresses as arguments of a
launch and therefore needs one launch for every few dozen tensors.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GRADIENTS = (torch.bfloat16, torch.float32)
CHUNK = 2048  # elements per program: 8 per thread, in loads of 16 bytes
ALIGNMENT = 16  # bytes; PyTorch's allocator gives more, and a view may have less
# Columns of the table: addresses of grad, master, m, v, working (0: none) and step, size, group.
COLUMNS = tl.constexpr(8)
# lr, beta1, beta2, eps, weight decay of a group, float64.
RATES = tl.constexpr(5)
# decay, beta1, 1 - beta1, beta2, 1 - beta2, step size, sqrt(1 - beta2^t), eps of a weight, float32.
SCALARS = tl.constexpr(8)


def adamw_reference(
    grads: list[Tensor], masters: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    working: list[Tensor], steps: list[Tensor], rates: Tensor, groups: list[int],
    found_inf: Tensor | None = None, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """Plain PyTorch, in place, one weight after the other; same signature as `adamw`."""
    if found_inf is not None and bool(found_inf):
        return
    rows = zip(grads, masters, exp_avgs, exp_avg_sqs, steps, groups, strict=True)
    for grad, master, exp_avg, exp_avg_sq, step, group in rows:
        lr, beta1, beta2, eps, weight_decay = rates[group].tolist()
        g = grad.float() if factor is None else grad.float() * factor
        step += 1
        master.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        count = step.item()
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
        master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**count))
    for copy, master in zip(working, masters, strict=bool(working)):
        copy.copy_(master)


@triton.jit
def _adamw_scalars_kernel(
    table_ptr, rates_ptr, found_inf_ptr, scalars_ptr, N,
    HAS_FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    step_ptr = tl.load(table_ptr + (rows * COLUMNS + 5), mask=inside, other=0)
    step_ptr = step_ptr.to(tl.pointer_type(tl.float32))
    group = tl.load(table_ptr + (rows * COLUMNS + 7), mask=inside, other=0)
    step = tl.load(step_ptr, mask=inside, other=1.0)
    if HAS_FOUND_INF:
        # A skipped update is not counted.
        step += 1.0 - tl.load(found_inf_ptr)
    else:
        step += 1.0
    tl.store(step_ptr, step, mask=inside)
    rate = group * RATES
    lr = tl.load(rates_ptr + rate)
    beta1 = tl.load(rates_ptr + (rate + 1))
    beta2 = tl.load(rates_ptr + (rate + 2))
    eps = tl.load(rates_ptr + (rate + 3))
    weight_decay = tl.load(rates_ptr + (rate + 4))
    # At least 1, as the very first update may be skipped: 0 / 0 helps nobody who looks for a NaN.
    count = tl.maximum(step, 1.0).to(tl.float64)
    bias1 = 1.0 - tl.exp(count * tl.log(beta1))
    bias2 = 1.0 - tl.exp(count * tl.log(beta2))
    out = rows * SCALARS
    tl.store(scalars_ptr + out, (1.0 - lr * weight_decay).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 1), beta1.to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 2), (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 3), beta2.to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 4), (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 5), (lr / bias1).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 6), tl.sqrt(bias2).to(tl.float32), mask=inside)
    tl.store(scalars_ptr + (out + 7), eps.to(tl.float32), mask=inside)


@triton.jit
def _address(table_ptr, column: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(kind))
    # Without the hint the compiler must assume that loads of 16 bytes are not aligned.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update_chunk(
    grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, working_ptr, scalars_ptr, factor, offsets,
    inside, HAS_WORKING: tl.constexpr,
):  # fmt: skip
    grad = tl.load(grad_ptr + offsets, mask=inside).to(tl.float32) * factor
    master = tl.load(master_ptr + offsets, mask=inside)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside)
    decay = tl.load(scalars_ptr)
    exp_avg = tl.load(scalars_ptr + 1) * exp_avg + tl.load(scalars_ptr + 2) * grad
    squares = tl.load(scalars_ptr + 4) * grad * grad
    exp_avg_sq = tl.load(scalars_ptr + 3) * exp_avg_sq + squares
    denominator = tl.sqrt(exp_avg_sq) / tl.load(scalars_ptr + 6) + tl.load(scalars_ptr + 7)
    master = master * decay - tl.load(scalars_ptr + 5) * exp_avg / denominator
    tl.store(master_ptr + offsets, master, mask=inside)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=inside)
    if HAS_WORKING:
        tl.store(working_ptr + offsets, master.to(tl.bfloat16), mask=inside)


@triton.jit
def _adamw_kernel(
    table_ptr, chunks_ptr, scalars_ptr, found_inf_ptr, factor_ptr,
    NARROW: tl.constexpr, HAS_WORKING: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    HAS_FACTOR: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * 2
    row = tl.load(chunks_ptr + chunk).to(tl.int64)
    start = tl.load(chunks_ptr + (chunk + 1)).to(tl.int64) * CHUNK
    weight_ptr = table_ptr + row * COLUMNS
    grad_ptr = _address(weight_ptr, 0, tl.bfloat16 if NARROW else tl.float32, ALIGNED)
    master_ptr = _address(weight_ptr, 1, tl.float32, ALIGNED)
    exp_avg_ptr = _address(weight_ptr, 2, tl.float32, ALIGNED)
    exp_avg_sq_ptr = _address(weight_ptr, 3, tl.float32, ALIGNED)
    working_ptr = _address(weight_ptr, 4, tl.bfloat16, ALIGNED)
    size = tl.load(weight_ptr + 6)
    if HAS_FOUND_INF:
        # Selected and not multiplied: NaN times 0 is NaN. A weight of no elements stays as it is.
        size = tl.where(tl.load(found_inf_ptr) == 0.0, size, 0)
    factor = tl.load(factor_ptr) if HAS_FACTOR else 1.0
    offsets = start + tl.arange(0, CHUNK).to(tl.int64)
    scalars_ptr += row * SCALARS
    # Masks that depend on a size read from memory turn accesses of 16 bytes into ones of 4, so only
    # a weight's last chunk has them.
    if start + CHUNK <= size:
        _update_chunk(
            grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, working_ptr, scalars_ptr, factor,
            offsets, None, HAS_WORKING,
        )  # fmt: skip
    else:
        _update_chunk(
            grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, working_ptr, scalars_ptr, factor,
            offsets, offsets < size, HAS_WORKING,
        )  # fmt: skip


def _address_of(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 of one without memory, of which shapes are traced."""
    return 0 if isinstance(tensor, torch._subclasses.FakeTensor) else tensor.data_ptr()


# What CUDA graphs copy from at each replay, long after the capture.
_captured: list[Tensor] = []


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of values from the host, which does not wait until they have arrived."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda" or isinstance(host, torch._subclasses.FakeTensor):
        return host.to(device)
    host = host.pin_memory()
    if _capturing(device):
        _captured.append(host)
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table of weights (n, COLUMNS) int64."""
    return on_device(rows, torch.int64, device)


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The list of chunks (chunks, 2) int32: 100,000 for nanoVLM, so that addresses do not matter.

    Gradients may lie elsewhere at each step, and making the list takes longer than the update.
    """
    chunks: list[tuple[int, int]] = []
    for number, size in enumerate(sizes):
        chunks += [(number, chunk) for chunk in range(triton.cdiv(size, CHUNK))]
    return on_device(chunks, torch.int32, device).view(-1, 2)


def _check(name: str, tensors: list[Tensor], masters: list[Tensor], dtypes: tuple) -> None:
    if len(tensors) != len(masters):
        raise ValueError(f"adamw: {len(tensors)} {name}, {len(masters)} masters")
    for number, (tensor, master) in enumerate(zip(tensors, masters, strict=True)):
        what = f"adamw: {name}[{number}]"
        if tensor.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise TypeError(f"{what} is {tensor.dtype}, expected one of {expected}")
        if tensor.device != master.device:
            raise ValueError(f"{what} is on {tensor.device}, its master is on {master.device}")
        if tensor.shape != master.shape and name != "steps":
            shapes = f"{tuple(tensor.shape)}, expected {tuple(master.shape)}"
            raise ValueError(f"{what} has shape {shapes}")
        if not tensor.is_contiguous():
            raise ValueError(f"{what} must be contiguous, its strides are {tensor.stride()}")


MUTATED = ("masters", "exp_avgs", "exp_avg_sqs", "working", "steps")


@torch.library.custom_op("nanovlm_fast::adamw", mutates_args=MUTATED)
def adamw(
    grads: list[Tensor], masters: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    working: list[Tensor], steps: list[Tensor], rates: Tensor, groups: list[int],
    found_inf: Tensor | None = None, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """Update masters, moments, steps and working copies in place; raises if one does not fit.

    `working` may be empty: then the masters are what the model computes with. `groups` gives each
    weight's row of `rates` (groups, RATES) float64. `found_inf` and `factor` are one float32 value
    each. For tensors on a GPU, or in Triton's interpreter; there is no plain path behind it.
    """
    float32 = (torch.float32,)
    _check("masters", masters, masters, float32)
    _check("grads", grads, masters, GRADIENTS if not grads else (grads[0].dtype,))
    for name, tensors in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("steps", steps)):
        _check(name, tensors, masters, float32)
    if working:
        _check("working", working, masters, (torch.bfloat16,))
    if not masters:
        return
    _check("grads", grads[:1], masters[:1], GRADIENTS)
    lists = (grads, masters, exp_avgs, exp_avg_sqs, working or masters, steps)
    columns = [[_address_of(tensor) for tensor in tensors] for tensors in lists]
    aligned = all(address % ALIGNMENT == 0 for column in columns[:5] for address in column)
    sizes = tuple(master.numel() for master in masters)
    device = masters[0].device
    rows = tuple(zip(*columns, sizes, groups, strict=True))
    if _capturing(device):
        # Not from a cache: nothing is copied before the replay, and a graph's memory is its own.
        table = _table.__wrapped__(rows, device)
        chunks = _chunks.__wrapped__(sizes, device)
    else:
        table = _table(rows, device)
        chunks = _chunks(sizes, device)
    scalars = rates.new_empty((len(masters), SCALARS.value), dtype=torch.float32)
    has_found_inf = found_inf is not None
    _adamw_scalars_kernel[(triton.cdiv(len(masters), 128),)](
        table, rates, found_inf, scalars, len(masters), HAS_FOUND_INF=has_found_inf, BLOCK=128
    )
    if len(chunks):
        _adamw_kernel[(len(chunks),)](
            table, chunks, scalars, found_inf, factor,
            NARROW=grads[0].dtype == torch.bfloat16, HAS_WORKING=bool(working),
            HAS_FOUND_INF=has_found_inf, HAS_FACTOR=factor is not None, ALIGNED=aligned,
            CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip


@adamw.register_fake
def _(*args, **kwargs):
    return None


def make_inputs(
    sizes: list[int], dtype: torch.dtype, device: str, working: bool = True, seed: int = 0
) -> dict:
    """Arguments of `adamw` for weights of so many elements, after ten steps, in two groups.

    `dtype` is the gradients'.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(scale: float, kind: torch.dtype = torch.float32) -> list[Tensor]:
        drawn = [torch.randn(size, generator=generator, device=device) for size in sizes]
        return [one.mul(scale).to(kind) for one in drawn]

    masters = random(0.02)
    rates = [[1e-3, 0.9, 0.999, 1e-8, 0.01], [2e-4, 0.9, 0.99, 1e-8, 0.0]]
    return {
        "grads": random(1e-2, dtype),
        "masters": masters,
        "exp_avgs": random(1e-3),
        "exp_avg_sqs": [one.square() for one in random(1e-2)],
        "working": [one.bfloat16() for one in masters] if working else [],
        "steps": [torch.full((), 10.0, device=device) for _ in sizes],
        "rates": torch.tensor(rates, dtype=torch.float64, device=device),
        "groups": [number % 2 for number in range(len(sizes))],
        "found_inf": torch.zeros((), device=device),
        "factor": torch.full((), 0.5, device=device),
    }


def cost(sizes: list[int], dtype: torch.dtype, working: bool = True) -> dict[str, tuple[int, int]]:
    """Fewest bytes and FLOPs of an update: {'forward': (bytes, FLOPs), 'backward': (0, 0)}."""
    elements = sum(sizes)
    per_element = dtype.itemsize + 24 + (2 if working else 0)
    return {"forward": (elements * per_element, 14 * elements), "backward": (0, 0)}
