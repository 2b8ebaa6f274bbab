"""Training in float16: the loss is scaled, overflows are skipped, and a resume goes on exactly."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.reliability import SMALL, losses
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.scaling import LossScaler, make_scaler, state_of
from nanovlm_fast.reporting.metrics import StepStats, read_metrics
from nanovlm_fast.training.optim import apply_gradients, make_optimizers
from nanovlm_fast.training.steps import accumulate_gradients
from tests.model.test_parity import batch_of, mixed_samples
from tests.support import forks
from tests.training.test_distributed import run

CPU = torch.device("cpu")
HALF = ["--dtype", "float16"]
ALONE = [*SMALL, *HALF, "--workers", "0", "--hang-timeout", "0"]  # in the tests' own process


def scaler_of(scale: float, growth_tracker: int = 0) -> LossScaler:
    return LossScaler(
        CPU, {"scale": scale, "growth_tracker": growth_tracker, "counts": [0.0, 0.0, 0.0]}
    )


def read(scaler: LossScaler) -> dict:
    return state_of(scaler.readings().tolist())


def test_only_float16_needs_a_scaler():
    assert make_scaler(torch.float32, CPU) is None and make_scaler(torch.bfloat16, CPU) is None
    scaler = make_scaler(torch.float16, CPU)
    assert read(scaler) == {"scale": 2.0**16, "growth_tracker": 0, "counts": [0, 0, 0]}


@pytest.mark.parametrize(
    "kept",
    [
        {"scale": 2.0},
        {"scale": "much", "growth_tracker": 0, "counts": [0, 0, 0]},
        {"scale": 0.0, "growth_tracker": 0, "counts": [0, 0, 0]},
        {"scale": 2.0, "growth_tracker": [], "counts": [0, 0, 0]},
        {"scale": 2.0, "growth_tracker": 0, "counts": [0]},
    ],
)
def test_a_damaged_scale_of_a_checkpoint_is_one_clear_error(kept):
    with pytest.raises(ValueError, match=r"loss_scale is damaged .*--dtype float32 does without"):
        make_scaler(torch.float16, CPU, kept)
    assert make_scaler(torch.float32, CPU, kept) is None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_scaled_gradients_are_those_of_the_loss_and_closer_to_float32(small_config, accumulate):
    """Small gradients vanish in float16 without a scale; with one they are there, unscaled once."""
    model = VisionLanguageModel(small_config)
    rng = np.random.default_rng(0)
    samples = [mixed_samples(small_config, 4, rng) for _ in range(accumulate)]
    batches = [batch_of(one, small_config) for one in samples]
    labels = 1e5  # as of a step over many ranks: each label's gradient is tiny

    def gradients(dtype: torch.dtype, scaler: LossScaler | None) -> torch.Tensor:
        model.zero_grad()
        accumulate_gradients(model, model, batches, labels, autocast_to(dtype, CPU), scaler)
        if scaler:
            scaler.unscale_(torch.optim.SGD(model.parameters()))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradients(torch.float32, None)
    plain = (gradients(torch.float16, None) - truth).norm() / truth.norm()
    scaled = (gradients(torch.float16, scaler_of(2.0**16)) - truth).norm() / truth.norm()
    assert scaled < 2e-3 < plain


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_changes_nothing_but_the_scale(optimizer):
    """Also where only one of two optimizers has a gradient that overflowed; clipping is after."""
    torch.manual_seed(0)
    model = VisionLanguageModel(parse_config(SMALL)[0])
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    scaler = scaler_of(1024.0, growth_tracker=5)

    def step(broken: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = 1024 * torch.randn(parameter.shape, generator=generator)
        size = torch.cat([p.grad.flatten() for p in model.parameters()]).norm() / 1024
        if broken is not None:
            model.MP.proj.weight.grad[0, 0] = broken
        update = apply_gradients(model, optimizers, 1.0, scaler=scaler)
        assert update.skipped.item() == (broken is not None)
        assert broken is not None or update.norm.item() == pytest.approx(size.item(), rel=1e-5)

    def everything() -> list[torch.Tensor]:
        states = [t for each in optimizers for slots in each.state.values() for t in slots.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *states)]

    step()
    assert read(scaler)["scale"] == 1024 and read(scaler)["growth_tracker"] == 6
    before = everything()
    step(broken=float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert read(scaler)["scale"] == 512 and read(scaler)["growth_tracker"] == 0


def test_overflows_are_counted_apart_from_losses_that_are_not_finite():
    scaler = scaler_of(4.0)
    stats = StepStats(CPU, scaler=scaler)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), fused=True)
    reads = []
    for loss, gradient in ((2.0, 1.0), (2.0, "inf"), ("nan", "nan"), (2.0, "inf"), (2.0, "inf")):
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.full_like(weight, float(gradient))
        layer = torch.nn.ParameterList(optimizer.param_groups[0]["params"])
        update = apply_gradients(layer, [optimizer], scaler=scaler)
        stats.add(torch.tensor(float(loss)), 2, update.norm, update.skipped)
        reads.append(stats.take()())
    assert [one["skipped"] for one in reads] == [0, 0, 1, 1, 1]
    assert [one["loss_scale"]["scale"] for one in reads] == [4, 2, 1, 0.5, 0.25]
    assert [one["loss_scale"]["counts"] for one in reads] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
        [2, 1, 1],
        [3, 2, 2],
    ]
    # The norm of the last step that was taken: of an overflow it says nothing.
    assert len({one["grad_norm"] for one in reads}) == 1 and reads[0]["grad_norm"] > 0


def spoiled(loop, out: Path, scale: float, steps: set[int], options: str = "") -> object:
    """A run whose gradients overflow in these steps; a new one begins with this scale."""
    argv = [*ALONE, "--out", str(out), "--optimizer", "adamw", *options.split()]
    trainer = loop.Trainer(*parse_config(argv))
    if not trainer.state.step:
        trainer.scaler.update(scale)

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf") if trainer.state.step + 1 in steps else grad

    trainer.model.MP.proj.weight.register_hook(spoil)
    return trainer


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, loop):
    """Scale and growth tracker too: with another scale the gradients round elsewhere."""
    bad = {2, 3, 8}
    options = "--max-steps 12 --save-every 6 --keep-checkpoints 2"
    whole = tmp_path / "whole"
    spoiled(loop, whole, 2.0**10, bad, options).train()
    lines = {line["step"]: line for line in read_metrics(whole) if "loss" in line}
    assert [lines[n]["overflow_steps"] for n in (1, 2, 3, 7, 8, 12)] == [0, 1, 2, 2, 3, 3]
    assert [lines[n]["loss_scale"] for n in (1, 2, 7, 12)] == [2**10, 2**9, 2**8, 2**7]
    assert lines[12]["skipped_steps"] == 0 and losses(whole)[12] < losses(whole)[1]
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000012")
    at_6 = json.loads((cut / "checkpoints/step-000006/state.json").read_text())["loss_scale"]
    assert at_6 == {"scale": 2.0**8, "growth_tracker": 3, "counts": [2, 0, 0]}
    trainer = spoiled(loop, cut, 1.0, bad, f"{options} --resume")
    assert read(trainer.scaler) == at_6
    trainer.train()
    assert losses(cut) == losses(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (cut / "last" / file).read_bytes() == (whole / "last" / file).read_bytes()
    states = [json.loads((run / "last" / "state.json").read_text()) for run in (cut, whole)]
    assert states[0]["loss_scale"] == states[1]["loss_scale"]
    assert states[0]["loss_scale"] == {"scale": 2.0**7, "growth_tracker": 4, "counts": [3, 0, 0]}


def test_a_scale_below_one_for_many_steps_stops_the_run(tmp_path, loop):
    options = "--max-steps 60 --max-skipped-steps 4 --save-every 50"
    trainer = spoiled(loop, tmp_path / "run", 4.0, set(range(2, 99)), options)
    with pytest.raises(loop.Stopped) as stopped:
        trainer.train()
    message = str(stopped.value)
    # Three halvings, by the steps 2 to 4, lead below 1.
    assert re.match(r"the loss scale of float16 was below 1 for 4 steps .* step 7: ", message)
    assert "--resume --dtype float32" in message and "checkpoint" in message
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_losses_that_are_not_finite_stop_a_float16_run_as_any_other(tmp_path, loop):
    options = "--max-steps 30 --max-skipped-steps 3 --save-every 50"
    trainer = spoiled(loop, tmp_path / "run", 2.0**10, {2}, options)
    forward = trainer.forward
    trainer.forward = lambda batch: forward(batch) * float("nan" if trainer.state.step > 4 else 1)
    with pytest.raises(loop.Stopped, match=r"3 steps in a row up to step 8 .* losses are not"):
        trainer.train()
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if "loss" in line}
    assert (lines[8]["skipped_steps"], lines[8]["overflow_steps"]) == (3, 1)


ONE_RANK_OVERFLOWS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from nanovlm_fast.model.scaling import LossScaler, state_of
from nanovlm_fast.training.optim import apply_gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
layer = torch.nn.Linear(4, 4, bias=False)
fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
scaler = LossScaler(torch.device("cpu"))
before = layer.weight.full_tensor().clone()
scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
if rank == 1:
    layer.weight.grad.to_local()[0, 0] = float("inf")
update = apply_gradients(layer, [optimizer], 1.0, scaler=scaler)
assert update.skipped.item() == 1
assert state_of(scaler.readings().tolist())["scale"] == 2.0**15
assert torch.equal(layer.weight.full_tensor(), before)
scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
update = apply_gradients(layer, [optimizer], scaler=scaler)
assert update.skipped.item() == 0 and abs(update.norm.item() - 4.0) < 1e-5
assert state_of(scaler.readings().tolist())["growth_tracker"] == 1
assert not torch.equal(layer.weight.full_tensor(), before)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_ranks_agree_on_an_overflow_of_one_of_them(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(ONE_RANK_OVERFLOWS)
    with (tmp_path / "log").open("w+") as log:
        code = forks.run_ranks([str(script)], 2, log)
    assert code == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
def test_replicated_and_sharded_ranks_scale_alike(tmp_path):
    """The first step overflows by itself: the scale begins at 65,536."""
    options = "--dtype float16 --optimizer adamw --max-steps 8 --workers 1"
    runs = [run(tmp_path / "ddp", 2, options), run(tmp_path / "fsdp", 2, f"{options} --shard")]
    ddp, fsdp = (json.loads((at / "last/state.json").read_text())["loss_scale"] for at in runs)
    assert ddp == fsdp and ddp["counts"][0] > 0
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)
    assert losses(runs[0])[8] < losses(runs[0])[1] - 0.5
