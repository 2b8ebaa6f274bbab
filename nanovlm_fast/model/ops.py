"""How the model computes: its operations as Triton kernels or plain PyTorch, its attention, what it recomputes.

The model calls `ops.rms_norm(...)` and does not know which it got: what `--kernels`, `--attention` and `--recompute`
switch. A kernel is in `auto` for a device only once it was measured there faster than torch.compile alone in the whole
training step.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.model.attention import Attention, choose_attention, sdpa

# device name -> kernels that won in the whole step there; bench/results holds the evidence
AUTO: dict[str, tuple[str, ...]] = {}


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """y, or (y, x + residual): the residual stream keeps its dtype."""
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    residual = x + residual
    return F.rms_norm(residual, weight.shape, weight, eps).to(x.dtype), residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None):
    """y, or (y, x + residual)."""
    if residual is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    residual = x + residual
    return F.layer_norm(residual, weight.shape, weight, bias, eps).to(x.dtype), residual


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> Tensor:
    """Half-rotation RoPE of the q and k heads of qkv (T, (n_q + 2 n_kv) D); cos, sin (positions, D / 2), float32."""
    heads = qkv.view(len(qkv), n_q + 2 * n_kv, -1)
    qk, v = heads.split([n_q + n_kv, n_kv], dim=1)
    cos, sin = (table.index_select(0, position_ids)[:, None] for table in (cos, sin))
    first, second = qk.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        qkv.dtype
    )
    return torch.cat([turned, v], dim=1).flatten(1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (T, 2 I), packed as [gate | up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def pixel_shuffle_proj(
    x: Tensor,
    weight: Tensor,
    factor: int,
    bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """(B, H W, C) -> (B, H W / factor^2, N): factor x factor patches become one token; square by default."""
    (n, patches, width), s = x.shape, factor
    height, across = grid or (math.isqrt(patches), math.isqrt(patches))
    x = x.view(n, height // s, s, across // s, s, width).transpose(2, 3)
    return F.linear(x.reshape(n, patches // s**2, s * s * width), weight, bias)


def embed_splice(
    input_ids: Tensor, table: Tensor, image_rows: Tensor, image_tokens: Tensor
) -> Tensor:
    """(T, C): the token's embedding, or where image_rows is not -1 that row of image_tokens."""
    text = F.embedding(input_ids, table)
    if len(image_tokens) == 0:
        return text
    # widened before the gather: the gradients of all documents that show an image add up unrounded
    shown = F.embedding(image_rows.clamp(min=0), image_tokens.to(text.dtype))
    return torch.where(image_rows[:, None] >= 0, shown, text)


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy summed over labels that are not -100, in float32; their count)."""
    loss = F.cross_entropy(F.linear(h, weight).float(), labels, ignore_index=-100, reduction="sum")
    return loss, (labels >= 0).sum()


@dataclass(frozen=True)
class Ops:
    """One callable an operation; `kernels` names those that are kernels, `backend` the attention's."""

    rms_norm: Callable = rms_norm
    layer_norm: Callable = layer_norm
    rotary: Callable = rotary
    swiglu: Callable = swiglu
    pixel_shuffle_proj: Callable = pixel_shuffle_proj
    embed_splice: Callable = embed_splice
    linear_cross_entropy: Callable = linear_cross_entropy
    kernels: tuple[str, ...] = ()
    attention: Attention = sdpa
    backend: str = "sdpa"
    recompute: str = "none"
    asleep: bool = False  # without a GPU each of `kernels` is its plain PyTorch

    def __str__(self) -> str:
        kernels = ", ".join(self.kernels) or "none, plain PyTorch"
        if self.asleep:
            kernels = f"none, plain PyTorch (they need a GPU: {kernels})"
        return f"attention: {self.backend} · kernels: {kernels} · recompute: {self.recompute}"


KERNELS = tuple(Ops.__dataclass_fields__)[: list(Ops.__dataclass_fields__).index("kernels")]


def choose_ops(
    kernels: str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
) -> Ops:
    """kernels: 'auto' (what won on this device, nothing on a CPU), 'none', 'all', or names separated by commas.

    attention: see `choose_attention`, for a model that computes in `dtype`; recompute: see recompute.py.
    Raises ValueError for an unknown name, and for an attention backend that cannot run here.
    """
    device = torch.device(device)
    if kernels == "auto":
        names = AUTO.get(torch.cuda.get_device_name(device), ()) if device.type == "cuda" else ()
    elif kernels in ("none", "all"):
        names = KERNELS if kernels == "all" else ()
    else:
        names = tuple(dict.fromkeys(name.strip() for name in kernels.split(",")))
    if unknown := [name for name in names if name not in KERNELS]:
        raise ValueError(
            f"--kernels {','.join(unknown)}: there are auto, none, all, {', '.join(KERNELS)}"
        )
    backend, attend = choose_attention(attention, device, dtype)
    chosen = {name: _kernel(name) for name in names}
    asleep = bool(names) and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
    return Ops(
        **chosen,
        kernels=names,
        attention=attend,
        backend=backend,
        recompute=recompute,
        asleep=asleep,
    )


# matrix products follow autocast as PyTorch's own do: their first argument is cast to its dtype. The weight stays
# float32: the kernels round it themselves, and give its gradient unrounded.
PRODUCTS = ("pixel_shuffle_proj", "linear_cross_entropy")


def _kernel(name: str) -> Callable:
    function = getattr(importlib.import_module(f"nanovlm_fast.kernels.{name}"), name)

    def under_autocast(x: Tensor, *args, **kwargs):
        device = x.device.type
        return function(
            x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x,
            *args,
            **kwargs,
        )

    return under_autocast if name in PRODUCTS else function
