"""The gate: right kernels pass, and one that is wrong in any way does not.

Mutants are plain functions, put where the model imports its kernels from. Kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.kernels import adamw as update
from nanovlm_fast.kernels import layer_norm, linear_cross_entropy, rms_norm, swiglu
from nanovlm_fast.kernels import pixel_shuffle_proj as projector
from nanovlm_fast.model import ops
from nanovlm_fast.model.lora import BASE, LORA_A, LORA_B
from nanovlm_fast.tune.candidates import Choice, gpu_candidates
from nanovlm_fast.tune.gate import Gate, difference
from nanovlm_fast.tune.parts import Job, Parts, odd_batch
from nanovlm_fast.tune.search import WHOLE
from tests.support.tuning import BUDGET, job

TYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def gates() -> dict[str, Gate]:
    """For each type; what plain computes is shared by all tests."""
    return {dtype: Gate(Parts(job(dtype))) for dtype in TYPES}


def test_the_odd_batch_has_what_kernels_get_wrong():
    config = job().model
    batch = odd_batch(BUDGET, config)
    lengths = batch.cu_seqlens.diff()
    assert len(batch.input_ids) % 2 and len(batch.labels) % 2 and len(batch.images) % 2
    assert lengths[1] == 0 and lengths[0] > 0 and lengths[2] > 0, "no empty document in the middle"
    assert lengths[-1] == 0 and lengths.sum() == len(batch.input_ids)
    assert (batch.labels == -100).any() and (batch.labels >= 0).any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("part", ["vision", "language", "ends", "update", "blocks", WHOLE])
def test_plain_passes(part, dtype, gates):
    """Compared with itself, in each type: what is wrong later is the candidate's fault."""
    assert gates[dtype](Choice(), part) is None


@pytest.mark.parametrize("part", ["vision", "language", "ends", "update", "blocks"])
def test_plain_passes_with_a_bfloat16_stream(part):
    with_masters = dataclasses.replace(job("bfloat16"), stream="bfloat16")
    assert Gate(Parts(with_masters))(Choice(), part) is None


# All kernels pass in `test_real_kernels_in_the_interpreter`, which takes longer.
@pytest.mark.parametrize("name", ["rotary", "layer_norm"])
def test_a_real_kernel_passes(name, gates):
    (candidate,) = (c for c in gpu_candidates(frozenset({"kernels"}), False) if c.name == name)
    assert gates["float32"](candidate.apply(Choice()), candidate.part) is None


FROZEN = {"lr_vision": 0.0, "lr_projector": 0.0}


@pytest.mark.parametrize(("stream", "frozen"), [("float32", FROZEN), ("bfloat16", {})])
def test_parts_have_a_runs_adapters_and_train_what_it_trains(stream, frozen, monkeypatch):
    train = TrainConfig(lora_rank=2, stream=stream, **frozen)
    a_job = Job.of(job().model, train, BUDGET, torch.device("cpu"), torch.bfloat16)
    gate = Gate(Parts(Job.from_json(json.loads(json.dumps(a_job.to_json())))))
    for part in ("language", "blocks"):
        grads = {name for name in gate.plain(part, "odd", torch.bfloat16) if name[:2] == "d "}
        assert len([name for name in grads if name.endswith((LORA_A, LORA_B))]) == 16
        assert not [name for name in grads if name.endswith(f"{BASE}.weight")], "it is frozen"
    assert any("vision_encoder" in name for name in grads) == (not frozen)
    moved = gate.plain("update", "odd", torch.bfloat16)
    towers = {name.split(".")[0].split()[1] for name, by in moved.items() if by.any()}
    assert towers == {"decoder", *(() if frozen else ("vision_encoder", "MP"))}
    assert {by.any().item() for name, by in moved.items() if BASE in name} == {False}
    assert gate(Choice(), "blocks") is None and gate(Choice(), "update") is None
    monkeypatch.setattr(rms_norm, "rms_norm", off_by_one_percent)
    assert gate(Choice(("rms_norm",)), "blocks") is not None


