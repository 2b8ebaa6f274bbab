"""Nonsense for every option of every command: success or one line, no traceback, no hang.

The options are read from the parsers, so a new one is walked too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import INTERRUPTED, UsageError, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from tests.support.processes import ROOT
from tests.support.runs import CONVERSATION, TINY

VALUES = ("nan", "inf", "-1", "0", str(10**20), "", "FOLDER", "MISSING")
SECONDS = 120  # after which a call counts as hung, on a busy machine
ONE_STEP = (
    "--workers 0 --hang-timeout 0 --epochs 1 --max-steps 1 --no-final-eval --val-samples 0 "
    "--overwrite --out run"
).split()
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("nanovlm_fast", "bench")
    for file in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in file.read_text()
)
BENCHES = [name for name in COMMANDS if name.startswith("bench.")]
FREE = (
    "--out",
    "--name",
    "--state",
    "--folder",
)  # options of a bench that take any text as a name, and start it
SMALL_BENCH = {  # so that a name that is refused late is refused soon enough
    # One short stage, and never in the repository's own results.
    "bench.harness.stages": ["--quick", "--stages", "facts", "--device", "cpu", "--out", "FOLDER"],
    "bench.compare": ["A.json", "B.json"],
    "bench.generate": ["--preset", "tiny"],
    "bench.kernels": ["--small"],
    "bench.loss_curves": ["--data", "synthetic"],
    "bench.memory": ["--preset", "tiny"],
    "bench.peer": ["--nanovlm", "nowhere"],
    "bench.profile_step": ["--data", "synthetic", "--samples", "2"],
    "bench.race": ["--quick"],
    "bench.train_step": ["--data", "synthetic", "--samples", "2"],
}


def call(main: Callable[[list[str]], int], argv: list[str]) -> tuple[int, str]:
    """The exit code and the stderr of a command that is called in this process."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"{argv[-1]} hangs")

    kept = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in kept}
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
    except SystemExit as left:
        code = left.code
    finally:
        signal.alarm(0)
        gc.enable()  # the training loop turns it off and leaves it so
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, errors.getvalue()


def problem_of(main: Callable[[list[str]], int], argv: list[str]) -> str:
    """Return what a command did wrong.

    Empty if it succeeded, or if it said in one line why it could not.
    """
    try:
        code, errors = call(main, argv)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ") or ": error: " in line]
    if code == 0 and not said:
        return ""
    if code not in (1, 2) or len(said) != 1 or lines[-1] != said[0]:
        return f"exit code {code}: {errors[-300:]}"
    return ""


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The long spelling of every option that takes a value."""
    taking = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    return {action.option_strings[-1]: action for action in taking}


def walk(main: Callable[[list[str]], int], options: list[str], base: list[str]) -> list[str]:
    """Call `main` with every value for every option; return what went wrong."""
    assert options
    folder = Path("a folder")
    folder.mkdir(exist_ok=True)
    places = {"FOLDER": str(folder), "MISSING": "no/such file"}
    found = []
    for option in options:
        for value in VALUES:
            argument = f"{option}={places.get(value, value)}"
            if problem := problem_of(main, [*base, argument]):
                found.append(f"{argument}: {problem}")
    return found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, far from any hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> str:
    """A data set of six examples, in the form that --data takes."""
    folder = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        records.append(json.dumps({"image": f"{i}.png", "conversations": CONVERSATION}))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(records) + "\n")
    return f"jsonl:{folder}"


@pytest.fixture(scope="session")
def trained(few, loop, tmp_path_factory) -> str:
    """The run folder of one step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert call(loop.main, [*TINY, *ONE_STEP, "--data", few, "--out", str(out)])[0] == 0
    assert (out / "last" / "model.safetensors").exists()
    return str(out)


@pytest.fixture
def cheap_collections() -> Iterator[None]:
    """Exclude what is loaded here from the loop's garbage collections.

    They would take longer than the step.
    """
    gc.freeze()
    yield
    gc.unfreeze()


# ---- the walk


@pytest.mark.parametrize(
    "option",
    [
        f"--{field.name.replace('_', '-')}"
        for config in (VLMConfig, TrainConfig)
        for field in dataclasses.fields(config)
    ],
)
def test_walk_train(option, loop, few, here, cheap_collections):
    """Up to one step and its checkpoint; what follows draws curves, whatever the options."""

    @reports_errors(loop.Stopped)
    def one_step(argv: list[str] | None = None) -> int:
        model_config, config = parse_config(argv)
        if not config.dry_run:
            loop.Trainer(model_config, config).train()
        return 0

    found = walk(one_step, [option], [*TINY, *ONE_STEP, "--data", few])
    assert not found, "\n".join(found)


