"""Attention: over packed documents in the language model, inside each image in the vision tower.

In the language model each document attends to itself only. Every backend has the interface of
FlashAttention's varlen functions (Dao, 2023):

    attend(q, k, v, cu_seqlens, max_seqlen, causal) -> out

    q            (T, n_heads, D)
    k, v         (T, n_kv_heads, D); n_heads is a multiple of n_kv_heads
    cu_seqlens   (documents + 1,) int32: where each document starts, from 0 to T; two equal
                 neighbours are an empty document, as the padding of a batch makes them
    max_seqlen   Python int, at least the length of the longest document
    out          (T, n_heads, D)

`choose_attention` picks one, once, before training:

| backend | what runs | needs |
| --- | --- | --- |
| `flash_attn` | the flash-attn package, FlashAttention-2 | CUDA, capability 8.0, 16-bit type |
| `torch` | `torch.nn.attention.varlen.varlen_attn`, FlashAttention-2 in PyTorch | the same |
| `torch_fa3`, `torch_fa4` | the same with FlashAttention-3 or 4 | their packages and their GPUs |
| `efficient` | the memory-efficient kernel of `sdpa`, on documents padded likewise | CUDA |
| `sdpa` | `scaled_dot_product_attention` over documents padded to max_seqlen | nothing |

The images of the vision tower have one length, so it needs no offsets and no mask:

    attend(q, k, v) -> out                  all (N, heads, P, D)

That is `scaled_dot_product_attention`, held to one of its kernels by `choose_vision_attention`:

| backend | what runs | needs |
| --- | --- | --- |
| `flash` | FlashAttention-2 in PyTorch | CUDA, capability 8.0, 16-bit type |
| `cudnn` | cuDNN's fused attention | the same, and a cuDNN that has it |
| `sdpa` | what PyTorch itself prefers there | nothing |
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
VisionAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """Attend by padding, on any device and in any type. Raises ValueError if shapes do not fit."""
    if q.dim() != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected (T, heads, D) each")
    slots = padded_slots(cu_seqlens, max_seqlen, q.shape[0])
    rows = (cu_seqlens.numel() - 1) * max_seqlen

    def lay_out(x: Tensor) -> Tensor:  # (T, heads, D) -> (documents, heads, max_seqlen, D)
        padded = x.new_zeros(rows, *x.shape[1:]).index_copy(0, slots, x)
        return padded.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2)

    # Padding follows the document, so the causal mask alone keeps real queries away from it.
    # No explicit mask in that case: one would rule out SDPA's flash backend.
    mask = None
    if not causal:
        lengths = cu_seqlens.diff()[:, None, None, None]
        mask = torch.arange(max_seqlen, device=q.device) < lengths
    grouped = q.shape[1] > k.shape[1]
    out = F.scaled_dot_product_attention(
        lay_out(q), lay_out(k), lay_out(v), attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2).reshape(rows, *q.shape[1:]).index_select(0, slots)


def efficient(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """`sdpa` by PyTorch's memory-efficient kernel, which GPUs before 8.0 have, float16 included.

    That kernel knows no groups of query heads, and PyTorch would compute whole matrices of scores
    in its place: keys and values are repeated for it. Where it does not run (another head size, a
    CPU), PyTorch's plain computation does.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    # Around each call: the switch is global, and the vision tower may need another kernel.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v, cu_seqlens, max_seqlen, causal)


