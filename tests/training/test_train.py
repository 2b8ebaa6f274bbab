"""train.py as its users run it: whole runs, interrupted runs, and what is inside the loop."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.training.steps import StepData
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.runs import (
    arguments,
    contents,
    different_tensors,
    error_of,
    lines,
    losses,
    train,
    trainer,
    write_llava,
)

# ---- a whole run


def test_a_run_writes_what_it_promises(finished):
    run, result = finished
    assert json.loads((run / "config.json").read_text())["lm_hidden_dim"] == 32
    for name in ("curves.png", "samples.png"):
        assert Image.open(run / name).size[0] > 500, name
    curve = losses(run)
    assert curve[len(curve)] < curve[1] - 0.1
    assert (run / "tokenizer.json").read_bytes() == (run / "last" / "tokenizer.json").read_bytes()

    scores = {line["step"]: line["accuracy"] for line in read_metrics(run) if "accuracy" in line}
    assert list(scores) == [*range(5, len(curve), 5), len(curve)], "every fifth step, and the end"
    best = max(scores, key=scores.__getitem__)  # the first of equal scores
    assert json.loads((run / "best" / "state.json").read_text())["step"] == best
    assert json.loads((run / "last" / "state.json").read_text())["step"] == len(curve)
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {
        f"step-{s:06d}" for s in (best, len(curve))
    }
    load_pretrained(run / "best"), load_pretrained(run / "last")

    outcome = json.loads((run / "result.json").read_text())
    sees, blind = outcome["seeing"]["accuracy"], outcome["blind"]["accuracy"]
    assert outcome["seeing"]["questions"] == sum(
        len(example.turns) for example in load_source("synthetic:32", "test")
    )
    assert (
        result.stdout.rstrip().splitlines()[-1].endswith(f"sees: {sees:.1%} · blind: {blind:.1%}")
    )
    assert re.search(r"loss \d+\.\d+ .*tok/s wait \d+%", result.stderr), "the progress bar"


def test_a_run_says_how_full_its_batches_were(finished):
    run, result = finished
    budget = json.loads((run / "config.json").read_text())
    assert f"a batch: 512 tokens · {budget['images_per_batch']} images" in result.stdout
    told = [line for line in read_metrics(run) if "packing" in line]
    for name in ("packing", "image_fill", "label_fill"):
        assert all(0 < line[name] <= 1 for line in told) and len(told) > 2
    counts = json.loads((run / "result.json").read_text())["filled"]
    assert counts["image_room"] == budget["images_per_batch"] * len(told)  # a line per step
    images = counts["images"] / counts["image_room"]
    assert images == pytest.approx(sum(line["image_fill"] for line in told) / len(told))
    labels = counts["labels"] / counts["label_room"]
    said = rf"packing +\d+\.\d% of the token budget, {images:.1%} of images, {labels:.1%} of labels"
    assert re.search(said, result.stdout)
    assert re.search(r"filled \d+% of tokens, \d+% of images, \d+% of labels", result.stderr)


def test_resuming_a_finished_run_harms_nothing(finished, copy):
    leftover = copy / "checkpoints" / ".tmp-step-999999"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half of a checkpoint")
    result = train(copy, "--resume")
    assert result.returncode == 0, result.stderr
    assert losses(copy) == losses(finished[0])
    assert different_tensors(copy, finished[0]) == []
    for side in ("seeing", "blind"):
        before, after = (
            json.loads((run / "result.json").read_text())[side] for run in (finished[0], copy)
        )
        assert before == after
    assert not leftover.exists()


def test_a_folder_that_holds_a_run_is_refused_and_overwritten_only_on_request(copy):
    before = contents(copy)
    error = error_of(train(copy, "--max-steps 1 --no-final-eval"))
    assert "--resume" in error and "--overwrite" in error and str(copy) in error
    assert contents(copy) == before
    result = train(copy, "--max-steps 1 --no-final-eval --overwrite")
    assert result.returncode == 0, result.stderr
    assert list(losses(copy)) == [1]
    assert not (copy / "result.json").exists(), "nothing of the old run is left"


def test_overwrite_does_not_delete_what_is_no_run(tmp_path):
    """A Hugging Face model folder has a config.json too."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_text("weights")
    before = contents(tmp_path)
    error_of(train(tmp_path, "--max-steps 1 --no-final-eval --overwrite"))
    assert contents(tmp_path) == before


def test_overwrite_does_not_delete_other_files(tmp_path):
    (tmp_path / "precious.jpg").write_text("a photograph")
    for options in ("--overwrite", "", "--resume"):
        error_of(train(tmp_path, f"--max-steps 1 --no-final-eval {options}"))
        assert contents(tmp_path) == {"precious.jpg": b"a photograph"}


def test_what_the_checkpoint_rests_on_cannot_change_on_resume(copy):
    before = contents(copy)
    for options in ("--seed 5", "--data easy_vqa", "--workers 3"):
        error = error_of(train(copy, f"--resume {options}"))
        assert options in error and "the run to resume has" in error
    assert contents(copy) == before


def test_a_part_can_be_frozen_on_resume(copy):
    """The other parts keep their own momentum: the optimizer's state is found by name."""
    before = load_file(copy / "last" / "model.safetensors")
    step = max(losses(copy))
    result = train(copy, f"--resume --lr-vision 0 --max-steps {step + 3} --no-final-eval")
    assert result.returncode == 0, result.stderr
    assert max(losses(copy)) == step + 3
    after = load_file(copy / "last" / "model.safetensors")
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same - {"decoder.rotary_embd.inv_freq"} == {
        name for name in after if name.startswith("vision_encoder")
    }


# ---- interrupted runs


def logged(count: int) -> Callable[[Path], bool]:
    """Whether that many lines of metrics.jsonl are written."""
    return lambda run: (
        (run / "metrics.jsonl").exists()
        and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count
    )


