"""Attention over packed documents: each document attends to itself alone.

Every backend has the interface of FlashAttention's varlen functions (Dao, 2023):

    attend(q, k, v, cu_seqlens, max_seqlen, causal) -> out

q (T, n_heads, D); k, v (T, n_kv_heads, D) with n_heads a multiple of n_kv_heads; cu_seqlens (documents + 1,) int32,
from 0 to T, equal neighbours being empty documents; max_seqlen, a Python int, at least the longest document; out
(T, n_heads, D). Which one runs is chosen once, by `choose_attention`.

| backend | what runs | needs |
| --- | --- | --- |
| `flash_attn` | the package flash-attn, FlashAttention-2 | CUDA, compute capability 8.0, bfloat16 |
| `torch` | `torch.nn.attention.varlen.varlen_attn`, FlashAttention-2 inside PyTorch | the same |
| `torch_fa3`, `torch_fa4` | the same with FlashAttention-3 or 4 under it | their packages, and the chips they are for |
| `sdpa` | `scaled_dot_product_attention` over documents padded to max_seqlen | nothing |
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """Any device and dtype. Raises ValueError for shapes that do not fit."""
    if q.dim() != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (T, heads, D) each"
        )
    slots = padded_slots(cu_seqlens, max_seqlen, q.shape[0])
    rows = (cu_seqlens.numel() - 1) * max_seqlen

    def lay_out(x: Tensor) -> Tensor:  # (T, heads, D) -> (documents, heads, max_seqlen, D)
        padded = x.new_zeros(rows, *x.shape[1:]).index_copy(0, slots, x)
        return padded.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2)

    # Padding lies behind the document, so the causal mask alone keeps every real query away from it.
    mask = (
        None
        if causal
        else torch.arange(max_seqlen, device=q.device) < cu_seqlens.diff()[:, None, None, None]
    )
    groups = q.shape[1] // k.shape[1]
    out = F.scaled_dot_product_attention(
        lay_out(q), lay_out(k), lay_out(v), attn_mask=mask, is_causal=causal, enable_gqa=groups > 1
    )
    return out.transpose(1, 2).reshape(rows, *q.shape[1:]).index_select(0, slots)


def padded_slots(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Tensor:
    """(T,) int64: where each packed token lies in the flattened (documents, max_seqlen) layout."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return document * max_seqlen + (token - cu_seqlens[document])


def _load_flash_attn() -> Attention:
    from flash_attn import flash_attn_varlen_func

    def attend(q, k, v, cu_seqlens, max_seqlen, causal=True):
        options = dict(causal=causal, deterministic=torch.are_deterministic_algorithms_enabled())
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
        )

    return attend


def _load_torch(implementation: str | None = None) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    if implementation:
        torch.nn.attention.activate_flash_attention_impl(implementation)
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from PyTorch 2.12 on

    def attend(q, k, v, cu_seqlens, max_seqlen, causal=True):
        window, groups = (-1, 0 if causal else -1), q.shape[1] // k.shape[1]
        options = {"enable_gqa": True} if grouped and groups > 1 else {}
        if groups > 1 and not grouped:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window, **options
        )

    return attend


LOAD: dict[str, Callable[[], Attention]] = {
    "flash_attn": _load_flash_attn,
    "torch": _load_torch,
    "torch_fa3": lambda: _load_torch("FA3"),
    "torch_fa4": lambda: _load_torch("FA4"),
    "sdpa": lambda: sdpa,
}
INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "torch_fa3": "build FlashAttention-3 from the folder hopper/ of its repository",
    "torch_fa4": "pip install flash-attn-4",
}


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """The backend's name and function for a model that computes in `dtype`; 'auto' takes the fastest that runs.

    Raises ValueError if the one asked for cannot run here, saying what it needs.
    """
    if name != "auto" and name not in LOAD:
        raise ValueError(f"--attention {name}: there are auto, {', '.join(LOAD)}")
    unfit = unfit_for_flash(device, dtype)
    if name == "auto":
        packaged = importlib.util.find_spec("flash_attn") is not None
        name = "sdpa" if unfit else "flash_attn" if packaged else "torch"
    if name != "sdpa" and unfit:
        raise ValueError(f"--attention {name} needs {unfit}; --attention sdpa runs anywhere")
    try:
        return name, LOAD[name]()
    except (ImportError, ValueError, RuntimeError) as error:
        how = INSTALL.get(name, "pip install 'torch>=2.11'")
        raise ValueError(
            f"--attention {name} is not installed here ({error}): {how}, or --attention auto"
        ) from error


def unfit_for_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """What FlashAttention lacks here, or None."""
    if device.type != "cuda":
        return "a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "--dtype bfloat16"
    return None
