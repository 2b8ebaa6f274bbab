"""varlen_attention against a loop over documents: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.attention import varlen_attention


def loop(q, k, v, cu_seqlens, causal):
    """Each document by itself, heads repeated, softmax written out."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(end - start, end - start).tril().bool(), float("-inf"))
        out[start:end] = torch.einsum("hqk,khd->qhd", F.softmax(scores, -1), v[start:end])
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 0, 16, 1, 0, 3], [16, 16, 0, 0]])
def test_equals_a_loop_over_documents(causal, heads, lengths):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(cu_seqlens[-1])
    inputs = [torch.randn(tokens, h, 16, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])]
    upstream = torch.randn(tokens, heads[0], 16, dtype=torch.float64)
    results = []
    for attend in (lambda *x: varlen_attention(*x, cu_seqlens, 16, causal), lambda *x: loop(*x, cu_seqlens, causal)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_misfitting_heads_are_refused():
    with pytest.raises(ValueError, match="expected"):
        varlen_attention(torch.randn(4, 3, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.tensor([0, 4]), 4)
