"""train.py as its users run it: whole runs, interrupted runs, wrong input. Processes are real, models are small."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from safetensors.torch import load_file

from nanovlm_fast.checkpoint import load_pretrained, newest_checkpoint
from nanovlm_fast.config import TrainConfig, VLMConfig, parse_config
from nanovlm_fast.data.sources import load_source
from nanovlm_fast.data.stream import SampleLoader
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.metrics import read_metrics
from nanovlm_fast.packing import Budget, pack

TINY = (
    "--device cpu --vit-img-size 32 --vit-hidden-dim 32 --vit-inter-dim 64 --vit-n-heads 2 --vit-n-blocks 1 "
    "--lm-hidden-dim 32 --lm-inter-dim 64 --lm-n-heads 2 --lm-n-kv-heads 1 --lm-n-blocks 1 --mp-pixel-shuffle-factor 2 "
    "--look-ahead 16 --tokens-per-batch 512 --val-samples 8 --log-every 1 --save-every 3 --data synthetic:32"
).split()
CONVERSATION = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def arguments(out: Path, options: str) -> list[str]:
    return ["train.py", *TINY, "--out", str(out), *options.split()]


def train(out: Path, options: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return run_python(*arguments(out, options), **env)


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of a run that failed; progress bars may stand before it, a traceback may not."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(train\.py: )?error: ", last), f"the last line is not the error: {result.stderr[-500:]}"
    return last


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, and what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = re.compile(r"seconds|data_wait|.*_per_s")
    return [{name: v for name, v in line.items() if not timed.fullmatch(name)} for line in read_metrics(run)]


def losses(run: Path) -> dict[int, float]:
    found = [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "each step exactly once, in order"
    return dict(found)


def different_tensors(run: Path, other: Path) -> list[str]:
    """Names of weights, optimizer and random state in which the runs' last checkpoints are not the same bits."""
    ours, theirs = (
        {**load_file(folder / "last" / "model.safetensors"), **load_file(folder / "last" / "optimizer.safetensors")}
        for folder in (run, other)
    )
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run from start to end. Tests that change it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = train(out, "--epochs 3 --eval-every 5")
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy", symlinks=True)


@pytest.fixture(scope="module")
def loop():
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_py", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    best = max(scores, key=scores.__getitem__)  # the first of equals
    assert json.loads((run / "best" / "state.json").read_text())["step"] == best
    assert json.loads((run / "last" / "state.json").read_text())["step"] == len(curve)
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {f"step-{s:06d}" for s in (best, len(curve))}
    load_pretrained(run / "best"), load_pretrained(run / "last")

    outcome = json.loads((run / "result.json").read_text())
    sees, blind = outcome["seeing"]["accuracy"], outcome["blind"]["accuracy"]
    assert outcome["seeing"]["questions"] == sum(len(example.turns) for example in load_source("synthetic:32", "test"))
    assert result.stdout.rstrip().splitlines()[-1].endswith(f"sees: {sees:.1%} · blind: {blind:.1%}")
    assert re.search(r"loss \d+\.\d+ .*tok/s wait \d+%", result.stderr), "the progress bar"


def test_resuming_a_finished_run_harms_nothing(finished, copy):
    leftover = copy / "checkpoints" / ".tmp-step-999999"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half of a checkpoint")
    result = train(copy, "--resume")
    assert result.returncode == 0, result.stderr
    assert losses(copy) == losses(finished[0])
    assert different_tensors(copy, finished[0]) == []
    for side in ("seeing", "blind"):
        before, after = (json.loads((run / "result.json").read_text())[side] for run in (finished[0], copy))
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
    assert same - {"decoder.rotary_embd.inv_freq"} == {name for name in after if name.startswith("vision_encoder")}


# ---- interrupted runs


def logged(count: int) -> Callable[[Path], bool]:
    """So many lines of metrics.jsonl are written."""
    return lambda run: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count


def saving(run: Path) -> bool:
    """A checkpoint is half-written."""
    return any((run / "checkpoints").glob(".tmp-*"))


