"""Initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig


def init_weights(model: nn.Module, config: VLMConfig) -> None:
    """Start from scratch, in place: nanoVLM's N(0, 0.02), or with `init=scratch` what small towers learn faster from.

    `scratch`: linear maps at 1/sqrt(fan_in) and those that end a residual branch at zero (as in Goyal et al., 2017),
    and learned position embeddings at the 2-D sine-cosine grid of Beyer et al., "Better plain ViT baselines" (2022).
    """
    scratch = config.init == "scratch"
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            ends_branch = name.endswith(("out_proj", "fc2", "down_proj"))
            fan_in = module.weight[0].numel()
            nn.init.normal_(
                module.weight, std=0.02 if not scratch else 0.0 if ends_branch else fan_in**-0.5
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.decoder.token_embedding.weight, std=0.1 if scratch else 0.02)
    if scratch:
        model.vision_encoder.patch_embedding.position_embedding.data.copy_(
            0.5 * sincos_positions(config)
        )


def sincos_positions(config: VLMConfig, temperature: float = 100.0) -> Tensor:
    """(1, P, C): sine and cosine of both coordinates of each patch, at C/4 frequencies. C must be a multiple of 4."""
    if config.vit_hidden_dim % 4:
        raise ValueError(
            f"init=scratch needs vit_hidden_dim in multiples of 4, got {config.vit_hidden_dim}"
        )
    quarter = config.vit_hidden_dim // 4
    frequencies = temperature ** -(torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(config.grid), torch.arange(config.grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]
