"""The step around the model: warm-up, feeding and statistics.

On a GPU, the host does not wait for the device, and CUDA graphs are used.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
import weakref

import numpy as np
import pytest
import torch

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import IGNORE
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.reporting.metrics import SpikeDetector, StepStats, read_metrics
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.warmup import full_batch, out_of_memory, warm_up
from tests.support.processes import ROOT
from tests.support.samples import random_sample

GPU = torch.cuda.is_available()
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
BUDGET = Budget(tokens=600, documents=40, images=6, labels=200, max_seqlen=64)


def batches(config, count: int) -> list[StreamBatch]:
    rng = np.random.default_rng(0)
    groups = ([random_sample(rng, config, 1, 3) for _ in range(1 + i % 3)] for i in range(count))
    packed = [pack(group, BUDGET, config.image_tokens, config.vit_img_size) for group in groups]
    return [StreamBatch(batch, {}, [], 0, 0, False, {}) for batch in packed]


# ---- warm-up


def test_a_full_batch_fills_every_budget(small_config):
    batch = full_batch(BUDGET, small_config)
    assert (batch.n_tokens, batch.n_images, batch.n_labels) == (
        BUDGET.tokens,
        BUDGET.images,
        BUDGET.labels,
    )
    assert batch.cu_seqlens.diff().max() == BUDGET.max_seqlen
    shown = batch.image_rows[batch.image_rows >= 0]
    assert torch.equal(
        shown, torch.arange(BUDGET.images * small_config.image_tokens, dtype=torch.int32)
    )
    assert (batch.labels != IGNORE).sum() == BUDGET.labels and len(
        batch.label_index.unique()
    ) == BUDGET.labels
    assert VisionLanguageModel(small_config)(batch).isfinite()


def test_a_full_batch_is_random_and_leaves_the_random_state(small_config):
    """A GPU is faster on constant data: what is timed on it would be too fast."""
    states = torch.get_rng_state(), str(np.random.get_state())
    batch = full_batch(BUDGET, small_config)
    assert torch.equal(torch.get_rng_state(), states[0]) and str(np.random.get_state()) == states[1]
    text = batch.input_ids[batch.image_rows < 0]
    for values in (text, batch.labels):
        assert values.unique().numel() > 0.5 * min(values.numel(), small_config.lm_vocab_size)
        assert values.min() >= 0 and values.max() < small_config.lm_vocab_size
    pixels = batch.images.flatten(1)
    assert pixels.unique().numel() == 256 and (pixels[0] != pixels[1]).float().mean() > 0.9
    again = full_batch(BUDGET, small_config)
    assert torch.equal(again.input_ids, batch.input_ids), "every attempt times the same work"


def test_warming_up_changes_neither_weights_nor_random_state(small_config):
    model = VisionLanguageModel(small_config)
    weights, random_state, calls = (
        [p.clone() for p in model.parameters()],
        torch.get_rng_state(),
        [],
    )

    def step(batch):
        calls.append(batch)
        return model(batch) + torch.rand(())  # an autotuner draws random numbers too

    warm_up(step, model, BUDGET, contextlib.nullcontext, rounds=3)
    assert len(calls) == 3 and torch.equal(torch.get_rng_state(), random_state)
    assert all(
        torch.equal(p, before) and p.grad is None
        for p, before in zip(model.parameters(), weights, strict=True)
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError, "no room"),
        (RuntimeError, "backend='inductor' raised: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_an_attempt_held_is_freed_before_the_advice_is_measured(
    small_config, monkeypatch, error, words
):
    """While an error is handled, its traceback keeps every saved tensor alive."""
    held: list[weakref.ref] = []
    alive_then: list[int] = []

    class Kept:
        pass

    def step(batch):
        kept = Kept()
        held.append(weakref.ref(kept))
        raise error(words)

    def advice(*arguments) -> str:
        alive_then.append(sum(ref() is not None for ref in held))
        return "lower something"

    monkeypatch.setattr("nanovlm_fast.training.warmup._smaller", advice)
    with pytest.raises(ValueError, match="lower something"):
        warm_up(step, VisionLanguageModel(small_config), BUDGET, contextlib.nullcontext)
    assert len(held) == 1 and alive_then == [0]


def test_out_of_memory_says_what_to_lower_and_by_how_much():
    budget = Budget(tokens=20736, documents=300, images=256, labels=4000, max_seqlen=128)
    error = out_of_memory(budget, fixed=4e9, activations=60e9, memory=34e9)
    assert "--tokens-per-batch 20736" in error and "64.0 GB" in error and "34.0 GB" in error
    assert (
        "lower --tokens-per-batch to 9216" in error and "--accumulate 3" in error
    )  # 0.9 (34 - 4) / 60 of 20736
    assert "not even one document" in out_of_memory(
        budget, fixed=4e9, activations=60e9, memory=4.01e9
    )


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_batch_too_big_for_the_device_is_refused_with_a_size_that_fits(small_config):
    model = VisionLanguageModel(small_config).cuda()
    budget = Budget(tokens=2**20, documents=2**15, images=2**13, labels=2**17, max_seqlen=64)
    torch.cuda.set_per_process_memory_fraction(6e9 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(
            ValueError,
            match=r"out of memory: --tokens-per-batch 1048576 .*lower --tokens-per-batch",
        ):
            warm_up(model, model, budget, contextlib.nullcontext)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- statistics that are read late


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_the_gpu)])
def test_statistics_are_those_of_their_interval_however_late_they_are_read(device):
    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value, device=device)

    stats = StepStats(device, kept={"losses": [1.0], "labels": [2], "skipped": [4.0, 0.0, 0.0]})
    stats.add(scalar(3.0), 2, scalar(5.0), scalar(0.0))
    glance, first = stats.peek(), stats.take()
    stats.add(scalar(50.0), 10, norm=scalar(7.0), skipped=scalar(0.0))
    second = stats.take()
    assert glance() == first()
    assert first()["losses"] == [0.5, 1.5] and (first()["loss"], first()["grad_norm"]) == (1.0, 5.0)
    assert (second()["loss"], second()["grad_norm"], second()["skipped"]) == (5.0, 7.0, 4)
    again = StepStats(device, kept=glance()["kept"])
    assert {**again.take()(), "grad_norm": 5.0} == first(), "what is kept is where a resume goes on"


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    stats = StepStats(torch.device("cpu"))
    reads = []
    for interval in ("..x", "xx.", "x..", ".x."):
        for mark in interval:
            bad = mark == "x"
            stats.add(
                torch.tensor(float("nan") if bad else 2.0),
                1,
                torch.tensor(1.0),
                torch.tensor(float(bad)),
            )
        reads.append(stats.take()())
    assert [read["skipped"] for read in reads] == [1, 3, 4, 5]
    assert [read["skipped_in_a_row"] for read in reads] == [1, 3, 1, 1], (
        "a row goes on over the end of an interval"
    )
    assert all(read["loss"] == 2.0 for read in reads), "the mean of what is finite"


def test_a_loss_that_stands_out_is_a_spike_and_the_next_one_still_is():
    rng, spikes = np.random.default_rng(0), SpikeDetector()
    assert not any(spikes.observe(loss) for loss in 3 + 0.1 * rng.standard_normal(300))
    assert [spikes.observe(loss) for loss in (3.2, 9.0, 3.0, 9.0, float("nan"), 3.1)] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    again = SpikeDetector(spikes.kept())
    assert (again.mean, again.variance) == (spikes.mean, spikes.variance) and again.observe(9.0)
    assert not any(SpikeDetector().observe(loss) for loss in (3.0, 3.0, 9.0)), (
        "at first nobody knows what is usual"
    )


# ---- feeding


def test_the_feed_hands_on_every_batch_and_measures_the_wait(small_config):
    made = batches(small_config, 3)

    def slowly():
        for batch in made:
            time.sleep(0.05)
            yield batch

    feed = Feed(slowly(), torch.device("cpu"), trim=True)
    for expected, (batch, packed) in zip(made, feed, strict=True):
        assert batch is expected and len(packed.input_ids) == expected.packed.n_tokens
    assert 0.15 <= feed.waited() < 1.0 and feed.waited() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_the_feed_measures_how_long_the_device_waits(small_config):
    """Waiting for late batches is counted.

    Batches that come while the device works cost no wait.
    """
    made, device = [b.pin_memory() for b in batches(small_config, 8)], torch.device("cuda")
    work = torch.randn(8192, 8192, device=device)

    def run(pause: float) -> float:
        feed = Feed((time.sleep(pause) or batch for batch in made), device)
        for expected, (_, packed) in zip(made, feed, strict=True):
            assert torch.equal(packed.images.cpu(), expected.packed.images) or pause == 0
            for _ in range(0 if pause else 20):
                work @ work
        torch.cuda.synchronize()
        return feed.waited()

    assert run(0.05) > 0.3
    assert run(0.0) < 0.05


# ---- the loop on a GPU


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """Trainers of small runs on the GPU, by options."""
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    numbers = itertools.count()

    def make(options: str) -> train.Trainer:
        small = (
            "--data synthetic --turns independent --tokens-per-batch 1024 --val-samples 4 "
            "--lm-vocab-size 320"
        )
        out = (
            f"--out {tmp_path / str(next(numbers))} --workers 0 --no-final-eval --device cuda "
            "--log-every 5 --tune off"
        )
        return train.Trainer(
            *parse_config([*small.split(), *out.split(), "--hang-timeout", "0", *options.split()])
        )

    yield make
    sys.modules.pop("train", None)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compile", ["none", "default", "reduce-overhead"])
def test_no_step_waits_for_the_device(trainer_of, compile, optimizer):
    trainer = trainer_of(f"--compile {compile} --optimizer {optimizer} --clip 1 --max-steps 30")
    step = trainer.optimizer_step

    def watched(*arguments) -> None:
        if trainer.state.step >= 2:  # the optimizers make their state in their first step
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.optimizer_step = watched
    trainer.train()
    assert trainer.state.step == 30


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "norms_and_activations"])
def test_cuda_graphs_train_as_eager_does(trainer_of, accumulate, recompute):
    losses = []
    for compile in ("none", "default", "reduce-overhead"):
        options = (
            f"--compile {compile} --recompute {recompute} --accumulate {accumulate} "
            "--optimizer adamw"
        )
        trainer = trainer_of(
            f"{options} --max-steps 20 --dtype float32 --attention sdpa --log-every 1"
        )
        trainer.train()
        losses.append([line["loss"] for line in read_metrics(trainer.run) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] == pytest.approx(
        losses[2], rel=1e-3
    )
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_the_optimizer_step_can_be_captured(trainer_of):
    trainer = trainer_of("--optimizer adamw --max-steps 3")
    (optimizer,) = trainer.optimizers
    parameters = list(trainer.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = [p.clone() for p in parameters]
    graph.replay()
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