def interrupt(out: Path, options: str, when: Callable[[Path], bool], signum: int) -> int:
    """Start or continue a run, send it the signal at that moment, and return its exit code."""
    with (out.parent / "output.txt").open("a") as output:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *arguments(out, options)],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        while not when(out):
            assert process.poll() is None and time.monotonic() < deadline, (out.parent / "output.txt").read_text()
            time.sleep(0.001)
        if signum == TERM:  # as schedulers do: to the workers as well
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
    "--workers 2 --augment dihedral --questions-per-image 2": [(logged(5), KILL), (logged(12), TERM)],
    "--workers 1 --look-ahead 3 --max-bad-samples 9999 --data jsonl:FOLDER": [(logged(20), KILL), (saving, KILL)],
}


@pytest.mark.parametrize("options", INTERRUPTIONS)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, options):
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    if "FOLDER" in options:
        write_llava(tmp_path / "data", good=6)
    config = f"{options.replace('FOLDER', str(tmp_path / 'data'))} --max-steps 40 --eval-every 7 --no-final-eval"
    with ThreadPoolExecutor(1) as pool:
        uninterrupted = pool.submit(train, plain, config)
        resume = ""
        for when, signum in INTERRUPTIONS[options]:
            code = interrupt(broken, f"{config} {resume}", when, signum)
            assert code == (75 if signum == TERM else -signum)
            if signum == TERM:  # saved what it had done
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


# ---- wrong input

REFUSED = {  # options -> what the line must say
    "--preset huge": "huge.*tiny",
    "--nonsense 3": "--nonsense",
    "--data nosuch": "nosuch.*easy_vqa",
    "--data jsonl:FOLDER/nowhere": "nowhere",
    "--data jsonl:FOLDER/empty": "empty",
    "--wandb maybe": "--wandb.*maybe",
    "--max-steps x": "--max.steps.*'x'",
    "--turns never": "--turns.*'never'",
    "--vit-n-heads 5": "vit_n_heads = 5",
    "--device gpu0": "gpu0",
    "--compile False": "none.*reduce-overhead",
    "--recompute some": "norms_and_activations",
    "--attention fast": "flash_attn.*sdpa",
    "--attention flash_attn --device cpu": "CUDA device.*sdpa",
    "--device cuda:99": "cuda",
    "--tokens-per-batch 5": "--tokens-per-batch 5 .*synthetic/train/",
    "--lm-vocab-size 100": "--lm-vocab-size",
    "--lr-vision 0 --lr-language 0 --lr-projector 0": "learning rate",
}


@pytest.fixture(scope="module")
def refusals(finished, tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess[str], bool]]:
    """Each of REFUSED, told to overwrite a copy of a run: (result, whether the copy is as it was)."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "empty").mkdir()
    (folder / "empty" / "train.jsonl").write_text("\n")
    before = contents(finished[0])

    def attempt(numbered: tuple[int, str]) -> tuple[subprocess.CompletedProcess[str], bool]:
        out = shutil.copytree(finished[0], folder / str(numbered[0]), symlinks=True)
        return train(out, f"--overwrite {numbered[1].replace('FOLDER', str(folder))}"), contents(out) == before

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(REFUSED, pool.map(attempt, enumerate(REFUSED)), strict=True))


@pytest.mark.parametrize("options", REFUSED)
def test_wrong_input_gets_one_clear_line_and_loses_nothing(refusals, options):
    result, untouched = refusals[options]
    error = error_of(result)
    assert re.search(REFUSED[options], error), error
    assert result.stderr.strip() == error, "one line"
    assert untouched, "the run that --out holds must outlive a command that could not start"


def test_a_start_that_failed_leaves_nothing_for_the_next(tmp_path):
    error_of(train(tmp_path / "run", "--tokens-per-batch 5"))
    assert contents(tmp_path) == {}, "a tokenizer left here would be taken for the next run's own"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("--final-eval False", "final_eval", False),
        ("--no-final-eval", "final_eval", False),
        ("--final-eval", "final_eval", True),
        ("", "final_eval", True),
        ("--wandb False", "wandb", False),
        ("--wandb", "wandb", True),
        ("--wandb no", "wandb", False),
        ("--resume False", "resume", False),
        ("--overwrite=false", "overwrite", False),
    ],
)
def test_booleans_mean_what_they_say(options, name, value):
    _, config = parse_config(options.split())
    assert getattr(config, name) is value


@pytest.mark.parametrize("spelling", ["", "True", "yes", "y", "T", "1"])
def test_resume_however_it_is_spelt_takes_the_runs_own_configuration(finished, spelling):
    model, config = parse_config(["--out", str(finished[0]), "--resume", *spelling.split(), "--lr-vision", "0.5"])
    assert (config.resume, config.epochs, config.tokens_per_batch, model.lm_hidden_dim) == (True, 3, 512, 32)
    assert config.lr_vision == 0.5, "what the command line says comes first"


def test_help_explains_every_field_with_its_default():
    result = run_python("train.py", "--help")
    assert result.returncode == 0, result.stderr
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", result.stdout)]
    for field in (*dataclasses.fields(VLMConfig), *dataclasses.fields(TrainConfig)):
        name = f"--{field.name.replace('_', '[-_]')}"
        (entry,) = (entry for entry in entries if re.match(rf"{name}[ ,]", entry))
        assert re.search(rf"{name.replace('[-_]', '-')}\b", entry), f"{entry}: the dashed spelling"
        words = " ".join(field.metadata["help"].split())
        assert words in entry and re.search(r"\(default: .*\)$", entry), entry


# ---- a data set of one's own


def write_llava(folder: Path, good: int) -> list[str]:
    """A LLaVA-format data set with `good` examples and four bad ones; returns what must be said of the bad ones."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(good + 1):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i}.jpg")
        records.append(json.dumps({"image": f"{i}.jpg", "conversations": CONVERSATION}))
    whole = (folder / f"{good}.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.png").write_bytes(b"no image at all")
    for name in ("truncated.jpg", "corrupt.png", "missing.png"):
        records.insert(2, json.dumps({"image": name, "conversations": CONVERSATION}))
    records[-1] = records[-1][:-9]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    return ["truncated.jpg", "corrupt.png", "missing.png", f"train.jsonl:{len(records)}"]


