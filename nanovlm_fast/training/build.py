"""Builds what a run trains: the model with its weights, its optimizers, and its compiled form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.capability import unfit_kernels
from nanovlm_fast.model.compiling import compile_options, compiled, inductor_names
from nanovlm_fast.model.lora import WITHOUT_ADAPTERS, Adapter, add_adapter
from nanovlm_fast.model.ops import KERNELS, Ops, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.ranks import World
from nanovlm_fast.training.checkpoint import load_training_state, load_weights
from nanovlm_fast.training.optim import make_optimizers
from nanovlm_fast.training.parallel import Averaging, replicate, shard_model
from nanovlm_fast.weights.adapter import base_of, hashes_of, read_adapter
from nanovlm_fast.weights.backbones import load_pretrained_weights
from nanovlm_fast.weights.folder import resolve


class Built(NamedTuple):
    """A model that is ready to train."""

    model: VisionLanguageModel
    optimizers: list[torch.optim.Optimizer]
    # The model compiled, replicated or sharded: batch -> summed loss.
    step_model: Callable[[PackedBatch], Tensor]


def build(
    model_config: VLMConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    checkpoint: Path | None = None,
) -> Built:
    """Build from a checkpoint of the run, from pretrained weights, or from scratch.

    With several ranks the model is sharded or replicated over `world`. Raises ValueError for a way
    to compile that does not work with several ranks, and what loading raises.
    """
    if config.compile == "reduce-overhead" and world.size > 1:
        raise ValueError(
            "--compile reduce-overhead is for one process; several take --compile default"
        )
    inductor = inductor_names(config.inductor)  # before weights are read: it may name nonsense
    # The same seed on all ranks: they must start from the same weights.
    torch.manual_seed(config.seed)
    ops = ops_for(config, kernels_of(config, device), device, dtype)
    if world.first:
        _say_what_does_not_run(config, device, ops.asleep)
    model = VisionLanguageModel(model_config, ops).to(device)
    # Weights before sharding, since a file holds whole tensors.
    load_start(model, config, checkpoint)
    sharded = config.shard and world.size > 1
    if sharded:
        options = compile_options(config.compile, inductor) if config.compile != "none" else None
        shard_model(model, options)
    # After loading: the masters are the weights as they were read, and not rounded.
    if config.stream == "bfloat16":
        model.keep_masters()
    # Optimizers after sharding, which replaces the parameters, and their state after both.
    optimizers = make_optimizers(model, config)
    if checkpoint:
        load_training_state(checkpoint, model, optimizers)
    # Compiling before DDP: DDP cuts the compiled graph at its buckets, so that the first ones are
    # reduced while backward still runs.
    step_model: Callable[[PackedBatch], Tensor] = model
    if config.compile != "none" and not sharded:
        step_model = compiled(model, config.compile, inductor)
    if world.size > 1 and model.masters:
        step_model = Averaging(model, step_model)
    elif world.size > 1 and not sharded:
        step_model = replicate(model, step_model, config.recompute != "none")
    return Built(model, optimizers, step_model)


def kernels_of(config: TrainConfig, device: torch.device) -> str:
    """The value of --kernels; with adapters `all` stands for those that compute with them."""
    if config.lora_rank and config.kernels == "all":
        left_out = {*WITHOUT_ADAPTERS, *unfit_kernels(KERNELS, device)}
        return ",".join(name for name in KERNELS if name not in left_out)
    return config.kernels


def load_start(model: VisionLanguageModel, config: TrainConfig, checkpoint: Path | None) -> None:
    """Load the weights that a run starts or resumes from, and add its adapters if it has any."""
    if config.lora_rank:
        adapt(model, config, checkpoint)
    elif not checkpoint:
        load_pretrained_weights(model, config)
    if checkpoint:
        load_weights(checkpoint, model)


def adapt(model: VisionLanguageModel, config: TrainConfig, checkpoint: Path | None) -> None:
    """Load the base of a run with adapters, of a resumed one by its checkpoint, and add them.

    Raises ValueError or OSError for a base that cannot be read.
    """
    base = base_of(config)
    if checkpoint:
        base = read_adapter(checkpoint).base
    elif config.start_from:
        # The checkpoint and not its run, which may go on.
        base["start_from"] = str(resolve(config.start_from).resolve())
    try:
        load_pretrained_weights(model, dataclasses.replace(config, **base))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"the base of --lora-rank cannot be read: {error}") from error
    alpha = alpha_of(config)
    add_adapter(model, Adapter(config.lora_rank, alpha, base, hashes_of(model)))


def _say_what_does_not_run(config: TrainConfig, device: torch.device, asleep: bool) -> None:
    """Name the kernels that are plain PyTorch on this device, and what is asked of no compiler."""
    if config.compile == "none" and inductor_names(config.inductor):
        print(f"warning: --inductor {config.inductor} changes nothing: the model is not compiled")
    if config.kernels == "all":
        for name, why in unfit_kernels(KERNELS, device).items():
            print(f"--kernels all leaves out {name}: {why}")
    if asleep:
        why = f"warning: --kernels {config.kernels}: Triton kernels need a GPU"
        print(f"{why}; plain PyTorch takes their place (--kernels none says so too)")


def ops_for(config: TrainConfig, kernels: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The operations that the run's options ask for, with these kernels."""
    return choose_ops(
        kernels,
        device,
        config.attention,
        dtype,
        config.recompute,
        config.vision_attention,
        config.stream,
    )


def alpha_of(config: TrainConfig) -> float:
    """The scale of adapters, times their rank."""
    return config.lora_alpha or 2.0 * config.lora_rank
