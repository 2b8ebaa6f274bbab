"""The search for the largest token budget, with made-up memories; and a real step of its trials."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench.reliability import SMALL
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.footprint import step_bytes
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.fitting import ROWS, largest_budget
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.packing.waves import wave_fill
from nanovlm_fast.presets import preset
from nanovlm_fast.ranks import World
from nanovlm_fast.training.fit import Steps, in_proportion, without_a_gpu
from tests.support.processes import ROOT

CPU = torch.device("cpu")
MODEL = VLMConfig()
GB = 1e9


def memory_of(fixed: float, per_token: float, limit: float, bend: float = 0.0):
    """A trial of a device with `limit` bytes, and the sizes that were tried."""
    tried: list[int] = []

    def trial(tokens: int) -> float | None:
        tried.append(tokens)
        peak = fixed + per_token * tokens + bend * tokens**2
        return None if peak > limit else peak

    return trial, tried


@pytest.mark.parametrize("per_token", [5e5, 2e6])
def test_the_largest_that_leaves_a_tenth_is_found_in_three_trials(per_token):
    trial, tried = memory_of(3.6 * GB, per_token, 15 * GB)
    found = largest_budget(trial, 15 * GB, MODEL, longest=128, sms=40)
    exact = (13.5 * GB - 3.6 * GB) / per_token
    assert 0.94 * exact <= found <= exact and found % ROWS == 0
    assert tried == [1024, 2048, found]
    near = range(int(0.95 * exact) // ROWS * ROWS + ROWS, int(exact), ROWS)
    assert wave_fill(found, MODEL, 40) >= max(wave_fill(n, MODEL, 40) for n in near) - 2e-3


@pytest.mark.parametrize("bend", [40.0, -2.0])
def test_a_memory_that_is_not_a_line_is_met_by_more_trials(bend):
    """More than predicted: smaller ones follow, also after running out; less: a larger one."""
    trial, tried = memory_of(3.6 * GB, 5e5, 15 * GB, bend)
    found = largest_budget(trial, 15 * GB, MODEL, longest=128)
    peak = 3.6 * GB + 5e5 * found + bend * found**2
    assert 0.85 * 13.5 * GB < peak <= 13.5 * GB and 3 < len(tried) <= 8


def test_the_largest_that_was_tried_and_fits_is_kept():
    """Also where the memory is a line only up to there, and nothing that it predicts fits."""

    def trial(tokens: int) -> float | None:
        return 3 * GB + 1e5 * tokens if tokens <= 2048 else None

    assert largest_budget(trial, 150 * GB, MODEL, longest=128) == 2048


def test_a_device_without_room_is_one_clear_error():
    trial, _ = memory_of(14 * GB, 5e5, 15 * GB)
    with pytest.raises(ValueError, match=r"not even 2048 tokens fit in 90% of 15\.0 GB; --recom"):
        largest_budget(trial, 15 * GB, MODEL, longest=2000)
    # The smallest fits and twice as much does not.
    trial, _ = memory_of(10 * GB, 3e6, 15 * GB)
    assert largest_budget(trial, 15 * GB, MODEL, longest=1000) == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_trial_takes_real_steps_of_the_size(small_config, dtype):
    """What is measured on a GPU, on a CPU: its size, its gradients, its optimizer's state."""
    measured = Budget(tokens=64, documents=8, images=2, labels=16, max_seqlen=32)
    config = dataclasses.replace(TrainConfig(), images_per_batch=3, clip=1.0)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    steps = Steps(small_config, config, CPU, dtype, measured)
    seen: list[tuple[int, int, int]] = []
    forward = steps.model.forward
    steps.model.forward = lambda batch: (
        seen.append((len(batch.input_ids), len(batch.images), batch.n_labels)),
        forward(batch),
    )[1]
    before = [weight.clone() for weight in steps.model.parameters()]
    assert steps(128)
    assert seen == [(128, 3, 32)] * 2
    moved = [not torch.equal(a, b) for a, b in zip(before, steps.model.parameters(), strict=True)]
    assert any(moved) and all(p.grad is None for p in steps.model.parameters())
    assert torch.equal(torch.get_rng_state(), state), "the run's random state has moved"
    assert in_proportion(measured, 32, TrainConfig()) == Budget(32, 4, 1, 8, 32)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [(torch.float32, "float32"), (torch.float16, "float32"), (torch.bfloat16, "bfloat16")],
)
def test_running_out_of_memory_is_an_answer_wherever_it_happens(
    small_config, dtype, stream, error, monkeypatch
):
    measured = Budget(tokens=64, documents=8, images=2, labels=16, max_seqlen=32)
    steps = Steps(small_config, TrainConfig(stream=stream), CPU, dtype, measured)

    def full(*_, **__):
        raise error

    # The first is called by AdamW for its state, of which the count of steps is there by then.
    places = ((torch, "zeros_like"), (steps.model, "forward"), (torch.optim.AdamW, "step"))
    for place, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert not steps(128)
        left = [weight.grad for weight in steps.model.masters.of_all(steps.model.parameters())]
        assert left.count(None) == len(left), "the next one would have less memory"
        assert steps(64), "a smaller one is tried after it"