def test_unreadable_samples_are_skipped_counted_and_named(tmp_path):
    bad = write_llava(tmp_path / "data", good=8)
    corrupt = json.dumps({"image": "corrupt.png", "conversations": CONVERSATION})
    (tmp_path / "data" / "test.jsonl").write_text(
        "\n".join((tmp_path / "data" / "train.jsonl").read_text().splitlines()[:2] + [corrupt])
    )
    result = train(tmp_path / "run", f"--data jsonl:{tmp_path}/data --val-samples 0 --epochs 1")
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stdout.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 4
    for name in bad:
        assert len([line for line in skipped if name in line]) == 1, name
        assert len([line for line in lines(tmp_path / "run") if name in line.get("skipped", "")]) == 1, name
    outcome = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (len(outcome["bad"]), outcome["examples"], outcome["seeing"]["questions"]) == (4, 12, 2)
    assert "corrupt.png" in outcome["seeing"]["skipped"][0]
    assert "4 unreadable, 0 too long" in result.stdout


def test_data_without_a_single_image_trains(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"from": "human", "value": "what follows one?"}, {"from": "gpt", "value": "two"}]
    (folder / "train.jsonl").write_text("\n".join([json.dumps({"conversations": turns})] * 40))
    result = train(tmp_path / "run", f"--data jsonl:{folder} --max-steps 60 --tokens-per-batch 128")
    assert result.returncode == 0, result.stderr
    assert "held-out images" in result.stdout and "sees: 100.0%" in result.stdout
    assert losses(tmp_path / "run")[60] < 0.2 * losses(tmp_path / "run")[1]


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    write_llava(tmp_path / "data", good=8)
    options = f"--data jsonl:{tmp_path}/data --val-samples 0 --no-final-eval --epochs 1 --max-bad-samples"
    assert train(tmp_path / "enough", f"{options} 4").returncode == 0
    error = error_of(train(tmp_path / "run", f"{options} 3"))
    assert "4 unreadable" in error and "--max-bad-samples 3" in error


def test_one_unreadable_sample_counts_once_however_often_it_is_met(tmp_path):
    """25 epochs over a data set with five bad images are no reason to stop at epoch 21."""
    write_llava(tmp_path / "data", good=8)
    options = f"--data jsonl:{tmp_path}/data --val-samples 0 --no-final-eval --epochs 3 --max-bad-samples 4"
    result = train(tmp_path / "run", options)
    assert result.returncode == 0, result.stderr


