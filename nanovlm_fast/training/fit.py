"""`--tokens-per-batch auto`: whole steps of a throw-away model, to find the largest that fits.

The steps are plain PyTorch, as a compiled one of each size would take a minute and less memory.
"""

from __future__ import annotations

import dataclasses
import gc
import math

import torch

from nanovlm_fast.command import ran_out_of_memory
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model.lora import Adapter, add_adapter
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.scaling import make_scaler
from nanovlm_fast.packing.fitting import largest_budget
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.ranks import World
from nanovlm_fast.training.build import alpha_of, ops_for
from nanovlm_fast.training.optim import apply_gradients, drop_gradients, make_optimizers
from nanovlm_fast.training.steps import accumulate_gradients
from nanovlm_fast.training.warmup import full_batch

STEPS = 2  # the first one makes the optimizer's state, beside which the second has its peak


def without_a_gpu(config: TrainConfig, device: torch.device, world: World) -> TrainConfig:
    """The configuration with the preset's token budget in place of `auto`, off a GPU.

    Raises ValueError for several processes: each would find another budget.
    """
    if config.tokens_per_batch:
        return config
    if world.size > 1:
        raise ValueError(
            "--tokens-per-batch auto is for one process: give several the number that it finds"
        )
    if device.type == "cuda":
        return config
    tokens = preset(config.preset)[1].tokens_per_batch
    print(f"--tokens-per-batch auto needs a GPU: on {device} it is the preset's {tokens}")
    return dataclasses.replace(config, tokens_per_batch=tokens)


def in_proportion(measured: Budget, tokens: int, config: TrainConfig) -> Budget:
    """A budget of so many tokens with the other sizes in proportion, but for those that are given.

    The run measures its own again: what it leaves for the spread of samples is no proportion.
    """
    share = tokens / measured.tokens
    documents = config.documents_per_batch or math.ceil(share * measured.documents)
    return Budget(
        tokens=tokens,
        documents=max(documents, measured.pad_documents(tokens)),
        images=config.images_per_batch or math.ceil(share * measured.images),
        labels=config.labels_per_batch or math.ceil(share * measured.labels),
        max_seqlen=measured.max_seqlen,
    )


class Steps:
    """Steps of a model that is thrown away, with made-up batches that fill their budget."""

    def __init__(
        self,
        model: VLMConfig,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        measured: Budget,
    ):
        self.config = config
        self.measured = measured
        self.clip = config.clip
        self.device = device
        ops = ops_for(config, "none", device, dtype)
        self.dtype = dtype
        self.autocast = autocast_to(dtype, device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.model = VisionLanguageModel(model, ops).to(device)
            if config.lora_rank:
                adapter = Adapter(config.lora_rank, alpha_of(config), base={}, hashes={})
                add_adapter(self.model, adapter)
        if config.stream == "bfloat16":
            self.model.keep_masters()

    def __call__(self, tokens: int) -> bool:
        """Take steps of so many tokens; return whether they fit the memory."""
        fits = True
        # New ones each time: those whose update ran out of memory take no other. A scaler refuses
        # it, and an optimizer may have half of its state.
        scaler = make_scaler(self.dtype, self.device)
        optimizers = make_optimizers(self.model, self.config)
        try:
            budget = in_proportion(self.measured, tokens, self.config)
            batch = full_batch(budget, self.model.config).to(self.device)
            for _ in range(STEPS):
                accumulate_gradients(
                    self.model, self.model, [batch], batch.n_labels, self.autocast, scaler
                )
                apply_gradients(self.model, optimizers, self.clip, False, scaler)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            # No more in here: the error's traceback keeps all that the attempt had in memory.
            fits = False
        drop_gradients(self.model, optimizers)
        return fits

    def drop(self) -> None:
        """Give the memory back."""
        del self.model
        gc.collect()
        torch.cuda.empty_cache()


def tokens_that_fit(
    model: VLMConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    measured: Budget,
) -> int:
    """The largest token budget that leaves a tenth of a GPU's memory free.

    `measured` is any budget that was measured on the data. Raises ValueError if none fits.
    """
    gc.collect()
    torch.cuda.empty_cache()
    try:
        steps = Steps(model, config, device, dtype, measured)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise ValueError("out of memory: the model alone does not fit this device") from error

    def trial(tokens: int) -> float | None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        if not steps(tokens):
            return None
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device))

    # What other processes hold is not there; what this one holds is a part of the peaks.
    free, _ = torch.cuda.mem_get_info(device)
    memory = free + torch.cuda.memory_reserved(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    try:
        found = largest_budget(trial, memory, model, measured.max_seqlen, sms)
    finally:
        steps.drop()
    print(f"--tokens-per-batch auto: {found:,} tokens fit 90% of {memory / 1e9:.1f} GB")
    return found
