"""Recomputation policies: the same bits, less memory, still one graph."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.ops import Ops, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.training.optim import make_optimizers
from tests.model.test_parity import batch_of, mixed_samples
from tests.support.kernel_checks import DEVICE

MLPS = ("gelu_mlp", "swiglu_mlp")


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("policy", "compiled"),
    [
        (POLICIES[1], False),
        (POLICIES[2], False),
        pytest.param(POLICIES[1], True, marks=pytest.mark.slow),
    ],
)
def test_kernels_with_products_give_the_same_bits(small_config, policy, compiled):
    config = dataclasses.replace(small_config, vit_n_blocks=1, lm_n_blocks=1)
    batch = batch_of(mixed_samples(config, 2, np.random.default_rng(0)), config).to(DEVICE)
    found = []
    for chosen in ("none", policy):
        torch.manual_seed(0)
        ops = choose_ops(",".join(MLPS), DEVICE, recompute=chosen)
        model = VisionLanguageModel(config, ops).to(DEVICE)
        found.append(gradients(model, batch, chosen, compiled and chosen == policy))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(
            again, plain, rtol=1e-5 if compiled else 0, atol=1e-7 if compiled else 0
        )


@pytest.mark.parametrize("kernel", MLPS)
def test_kernels_with_products_do_not_keep_the_activation(small_config, kernel):
    """The policy keeps what their operators return; the activation must not be among it."""
    batch = batch_of(mixed_samples(small_config, 2, np.random.default_rng(0)), small_config)
    ops = choose_ops(kernel, recompute="norms_and_activations")
    keeping = dataclasses.replace(ops, **{kernel: getattr(choose_ops(kernel), kernel)})
    model = VisionLanguageModel(small_config, ops)
    kept = kept_bytes(model, batch)
    model.ops = keeping
    rows, inner, blocks = len(batch.input_ids), small_config.lm_inter_dim, small_config.lm_n_blocks
    if kernel == "gelu_mlp":
        rows = len(batch.images) * small_config.grid**2
        inner = small_config.vit_inter_dim
        blocks = small_config.vit_n_blocks
    else:
        blocks -= 1  # the last has labelled rows only
    assert kept_bytes(model, batch) - kept >= 4 * rows * inner * blocks


def kept_bytes(model: VisionLanguageModel, batch: PackedBatch) -> int:
    """Bytes that a forward pass leaves for the backward: what was allocated and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss = model(batch)
        # A run in this process switches automatic collections off, and recomputation leaves cycles.
        gc.collect()
    kept = sum(event.self_cpu_memory_usage for event in trace.key_averages())
    del loss
    return kept


def test_each_policy_keeps_less_for_the_backward(small_config):
    config = VLMConfig(**{**vars(small_config), "lm_n_blocks": 6, "vit_n_blocks": 6})
    model = VisionLanguageModel(config, Ops())
    batch = batch_of(mixed_samples(config, 20, np.random.default_rng(0)), config)
    kept = {}
    for policy in POLICIES:
        model.ops = dataclasses.replace(model.ops, recompute=policy)
        kept[policy] = kept_bytes(model, batch)
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
