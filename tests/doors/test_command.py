"""Errors and Ctrl-C are a line and an exit code; a number out of its range is refused by name."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanovlm_fast import export, generate
from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import INTERRUPTED, Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.device import pick_device
from nanovlm_fast.generate import choose
from nanovlm_fast.ranges import INT32_MAX, Range, ranges_of
from nanovlm_fast.ranks import World
from nanovlm_fast.threads import OPENMP, WAITING
from tests.support.processes import ROOT, run_python
from tests.support.runs import contents

# ---- ranges


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--epochs inf", "--epochs must be a finite number of at least 0, got inf"),
        ("--epochs nan", "--epochs must be a finite number of at least 0, got nan"),
        (
            "--image-mean nan",
            "image_mean must be a finite number of at least -1000 and up to 1000, got nan",
        ),
        ("--lr-vision nan", "--lr-vision must be a finite number of at least 0, got nan"),
        ("--muon-scale 0", "--muon-scale must be a finite number above 0, got 0.0"),
        ("--beta2 1", "--beta2 must be a finite number of at least 0 and below 1, got 1.0"),
        (
            "--lm-n-blocks 0",
            f"lm_n_blocks must be a whole number of at least 1 and up to {INT32_MAX}, got 0",
        ),
        (
            "--vit-n-blocks 0",
            f"vit_n_blocks must be a whole number of at least 1 and up to {INT32_MAX}, got 0",
        ),
        (
            f"--seed {10**20}",
            f"--seed must be a whole number of at least 0 and up to {2**63 - 1}, got {10**20}",
        ),
        (f"--look-ahead {2**31}", "--look-ahead must be a whole number of at least 1 and up to"),
        ("--look-ahead 2000000000", "--look-ahead must be a whole number of at least 1 and up to"),
        ("--workers 100000", "--workers must be a whole number of at least -1 and up to 1024"),
    ],
)
def test_a_number_out_of_its_range_is_named(options, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(options.split())
    said = capsys.readouterr().err
    assert f"error: {error}" in said and said.count("\n") == 1


def test_every_number_of_a_configuration_is_finite():
    for config in (VLMConfig(), TrainConfig()):
        numbers = {name for name, value in vars(config).items() if type(value) in (int, float)}
        assert ranges_of(type(config)).keys() == numbers and len(numbers) > 15
        for name in numbers:
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ValueError, match=f"{name}|{name.replace('_', '-')}"):
                    dataclasses.replace(config, **{name: value}).validate()


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (
            Range(int),
            ["0", "007", str(INT32_MAX)],
            ["-1", str(2**31), "1.0", "1e3", "nan", "", "9" * 5000],
        ),
        (Range(int, least=-1), ["-1"], ["-2"]),
        (Range(float), ["0", "1e300", "-0"], ["-1e-300", "inf", "-inf", "nan", "1e999", "x"]),
        (Range(float, least=None), ["-1e300"], ["nan", "-inf"]),
        (Range(float, above=0, most=1), ["1e-300", "1"], ["0", "1.0000001"]),
        (Range(float, below=1), ["0", "0.999"], ["1"]),
    ],
)
def test_ranges(allowed, inside, outside):
    for text in inside:
        assert allowed.read("it", text) == allowed.kind(text)
    for text in outside:
        with pytest.raises(ValueError, match=r"^it must be .* number.*, got ") as error:
            allowed.read("it", text)
        assert len(str(error.value)) < 150


def test_only_devices_that_are_supported():
    assert pick_device("cpu").type == "cpu"
    for name in ("mps", "xpu", "meta", "hpu", "vulkan", ""):
        with pytest.raises(ValueError, match=f"^--device {name}: "):
            pick_device(name)


def test_numbers_of_the_environment_and_of_a_data_set(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for value in ("x", "-1", "nan"):
        monkeypatch.setenv("RANK", value)
        with pytest.raises(ValueError, match=rf"\$RANK must be a whole number .*, got '{value}'"):
            World.join("cpu")
    for value in ("0", "nan", str(10**20)):
        with pytest.raises(ValueError, match="--data synthetic:IMAGE_SIZE must be"):
            load_source(f"synthetic:{value}", "train")


def test_a_batch_that_no_machine_holds_is_refused(loop, tmp_path, capsys):
    options = f"--data synthetic --hang-timeout 0 --device cpu --tokens-per-batch {INT32_MAX}"
    assert loop.main([*options.split(), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: --tokens-per-batch {INT32_MAX} ") and said.count("\n") == 1
    assert "GiB, this machine has" in said and contents(tmp_path) == {}


# ---- generation


def test_a_tiny_temperature_takes_the_likeliest_token():
    logits = torch.randn(64, 97)
    for temperature in (1e-30, 1e-40, 1e-46, 5e-324):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.5)):
            chosen = choose(logits, temperature, top_k, top_p, None)
            assert chosen.equal(logits.argmax(-1)), (temperature, top_k, top_p)


def test_the_largest_logit_counts_for_nothing_but_its_distance():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(20000, 3)
    share = choose(logits, 0.5, 0, 1.0, torch.Generator().manual_seed(0)).bincount() / 20000
    assert torch.allclose(share, (logits[0] / 0.5).softmax(-1), atol=0.02)


@pytest.mark.parametrize("option", [{"temperature": math.nan}, {"top_k": -1}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        generate.generate(None, torch.zeros(0, 3, 8, 8), [], 0, **option)


def test_a_prompt_that_is_no_utf8_is_refused(capsys):
    assert generate.main(["--prompt", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err == "error: argument --prompt: 'caf\\udce9' is no UTF-8\n"
    with pytest.raises(ValueError, match="in UTF-8"):
        VLMConfig(prompt="{question} \udce9").validate()


# ---- export


def test_an_export_onto_a_full_disk_leaves_nothing(finished, tmp_path, capsys):
    """A real limit on the size of files makes the write of the weights fail half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in ("nanovlm", "transformers"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            code = export.main(
                ["--checkpoint", str(finished[0]), "--to", target, "--out", f"{tmp_path}/new"]
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert (
            code == 1 and "error: " in said and "File too large" in said and "Traceback" not in said
        )
        assert f"{tmp_path}/new" in said and not list(tmp_path.iterdir())


def test_an_export_into_the_working_folder_is_refused(finished, tmp_path, capsys, monkeypatch):
    checkpoint = str(finished[0].resolve())
    monkeypatch.chdir(tmp_path)
    for out in (".", "", "new/..", str(tmp_path)):
        assert export.main(["--checkpoint", checkpoint, "--to", "nanovlm", "--out", out]) == 1
        said = capsys.readouterr().err
        assert "is the folder that you are in: name a new one" in said and said.count("\n") == 1
    assert export.main(["--checkpoint", checkpoint, "--to", "nanovlm", "--out", "deep/new"]) == 0
    assert (tmp_path / "deep" / "new" / "model.safetensors").exists()


# ---- errors and exit codes


def test_errors_are_a_line_and_bugs_keep_their_traceback(capsys):
    def raising(error: BaseException, *more: type[Exception], code: int = 1) -> tuple[int, str]:
        def main(argv: list[str] | None = None) -> int:
            raise error

        done = reports_errors(*more, code=code)(main)([])
        return done, capsys.readouterr().err

    assert raising(ValueError("a\n  b\n")) == (1, "error: a b\n")
    assert raising(ValueError()) == (1, "error: ValueError\n")
    assert raising(FileNotFoundError(2, "No such file", "x")) == (
        1,
        "error: [Errno 2] No such file: 'x'\n",
    )
    assert raising(ValueError("worse"), code=2) == (2, "error: worse\n")
    assert raising(KeyError("device"), KeyError) == (1, "error: KeyError('device')\n")
    assert raising(KeyboardInterrupt()) == (INTERRUPTED, "error: interrupted\n")
    assert raising(KeyboardInterrupt("all stays")) == (INTERRUPTED, "error: all stays\n")
    for bug in (KeyError("x"), ZeroDivisionError(), RuntimeError("shapes differ")):
        with pytest.raises(type(bug)):
            raising(bug)


@pytest.mark.parametrize("ask", [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60)])
def test_too_little_memory_is_a_line(ask, capsys):
    assert reports_errors()(lambda argv=None: ask())([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ") and said.count("\n") == 1


def test_a_wrong_command_line_is_a_line(capsys):
    parser = Parser(prog="command")
    parser.add_argument("--top-k", type=Range(int))
    main = reports_errors()(lambda argv=None: parser.parse_args(argv) and 0)
    assert main(["--top-k", "3"]) == 0
    for wrong, why in (
        (["--top-k", "-1"], "--top-k: must be a whole number"),
        (["--nonsense"], "--nonsense"),
    ):
        assert main(wrong) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and why in said and said.count("\n") == 1


PRINTS = (
    "import sys; from nanovlm_fast.command import reports_errors; "
    "sys.exit(reports_errors()(lambda argv=None: print('x' * 99) or 0)())"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_a_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
    assert run_python("-c", PRINTS).stdout == "x" * 99 + "\n"


# ---- Ctrl-C in real processes

SLOW_TORCH = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    "command", ["train.py", "-m nanovlm_fast.evaluate", "-m bench", "-m bench.race"]
)
def test_an_interrupt_while_torch_is_imported_is_one_line(command, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (INTERRUPTED, "error: interrupted\n")


def test_an_import_of_the_package_leaves_ctrl_c_alone():
    program = (
        "import signal, nanovlm_fast, bench\n"
        "print(signal.getsignal(2) is signal.default_int_handler)"
    )
    assert run_python("-c", program).stdout == "True\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train.py --device cpu --out OUT", "error: interrupted\n"),
        (
            "-m nanovlm_fast.data.prepare --out OUT",
            "error: interrupted: the same command goes on from here\n",
        ),
    ],
)
def test_an_interrupt_at_work_is_one_line_and_leaves_nothing(command, says, tmp_path):
    """The data is a pipe without a writer, so the command waits for it when the signal comes."""
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "train.jsonl")
    arguments = command.replace("OUT", str(tmp_path / "out")).split()
    process = subprocess.Popen(
        [sys.executable, *arguments, "--data", f"jsonl:{tmp_path / 'data'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(tmp_path / "data" / "train.jsonl", "w"):  # waits for the reader
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (INTERRUPTED, says)
    assert not (tmp_path / "out").exists()


# ---- how OpenMP's threads wait


def openmp_settings(*command: str, **env: str) -> dict[str, str]:
    """The variables that OpenMP in a command's process reports when torch loads it."""
    done = run_python(*command, OMP_DISPLAY_ENV="verbose", **env)
    return dict(re.findall(r"(\w+) = '(.*)'", done.stderr))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP reports it")
@pytest.mark.parametrize("command", [["train.py"], ["-m", "bench.roofline"]])
def test_commands_limit_the_spinning_of_threads_before_torch_is_loaded(command, monkeypatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    assert openmp_settings(*command, "--help").items() >= OPENMP.items()


def test_the_users_own_waiting_is_left_alone(monkeypatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = openmp_settings("train.py", "--help")
    assert found["OMP_WAIT_POLICY"] == "ACTIVE"
    assert found["GOMP_SPINCOUNT"] != OPENMP["GOMP_SPINCOUNT"]


def test_a_program_that_imports_the_package_keeps_its_environment():
    told = "import os, nanovlm_fast.command; print(sorted(os.environ))"
    before = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-c", told]
    done = subprocess.run(command, cwd=ROOT, env=before, capture_output=True, text=True, check=True)
    assert not set(WAITING) & set(ast.literal_eval(done.stdout))
