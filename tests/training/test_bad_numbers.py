"""Numbers that go wrong in a run: gradients that are not finite, and a loss that jumps."""

from __future__ import annotations

import re
import time

import pytest
import torch

from bench.reliability import SMALL
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.training import checkpoint as checkpoints
from nanovlm_fast.training.optim import apply_gradients, make_optimizers
from nanovlm_fast.weights.folder import newest_checkpoint

ALONE = [*SMALL, "--workers", "0", "--hang-timeout", "0"]  # in the tests' own process


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(optimizer, value):
    torch.manual_seed(0)
    model = VisionLanguageModel(VLMConfig(**{**vars(parse_config(SMALL)[0])}))
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))

    def step(broken: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if broken is not None:
            model.MP.proj.weight.grad[0, 0] = broken
        update = apply_gradients(model, optimizers)
        assert update.skipped.item() == (broken is not None)

    def everything() -> list[torch.Tensor]:
        states = [t for each in optimizers for slots in each.state.values() for t in slots.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *states)]

    step()
    before = everything()
    step(broken=value)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step()
    assert not any(
        torch.equal(a, b) for a, b in zip(before, everything(), strict=True) if a.dim() > 1
    )


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run(tmp_path, loop):
    options = [*ALONE, "--out", str(tmp_path / "run"), "--max-steps", "60", "--optimizer", "adamw"]
    trainer = loop.Trainer(
        *parse_config([*options, "--max-skipped-steps", "4", "--log-every", "5"])
    )
    bad = {7, 8, 20, *range(40, 60)}

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan") if trainer.state.step + 1 in bad else grad

    trainer.model.MP.proj.weight.register_hook(spoil)
    with pytest.raises(
        loop.Stopped, match=r"steps in a row up to step 45 .*not finite.*synthetic/train/\d+"
    ):
        trainer.train()
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if "loss" in line}
    assert [lines[step]["skipped_steps"] for step in (5, 10, 20, 40, 45)] == [0, 2, 3, 4, 9]
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_the_checkpoint_that_an_error_names_is_there(tmp_path, loop, monkeypatch):
    """The next checkpoint is being written when the error comes, and replaces the one before."""
    real = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", lambda *args: (time.sleep(0.2), real(*args)))
    out = tmp_path / "run"
    options = [
        *ALONE,
        "--out",
        str(out),
        "--max-steps",
        "9",
        "--save-every",
        "1",
        "--max-skipped-steps",
        "2",
    ]
    trainer = loop.Trainer(*parse_config([*options, "--optimizer", "adamw"]))
    trainer.model.MP.proj.weight.register_hook(
        lambda grad: grad * float("nan" if trainer.state.step > 2 else 1)
    )
    with pytest.raises(loop.Stopped) as error:
        trainer.train()
    trainer.checkpoints.wait()
    assert f"The last good checkpoint is {newest_checkpoint(out)}." in str(error.value)


@pytest.mark.slow
def test_a_spike_names_its_samples(tmp_path, loop):
    options = [*ALONE, "--out", str(tmp_path / "run"), "--max-steps", "80", "--log-every", "4"]
    trainer = loop.Trainer(*parse_config(options))
    forward = trainer.forward
    trainer.forward = lambda batch: forward(batch) * (40 if trainer.state.step + 1 == 70 else 1)
    trainer.train()
    (spike,) = (
        line for line in read_metrics(tmp_path / "run") if "spike" in line and line["step"] == 70
    )
    assert spike["spike"] > 3 * spike["mean"]
    assert spike["samples"] and all(
        re.fullmatch(r"synthetic/train/\d+", name) for name in spike["samples"]
    )
