"""Adapters in the model: what they compute, what is trained, and how they are merged."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model.lora import (
    BASE,
    WITHOUT_ADAPTERS,
    Adapter,
    adapter_size,
    add_adapter,
    is_of_adapter,
    merged,
    merged_state,
)
from nanovlm_fast.model.ops import KERNELS, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.training.build import kernels_of
from nanovlm_fast.training.optim import apply_gradients, make_optimizers
from nanovlm_fast.training.parallel import unsharded
from nanovlm_fast.tune.candidates import gpu_candidates
from nanovlm_fast.tune.tuner import fit
from tests.model.test_parity import batch_of, mixed_samples


def adapted(config: VLMConfig, **options: str) -> VisionLanguageModel:
    """A model with adapters of rank 3 whose B is no longer 0."""
    model = VisionLanguageModel(config, choose_ops(**options))
    add_adapter(model, Adapter(3, 6.0, {}, {}))
    for name, parameter in model.named_parameters():
        if is_of_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def some_batch(config: VLMConfig) -> PackedBatch:
    return batch_of(mixed_samples(config, 9, np.random.default_rng(0)), config)


def without_adapters(model: VisionLanguageModel) -> VisionLanguageModel:
    plain = VisionLanguageModel(model.config)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    return plain


def gradients(step, model, batch, dtype=torch.float32) -> tuple[float, dict[str, torch.Tensor]]:
    with autocast_to(dtype, torch.device("cpu"))():
        loss = step(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def test_new_adapters_change_nothing_and_merged_ones_neither(small_config):
    model = VisionLanguageModel(small_config)
    batch = some_batch(small_config)
    before = model(batch)
    add_adapter(model, Adapter(3, 6.0, {}, {}))
    assert torch.equal(model(batch), before)
    moved = adapted(small_config)
    loss = moved(batch)
    assert abs(loss - before) > 1e-3 * before, "the adapters do nothing"
    torch.testing.assert_close(without_adapters(moved)(batch), loss, rtol=1e-5, atol=1e-5)


def test_merging_is_pefts_own_bit_for_bit(small_config):
    model = adapted(small_config)
    ours = merged_state(model, model.state_dict())
    layers = [layer for layer in model.decoder.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 4 * small_config.lm_n_blocks
    for layer in layers:
        layer.merge()
    theirs = model.state_dict()
    assert {name.replace(BASE, "") for name in theirs if not is_of_adapter(name)} == ours.keys()
    for name, weight in theirs.items():
        if not is_of_adapter(name):
            assert torch.equal(weight, ours[name.replace(BASE, "")]), name


def test_only_adapters_and_the_other_parts_are_trained(small_config):
    """The base has no gradient and no optimizer state; Muon leaves the adapters to AdamW."""
    for optimizer in ("adamw", "muon"):
        model = adapted(small_config)
        config = TrainConfig(optimizer=optimizer, lr_language=1e-2)
        optimizers = make_optimizers(model, config)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        batch = some_batch(small_config)
        (model(batch) / batch.n_labels).backward()
        frozen = {
            name
            for name, _ in model.named_parameters()
            if name.startswith("decoder.") and not is_of_adapter(name)
        }
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == before.keys() - frozen
        apply_gradients(model, optimizers)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == before.keys() - frozen
        held = {id(p) for one in optimizers for p in one.state}
        names = {name for name, p in model.named_parameters() if id(p) in held}
        assert names == before.keys() - frozen
        groups = [g for o in optimizers for g in o.param_groups if "decoder" in g["name"]]
        assert [group["name"] for group in groups] == ["decoder"]
        assert groups[0]["peak_lr"] == 1e-2
        sizes = [p.numel() for n, p in model.named_parameters() if is_of_adapter(n)]
        assert sum(sizes) == adapter_size(small_config, 3)


def test_it_is_one_graph_and_recomputes(small_config):
    dtype = torch.bfloat16  # in which autocast casts at every layer
    # Compiling takes seconds per block.
    model = adapted(dataclasses.replace(small_config, vit_n_blocks=1, lm_n_blocks=1))
    batch = some_batch(small_config)
    loss, expected = gradients(model, model, batch, dtype)
    whole = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in (whole, "norms_and_activations", "blocks"):
        if isinstance(step, str):
            model.ops = choose_ops(recompute=step)
            step = model
        again, found = gradients(step, model, batch, dtype)
        assert again == loss
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name


def test_a_bfloat16_stream_keeps_no_masters_of_the_base(small_config):
    model = adapted(small_config, stream="bfloat16")
    exact = {name: weight.clone() for name, weight in model.named_parameters()}
    model.keep_masters()
    optimizers = make_optimizers(model, TrainConfig(optimizer="adamw"))
    base = [name for name in exact if name.endswith(f"{BASE}.weight")]
    assert base and not any(name in model.masters.weights for name in base)
    for name, weight in model.named_parameters():
        narrow = name in base or name in model.masters.weights
        assert weight.dtype == (torch.bfloat16 if narrow else torch.float32), name
    batch = some_batch(small_config)
    with autocast_to(torch.bfloat16, torch.device("cpu"))():
        loss = model(batch)
    (loss / batch.n_labels).backward()
    apply_gradients(model, optimizers)
    for name, weight in model.named_parameters():
        if name in base:
            assert torch.equal(weight, exact[name].bfloat16())
        elif is_of_adapter(name):
            assert not torch.equal(weight, exact[name])
    # What an evaluation in between computes with: merged, and without peft's layers.
    copy = unsharded(model)
    assert copy.adapter is None
    assert copy.state_dict().keys() == VisionLanguageModel(small_config).state_dict().keys()


REFUSED = (
    (dict(lora_rank=4), "name them by --language or --start-from"),
    (dict(lora_alpha=4.0), "give --lora-rank too"),
    (dict(lora_rank=-1), "--lora-rank must be a whole number"),
    (dict(lora_rank=4, language="L", lr_language=0.0), "--lr-language, which must be above 0"),
    (dict(lora_rank=4, language="L", kernels="rotary,swiglu_mlp"), "--kernels swiglu_mlp"),
)


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_be_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**options).validate()


def test_all_kernels_are_those_that_see_the_adapters():
    plain = TrainConfig(kernels="all")
    assert kernels_of(plain, torch.device("cpu")) == "all"
    with_adapters = dataclasses.replace(plain, lora_rank=2)
    names = kernels_of(with_adapters, torch.device("cpu")).split(",")
    assert {*names} == {*KERNELS} - {*WITHOUT_ADAPTERS}


def test_the_tuner_tries_only_kernels_that_see_the_adapters():
    candidates = gpu_candidates(frozenset({"kernels"}), compiled=True)
    without = fit(candidates, {"sharded": False})
    adapted = fit(candidates, {"sharded": False, "lora_rank": 2})
    assert [one.name for one in without if one not in adapted] == ["swiglu_mlp"]


def test_without_peft_it_says_so(small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        add_adapter(VisionLanguageModel(small_config), Adapter(3, 6.0, {}, {}))


def test_tensors_that_do_not_fit_are_named():
    weights = {"a.weight": torch.zeros(4, 6), "MP.proj.weight": torch.zeros(2, 2)}
    a, b = "a.lora_A.default.weight", "a.lora_B.default.weight"
    fits = {a: torch.ones(2, 6), b: torch.ones(4, 2)}
    assert torch.equal(merged(weights, fits, 0.5)["a.weight"], torch.ones(4, 6))
    for wrong, named in (
        ({**fits, a: torch.ones(2, 5)}, a),
        ({**fits, b: torch.ones(4, 3)}, a),
        ({**fits, b: torch.ones(4)}, a),
        ({a: fits[a]}, a),
        ({b: fits[b]}, b),
        ({"MP.proj.weight": torch.zeros(3, 2)}, "MP.proj.weight"),
        ({"other.weight": torch.zeros(1)}, "other.weight"),
    ):
        with pytest.raises(ValueError, match=named):
            merged(weights, wrong, 0.5)