class Transposed(torch.autograd.Function):
    """x unchanged; its gradient, square in the last two dimensions, transposed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        square = grad[..., : grad.shape[-2], : grad.shape[-1]]
        return square.mT.contiguous() if square.shape[-1] == square.shape[-2] else grad.flip(-1)


def without_residual(x, weight, eps, residual=None):
    y = ops.rms_norm(x, weight, eps)
    return y if residual is None else (y, residual)


def without_the_sum(x, weight, eps, residual=None):
    if residual is None:
        return ops.rms_norm(x, weight, eps)
    return ops.rms_norm(x, weight, eps, residual)[0], residual


def wrong_eps(x, weight, eps, residual=None):
    return ops.rms_norm(x, weight, 10 * eps, residual)


def wrong_eps_of_layer_norm(x, weight, bias, eps, residual=None, delta_bias=None):
    return ops.layer_norm(x, weight, bias, 10 * eps, residual, delta_bias)


def without_bias(x, weight, bias, eps, residual=None, delta_bias=None):
    return ops.layer_norm(x, weight, torch.zeros_like(bias), eps, residual, delta_bias)


def off_by_one_percent(x, weight, eps, residual=None):
    y = ops.rms_norm(x, weight, eps, residual)
    return 1.01 * y if residual is None else (1.01 * y[0], y[1])


def transposed_gradient(x, weight, factor, bias=None, grid=None):
    return ops.pixel_shuffle_proj(x, Transposed.apply(weight), factor, bias, grid)


def swapped(gate_up):
    return ops.swiglu(gate_up.roll(gate_up.shape[-1] // 2, -1))


def never_written(gate_up):
    out = ops.swiglu(gate_up)
    hole = torch.empty_like(out)
    hole[:-1] = 0
    return out + hole


def other_bits(gate_up):
    noise = 1 + 1e-6 * torch.randn(gate_up.shape[0], 1)
    return ops.swiglu(gate_up) * noise


def counts_ignored_labels(h, weight, labels):
    return ops.linear_cross_entropy(h, weight, labels.clamp(min=0))


MUTANTS: list[tuple[object, Callable, str]] = [
    (rms_norm, without_residual, "language"),
    (rms_norm, without_the_sum, "language"),
    (rms_norm, wrong_eps, "language"),
    (rms_norm, off_by_one_percent, "language"),
    (layer_norm, wrong_eps_of_layer_norm, "vision"),
    (layer_norm, without_bias, "vision"),
    (projector, transposed_gradient, "ends"),
    (swiglu, swapped, "language"),
    (swiglu, never_written, "language"),
    (swiglu, other_bits, "language"),
    (linear_cross_entropy, counts_ignored_labels, "ends"),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("module", "mutant", "part"), MUTANTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_mutated_kernel_never_passes(module, mutant, part, dtype, gates, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(importlib.import_module(module.__name__), name, mutant)
    wrong = gates[dtype](Choice((name,)), part)
    assert wrong is not None
    # Together with everything else it does not pass either.
    assert gates[dtype](Choice((name,)), WHOLE) is not None


@pytest.mark.parametrize("module", [rms_norm, layer_norm, swiglu])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_plain_function_in_a_kernels_place_passes(module, dtype, gates, monkeypatch):
    """So the mutants above fail for their mutation."""
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(module, name, getattr(ops, name))
    assert gates[dtype](Choice((name,)), "blocks") is None


def adamw_with(
    rate: float = 1.0, beta1: float = 1.0, beta2: float = 1.0, decay: float = 1.0, ulps: int = 0
) -> Callable:
    """What `kernels/adamw.py` computes, with factors to its numbers, and one weight ulps off."""

    def adamw(grads: list[Tensor], weights: list[Tensor], *rest: Any) -> None:
        averages, squares, working, steps, rates, groups, *_ = rest
        for number, weight in enumerate(weights):
            average = averages[number]
            square = squares[number]
            lr, b1, b2, eps, wd = rates[groups[number]].tolist()
            lr *= rate
            b1 *= beta1
            b2 *= beta2
            grad = grads[number].float()
            steps[number] += 1
            average.mul_(b1).add_((1 - b1) * grad)
            square.mul_(b2).add_((1 - b2) * grad * grad)
            corrected = average / (1 - b1 ** steps[number])
            root = (square / (1 - b2 ** steps[number])).sqrt()
            weight.mul_(1 - lr * wd * decay).sub_(lr * corrected / (root + eps))
            up = torch.tensor(torch.inf)
            for _ in range(ulps):
                weight.view(-1)[:1] = weight.view(-1)[:1].nextafter(up)
            if working:
                working[number].copy_(weight)

    return adamw


UPDATES = [{"rate": 1.01}, {"beta1": 0.99}, {"beta2": 0.99}, {"decay": 0.0}, {"decay": 1.2}]


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_an_update_may_round_otherwise_and_must_not_be_wrong(stream, monkeypatch):
    """Norms have weights of 1, of which an ulp is 0.1% of a step at a rate of 1e-4."""
    a_job = dataclasses.replace(job("bfloat16"), stream=stream)
    gate = Gate(Parts(a_job))
    for ulps in (0, 1):
        monkeypatch.setattr(update, "adamw", adamw_with(ulps=ulps))
        assert gate(Choice(("adamw",)), "update") is None
    for factors in UPDATES:
        monkeypatch.setattr(update, "adamw", adamw_with(**factors))
        assert "error" in (gate(Choice(("adamw",)), "update") or ""), factors


def test_the_loss_may_be_off_where_plain_hits_it_by_luck():
    """A single number has no other whose error would say how large errors are."""
    exact = {"out0": torch.tensor(100.0)}

    def against(ours: float, dtype: torch.dtype, plain: float = 100.0) -> str | None:
        off = {"out0": torch.tensor(ours)}
        return difference(off, off, {"out0": torch.tensor(plain)}, exact, dtype)

    assert against(100.05, torch.bfloat16) is None
    assert "allowed 1.00e-01" in against(101.0, torch.bfloat16)
    assert "allowed 1.00e-02" in against(100.05, torch.float32)
    many = {"d x": torch.ones(1000)}
    one_off = {"d x": torch.ones(1000).index_fill(0, torch.tensor([3]), 1.001)}
    assert difference(one_off, one_off, many, many, torch.bfloat16) is not None


def test_results_that_are_missing_or_of_another_shape_do_not_pass():
    exact = {"out0": torch.ones(3), "d x": torch.ones(2, 2)}

    def against(ours: dict[str, Tensor]) -> str | None:
        return difference(ours, ours, exact, exact, torch.float32)

    assert against(exact) is None
    assert "d x is missing" in against({"out0": torch.ones(3)})
    assert "shape (3,), not (2, 2)" in against({**exact, "d x": torch.ones(3)})
    assert "out0" in against({**exact, "out0": torch.full((3,), 1.01)})
