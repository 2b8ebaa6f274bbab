"""SwiGLU of a packed projection: one elementwise pass forward, one backward (Shazeer, 2020).

    y = silu(gate) * up,    gate, up = the halves of gate_up's last dimension
    silu(g) = g * sigmoid(g)
    d up = dy * silu(gate)
    d gate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Shapes and dtypes: gate_up (..., 2 I) bf16, fp16 or fp32 -> y (..., I). Everything is float32 until
one rounding at the end.

The halves are read where the GEMM wrote them and the gradient is written packed, so nothing is
split or concatenated. Only gate_up is saved for the backward, which computes the sigmoid again:
it is cheaper than reading it.

Bytes per row: 3 I forward (read 2 I, write I) and 5 I backward (read 3 I, write 2 I), times the
element size.
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


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Plain PyTorch, at least float32 inside; same signature and dtypes as `swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def _tile(M, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Rows (ROWS, 1) int64, columns (1, BLOCK_N) and mask of this program's tile.

    Column blocks vary fastest, so that programs that run together read adjacent memory.
    """
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    rows = ((program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = ((program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return rows, columns, (rows < M) & (columns < N)


@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, y_ptr, M, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):
    rows, columns, inside = _tile(M, N, BLOCK_N, ROWS)
    offsets = rows * (2 * N) + columns
    gate = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (offsets + N), mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + (rows * N + columns), gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, M, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):
    rows, columns, inside = _tile(M, N, BLOCK_N, ROWS)
    offsets = rows * (2 * N) + columns
    dy = tl.load(dy_ptr + (rows * N + columns), mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (offsets + N), mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_up_ptr + offsets, dy * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(dgate_up_ptr + (offsets + N), dy * silu, mask=inside)


def _launch(n: int) -> dict[str, int]:
    """Tile and warps for halves of n columns.

    2,048 elements per program: two 128-bit accesses per thread and tensor.
    """
    block = min(512, triton.next_power_of_2(n))
    return {"BLOCK_N": block, "ROWS": 2048 // block, "num_warps": 4}


def _grid(m: int, n: int, launch: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(m, launch["ROWS"]) * triton.cdiv(n, launch["BLOCK_N"]),)


def _check(
    name: str, tensor: Tensor, like: Tensor, shape: torch.Size | tuple[int, ...], dtypes: tuple
) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise TypeError(f"swiglu: {name} is {tensor.dtype}, expected one of {expected}")
    if tensor.device != like.device:
        raise ValueError(f"swiglu: {name} is on {tensor.device}, gate_up is on {like.device}")
    if tensor.shape != shape:
        raise ValueError(f"swiglu: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"swiglu: {name} must be contiguous, its strides are {tensor.stride()}")


def _check_gate_up(gate_up: Tensor) -> tuple[int, int]:
    """Check gate_up; return its rows M and the columns N of one half."""
    _check("gate_up", gate_up, gate_up, gate_up.shape, DTYPES)
    if gate_up.dim() != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        raise ValueError(
            f"swiglu: gate_up has shape {tuple(gate_up.shape)}, expected (M, 2 N) with N > 0"
        )
    return gate_up.shape[0], gate_up.shape[1] // 2


@torch.library.custom_op("nanovlm_fast::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """Return y (M, N) of gate_up (M, 2 N); raises if an argument does not fit."""
    m, n = _check_gate_up(gate_up)
    y = gate_up.new_empty(m, n)
    if m:
        launch = _launch(n)
        _swiglu_fwd_kernel[_grid(m, n, launch)](gate_up, y, m, N=n, **launch)
    return y


@swiglu_fwd.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("nanovlm_fast::swiglu_bwd", mutates_args=())
def swiglu_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Return d gate_up (M, 2 N), in gate_up's dtype, of dy (M, N) and gate_up (M, 2 N)."""
    m, n = _check_gate_up(gate_up)
    _check("dy", dy, gate_up, (m, n), DTYPES)
    dgate_up = torch.empty_like(gate_up)
    if m:
        launch = _launch(n)
        _swiglu_bwd_kernel[_grid(m, n, launch)](dy, gate_up, dgate_up, m, N=n, **launch)
    return dgate_up


@swiglu_bwd.register_fake
def _(dy, gate_up):
    return torch.empty_like(gate_up)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    (gate_up,) = ctx.saved_tensors
    return swiglu_bwd(dy.contiguous(), gate_up)


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (..., I) of gate_up (..., 2 I), in its dtype.

    Differentiable. An input that is not contiguous is copied. A CPU tensor runs the reference (or
    Triton's interpreter under TRITON_INTERPRET=1). Raises TypeError or ValueError that names the
    argument.
    """
    if not (gate_up.is_cuda or INTERPRET):
        return swiglu_reference(gate_up)
    y = swiglu_fwd(gate_up.reshape(-1, gate_up.shape[-1]).contiguous())
    return y.view(*gate_up.shape[:-1], y.shape[-1])


def make_inputs(m: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """Arguments of `swiglu` for m rows of two halves of n columns each."""
    generator = torch.Generator(device).manual_seed(seed)
    return {"gate_up": 2 * torch.randn(m, 2 * n, generator=generator, device=device).to(dtype)}


def cost(m: int, n: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Fewest bytes and FLOPs: {'forward': (bytes, FLOPs), 'backward': (bytes, FLOPs)}."""
    size = m * n * dtype.itemsize
    return {"forward": (3 * size, 5 * m * n), "backward": (5 * size, 11 * m * n)}
