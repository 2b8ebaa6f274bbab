"""The tuner on a CPU: each choice in a process of its own; and the command.

Most processes here are no training but a script that answers with planted speeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, PretrainedConfig, SiglipVisionConfig

from nanovlm_fast.cli import parse_config
from nanovlm_fast.tune import cache, cpu
from nanovlm_fast.tune import key as key_module
from nanovlm_fast.tune.__main__ import expected_budget, main, run_of
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.cpu import tune_cpu
from nanovlm_fast.tune.key import free_in, key_of
from nanovlm_fast.tune.report import options_of
from nanovlm_fast.tune.search import LEFT_OUT, TAKEN, Found, Row
from tests.support.processes import ROOT
from tests.support.runs import TINY

# Faster on one thread and without a worker, slower where threads wait passively; compiled code is
# wrong. It notes how it was started.
PLANTED = """
import json, os, pathlib, random, sys
train = json.loads(sys.stdin.readline())["train"]
names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
started = {name: os.environ.get(name) for name in names}
pathlib.Path(train["out"]).mkdir(parents=True)
noted = {**started, **{name: train[name] for name in ("workers", "compile", "tune", "resume")}}
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps({**noted, "pid": os.getpid()}), file=notes)
seconds = 0.7 if started["OMP_NUM_THREADS"] == "1" else 1.0
seconds *= 0.9 if train["workers"] == 0 else 1.0
seconds *= 1.2 if started["OMP_WAIT_POLICY"] else 1.0
seconds *= float(os.environ.get("OF_BFLOAT16", "1")) if train["dtype"] == "bfloat16" else 1.0
print("{}", flush=True)
for line in sys.stdin:
    question = json.loads(line)
    answer = {"seconds": seconds * random.uniform(0.99, 1.01), "tokens": 512}
    print(json.dumps({"wrong": "off by 1%"} if "gate" in question else answer), flush=True)
