"""What a training step takes of a device's memory, estimated on any machine.

Weights, gradients and AdamW's moments are counted; activations are those that autograd keeps in
plain PyTorch. A model of one and two layers is run on tensors without memory, and the rest follows,
as every layer keeps the same. A compiled step keeps less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from contextlib import nullcontext

import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.ops import Ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.packer import Budget

# float32: a weight; of one that is trained also its gradient and two moments.
OF_A_WEIGHT = 4
OF_TRAINING = 12


def step_bytes(
    config: VLMConfig,
    budget: Budget,
    dtype: torch.dtype,
    recompute: str = "none",
    frozen: Collection[str] = (),
    adapters: int = 0,
) -> float:
    """Bytes at the peak of a step; see the module.

    Args:
        recompute: "none" or "blocks": autograd does not tell what the policy between them keeps.
        frozen: parts whose own weights are not trained (vision_encoder, MP, decoder).
        adapters: the number of weights in adapters of a frozen decoder, 0 without any.
    """
    with torch.device("meta"):
        parts = dict(VisionLanguageModel(config).named_children())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = adapters + sum(size for name, size in sizes.items() if name not in frozen)
    weights = OF_A_WEIGHT * (adapters + sum(sizes.values())) + OF_TRAINING * trained
    # An adapter needs the inputs that the weight beside it would.
    frozen = {*frozen} - ({"decoder"} if adapters else set())
    kept, vision, language = _kept(config, budget, dtype, recompute, frozen)
    kept += (config.vit_n_blocks - 1) * vision + (config.lm_n_blocks - 1) * language
    if recompute != "none":
        # One block at a time is computed again, and is then whole.
        _, vision, language = _kept(config, budget, dtype, "none", frozen)
        kept += max(vision, language)
    # The backward begins with the gradients of the logits, in float32 and in the type of products.
    logits = budget.labels * config.lm_vocab_size * (4 + dtype.itemsize)
    return weights + kept + logits


def _kept(
    config: VLMConfig, budget: Budget, dtype: torch.dtype, recompute: str, frozen: Collection[str]
) -> tuple[float, float, float]:
    """Bytes that one layer of each tower keeps with all around them; and those of a further one."""
    ones = kept_by(config, (1, 1), budget, dtype, recompute, frozen)
    more_vision = kept_by(config, (2, 1), budget, dtype, recompute, frozen)
    more_language = kept_by(config, (1, 2), budget, dtype, recompute, frozen)
    return ones, more_vision - ones, more_language - ones


def kept_by(
    config: VLMConfig,
    layers: tuple[int, int],
    budget: Budget,
    dtype: torch.dtype,
    recompute: str,
    frozen: Collection[str],
) -> float:
    """Bytes of the tensors that autograd keeps of a forward pass, weights apart."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    few = dataclasses.replace(config, vit_n_blocks=layers[0], lm_n_blocks=layers[1])
    sizes: dict[int, int] = {}
    alive = []  # or the address of a storage could be that of a later one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    with FakeTensorMode():
        model = VisionLanguageModel(few, Ops(recompute=recompute))
        for part in frozen:
            model.get_submodule(part).requires_grad_(False)
        batch = _empty(few, budget)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            loss = model(batch)
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage()._cdata, None)
        del loss
    return float(sum(sizes.values()))


def _empty(config: VLMConfig, budget: Budget) -> PackedBatch:
    """A batch of the budget's shapes; of what is in it nothing is read."""
    size = config.vit_img_size
    return PackedBatch(
        input_ids=torch.empty(budget.tokens, dtype=torch.int64),
        position_ids=torch.empty(budget.tokens, dtype=torch.int32),
        cu_seqlens=torch.empty(budget.documents + 1, dtype=torch.int32),
        images=torch.empty(budget.images, 3, size, size, dtype=torch.uint8),
        image_rows=torch.empty(budget.tokens, dtype=torch.int32),
        label_index=torch.empty(budget.labels, dtype=torch.int64),
        labels=torch.empty(budget.labels, dtype=torch.int64),
        max_seqlen=budget.max_seqlen,
        n_labels=budget.labels,
    )
