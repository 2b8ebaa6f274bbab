"""Fused weights of the packed model, and the reference's weights that they hold.

The packed model computes q, k and v with one matrix, and gate and up with another. The reference,
and with it every checkpoint, has them as separate matrices. A fused matrix holds its parts as
consecutive rows, so splitting it gives views and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig

EMBEDDING = "decoder.token_embedding.weight"
HEAD = "decoder.head.weight"
ROTARY = "decoder.rotary_embd.inv_freq"

# How many problems an error message names: weights of another model have one in every layer.
NAMED = 8


def fused_parts(config: VLMConfig) -> dict[str, dict[str, int]]:
    """Map each fused weight's name to the reference's weights in it, in order, and their rows."""
    q_rows = config.lm_n_heads * config.head_dim
    kv_rows = config.lm_n_kv_heads * config.head_dim
    parts = {}
    for i in range(config.lm_n_blocks):
        attn = f"decoder.blocks.{i}.attn"
        parts[f"{attn}.qkv_proj.weight"] = {
            f"{attn}.q_proj.weight": q_rows,
            f"{attn}.k_proj.weight": kv_rows,
            f"{attn}.v_proj.weight": kv_rows,
        }
        mlp = f"decoder.blocks.{i}.mlp"
        parts[f"{mlp}.gate_up_proj.weight"] = {
            f"{mlp}.gate_proj.weight": config.lm_inter_dim,
            f"{mlp}.up_proj.weight": config.lm_inter_dim,
        }
    return parts


def by_reference_name(config: VLMConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights or gradients of the packed model to the reference's names, as views."""
    fused = fused_parts(config)
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = fused.get(name, {name: len(tensor)})
        split.update(zip(parts, tensor.split(list(parts.values())), strict=True))
    return split


def copy_reference_state(
    config: VLMConfig, target: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Copy the reference's state dict `state` into `target`, the packed model's weights.

    `target` has the reference's names and shares memory with the model. Of tied weights one may be
    absent from `state`; so may the rotary frequencies. Raises ValueError naming what is missing,
    unexpected or of another shape. Nothing is copied in that case.
    """
    state = dict(state)
    if config.lm_tie_weights:
        for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if other in state:
                state.setdefault(name, state[other])
    state.setdefault(ROTARY, target[ROTARY])
    _check_names_and_shapes(target, state)
    _check_rotary(config, target[ROTARY], state[ROTARY])
    with torch.no_grad():
        for name, tensor in target.items():
            # The frequencies come from lm_re_base. A checkpoint stored in half precision has them
            # rounded, and the error in the angle grows with the position.
            if name != ROTARY:
                tensor.copy_(state[name])


def _check_names_and_shapes(target: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in target if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in target]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - NAMED} more)" if len(problems) > NAMED else ""
        raise ValueError("weights do not fit the model: " + "; ".join(problems[:NAMED]) + more)


def _check_rotary(config: VLMConfig, expected: Tensor, stored: Tensor) -> None:
    """Raise ValueError if the stored rotary frequencies are not those of the configuration."""
    if stored.is_meta or expected.is_meta:  # only shapes are being checked: there are no values
        return
    rtol = 1e-4 if stored.dtype == torch.float32 else 1e-2  # half precision has rounded them
    if not torch.allclose(stored.cpu().float(), expected.cpu(), rtol, 0.0):
        raise ValueError(
            f"{ROTARY} is not what lm_re_base = {config.lm_re_base} gives: the weights "
            "were trained with another base, or with scaled positions (not supported)"
        )
