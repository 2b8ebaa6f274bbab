"""Parameter groups, learning-rate schedule and optimizer."""

from __future__ import annotations

import math

import torch

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.model import VisionLanguageModel


def make_optimizer(model: VisionLanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW with one group each for projector, vision and language; a rate of 0 freezes the part."""
    parts = {
        "projector": (model.MP, config.lr_projector),
        "vision": (model.vision_encoder, config.lr_vision),
        "language": (model.decoder, config.lr_language),
    }
    groups = []
    for name, (module, lr) in parts.items():
        module.requires_grad_(lr > 0)
        if lr > 0:
            groups.append({"params": list(module.parameters()), "lr": lr, "peak_lr": lr, "name": name})
    if not groups:
        raise ValueError("every learning rate is 0: there is nothing to train")
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)


def lr_factor(progress: float, warmup: float, floor: float) -> float:
    """Learning rate as a share of its peak at `progress` in [0, 1]: linear warm-up, then cosine down to `floor`."""
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