def test_off_a_gpu_the_presets_budget_is_taken_and_several_processes_are_refused(capsys):
    auto = dataclasses.replace(preset("tiny")[1], tokens_per_batch=0)
    known = preset("tiny")[1].tokens_per_batch
    assert without_a_gpu(auto, CPU, World()).tokens_per_batch == known
    assert f"auto needs a GPU: on cpu it is the preset's {known}" in capsys.readouterr().out
    assert without_a_gpu(auto, torch.device("cuda"), World()) is auto
    with pytest.raises(ValueError, match="is for one process"):
        without_a_gpu(auto, CPU, World(size=2))
    given = dataclasses.replace(auto, tokens_per_batch=99)
    assert without_a_gpu(given, CPU, World(size=2)) is given


def test_the_estimate_is_near_a_measured_peak():
    """`bench.memory` on a CPU, in float32: what 12 samples more take, and what they take at all."""
    file = ROOT / "bench/results/amd-epyc-2-threads/memory.json"
    measured = json.loads(file.read_text())["peaks"]["none"]
    two = dataclasses.replace(preset("nanovlm-222m")[0], vit_n_blocks=2, lm_n_blocks=2)

    def estimate(samples: int) -> float:
        tokens = round(77.5 * samples)
        labels = round(11.2 * samples)
        return step_bytes(two, Budget(tokens, samples + 8, samples, labels, 128), torch.float32)

    few, many = (2**20 * measured[str(samples)]["peak_mib"] for samples in (4, 16))
    assert estimate(16) - estimate(4) == pytest.approx(many - few, rel=0.2)
    assert estimate(16) == pytest.approx(many, rel=0.15)
    half = [
        step_bytes(two, Budget(1240, 24, 16, 180, 128), torch.float16, r)
        for r in ("none", "blocks")
    ]
    assert half[1] < half[0] < estimate(16)


def test_what_is_frozen_takes_less():
    """Adapters keep the activations of a trained model, and a frozen tower keeps none."""
    two = dataclasses.replace(preset("nanovlm-222m")[0], vit_n_blocks=2, lm_n_blocks=2)
    budget = Budget(1240, 24, 16, 180, 128)

    def estimate(*frozen: str, adapters: int = 0) -> float:
        return step_bytes(two, budget, torch.float32, "none", frozen, adapters)

    with torch.device("meta"):
        model = VisionLanguageModel(two)
    language, vision = (
        sum(p.numel() for p in part.parameters()) for part in (model.decoder, model.vision_encoder)
    )
    assert estimate() - estimate("decoder", adapters=1000) == 12 * language - 16 * 1000
    assert estimate() - estimate("vision_encoder") > 12 * vision + 16 * 196 * 768 * 4 * 2 * 10


def test_a_run_keeps_the_budget_that_it_found(tmp_path, loop):
    """In its config.json, so that a resume, whose command says auto again, packs the same."""
    argv = [*SMALL, "--tokens-per-batch", "auto", "--out", str(tmp_path / "run"), "--workers", "0"]
    model, config = parse_config([*argv, "--hang-timeout", "0"])
    assert config.tokens_per_batch == 0
    trainer = loop.Trainer(model, config)
    found = json.loads((tmp_path / "run" / "config.json").read_text())["tokens_per_batch"]
    assert found == trainer.stream.budget.tokens == preset("tiny")[1].tokens_per_batch
    assert parse_config([*argv, "--resume"])[1].tokens_per_batch == found
