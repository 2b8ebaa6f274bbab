"""Recomputation policies: the same bits, less memory, still one graph."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.ops import Ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.training.optim import make_optimizers
from tests.model.test_parity import batch_of, mixed_samples


def gradients(
    model: VisionLanguageModel, batch: PackedBatch, policy: str, compiled: bool = False
) -> list[torch.Tensor]:
    model.ops = dataclasses.replace(model.ops, recompute=policy)
    torch._dynamo.reset()
    step = (
        torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        if compiled
        else model
    )
    loss = step(batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_every_policy_gives_the_same_bits(small_config, policy, compiled):
    model = VisionLanguageModel(small_config)
    batch = batch_of(mixed_samples(small_config, 9, np.random.default_rng(0)), small_config)
    for plain, again in zip(
        gradients(model, batch, "none"), gradients(model, batch, policy, compiled), strict=True
    ):
        torch.testing.assert_close(
            again, plain, rtol=1e-5 if compiled else 0, atol=1e-7 if compiled else 0
        )


def test_each_policy_keeps_less_for_the_backward(small_config):
    config = VLMConfig(**{**vars(small_config), "lm_n_blocks": 6, "vit_n_blocks": 6})
    model = VisionLanguageModel(config, Ops())
    batch = batch_of(mixed_samples(config, 20, np.random.default_rng(0)), config)
    kept = {}
    for policy in POLICIES:
        model.ops = dataclasses.replace(model.ops, recompute=policy)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            loss = model(batch)
        kept[policy] = sum(
            event.self_cpu_memory_usage for event in trace.key_averages()
        )  # bytes, freed ones taken off
        del loss
    assert kept["blocks"] < 0.6 * kept["norms_and_activations"] < 0.6 * 0.9 * kept["none"]


def saved_of(model: VisionLanguageModel, batch: PackedBatch, run_backward: bool = True) -> int:
    """Bytes that the vision tower's forward saves for the backward pass, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tower = model.vision_encoder.forward
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shown = tower(model.ops, batch.images)
    assert shown.requires_grad == any(p.requires_grad for p in model.vision_encoder.parameters())
    if run_backward:
        model(batch).backward()
    return sum(saved.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", ["lr_vision", "lr_vision lr_projector"])
def test_a_frozen_tower_saves_nothing_and_gets_no_gradient(small_config, policy, frozen):
    """As --lr-vision 0 freezes it."""
    model = VisionLanguageModel(small_config, Ops(recompute=policy))
    batch = batch_of(mixed_samples(small_config, 9, np.random.default_rng(0)), small_config)
    assert saved_of(model, batch, run_backward=False) > batch.images.nbytes
    make_optimizers(model, TrainConfig(**dict.fromkeys(frozen.split(), 0.0)))
    assert saved_of(model, batch) == 0
    assert all(weight.grad is None for weight in model.vision_encoder.parameters())
    assert (model.MP.proj.weight.grad is None) == ("lr_projector" in frozen)
    assert all(weight.grad is not None for weight in model.decoder.parameters())