def saving(run: Path) -> bool:
    """Whether a checkpoint is half-written."""
    return any((run / "checkpoints").glob(".tmp-*"))


def interrupt(out: Path, options: str, when: Callable[[Path], bool], signum: int) -> int:
    """Start or continue a run, send it the signal at that moment, and return its exit code."""
    with (out.parent / "output.txt").open("a") as output:
        process = forks.start(arguments(out, options), output, output)
    try:
        deadline = time.monotonic() + 200
        while not when(out):
            assert process.poll() is None and time.monotonic() < deadline, (
                out.parent / "output.txt"
            ).read_text()
            time.sleep(0.001)
        if signum == TERM:  # to the workers as well, as schedulers do
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        return process.wait(60)
    finally:
        process.kill()


KILL, TERM = signal.SIGKILL, signal.SIGTERM
INTERRUPTIONS = {
    "--workers 0": [(logged(1), KILL), (logged(8), KILL), (logged(15), TERM)],
    "--workers 1 --accumulate 2 --clip 1": [(saving, KILL), (logged(9), TERM)],
    "--workers 2 --augment dihedral --questions-per-image 2": [
        (logged(5), KILL),
        (logged(12), TERM),
    ],
    "--workers 1 --look-ahead 3 --max-bad-samples 9999 --data jsonl:FOLDER": [
        (logged(20), KILL),
        (saving, KILL),
    ],
}


@pytest.mark.parametrize("options", INTERRUPTIONS)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, options):
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    if "FOLDER" in options:
        write_llava(tmp_path / "data", good=6)
    config = (
        f"{options.replace('FOLDER', str(tmp_path / 'data'))} --max-steps 40 --eval-every 7 "
        "--no-final-eval"
    )
    with ThreadPoolExecutor(1) as pool:
        uninterrupted = pool.submit(train, plain, config)
        resume = ""
        for when, signum in INTERRUPTIONS[options]:
            code = interrupt(broken, f"{config} {resume}", when, signum)
            assert code == (75 if signum == TERM else -signum)
            if signum == TERM:  # it has saved what it had done
                assert (broken / "last").resolve().name == f"step-{len(losses(broken)):06d}"
            resume = "--resume"
        assert len(losses(broken)) < 40, "the run was over before it was interrupted"
        result = train(broken, f"{config} --resume")
        assert result.returncode == 0, result.stderr
        assert uninterrupted.result().returncode == 0, uninterrupted.result().stderr
    assert losses(broken) == losses(plain)
    assert len(losses(plain)) == 40 and len(set(losses(plain).values())) > 30
    assert lines(broken) == lines(plain)
    assert different_tensors(broken, plain) == []
    states = [json.loads((run / "last" / "state.json").read_text()) for run in (plain, broken)]
    assert {**states[0], "seconds": 0} == {**states[1], "seconds": 0}
    assert not list((broken / "checkpoints").glob(".tmp-*"))


# ---- inside the loop


def disturb(model: torch.nn.Module) -> None:
    """Move the weights away from their initial values.

    Initially, projections of zeros pass no gradient to the parts before them.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("part", ["projector", "vision", "language"])
def test_learning_rate_0_freezes_exactly_that_part(loop, tmp_path, part):
    subject = trainer(loop, tmp_path, f"--lr-{part} 0 --max-steps 3 --warmup 0")
    disturb(subject.model)
    before = {name: weight.clone() for name, weight in subject.model.named_parameters()}
    subject.train()
    prefix = {"projector": "MP.", "vision": "vision_encoder.", "language": "decoder."}[part]
    for name, weight in subject.model.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith(prefix), name


def test_accumulated_gradients_are_weighted_by_labelled_tokens(loop, tmp_path, monkeypatch):
    """Two micro-batches with very different label counts give the step of one batch with both."""
    subject = trainer(loop, tmp_path, "--max-steps 1 --accumulate 2 --clip 0")
    config, model = subject.model.config, subject.model
    disturb(model)
    text = TextProcessor(subject.tokenizer, config.prompt, config.image_tokens)
    load = SampleLoader(subject.train_source, config, TrainConfig(), text)
    samples = [load(i) for i in range(12)]
    budget = Budget(1024, 64, 16, 512, 64)
    few, many, both = (
        pack(group, budget, config.image_tokens, config.vit_img_size)
        for group in (samples[:1], samples[1:], samples)
    )
    assert few.n_labels * 4 < many.n_labels and few.n_labels + many.n_labels == both.n_labels

    def gradients(*batches) -> torch.Tensor:
        """The gradients that the optimizer gets in the loop's first step on these micro-batches."""
        seen = {}

        def note(*_) -> None:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

        subject.state.step = 0
        monkeypatch.setattr(loop, "next_batches", lambda *_: StepData(list(batches)))
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        handle = subject.optimizers[0].register_step_pre_hook(note)
        subject.train()
        handle.remove()
        model.load_state_dict(weights)
        return torch.cat([gradient.flatten() for gradient in seen.values()])

    whole, parts = gradients(both), gradients(few, many)
    scale = whole.abs().max()
    assert (parts - whole).abs().max() < 1e-5 * scale
    mean_of_means = (gradients(few) + gradients(many)) / 2
    assert (mean_of_means - whole).abs().max() > 1e-2 * scale, (
        "the batches are too much alike to tell"
    )
    logged_losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert logged_losses[0] == pytest.approx(logged_losses[1], rel=1e-5)


def test_wandb_offline(tmp_path):
    env = {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }
    result = train(tmp_path / "run", "--max-steps 2 --no-final-eval --wandb", **env)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert b"loss" in next(folder.glob("run-*.wandb")).read_bytes()
