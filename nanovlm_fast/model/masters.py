"""Working weights in bfloat16 beside float32 masters (`--stream bfloat16`).

Autocast rounds the weight of every linear layer to bfloat16 at each forward, and widens its
gradient to float32. Working weights are rounded once per update instead: the layers hold bfloat16
parameters, and the masters, which optimizers update and checkpoints hold, lie here. Products
compute the same bits either way.

Two matrices stay float32 parameters. The token table, which is the tied head as well: its gradient
is a sum over many tokens and two uses, and would be rounded at each addition. The patch
convolution: it is scaled before its product anyway (`PatchEmbedding`). Norms and biases are small.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanovlm_fast.model import lora


class Masters:
    """The float32 masters of a model's working weights, by name; none by default.

    A master is what an optimizer updates, and its `grad` the sum of the working weight's gradients
    in float32. `working` are the model's parameters, `weights` their masters, in the same order.
    """

    def __init__(self, working: dict[str, nn.Parameter] | None = None):
        self.working = working or {}
        self.weights = {name: p.detach() for name, p in self.working.items()}
        self._of: dict[Tensor, Tensor] = {p: self.weights[name] for name, p in self.working.items()}

    def __bool__(self) -> bool:
        return bool(self.working)

    def of(self, parameter: Tensor) -> Tensor:
        """Return what an optimizer updates: the parameter's master, or itself without one."""
        return self._of.get(parameter, parameter)

    def of_all(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [self.of(parameter) for parameter in parameters]

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the master's gradient, or the parameter's own, in its type, without one."""
        summed = self.of(parameter).grad
        return parameter.grad if summed is None else summed

    def has_sums(self) -> bool:
        """Whether masters hold gradients, so that those of the working weights must join them."""
        return any(master.grad is not None for master in self.weights.values())

    def drop_gradients(self) -> None:
        """Forget what the working weights hold; a graph's next replay would overwrite it."""
        for working in self.working.values():
            working.grad = None

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Move the gradients of working weights to their masters, adding in float32."""
        sums: list[Tensor] = []  # in float32, and what is added to each of them
        more: list[Tensor] = []
        empty: list[Tensor] = []  # new ones, and what they begin with
        first: list[Tensor] = []
        for working, master in zip(self.working.values(), self.weights.values(), strict=True):
            if working.grad is None:
                continue
            if master.grad is not None:
                sums.append(master.grad)
                more.append(working.grad)
            else:
                master.grad = torch.empty_like(master)
                empty.append(master.grad)
                first.append(working.grad)
        if sums:
            torch._foreach_add_(sums, more)
        if empty:
            torch._foreach_copy_(empty, first)
        self.drop_gradients()

    @torch.no_grad()
    def round(self) -> None:
        """Write the masters, rounded, into the working weights."""
        if self.working:
            torch._foreach_copy_(list(self.working.values()), list(self.weights.values()))


def work_in_bfloat16(model: nn.Module) -> Masters:
    """Turn the weights of the model's linear layers, but for the head, into working weights.

    Their float32 memory becomes the masters'. The parameters stay the same objects. What an adapter
    adapts is never updated and has no master. Adapters are small and stay float32.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name == "decoder.head":
            continue
        weight = layer.get_parameter("weight")
        if name.endswith(lora.BASE):
            weight.data = weight.data.bfloat16()
        elif not lora.is_of_adapter(f"{name}.weight"):
            weights[f"{name}.weight"] = weight
    masters = Masters(weights)
    for weight in weights.values():
        weight.data = weight.data.bfloat16()
    return masters


def masters_of(model: object) -> Masters:
    """Return the masters of a model, compiled or not. A reference model has none."""
    return getattr(model, "masters", None) or Masters()
