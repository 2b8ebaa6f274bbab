"""The first step, before the clock starts: compiles, loads kernels, and tries the memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm_fast.command import ran_out_of_memory
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget

Step = Callable[[PackedBatch], Tensor]
Autocast = Callable[[], AbstractContextManager]


def full_batch(budget: Budget, config: VLMConfig) -> PackedBatch:
    """A made-up batch that fills the budget: every token is real, every image and label is used.

    Token ids, targets and pixels are random and the same at each call. Constant ones would do for
    memory and not for time: a GPU runs faster on zeros, as fewer of its transistors switch, and the
    gradients of one embedding row would all wait for each other.
    """
    # Its own generator: a run's random state must not depend on whether it warmed up.
    rng = np.random.default_rng(0)
    lengths = [budget.max_seqlen] * (budget.tokens // budget.max_seqlen)
    if rest := budget.tokens % budget.max_seqlen:
        lengths.append(rest)
    all_image_tokens = budget.images * config.image_tokens
    # Image tokens and labels go to the first documents that have room, until none are left.
    image_tokens = all_image_tokens
    labels = budget.labels
    documents = []
    for length in lengths:
        shown = min(length, image_tokens)
        labelled = min(length, labels)
        rows = np.arange(length) + (all_image_tokens - image_tokens)
        rows[shown:] = -1  # text
        ids, targets = rng.integers(0, config.lm_vocab_size, (2, length))
        ids[:shown] = 0  # what stands under image tokens
        targets[labelled:] = IGNORE
        documents.append(Document(ids, rows.astype(np.int32), targets))
        image_tokens -= shown
        labels -= labelled
    size = config.vit_img_size
    images = rng.integers(0, 256, (budget.images, 3, size, size), np.uint8)
    return pack([Sample("warm-up", images, documents)], budget, config.image_tokens, size)


def warm_up(
    step: Step,
    model: VisionLanguageModel,
    budget: Budget,
    autocast: Autocast,
    rounds: int = 1,
) -> None:
    """Run forward and backward on a full batch, `rounds` times.

    `step` is the model or its compiled form. Weights, gradients and random state are left as they
    were. Raises ValueError, saying what to lower and by how much, if the device's memory does not
    hold the batch.
    """
    device = next(model.parameters()).device
    fits = True
    # What the made-up batch draws must not move the run's random state.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for _ in range(rounds):
                batch = full_batch(budget, model.config).to(device)
                _forward_backward(step, model, batch, autocast)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            # No more in here: the error's traceback keeps all that the attempt had in memory.
            fits = False
        if not fits:
            torch._dynamo.reset()  # recorded graphs hold memory too
            gc.collect()
            if dist.is_initialized():  # a smaller attempt would need all ranks
                lower = f"lower --tokens-per-batch {budget.tokens}"
                raise ValueError(f"out of memory: {lower}, or take --recompute blocks")
            raise ValueError(_smaller(model, budget, autocast))


def _forward_backward(
    step: Step, model: VisionLanguageModel, batch: PackedBatch, autocast: Autocast
) -> None:
    try:
        with autocast():
            loss = step(batch)
        loss.backward()
        # Kernels that fail, or are compiled on their first call, do so before the clock starts.
        if batch.input_ids.is_cuda:
            torch.cuda.synchronize()
    finally:
        model.zero_grad(set_to_none=True)


def _smaller(
    model: VisionLanguageModel, budget: Budget, autocast: Autocast, share: int = 16
) -> str:
    """Measure the memory of a `share`-th of the budget, and say what would fit."""
    torch.cuda.empty_cache()
    part = budget.shrunk(share)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        batch = full_batch(part, model.config).to(next(model.parameters()).device)
        # The model itself and not its compiled form: compiling again would take minutes.
        _forward_backward(model, model, batch, autocast)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        amount = f"{part.tokens} tokens with {part.images} images"
        return f"out of memory, and even {amount} are too many for this device"
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    # The peak is weights, their gradients and activations. Activations grow with the tokens.
    activations = torch.cuda.max_memory_allocated() - before - gradients
    needed = activations * budget.tokens / part.tokens
    memory = torch.cuda.mem_get_info()[1]
    # AdamW's two moments are float32, as what it updates is: weights, or the masters of them.
    moments = 2 * 4 * sum(p.numel() for p in trained)
    return out_of_memory(budget, before + gradients + moments, needed, memory)


def out_of_memory(budget: Budget, fixed: float, activations: float, memory: float) -> str:
    """Say what to lower.

    `fixed` are the bytes of weights, gradients and optimizer, `activations` those of a full batch,
    and `memory` those of the device.
    """
    # A tenth is left to fragmentation; a multiple of 128 suits the tiles of matrix products.
    fits = int(0.9 * (memory - fixed) / activations * budget.tokens) // 128 * 128
    wanted = f"--tokens-per-batch {budget.tokens} with {budget.images} images"
    needs = f"needs about {(fixed + activations) / 1e9:.1f} GB"
    says = f"out of memory: {wanted} {needs}, the device has {memory / 1e9:.1f} GB"
    if fits < budget.max_seqlen:
        longest = f"not even one document of {budget.max_seqlen} tokens fits"
        return f"{says}, and {longest}: --recompute blocks"
    accumulate = -(-budget.tokens // fits)
    same_step = f"--accumulate {accumulate} keeps the step's size"
    images = "an explicit --images-per-batch shrinks in proportion"
    lower = f"lower --tokens-per-batch to {fits} ({same_step}; {images})"
    return f"{says}: {lower}, or take --recompute blocks"
