"""LoRA (Hu et al., 2021) on the language model's linear layers (`--lora-rank`), by `peft`.

A layer's product becomes x W^T + (alpha / rank) x A^T B^T. W is frozen; A and B are trained.

The packed model's matrices are adapted as they are: q, k and v as one, gate and up as one. They
thus share an A, and the rows of B are theirs in the order of `fused.py`, so that the adapter of a
fused matrix is one of each of its parts as well. Embedding, norms and head have no adapter.

Shapes: with I inputs, O outputs and rank R a layer has W (O, I), its adapter A (R, I), B (O, R).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig

# What peft adds to the name of a layer that it adapts.
BASE = ".base_layer"
LORA_A = ".lora_A.default.weight"
LORA_B = ".lora_B.default.weight"
# Kernels that take the layers' matrices as they are, without their adapters.
WITHOUT_ADAPTERS = ("swiglu_mlp",)
LAYERS = ("qkv_proj", "out_proj", "gate_up_proj", "down_proj")


@dataclass
class Adapter:
    """What a model's adapter is, and what it adapts."""

    rank: int
    alpha: float
    base: dict[str, Any]  # options of train.py that name the base, and the seed of what they lack
    hashes: dict[str, str]  # of the base's towers, by their names in the model
    # Weights that a checkpoint held, and that later ones hold too, trained or not.
    loaded: frozenset[str] = field(default_factory=frozenset)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def stores(self, name: str, parameter: Tensor) -> bool:
        """Whether a checkpoint holds a parameter; what it does not hold is the base's."""
        # The projector always: in most runs it is new, and it is small.
        return parameter.requires_grad or name.startswith("MP.") or name in self.loaded


def add_adapter(model: Any, adapter: Adapter) -> None:
    """Put new adapters into a packed model and freeze its language model's own weights.

    A is random and B is 0, so that the model computes what it did. Raises ValueError without peft.
    """
    # Imported here: it takes seconds, and only training with adapters needs it.
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"--lora-rank needs peft, which does not load here ({error}): pip install peft"
        ) from error
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        target_modules=list(LAYERS),
    )
    with warnings.catch_warnings():
        # The decoder has no configuration of transformers', which nothing here needs.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model.decoder)
    for layer in model.decoder.modules():
        # peft would widen what enters an adapter to float32, which autocast then narrows again.
        if hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = False
    model.adapter = adapter


def is_of_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an A or a B."""
    return name.endswith((LORA_A, LORA_B))


def trainable(part: nn.Module) -> list[nn.Parameter]:
    """The parameters of a tower that an optimizer may update: its adapters, else all."""
    adapters = [one for name, one in part.named_parameters() if is_of_adapter(name)]
    return adapters or list(part.parameters())


def adapter_size(config: VLMConfig, rank: int) -> int:
    """The number of weights in the adapters of a model."""
    width = config.lm_hidden_dim
    heads = config.lm_n_heads + 2 * config.lm_n_kv_heads
    sides = (
        width + heads * config.head_dim,
        width + width,
        width + 2 * config.lm_inter_dim,
        config.lm_inter_dim + width,
    )
    return config.lm_n_blocks * rank * sum(sides)


@torch.no_grad()
def merged(weights: dict[str, Tensor], others: dict[str, Tensor], scaling: float) -> dict:
    """Return `weights` with W + scaling B A for every adapted W, and what else is in `others`.

    Args:
        weights: of the base, under the packed model's names.
        others: of a checkpoint with adapters, under the same names.

    Raises:
        ValueError: naming the first tensor in `others` that does not fit the base.
    """
    found = dict(weights)
    for name, tensor in others.items():
        layer = name.removesuffix(LORA_A).removesuffix(LORA_B)
        key = f"{layer}.weight" if is_of_adapter(name) else name
        if key not in weights:
            raise ValueError(f"{name} belongs to no weight of the base")
        wanted = tuple(weights[key].shape)
        if not is_of_adapter(name):
            fits = tuple(tensor.shape) == wanted
            found[key] = tensor
        elif name.endswith(LORA_B):
            fits = layer + LORA_A in others
        else:
            b = others.get(layer + LORA_B)
            fits = b is not None and product_shape(b, tensor) == wanted
            if b is not None and fits:
                # In peft's order of operations, for its bits.
                found[key] = weights[key] + (b @ tensor) * scaling
        if not fits:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not fit {key} {wanted}")
    return found


def check_complete(names: Iterable[str], stored: dict[str, Tensor], rank: int) -> None:
    """Raise ValueError if a checkpoint with adapters lacks a tensor.

    Args:
        names: of the parameters of the model without adapters.
        stored: what the checkpoint holds.
        rank: of the adapters.
    """
    whole = held_whole(stored)
    for name in names:
        layer = name.removesuffix(".weight")
        if name.startswith("decoder.") and layer.endswith(LAYERS):
            a = stored.get(layer + LORA_A)
            if a is None or len(a) != rank:
                raise ValueError(f"no adapter of rank {rank} for {layer}")
        elif name.split(".")[0] in whole and name not in stored:
            raise ValueError(f"no {name}")


def held_whole(stored: Iterable[str]) -> set[str]:
    """The parts that are whole in a checkpoint: the projector, and the tower if it was trained."""
    return {"MP", *(name.split(".")[0] for name in stored)} - {"decoder"}


def product_shape(b: Tensor, a: Tensor) -> tuple[int, ...]:
    """The shape of b @ a; empty if there is none."""
    if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
        return ()
    return (b.shape[0], a.shape[1])


def merged_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict as that of a model without adapters, in which they are merged."""
    if model.adapter is None:
        return state
    plain = {name.replace(BASE, ""): one for name, one in state.items() if not is_of_adapter(name)}
    adapters = {name: one for name, one in state.items() if is_of_adapter(name)}
    # Working weights may be bfloat16.
    plain = {name: one.float() if one.is_floating_point() else one for name, one in plain.items()}
    return merged(plain, adapters, model.adapter.scaling)