def padded_slots(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Tensor:
    """Return (T,) int64: each token's place in the flattened (documents, max_seqlen) layout."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # right=True: of equal offsets the last one counts, so that empty documents are skipped.
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return document * max_seqlen + (token - cu_seqlens[document])


def _load_flash_attn() -> Attention:
    from flash_attn import flash_attn_varlen_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
    ) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            causal=causal,
            # Its default backward adds up dq with atomics, in an order that varies between runs.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return attend


def _load_torch(implementation: str | None = None) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    if implementation:
        torch.nn.attention.activate_flash_attention_impl(implementation)
    # `enable_gqa` came with PyTorch 2.12. Before it, keys and values are repeated, which costs
    # memory but gives the same result.
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
    ) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)}
        if groups > 1 and takes_groups:
            options["enable_gqa"] = True
        elif groups > 1:
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        return cast(Tensor, out)  # a tuple only if `return_aux` asks for more

    return attend


# Backend -> what imports it and returns its function. A backend's package is imported only when
# the backend is chosen.
BACKENDS: dict[str, Callable[[], Attention]] = {
    "flash_attn": _load_flash_attn,
    "torch": _load_torch,
    "torch_fa3": lambda: _load_torch("FA3"),
    "torch_fa4": lambda: _load_torch("FA4"),
    "efficient": lambda: efficient,
    "sdpa": lambda: sdpa,
}
PADDED = ("efficient", "sdpa")  # which pad documents, and need no FlashAttention
INSTALL_HINTS = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "torch_fa3": "build FlashAttention-3 from the folder hopper/ of its repository",
    "torch_fa4": "pip install flash-attn-4",
}


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """Return name and function of the backend for a model that computes in `dtype`.

    "auto" is the fastest backend that runs here. Raises ValueError, saying what is missing, if the
    requested backend cannot run.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"--attention {name}: there are auto, {', '.join(BACKENDS)}")
    missing = unfit_for_flash(device, dtype)
    if name == "auto":
        name = _fastest_padded(device) if missing else _fastest_flash()
    if name == "efficient":  # on any GPU
        missing = None if device.type == "cuda" else missing
    if name != "sdpa" and missing:
        raise ValueError(f"--attention {name} needs {missing}; --attention sdpa runs anywhere")
    try:
        return name, BACKENDS[name]()
    # RuntimeError: a flash-attn package built against another PyTorch fails while it is loaded.
    except (ImportError, ValueError, RuntimeError) as error:
        how = INSTALL_HINTS.get(name, "pip install 'torch>=2.11'")
        raise ValueError(
            f"--attention {name} is not installed here ({error}): {how}, or --attention auto"
        ) from error


def _fastest_padded(device: torch.device) -> str:
    # Newer GPUs come here in float32 alone, in which results are compared with those of `sdpa`.
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return "efficient" if old else "sdpa"


def _fastest_flash() -> str:
    packaged = importlib.util.find_spec("flash_attn") is not None
    return "flash_attn" if packaged else "torch"


def unfit_for_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what FlashAttention lacks here, in words that follow "needs", or None."""
    if device.type != "cuda":
        return "a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "--dtype bfloat16 or float16"
    return None


# What --vision-attention can hold `scaled_dot_product_attention` to.
VISION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def only(backend: SDPBackend) -> VisionAttention:
    """Return attention (N, heads, P, D) by this kernel of PyTorch's and by no other."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Around each call and not once for the process: the switch is global, and the language
        # model's `sdpa` may need another kernel.
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def choose_vision_attention(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, VisionAttention]:
    """Return name and function of the vision tower's attention.

    "auto" is `flash` where FlashAttention runs, else `sdpa`. Left to itself, PyTorch takes cuDNN or
    FlashAttention by the versions of its wheel, so two installations would time different steps.
    Which of the two is faster on these shapes has not been measured. Raises ValueError, saying what
    is missing, if the requested backend cannot run.
    """
    if name != "auto" and name not in VISION_BACKENDS:
        there = ", ".join(VISION_BACKENDS)
        raise ValueError(f"--vision-attention {name}: there are auto, {there}")
    missing = unfit_for_flash(device, dtype)
    if name == "auto":
        if missing:
            return "sdpa", F.scaled_dot_product_attention
        return "flash", only(VISION_BACKENDS["flash"])
    anywhere = "--vision-attention auto runs anywhere"
    if missing:
        raise ValueError(f"--vision-attention {name} needs {missing}; {anywhere}")
    attend = only(VISION_BACKENDS[name])
    # Tried once: whether cuDNN has the kernel depends on its version and the GPU, and without a try
    # the first step would end with "No available kernel".
    try:
        attend(*torch.zeros(3, 1, 1, 16, 64, device=device, dtype=dtype))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--vision-attention {name} does not run here ({reason}): {anywhere}"
        ) from error
    return name, attend
