"""The first step before the clock starts: compiles, loads kernels, and finds out whether the budgets fit the memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import Document, Sample
from nanovlm_fast.packing.packer import Budget


def full_batch(budget: Budget, config: VLMConfig) -> PackedBatch:
    """A made-up batch that fills the budget: every token real, every image and label used."""
    lengths = [budget.max_seqlen] * (budget.tokens // budget.max_seqlen)
    lengths += [budget.tokens % budget.max_seqlen] * (budget.tokens % budget.max_seqlen > 0)
    image_tokens, labels, documents = budget.images * config.image_tokens, budget.labels, []
    for length in lengths:
        shown, labelled = min(length, image_tokens), min(length, labels)
        rows = np.arange(length) + (budget.images * config.image_tokens - image_tokens)
        image_tokens, labels = image_tokens - shown, labels - labelled
        rows[shown:] = -1
        targets = np.where(np.arange(length) < labelled, 0, -100)
        documents.append(Document(np.zeros(length, np.int64), rows.astype(np.int32), targets))
    size = config.vit_img_size
    images = np.full((budget.images, 3, size, size), 127, np.uint8)
    return pack([Sample("warm-up", images, documents)], budget, config.image_tokens, size)


def warm_up(
    step: Callable[[PackedBatch], Tensor],
    model: VisionLanguageModel,
    budget: Budget,
    autocast: Callable[[], AbstractContextManager],
    rounds: int = 1,
) -> None:
    """Forward and backward on a full batch, `rounds` times; leaves weights, gradients and random state as they were.

    `step` is the model or its compiled form. Raises ValueError, saying what to lower and by how much, if the device's
    memory does not hold the batch.
    """
    device = next(model.parameters()).device
    fits = True
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for _ in range(rounds):
                _forward_backward(
                    step, model, full_batch(budget, model.config).to(device), autocast
                )
        except torch.OutOfMemoryError:
            fits = False  # no more here: while the error lives, so does all that the attempt had in memory
        if not fits:
            torch._dynamo.reset()  # recorded graphs hold memory too
            gc.collect()
            if dist.is_initialized():  # a smaller attempt would need all ranks
                raise ValueError(
                    f"out of memory: lower --tokens-per-batch {budget.tokens}, or take --recompute blocks"
                )
            raise ValueError(_smaller(model, budget, autocast))


def _forward_backward(step, model, batch, autocast) -> None:
    try:
        with autocast():
            loss = step(batch)
        loss.backward()
        if batch.input_ids.is_cuda:
            torch.cuda.synchronize()
    finally:
        model.zero_grad(set_to_none=True)


def _smaller(
    model: VisionLanguageModel, budget: Budget, autocast: Callable, share: int = 16
) -> str:
    """Measure a `share`-th of the budget and say what would fit."""
    torch.cuda.empty_cache()
    part = budget.shrunk(share)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        _forward_backward(
            model,
            model,
            full_batch(part, model.config).to(next(model.parameters()).device),
            autocast,
        )
    except torch.OutOfMemoryError:
        return f"out of memory, and even {part.tokens} tokens with {part.images} images are too many for this device"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = (
        (torch.cuda.max_memory_allocated() - before - weights) * budget.tokens / part.tokens
    )
    return out_of_memory(budget, before + 3 * weights, activations, torch.cuda.mem_get_info()[1])


def out_of_memory(budget: Budget, fixed: float, activations: float, memory: float) -> str:
    """What to lower: `fixed` bytes for weights, gradients and optimizer, `activations` for a full batch."""
    fits = int(0.9 * (memory - fixed) / activations * budget.tokens) // 128 * 128
    needs = (
        f"out of memory: --tokens-per-batch {budget.tokens} with {budget.images} images needs about "
        f"{(fixed + activations) / 1e9:.1f} GB, the device has {memory / 1e9:.1f} GB"
    )
    if fits < budget.max_seqlen:
        return f"{needs}, and not even one document of {budget.max_seqlen} tokens fits: --recompute blocks"
    accumulate = -(-budget.tokens // fits)
    return (
        f"{needs}: lower --tokens-per-batch to {fits} (--accumulate {accumulate} keeps the step's size; an explicit "
        f"--images-per-batch shrinks in proportion), or take --recompute blocks"
    )
