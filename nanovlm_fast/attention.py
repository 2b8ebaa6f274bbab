"""Attention over packed documents: each document attends to itself alone.

`varlen_attention` has the interface of FlashAttention's varlen functions (Dao, 2023), so that a fused backend can
stand behind the same call. The backend here is `sdpa`: documents are laid out as rows of a (documents, max_seqlen)
batch and given to PyTorch's scaled_dot_product_attention, which works on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = True
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside each document.

    q (T, n_heads, D); k, v (T, n_kv_heads, D) with n_heads a multiple of n_kv_heads; cu_seqlens (documents + 1,)
    int32, from 0 to T, equal neighbours being empty documents; max_seqlen at least the longest document.
    Returns (T, n_heads, D). Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (T, heads, D) each")
    slots = padded_slots(cu_seqlens, max_seqlen, q.shape[0])
    rows = (cu_seqlens.numel() - 1) * max_seqlen

    def lay_out(x: Tensor) -> Tensor:  # (T, heads, D) -> (documents, heads, max_seqlen, D)
        padded = x.new_zeros(rows, *x.shape[1:]).index_copy(0, slots, x)
        return padded.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2)

    # Padding lies behind the document, so the causal mask alone keeps every real query away from it.
    mask = None if causal else torch.arange(max_seqlen, device=q.device) < cu_seqlens.diff()[:, None, None, None]
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
