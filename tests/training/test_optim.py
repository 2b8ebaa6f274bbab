"""Optimizers, their groups of parameters, and the schedule."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.training.optim import Muon, lr_factor, make_optimizers, orthogonalise, set_lr
from tests.support.runs import trainer


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (1, 16, 4)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_directions(shape):
    matrices = torch.randn(shape)
    result = orthogonalise(matrices)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.5 and singular.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1)).min() > 0.95
    )


def test_muon_agrees_with_pytorchs_own():
    """The update of one matrix is that of torch.optim.Muon, which iterates in bfloat16."""
    start, gradients = torch.randn(12, 8), [torch.randn(12, 8) for _ in range(4)]
    results = []
    for make in (
        lambda p: Muon([dict(params=[p], parts=[[12]], lr=0.02)], weight_decay=0.1),
        lambda p: torch.optim.Muon([p], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach() - start)
    assert (
        torch.nn.functional.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0)
        > 0.999
    )
    assert results[0].norm() == pytest.approx(results[1].norm().item(), rel=0.02)


def test_fused_matrices_are_updated_as_their_parts():
    parts, gradient = [4, 2, 2], torch.randn(8, 6)
    whole = torch.nn.Parameter(torch.zeros(8, 6))
    whole.grad = gradient
    Muon([dict(params=[whole], parts=[parts], lr=1.0)]).step()
    for rows, ours in zip(gradient.split(parts), whole.detach().split(parts), strict=True):
        single = torch.nn.Parameter(torch.zeros_like(rows))
        single.grad = rows.clone()
        Muon([dict(params=[single], parts=[[len(rows)]], lr=1.0)]).step()
        torch.testing.assert_close(ours, single.detach())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_with_its_parts_rate(small_config, optimizer, tied):
    model = VisionLanguageModel(dataclasses.replace(small_config, lm_tie_weights=tied))
    config = TrainConfig(
        optimizer=optimizer, lr_projector=3e-3, lr_vision=2e-3, lr_language=1e-3, muon_scale=10
    )
    optimizers = make_optimizers(model, config)
    rates = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert (
        sum(len(g["params"]) for o in optimizers for g in o.param_groups)
        == len(list(model.parameters()))
        == len(rates)
    )
    expected = {"MP": 3e-3, "vision_encoder": 2e-3, "decoder": 1e-3}
    for name, parameter in model.named_parameters():
        matrix = optimizer == "muon" and ("proj" in name or "fc" in name) and parameter.dim() == 2
        assert rates[id(parameter)] == pytest.approx(
            expected[name.split(".")[0]] * (10 if matrix else 1)
        ), name
    set_lr(optimizers, 0.5)
    assert {g["lr"] / g["peak_lr"] for o in optimizers for g in o.param_groups} == {0.5}


def test_a_rate_of_zero_freezes_and_all_zeros_are_refused(small_config):
    model = VisionLanguageModel(small_config)
    make_optimizers(model, TrainConfig(lr_vision=0))
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizers(model, TrainConfig(lr_vision=0, lr_language=0, lr_projector=0))


def test_schedule():
    assert lr_factor(0.0, 0.05, 0.1, 0.1) == pytest.approx(0.5)
    assert (
        lr_factor(0.05, 0.1, 0.1, 0.1)
        == lr_factor(0.05, 0.2, 0.1, 0.1)
        == lr_factor(0.1, 0.2, 0.1, 0.1)
        == 1
    )
    assert lr_factor(0.55, 0.6, 0.1, 0.1) == pytest.approx(0.55)
    assert lr_factor(1.0, 1.0, 0.1, 0.1) == lr_factor(1.5, 1.6, 0.1, 0.1) == pytest.approx(0.1)
    assert lr_factor(0.0, 0.1, 0.0, 0.1) == 1


def rate_of_v01(step: int, steps: int) -> float:
    """nanoVLM v0.1's learning rate at a step, counted from 0, as a share of its peak."""
    warmup = steps * 0.03
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize("steps", [7, 100, 1000, 1234])
def test_the_learning_rate_is_v01s_at_every_step(steps):
    ours = [lr_factor(step / steps, (step + 1) / steps, 0.03, 0.1) for step in range(steps)]
    theirs = [rate_of_v01(step, steps) for step in range(steps)]
    assert ours == pytest.approx([min(rate, 1.0) for rate in theirs], rel=1e-12)
    over = [step for step, rate in enumerate(theirs) if rate > 1]
    assert over == ([] if steps % 100 == 0 else [int(0.03 * steps)]), (
        "the one step that is not v0.1's"
    )


@pytest.mark.parametrize("length", ["--max-steps 20", "--epochs 1 --accumulate 2"])
def test_the_loop_gives_each_step_its_rate(loop, tmp_path, length):
    """By steps, and by the examples that are taken."""
    subject = trainer(
        loop, tmp_path, f"{length} --optimizer adamw --warmup 0.2 --no-final-eval --save-every 0"
    )
    steps: list[tuple[int, float]] = []
    group = subject.optimizers[0].param_groups[0]
    note = lambda *_: steps.append((subject.state.examples, group["lr"] / group["peak_lr"]))  # noqa: E731
    subject.optimizers[0].register_step_pre_hook(note)
    subject.train()
    done = [number / len(steps) for number in range(len(steps) + 1)]
    if "epochs" in length:
        done = [0.0, *(examples / subject.total for examples, _ in steps)]
    assert len(steps) > 4 and done[-1] == 1
    floor = subject.config.min_lr
    expected = [lr_factor(before, after, 0.2, floor) for before, after in itertools.pairwise(done)]
    assert [rate for _, rate in steps] == pytest.approx(expected)
