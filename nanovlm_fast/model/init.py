"""Initial weights of a model that starts without pretrained ones (`--init`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig

NANOVLM_STD = 0.02  # nanoVLM's deviation for every matrix


def init_weights(model: Any, config: VLMConfig) -> None:
    """Initialise the reference or the packed model in place, as `config.init` says.

    "seed" is nanoVLM's initialisation: N(0, 0.02). (The value's name is written in checkpoints.)

    "scratch" is one that small models learn from much faster: linear maps at 1/sqrt(fan_in), those
    that end a residual branch at zero (Goyal et al., 2017), and the learned position embeddings at
    the 2-D sine-cosine grid of Beyer et al., "Better plain ViT baselines" (2022).
    """
    scratch = config.init == "scratch"
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            std = _scratch_std(name, module.weight) if scratch else NANOVLM_STD
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # After the loop: a tied head is the same tensor, and is one of the loop's linear maps.
    embedding = model.decoder.token_embedding.weight
    nn.init.normal_(embedding, std=0.1 if scratch else NANOVLM_STD)
    if scratch:
        positions = model.vision_encoder.patch_embedding.position_embedding
        positions.data.copy_(0.5 * sincos_positions(config))


def _scratch_std(name: str, weight: Tensor) -> float:
    """Return the deviation of one linear map under `init=scratch`."""
    # A residual branch that ends in zeros makes each block the identity at first, so the depth of
    # the model does not slow its first steps.
    if name.endswith(("out_proj", "fc2", "down_proj")):
        return 0.0
    fan_in = weight[0].numel()  # of a convolution too: channels x patch x patch
    return fan_in**-0.5


def sincos_positions(config: VLMConfig, temperature: float = 100.0) -> Tensor:
    """Return (1, P, C): sine and cosine of both coordinates of each patch, at C/4 frequencies."""
    if config.vit_hidden_dim % 4:
        raise ValueError(
            f"init=scratch needs vit_hidden_dim in multiples of 4, got {config.vit_hidden_dim}"
        )
    quarter = config.vit_hidden_dim // 4
    frequencies = temperature ** -(torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(config.grid), torch.arange(config.grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]
