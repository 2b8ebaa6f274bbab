"""Optimizers, their parameter groups, the learning-rate schedule, and the one optimizer update.

Shapes: Muon updates matrices (rows, columns); those of one shape are stacked (n, rows, columns).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.model.lora import trainable
from nanovlm_fast.model.masters import Masters, masters_of
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.scaling import LossScaler
from nanovlm_fast.training.parallel import whole


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration, for matrices (Keller Jordan, 2024).

    `torch.optim.Muon` iterates in bfloat16, which is a hundred times slower on CPUs without fast
    bfloat16 products; this one iterates in float32 on a CPU, and in float16 on a GPU without
    bfloat16. Matrices of one shape go through the iteration as one batch. Fused matrices (q, k, v;
    gate, up) are orthogonalised part by part: a group's `parts` gives the row counts of each
    parameter's parts.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(groups, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]  # no loss is returned
        """Update every parameter that has a gradient; change nothing where `found_inf` is 1."""
        # `found_inf` is the attribute that `skip_if_not_finite` sets. The factor stays a tensor,
        # because an `if` would wait for the device.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            for (out_rows, in_columns), pairs in self._updates_by_shape(group, keep).items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                # A matrix with more rows than columns needs larger steps for the same effect.
                scale = group["lr"] * max(1.0, out_rows / in_columns) ** 0.5 * keep
                decay = 1 - group["lr"] * group["weight_decay"] * keep
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(decay).sub_(update * scale)

    def _updates_by_shape(
        self, group: dict[str, Any], keep: Tensor | float
    ) -> dict[torch.Size, list[tuple[Tensor, Tensor]]]:
        """Advance the momentum of a group; return (weight, update) of its parts, by shape."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, rows in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            grad = parameter.grad
            # Selected, not multiplied: NaN times 0 is NaN and would reach the momentum.
            if found_inf is not None:
                grad = grad.where(found_inf == 0, 0)
            share = torch.as_tensor(
                (1 - group["momentum"]) * keep, dtype=grad.dtype, device=grad.device
            )
            momentum = state["momentum"].lerp_(grad, share)
            update = grad.lerp(momentum, group["momentum"])  # Nesterov momentum
            for weight, part in zip(parameter.split(rows), update.split(rows), strict=True):
                by_shape[weight.shape].append((weight, part))
        return by_shape