def test_walk_generate(trained, here):
    module = importlib.import_module("nanovlm_fast.generate")
    base = [
        "--checkpoint",
        trained,
        "--prompt",
        "What?",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    found = walk(module.main, list(options_of(module.make_parser())), base)
    assert not found, "\n".join(found)


def test_walk_evaluate(trained, few, here):
    module = importlib.import_module("nanovlm_fast.evaluate")
    base = ["--checkpoint", trained, "--data", few, "--device", "cpu"]
    found = walk(module.main, list(options_of(module.make_parser())), base)
    assert not found, "\n".join(found)


def test_walk_export(trained, here):
    module = importlib.import_module("nanovlm_fast.export")

    def anew(argv: list[str]) -> int:
        shutil.rmtree("new", ignore_errors=True)
        return module.main(argv)

    base = ["--checkpoint", trained, "--to", "nanovlm", "--out", "new"]
    found = walk(anew, list(options_of(module.make_parser())), base)
    assert not found, "\n".join(found)


def test_walk_prepare(few, here):
    module = importlib.import_module("nanovlm_fast.data.prepare")

    def anew(argv: list[str]) -> int:
        shutil.rmtree("new", ignore_errors=True)
        return module.main(argv)

    base = [*TINY, "--data", few, "--workers", "0", "--out", "new"]
    found = walk(anew, list(options_of(module.make_parser())), base)
    assert not found, "\n".join(found)


def test_walk_chat(trained, here):
    """Up to a server that could answer, which is closed again."""
    module = importlib.import_module("nanovlm_fast.chat.__main__")

    @reports_errors()
    def begin(argv: list[str] | None = None) -> int:
        module.start(argv)[0].server_close()
        return 0

    base = ["--checkpoint", trained, "--port", "0", "--device", "cpu"]
    found = walk(begin, list(options_of(module.make_parser())), base)
    assert not found, "\n".join(found)


def test_walk_tune(here, monkeypatch):
    """Every number is refused before anything is measured; --report measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    module = importlib.import_module("nanovlm_fast.tune.__main__")
    found = walk(module.main, list(options_of(module.make_parser())), ["--report"])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BENCHES)
def test_walk_bench(name, here):
    """Numbers are read; every unknown name is refused before anything is measured."""
    module = importlib.import_module(name)
    parser = module.make_parser()
    base = [str(here) if word == "FOLDER" else word for word in SMALL_BENCH.get(name, [])]
    actions = options_of(parser)

    def run_what_must_be_refused(argv: list[str]) -> int:
        option, value = argv[-1].split("=", 1)
        if option in FREE or not value or actions[option].type not in (None, str, Path):
            with contextlib.suppress(UsageError):
                parser.parse_args(argv)
                return 0
        return module.main(argv)

    found = walk(run_what_must_be_refused, list(actions), base) if actions else []
    assert not found, "\n".join(found)


def test_every_number_has_a_range():
    """A bare `type=int` takes 10**20, a bare `type=float` NaN."""
    bare = [
        f"{name} {option}"
        for name in COMMANDS
        for option, action in options_of(importlib.import_module(name).make_parser()).items()
        if action.type in (int, float)
    ]
    assert len(COMMANDS) > 20 and not bare


# ---- Ctrl-C


@pytest.mark.parametrize("name", [*COMMANDS, "train"])
def test_an_interrupt_is_one_line(name, loop, monkeypatch, here):
    """Send a real signal as soon as the command reads its options."""
    module: ModuleType = loop if name == "train" else importlib.import_module(name)
    parse = argparse.ArgumentParser.parse_known_args

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return parse(*arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    assert call(module.main, []) == (INTERRUPTED, "error: interrupted\n")


def test_what_a_preset_switches_on_can_be_switched_off():
    recipe = ["--preset", "nanovlm-230m", "--dry-run"]
    model, run = parse_config(recipe)
    assert run.streaming and model.resize_to_max_side_len
    for off in (
        "--no-streaming --no-resize-to-max-side-len",
        "--streaming False --no_resize_to_max_side_len",
    ):
        model, run = parse_config([*recipe, *off.split()])
        assert not run.streaming and model.max_img_size and not model.resize_to_max_side_len
