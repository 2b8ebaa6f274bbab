"""Activation recomputation: what a block keeps for its backward, and what it computes again (Chen et al., 2016).

| policy | kept for the backward of a block | computed again |
| --- | --- | --- |
| `none` | everything | nothing |
| `norms_and_activations` | results of matrix products and of attention | norms, GELU and SwiGLU, rotary, additions |
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

# what is dear to compute, by name: an attention backend's operator exists only once it is loaded
SAVED = frozenset(
    "aten::mm aten::addmm aten::bmm flash_attn::_flash_attn_varlen_forward torch_attn::_varlen_attn "
    "aten::_scaled_dot_product_flash_attention aten::_scaled_dot_product_flash_attention_for_cpu "
    "aten::_scaled_dot_product_cudnn_attention aten::_scaled_dot_product_efficient_attention".split()
)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator.name().split(".")[0] in SAVED
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(policy: str, block: torch.nn.Module, *args: Any) -> Any:
    """`block(*args)`, remembering for its backward what `policy` says."""
    if policy == "none" or not torch.is_grad_enabled():
        return block(*args)
    options = {}
    if policy == "norms_and_activations":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # nothing in a block draws random numbers
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)