class KernelAdamW(torch.optim.AdamW):
    """AdamW by `kernels/adamw.py`: all weights at once, and their working weights with them.

    `factor` scales gradients, a float32 value on the device; None leaves them as they are. State,
    groups and `found_inf` are as of the fused AdamW of PyTorch.
    """

    factor: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masters: Masters,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        # `fused` keeps the step counts on the device when state is loaded.
        super().__init__(groups, betas=betas, weight_decay=weight_decay, fused=True)
        pairs = zip(masters.weights.values(), masters.working.values(), strict=True)
        self.working: dict[Tensor, nn.Parameter] = dict(pairs)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]  # no loss
        """Update every weight that has a gradient; change nothing where `found_inf` is 1."""
        # Imported here: Triton may be missing where this optimizer is not chosen.
        from nanovlm_fast.kernels.adamw import adamw, on_device

        # The kernel takes gradients of one type, and weights that all have working ones or none.
        calls: dict[tuple[torch.dtype, bool], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                working = self.working.get(weight)
                grad = working.grad if weight.grad is None and working is not None else weight.grad
                if grad is not None:
                    calls[grad.dtype, working is not None].append((number, weight, grad))
        values = [
            (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for group in self.param_groups
        ]
        rates = on_device(values, torch.float64, self.param_groups[0]["params"][0].device)
        for (_, has_working), rows in calls.items():
            states = [self._state_of(weight) for _, weight, _ in rows]
            adamw(
                [grad.contiguous() for _, _, grad in rows],
                [weight for _, weight, _ in rows],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [self.working[weight] for _, weight, _ in rows] if has_working else [],
                [state["step"] for state in states],
                rates,
                [number for number, _, _ in rows],
                getattr(self, "found_inf", None),
                self.factor,
            )

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> nearly the closest semi-orthogonal ones (singular values about 1)."""
    # x x^T is the smaller of the two products only for a wide matrix.
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # The iteration converges for singular values up to 1, which the Frobenius norm bounds. In the
    # gradients' own type: float16 has no numbers as small as they may be.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if matrices.is_cuda:
        narrow = torch.cuda.get_device_capability(matrices.device) < (8, 0)
        x = x.to(torch.float16 if narrow else torch.bfloat16)
    for _ in range(steps):
        gram = x @ x.mT
        # Coefficients of Keller Jordan: steepest at 0, so small singular values grow fastest.
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(model: VisionLanguageModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW; with `optimizer=muon`, Muon for the matrices of the blocks and the projector.

    There is one group each for projector, vision and language, and a rate of 0 freezes the part.
    Of a language model with adapters these alone are trained.
    Where the model has working weights, the masters of these are what the optimizers hold.
    Every group keeps its `peak_lr`. Raises ValueError if all rates are 0.
    """
    rates = {
        "MP": config.lr_projector,
        "vision_encoder": config.lr_vision,
        "decoder": config.lr_language,
    }
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for part, lr in rates.items():
        # The adapters in it, or all of it.
        trained = unfrozen(trainable(getattr(model, part)), lr > 0)
        if not trained:
            continue
        matrices = matrices_of(model, part) if config.optimizer == "muon" else {}
        if matrices:
            weights = dict(params=list(matrices), parts=list(matrices.values()))
            muon.append(dict(**weights, name=f"{part}.matrices", lr=lr * config.muon_scale))
        weights_of_part = masters_of(model).of_all(trained)
        rest = [weight for weight in weights_of_part if weight not in matrices]
        if rest:
            adamw.append(dict(params=rest, lr=lr, name=part))
    if not adamw and not muon:
        raise ValueError("every learning rate is 0: there is nothing to train")
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(_adamw(model, adamw, (0.9, config.beta2), config.weight_decay))
    if muon:
        optimizers.append(Muon(muon, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def unfrozen(parameters: list[nn.Parameter], wanted: bool) -> list[nn.Parameter]:
    """Let parameters have gradients, or freeze them; return those that have."""
    for parameter in parameters:
        parameter.requires_grad_(wanted)
    return parameters if wanted else []


def _adamw(
    model: VisionLanguageModel,
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The kernel's AdamW if it is chosen, else PyTorch's fused one."""
    first = next(model.parameters())
    # Shards are no tensors with an address of their own.
    if model.ops.updated_by_kernel and not hasattr(first, "full_tensor"):
        return KernelAdamW(groups, masters_of(model), betas, weight_decay)
    # Fused reads `found_inf` on the device; capturable keeps the step count there too, so a skipped
    # step is not counted without the host knowing that it was skipped.
    return torch.optim.AdamW(
        groups, betas=betas, weight_decay=weight_decay, fused=True, capturable=first.is_cuda
    )


def matrices_of(model: VisionLanguageModel, part: str) -> dict[Tensor, list[int]]:
    """Weight matrices of a part that Muon updates -> the row counts of the matrices fused in each.

    They are the float32 masters where the model has working weights.
    The output head is left to AdamW: its rows are token embeddings, not one linear map. So are
    adapters: an A and a B are the halves of one.
    """
    if part == "decoder" and model.adapter is not None:
        return {}
    fused = {name: list(rows.values()) for name, rows in model.fused_parts().items()}
    matrices: dict[Tensor, list[int]] = {}
    for name, layer in getattr(model, part).named_modules(prefix=part):
        if not isinstance(layer, nn.Linear) or name == "decoder.head":
            continue
        rows = len(layer.weight)
        # The vision encoder's q, k, v are one matrix in nanoVLM's checkpoints too, so
        # `fused_parts` does not list it.
        whole_or_thirds = [rows]
        if "vision_encoder" in name and "qkv" in name:
            whole_or_thirds = [rows // 3] * 3
        matrices[masters_of(model).of(layer.weight)] = fused.get(f"{name}.weight", whole_or_thirds)
    return matrices


class Update(NamedTuple):
    """What `apply_gradients` measured; scalars on the device."""

    norm: Tensor  # of all gradients, before clipping
    skipped: Tensor  # 1.0 where the update was skipped, else 0.0


def apply_gradients(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    clip: float = 0.0,
    keep_gradients: bool = False,
    scaler: LossScaler | None = None,
) -> Update:
    """The optimizer update: norm, clip, skip if not finite, step, zero. It waits for MPS alone.

    `clip` is the largest norm, 0 for no limit. `keep_gradients` zeroes gradients in place instead
    of dropping them. `scaler` is what scaled the loss, if anything did: gradients are divided by
    its scale first, and it learns whether they were finite. Training and the benchmarks share this
    function, so that what is measured is what trains.
    """
    masters = masters_of(model)
    if scaler:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    # The kernel reads bfloat16 gradients where they are, and rounds what it has updated itself.
    kernels = [optimizer for optimizer in optimizers if isinstance(optimizer, KernelAdamW)]
    by_kernel = len(kernels) == len(optimizers)
    if not by_kernel or masters.has_sums():
        masters.add_gradients()
    found = [masters.gradient(parameter) for parameter in model.parameters()]
    norm = whole(total_norm([gradient for gradient in found if gradient is not None]))
    # Clipping comes before the check: it divides by the norm, and a norm that is not finite makes
    # every gradient useless anyway; the check below is what keeps them out of the weights.
    clip_gradients(model, kernels if by_kernel else [], clip, norm)
    skipped = skip_if_not_finite(optimizers, norm)
    # The fused AdamW of MPS does not read `found_inf`: there the host waits and decides.
    left_out = norm.device.type == "mps" and bool(skipped)
    for optimizer in optimizers:
        if not left_out:
            optimizer.step()
        optimizer.zero_grad(set_to_none=not keep_gradients)
    if scaler:
        scaler.update()
    masters.drop_gradients()
    if not by_kernel:
        masters.round()
    return Update(norm, skipped)


def drop_gradients(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Forget the gradients that a step left when it failed, those of masters too."""
    model.zero_grad(set_to_none=True)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def clip_gradients(model: nn.Module, kernels: list[KernelAdamW], clip: float, norm: Tensor) -> None:
    """Scale gradients of this norm down to `clip`; 0 for no limit.

    Where `kernels` update every weight, they scale the gradients as they read them.
    """
    for kernel in kernels:
        kernel.factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else None
    if clip and not kernels:
        nn.utils.clip_grads_with_norm_(masters_of(model).of_all(model.parameters()), clip, norm)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients, float32: a norm of bfloat16 ones would be rounded to theirs."""
    narrow = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    if not narrow:
        return nn.utils.get_total_norm(gradients)
    others = [gradient for gradient in gradients if gradient.dtype != torch.bfloat16]
    norms = list(torch._foreach_norm(narrow, 2.0, dtype=torch.float32))
    if others:
        norms.append(nn.utils.get_total_norm(others))
    return torch.linalg.vector_norm(torch.stack(norms))


def skip_if_not_finite(optimizers: list[torch.optim.Optimizer], norm: Tensor) -> Tensor:
    """Return 1.0 on the device if `norm` is not finite; the next `step` then changes nothing.

    The fused optimizers read the attribute as they read that of a GradScaler. Nothing is copied to
    the host, so the host does not wait for the step in order to decide.
    """
    # A finite number minus itself is 0. Half as many launches as `isfinite`.
    found_inf = (norm - norm).ne(0).float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # PyTorch's own side channel
    return found_inf


def lr_factor(before: float, after: float, warmup: float, floor: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to `floor`.

    `before` and `after` say how far the run is, in [0, 1], before and after the step. The warm-up
    uses `after`, so that the first step has a rate above 0; the cosine uses `before`. This is
    nanoVLM v0.1's schedule at every step but one: where the warm-up is not a whole number of steps,
    v0.1 overshoots the peak in its last step.
    """
    if before < warmup:
        return min(after / warmup, 1.0)
    done = min((before - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
