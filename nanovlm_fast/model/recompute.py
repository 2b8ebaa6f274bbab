"""Activation recomputation (`--recompute`): what a block stores for its backward pass.

After Chen et al., 2016. Less stored means less memory and more time:

| policy | stored per block | computed again in the backward pass |
| --- | --- | --- |
| `none` | everything | nothing |
| `norms_and_activations` | products, attention | norms, GELU, SwiGLU, RoPE, additions |
| `blocks` | its input | the whole block |
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

POLICIES = ("none", "norms_and_activations", "blocks")

# Operators whose results `norms_and_activations` keeps, because computing them again is expensive.
# They are named by strings: an attention backend's operator exists only after its package was
# imported, so it cannot be looked up here.
KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "flash_attn::_flash_attn_varlen_forward",
        "torch_attn::_varlen_attn",
        "nanovlm_fast::document_attention_fwd",
        "nanovlm_fast::image_attention_fwd",
        "nanovlm_fast::gelu_mlp_fwd",
        "nanovlm_fast::swiglu_mlp_fwd",
    }
)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]  # without the overload, as in aten::mm.out
    kept = name in KEPT_OPERATORS
    # MUST_SAVE and not PREFER_SAVE: torch.compile may drop what is only preferred.
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _has_backward(block: torch.nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether gradients pass through the block: `checkpoint` stores its input even if none do."""
    tensors = [*block.parameters(), *(arg for arg in args if isinstance(arg, torch.Tensor))]
    return any(tensor.requires_grad for tensor in tensors)


def run_block(policy: str, block: torch.nn.Module, *args: Any) -> Any:
    """Return `block(*args)`, storing for its backward pass only what `policy` says."""
    if policy == "none" or not torch.is_grad_enabled() or not _has_backward(block, args):
        return block(*args)
    options: dict[str, Any] = {}
    if policy == "norms_and_activations":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # The random state need not be saved and restored, as no block draws random numbers.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)