"""


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    # Whatever the processor of this machine has.
    monkeypatch.setattr(key_module, "has_fast_bfloat16", lambda: False)
    return tmp_path / "caches"


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Entry:
    monkeypatch.setattr(cpu, "SERVE", PLANTED)
    monkeypatch.setattr(cpu, "cores_of", lambda: 2)
    tmp_path.mkdir(exist_ok=True)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    arguments = [*TINY, "--compile", "auto", "--tune-seconds", "1000", "--resume", "False"]
    model, config = parse_config([*arguments, *options, "--out", str(tmp_path / "run")])
    key = key_of(model, config, None, torch.device("cpu"), torch.float32, several=False)
    return tune_cpu(model, config, key, Choice())


def test_planted_speeds_give_the_planted_choice(tmp_path, monkeypatch):
    entry = planted(tmp_path, monkeypatch)
    assert entry.plain == Choice(threads=2, workers=1)
    assert entry.choice == Choice(threads=1, workers=0)
    verdicts = {row.name: (row.verdict, row.why) for row in entry.rows}
    assert verdicts == {
        "1 threads": (TAKEN, ""),
        "waiting passive": ("slower", ""),
        "waiting long": ("same", ""),
        "0 workers": (TAKEN, ""),
        "compiled": (LEFT_OUT, "off by 1%"),
        "all that was taken": (TAKEN, ""),
    }
    assert cache.read(entry.key).choice == entry.choice
    assert options_of(entry.choice, entry.plain) == "OMP_NUM_THREADS=1 --workers 0"
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    first, *others = notes
    plain = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000", "OMP_WAIT_POLICY": None}
    run = {"workers": 1, "compile": "none", "tune": "off", "resume": False}
    assert {**first, "pid": 0} == {**plain, **run, "pid": 0}
    assert {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": None}.items() <= others[1].items()
    assert not [note for note in notes if Path(f"/proc/{note['pid']}").exists()]
    assert not (tmp_path / "run").exists(), "the run's own folder is left alone"


@pytest.mark.parametrize(("share", "verdict"), [("0.5", TAKEN), ("1.3", "slower")])
def test_bfloat16_is_taken_only_where_it_was_measured_faster(tmp_path, monkeypatch, share, verdict):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("OF_BFLOAT16", share)
    others = ("--workers", "1", "--compile", "none")
    # A processor without such products is not asked, and neither is a user who has said it.
    assert not planted(tmp_path / "without", monkeypatch, *others).rows
    monkeypatch.setattr(key_module, "has_fast_bfloat16", lambda: True)
    assert not planted(tmp_path / "set", monkeypatch, *others, "--dtype", "float32").rows
    entry = planted(tmp_path / "free", monkeypatch, *others)
    assert (entry.rows[0].name, entry.rows[0].verdict) == ("bfloat16", verdict)
    taken = verdict == TAKEN
    assert entry.choice.dtype == ("bfloat16" if taken else "auto")
    assert ("--dtype bfloat16" in options_of(entry.choice, entry.plain)) == taken


def test_a_token_budget_that_a_run_has_to_find_is_refused(capsys):
    """Seconds of a full batch are seconds of 0 tokens there, and all candidates alike."""
    assert main(["--tokens-per-batch", "auto", "--device", "cpu"]) == 1
    assert "a run finds the number (see its config.json): give it here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dry-run", "--dry_run=True", "--device-like=t4"])
def test_a_plan_is_refused(option, capsys):
    assert main(["--device", "cpu", option]) == 2
    assert "plans a run, and this command measures" in capsys.readouterr().err


def test_a_device_that_is_not_measured_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert main(["--device", "mps"]) == 1
    assert "--device mps: only a CPU or a CUDA GPU is measured" in capsys.readouterr().err


def test_what_the_user_has_set_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    entry = planted(tmp_path, monkeypatch, "--workers", "1", "--compile", "none")
    assert free_in(entry.key) == frozenset() and not entry.rows
    note = json.loads((tmp_path / "notes").read_text())
    assert note["OMP_WAIT_POLICY"] == "passive" and note["OMP_NUM_THREADS"] == "2"


def test_fewer_threads_than_cores_stay_if_the_user_wants_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    entry = planted(tmp_path, monkeypatch, "--workers", "1", "--compile", "none")
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert {note["OMP_NUM_THREADS"] for note in notes} == {"1"}
    assert {note["OMP_WAIT_POLICY"] for note in notes} == {None, "passive"}
    assert entry.choice.threads == 0  # a run leaves the number as it is


def test_a_run_that_does_not_train_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "SERVE", "raise SystemExit('--data nowhere: no such folder')")
    model, config = parse_config([*TINY, "--out", str(tmp_path / "run")])
    key = key_of(model, config, None, torch.device("cpu"), torch.float32, several=False)
    with pytest.raises(ValueError, match="process of its own: ended with 1: --data nowhere"):
        tune_cpu(model, config, key, Choice())
    assert cache.newest() is None


@pytest.mark.slow
def test_real_training_in_real_processes(tmp_path):
    """The command, with candidates that train; its report; and a run that takes the choice."""
    options = [*TINY, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}

    def command(*words: str) -> str:
        call = [sys.executable, *words]
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = command("-m", "nanovlm_fast.tune", "--seconds", "20", *options)
    assert said.startswith("--compile auto is tried too: give it to train.py as well")
    assert "\nno GPU: measuring threads, waiting, workers and --compile" in said
    entry = cache.newest()
    assert entry.done and entry.rows[0].seconds > 0
    report = command("-m", "nanovlm_fast.tune", "--report")
    assert report.startswith(f"### Tuned on {entry.key['device']}") and "| 0 workers |" in report
    trained = [*options, "--compile", "auto", "--max-steps", "1", "--no-final-eval"]
    assert "tuned on 20" in command("train.py", *trained)
    assert not list(tmp_path.glob("run-*"))


# ---- the command


def test_a_report_without_a_measurement_says_what_to_do(capsys):
    assert main(["--report"]) == 1
    assert "holds no measurement: leave out --report to make one" in capsys.readouterr().err


def test_a_report_takes_no_other_options(capsys):
    assert main(["--report", "--preset", "tiny"]) == 2
    assert capsys.readouterr().err == "error: --report takes no other option, got --preset\n"


def test_a_report_is_markdown_to_paste(capsys):
    rows = [
        Row("rotary", "language", TAKEN, "", 0.002, 0.0025, 0.79, 0.81, 0.03),
        Row("swiglu", "language", LEFT_OUT, "a|b"),
    ]
    model, config = parse_config([*TINY, "--out", "run"])
    key = key_of(model, config, None, torch.device("cpu"), torch.float32, several=False)
    cache.write(Entry.of(key, Choice(), Found(Choice(("rotary",)), rows, done=True), 9.0))
    assert main(["--report"]) == 0
    said = capsys.readouterr().out
    assert "| rotary | language | 2.000 | 0.800 (0.790 to 0.810) | -3.0% | taken |" in said
    assert "| swiglu | language |  |  |  | left out: a\\|b |" in said
    assert f"- torch: {torch.__version__}" in said and "Chosen: `--kernels rotary`" in said


def test_the_sizes_of_data_that_are_not_here_follow_from_the_recipes_counts():
    model, config = parse_config(["--preset", "nanovlm-222m", "--dry-run"])
    budget = expected_budget(model, config)
    # As a run measures them on that data: bench/README.md, compiled_step.
    assert budget.tokens == 22528 and budget.max_seqlen == 128
    assert 270 <= budget.images <= 295 and budget.labels % 128 == 0
    assert 3000 <= budget.labels <= 4096 and budget.documents >= budget.images
    config.data = "someone/else"
    with pytest.raises(ValueError, match="someone/else is not on this machine"):
        expected_budget(model, config)


def on_the_hub(cache: Path, name: str, config: PretrainedConfig) -> None:
    """Put a config.json where the hub's client keeps what it has downloaded."""
    folder = cache / f"models--{name.replace('/', '--')}"
    config.save_pretrained(folder / "snapshots" / "one")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("one")