def test_a_sample_over_the_budget_is_skipped_and_named(tmp_path):
    write_llava(tmp_path / "data", good=8)
    file = tmp_path / "data" / "train.jsonl"
    turns = [{**CONVERSATION[0], "value": "word " * 999}, CONVERSATION[1]]
    records = file.read_text().splitlines()[:2] + [json.dumps({"conversations": turns})]
    file.write_text("\n".join(records))
    # neither a test split nor held-out images: there is nothing to evaluate, and that is no error
    result = train(tmp_path / "run", f"--data jsonl:{tmp_path}/data --val-samples 0 --epochs 1")
    (skipped,) = (line for line in result.stdout.splitlines() if line.startswith("skipped"))
    assert "too long" in skipped and "train.jsonl:3" in skipped and "the budget is 512" in skipped
    assert result.returncode == 0, result.stderr
    assert "0 unreadable, 1 too long" in result.stdout


def test_samples_over_the_budget_are_named_a_hundred_times_and_then_counted(loop, tmp_path):
    """The recipe leaves out a part of the Cauldron: a line for each would be hundreds of thousands."""
    subject = trainer(loop, tmp_path, "--max-steps 1 --no-final-eval")
    batch = next(iter(subject.stream))
    for start in (0, 60, 120):
        names = [f"long {i}" for i in range(start, start + 60)]
        subject.journal.hear(dataclasses.replace(batch, bad={}, too_long=names))
        subject.journal.note_skipped()
    named = [line["skipped"] for line in read_metrics(tmp_path)]
    assert named == [f"long {i}" for i in range(100)] and subject.state["too_long"] == 180


# ---- numbers that go wrong


@pytest.mark.parametrize("rate", ["1e30", "1e39"])  # the second overflows the weights themselves, in one step
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_good_checkpoint(tmp_path, rate):
    run = tmp_path / "run"
    rates = f"--optimizer adamw --lr-projector {rate} --lr-vision {rate} --lr-language {rate} --clip 0"
    result = train(run, f"{rates} --max-steps 20 --warmup 0.5 --save-every 1 --no-final-eval")
    assert result.returncode == 1
    error = error_of(result)
    assert re.search(r"step \d+.*learning rate.*synthetic/train/\d+", error), error
    kept = newest_checkpoint(run)
    assert (str(kept) if kept else "No checkpoint had been written") in error
    assert kept or rate == "1e39"  # where the first step already goes wrong
    if kept is None:
        return
    model, _ = load_pretrained(kept)
    for name, weight in model.state_dict().items():
        assert weight.isfinite().all(), name


# ---- inside the loop


def trainer(loop, out: Path, options: str):
    return loop.Trainer(*parse_config([*TINY, "--out", str(out), "--workers", "0", *options.split()]))


def disturb(model: torch.nn.Module) -> None:
    """Away from the start, where projections of zeros let no gradient through to the parts before them."""
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


def test_accumulated_gradients_are_weighted_by_labelled_tokens(loop, tmp_path):
    """Two micro-batches with very different label counts step as one batch of both does."""
    subject = trainer(loop, tmp_path, "--max-steps 1 --accumulate 2 --clip 0")
    config, model = subject.model.config, subject.model
    disturb(model)
    text = TextProcessor(subject.tokenizer, config.prompt, config.image_tokens)
    load = SampleLoader(subject.train_source, config, TrainConfig(), text)
    samples = [load(i) for i in range(12)]
    budget = Budget(1024, 64, 16, 512, 64)
    few, many, both = (
        pack(group, budget, config.image_tokens, config.vit_img_size) for group in (samples[:1], samples[1:], samples)
    )
    assert few.n_labels * 4 < many.n_labels and few.n_labels + many.n_labels == both.n_labels

    def gradients(*batches) -> torch.Tensor:
        """What the optimizer is given at the loop's first step on these micro-batches."""
        seen = {}

        def note(*_) -> None:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

        subject.state["step"] = 0
        subject.next_batches = lambda *_: list(batches)
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
    assert (mean_of_means - whole).abs().max() > 1e-2 * scale, "the batches are too much alike to tell"
    logged_losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert logged_losses[0] == pytest.approx(logged_losses[1], rel=1e-5)


def test_wandb_offline(tmp_path):
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    result = train(tmp_path / "run", "--max-steps 2 --no-final-eval --wandb", **env)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert b"loss" in next(folder.glob("run-*.wandb")).read_bytes()
