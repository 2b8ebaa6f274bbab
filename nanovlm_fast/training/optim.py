"""Optimizers, their parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.model.packed import VisionLanguageModel


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration, for weight matrices (Keller Jordan, 2024).

    `torch.optim.Muon` iterates in bfloat16, which CPUs without fast bfloat16 products run a hundred times slower;
    here a CPU iterates in float32. Matrices of one shape go through the iteration as one batch, and fused ones
    (q, k, v; gate, up) as the parts they hold: a group's `parts` gives each parameter's row counts.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(groups, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; none where the attribute `found_inf` is a tensor of 1."""
        found_inf = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf  # a tensor: nobody waits to know
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter, rows in zip(group["params"], group["parts"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                grad = (
                    parameter.grad if found_inf is None else parameter.grad.where(found_inf == 0, 0)
                )
                weight = torch.as_tensor(
                    (1 - group["momentum"]) * keep, dtype=grad.dtype, device=grad.device
                )
                momentum = state["momentum"].lerp_(grad, weight)
                update = grad.lerp(momentum, group["momentum"])  # Nesterov's
                for weight, part in zip(parameter.split(rows), update.split(rows), strict=True):
                    by_shape[weight.shape].append((weight, part))
            for (out_rows, in_columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([part for _, part in pairs]))
                scale = group["lr"] * max(1.0, out_rows / in_columns) ** 0.5 * keep
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"] * keep).sub_(update * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> nearly the closest semi-orthogonal matrices (singular values about 1)."""
    dtype = matrices.dtype if matrices.device.type == "cpu" else torch.bfloat16
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(model: VisionLanguageModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW, and with `optimizer=muon` Muon for the matrices of the blocks and the projector.

    One group each for projector, vision and language; a rate of 0 freezes the part. Every group keeps its `peak_lr`.
    """
    rates = {
        "MP": config.lr_projector,
        "vision_encoder": config.lr_vision,
        "decoder": config.lr_language,
    }
    parts = {name: list(rows.values()) for name, rows in model.fused_parts().items()}
    adamw, muon = [], []
    for part, lr in rates.items():
        module = getattr(model, part).requires_grad_(lr > 0)
        if lr <= 0:
            continue
        matrices = {}
        if config.optimizer == "muon":
            for name, layer in module.named_modules(prefix=part):
                if isinstance(layer, nn.Linear) and name != "decoder.head":
                    rows = len(layer.weight)
                    thirds = (
                        [rows // 3] * 3 if "vision_encoder" in name and "qkv" in name else [rows]
                    )
                    matrices[layer.weight] = parts.get(f"{name}.weight", thirds)
            muon_lr = lr * config.muon_scale
            muon.append(
                dict(
                    params=list(matrices),
                    parts=list(matrices.values()),
                    name=f"{part}.matrices",
                    lr=muon_lr,
                )
            )
        rest = [parameter for parameter in module.parameters() if parameter not in matrices]
        if rest:
            adamw.append(dict(params=rest, lr=lr, name=part))
    if not adamw and not muon:
        raise ValueError("every learning rate is 0: there is nothing to train")
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        on_gpu = next(model.parameters()).is_cuda
        options = dict(
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        optimizers.append(torch.optim.AdamW(adamw, **options))
    if muon:
        optimizers.append(Muon(muon, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def skip_if_not_finite(optimizers: list[torch.optim.Optimizer], norm: Tensor) -> Tensor:
    """() float32 on the device: 1 where the gradients' `norm` is not finite, and the next `step` changes nothing.

    The fused optimizers read it as they read a GradScaler's; nothing is copied to the host.
    """
    found_inf = norm.isfinite().logical_not().float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
    return found_inf


def lr_factor(before: float, after: float, warmup: float, floor: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then cosine down to `floor`.

    `before` and `after` say how far the run is, in [0, 1], around the step. The warm-up goes by the end of the step, so
    that the first has a rate, the cosine by its beginning: nanoVLM v0.1's schedule step by step, but for the warm-up's
    last step, which overshoots the peak there where the warm-up is no whole number of steps.
    """
    if before < warmup:
        return min(after / warmup, 1.0)
    done = min((before - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