@pytest.mark.parametrize("name", ["nanovlm-222m", "nanovlm-230m", "nanovlm-460m"])
def test_without_the_hub_a_preset_has_the_key_of_its_run(name, tmp_path, monkeypatch):
    """train.py reads the sizes from the towers' configurations, and the command has none."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    options = ["--preset", name, "--out", str(tmp_path / "run")]
    tuned = run_of(options)
    assert not tuned[1].dry_run
    wide = name == "nanovlm-460m"  # as in the configurations of SmolLM2-135M and -360M
    sizes = (960, 2560, 32, 15, 5) if wide else (576, 1536, 30, 9, 3)
    fields = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    language = dict(zip([*fields, "num_key_value_heads"], sizes, strict=True))
    language |= dict(vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5)
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    llama = LlamaConfig(**language, rope_parameters=rope, tie_word_embeddings=True)
    side = 224 if name == "nanovlm-222m" else 512
    on_the_hub(tmp_path, tuned[1].vision, SiglipVisionConfig(image_size=side))
    on_the_hub(tmp_path, tuned[1].language, llama)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    trained = parse_config(options)
    place = expected_budget(*trained), torch.device("cpu"), torch.bfloat16
    assert key_of(*tuned, *place, several=False) == key_of(*trained, *place, several=False)


def test_towers_that_are_not_the_presets_are_still_looked_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit):
        run_of(["--preset", "nanovlm-222m", "--vision", "someone/tower"])
    assert "'someone/tower': no such folder, and the Hugging Face" in capsys.readouterr().err


def test_the_help_names_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--report" in capsys.readouterr().out
