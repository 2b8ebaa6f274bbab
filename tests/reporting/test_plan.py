"""--dry-run: the plan of a run, from constants or from local data.

It uses no network and leaves no files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bench.pages.rates import rates
from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.sources.cauldron import ALL45, configurations
from nanovlm_fast.device import device_name
from nanovlm_fast.presets import COUNTS, PRESETS
from nanovlm_fast.reporting import plan as module
from nanovlm_fast.reporting.plan import plan, prediction
from tests.support.processes import run_python


def test_nanovlms_recipe_is_one_command(tmp_path):
    """It runs in a process that may not ask the hub, and its folder stays empty."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = run_python(
        "train.py", "--preset", "nanovlm-222m", "--dry-run", "--out", str(tmp_path / "run"), **env
    )
    assert result.returncode == 0, result.stderr
    rows = {line[2:13].strip(): line[13:].strip() for line in result.stdout.splitlines()}
    assert rows["model"].startswith(
        "222,081,600 parameters: vision 85,797,120, projector 1,769,472, language 134,515,008"
    )
    assert (
        rows["data"] == "HuggingFaceM4/the_cauldron:all45, turns: first"
        and "mmstar" in rows["scored by"]
    )
    assert rows["steps"].startswith("about 30,023 of 278 examples, 22,528 tokens; 5.0 epochs")
    assert rows["tokens"].startswith("676,") and "159 GFLOP an example" in rows["FLOPs"]
    assert not list(tmp_path.iterdir())


def test_the_preset_is_v01s_recipe():
    model, config = parse_config(["--preset", "nanovlm-222m", "--dry-run"])
    assert [name for _, _, name in configurations(config.data)] == list(ALL45)
    assert (config.lr_projector, config.lr_vision, config.lr_language, config.epochs) == (
        2e-3,
        1e-4,
        1e-4,
        5,
    )
    assert (config.optimizer, config.warmup, config.min_lr, config.weight_decay) == (
        "adamw",
        0.03,
        0.1,
        0.01,
    )
    assert (config.tokens_per_batch, config.max_seqlen, config.turns, config.clip) == (
        22528,  # 278 samples of 81 tokens, where v0.1 has 256
        128,
        "first",
        0,
    )
    assert (model.image_mean, model.image_std, model.lm_tokenizer) == (
        0,
        1,
        "HuggingFaceTB/cosmo2-tokenizer",
    )
    assert (config.data, config.turns) in COUNTS and set(PRESETS["nanovlm-222m"]) <= {
        *vars(config),
        *vars(model),
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nanovlm-230m", "228,063,936 parameters: vision 86,433,024, projector 7,077,888, "),
        ("nanovlm-460m", "460,113,984 parameters: vision 86,433,024, projector 11,796,480, "),
    ],
)
def test_the_models_with_tiles_are_planned_without_the_hub(name, parts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, config = parse_config(["--preset", name, "--dry-run"])
    assert model.image_tokens == 64 and len(model.vlm_extra_tokens) == 66
    assert (config.lr_projector, config.lr_vision, config.lr_language, config.clip) == (
        5.12e-3,
        5e-5,
        5e-5,
        1.0,
    )
    rows = plan(model, config)
    assert rows["model"].startswith(parts)
    assert "9.2 tiles" in rows["an epoch"]
    # 131,072 tokens of 1,105 each; 9.2 tiles of 65 tokens
    assert rows["steps"].startswith("about 80,100 of 119 examples, 131,072 tokens, 1,092 tiles")
    shares = [float(part) for part in re.findall(r"([\d.]+)%", rows["of these"])]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[0] > 60
    assert "h on NVIDIA H100 80GB HBM3" in rows["at peak"] or torch.cuda.is_available()


def test_local_data_is_measured():
    model, config = parse_config(
        "--data synthetic:32 --vit-img-size 32 --mp-pixel-shuffle-factor 2 --epochs 3".split()
    )
    rows = plan(model, config)
    assert (
        rows["an epoch"].startswith("156 examples of 1.0 images, ")
        and "measured on 156" in rows["an epoch"]
    )
    assert rows["steps"].endswith("3.0 epochs") and "held-out" in rows["scored by"]
    rows = plan(model, dataclasses.replace(config, max_steps=7, accumulate=2, tokens_per_batch=512))
    assert rows["steps"].startswith("about 7 of ") and "1,024 tokens" in rows["steps"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--data owner/name", "owner/name is on the hub"),
        ("--lm-tokenizer owner/other", "owner/other is on the hub"),
    ],
)
def test_what_only_the_hub_knows_is_called_unknown(options, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = plan(*parse_config(f"--data synthetic {options}".split()))
    assert (
        rows["an epoch"].startswith("unknown")
        and reason in rows["an epoch"]
        and "predicted" not in rows
    )


def write_rates(results: Path) -> None:
    """RESULTS/rates.json, as bench.report writes it from the results there."""
    (results / "rates.json").write_text(rates(results))


def test_hours_come_from_a_measured_run_of_the_preset_on_the_device(tmp_path, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(module, "RATES", tmp_path / "rates.json")
    _, config = parse_config([])
    (tmp_path / "here").mkdir()
    run = {"device": device_name(device), "options": [], "tokens_per_s": 5000.0}
    (tmp_path / "here" / "train_tiny.json").write_text(json.dumps(run))
    write_rates(tmp_path)
    assert prediction(config, device, 36e6).startswith(
        "2.00 h at 5,000 tokens/s (bench/results/here/train_tiny.json"
    )
    for changes in ({"device": "another"}, {"options": ["--preset", "nanovlm-222m"]}):
        (tmp_path / "here" / "train_tiny.json").write_text(json.dumps({**run, **changes}))
        write_rates(tmp_path)
        assert prediction(config, device, 36e6).startswith("unknown: no run of tiny")


def test_without_a_run_hours_come_from_a_bare_step(tmp_path, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(module, "RATES", tmp_path / "rates.json")
    _, config = parse_config(["--preset", "nanovlm-222m", "--dry-run"])
    step = {"device": device_name(device), "variants": {"ours": {"tokens_per_s": 5000.0}}}
    file = tmp_path / "here" / "train_step_nanovlm-222m.json"
    file.parent.mkdir()
    (file.parent / "train_step_nanovlm-222m_2layers.json").write_text(json.dumps(step))
    write_rates(tmp_path)
    assert prediction(config, device, 36e6).startswith("unknown"), (
        "a cut model's rate is not the preset's"
    )
    file.write_text(json.dumps(step))
    write_rates(tmp_path)
    expected = (
        "2.00 h at a bare step's rate, 5,000 tokens/s "
        "(bench/results/here/train_step_nanovlm-222m.json)"
    )
    assert prediction(config, device, 36e6) == expected
    run = {
        "device": device_name(device),
        "options": ["--preset", "nanovlm-222m"],
        "tokens_per_s": 2500.0,
    }
    (file.parent / "train_222m.json").write_text(json.dumps(run))
    write_rates(tmp_path)
    assert prediction(config, device, 36e6).startswith("4.00 h at 2,500 tokens/s")
    (file.parent / "train_222m.json").unlink()
    for changes in ({"device": "another"}, {"variants": {"ours": {"error": "no time"}}}):
        file.write_text(json.dumps({**step, **changes}))
        write_rates(tmp_path)
        assert prediction(config, device, 36e6).startswith("unknown")


def test_a_gpu_to_plan_for_needs_a_plan_and_is_never_left_out_of_it(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--device-like", "t4"])
    assert "--device-like is a part of the plan: give --dry-run too" in capsys.readouterr().err
    unknown = ["--preset", "nanovlm-222m", "--dry-run", "--data", "nobody/nothing"]
    rows = plan(*parse_config([*unknown, "--device-like", "t4"]))
    assert rows["memory"].startswith("unknown") and "memory" not in plan(*parse_config(unknown))


def test_a_t4_holds_nanovlm_222m():
    """By an estimate: whole batches with the blocks recomputed, a part of one without."""
    argv = ["--preset", "nanovlm-222m", "--dry-run", "--device-like", "t4", "--device", "cpu"]
    rows = plan(*parse_config(argv))
    assert rows["memory"] == "15 GB of a Tesla T4, in float16, a tenth left free"
    assert "on Tesla T4 if it did nothing else" in rows["at peak"]
    said = r"22,528 tokens take ([\d.]+) GB; at most ([\d,]+) fit"
    found = {}
    for recompute in ("none", "blocks"):
        gigabytes, most = re.match(said, rows[f"--recompute {recompute}"]).groups()
        found[recompute] = float(gigabytes), int(most.replace(",", ""))
    assert found["none"][0] > 40 and 3000 < found["none"][1] < 7000
    assert found["blocks"][0] < 13.5 and found["blocks"][1] > 22528
    parts = -(-22528 // found["none"][1])
    assert f"(--accumulate {parts} keeps the step's size)" in rows["--recompute none"]
    # A plan tries nothing: `auto` is the preset's budget in it.
    plain = argv[:3]
    assert plan(*parse_config([*plain, "--tokens-per-batch", "auto"])) == plan(*parse_config(plain))


def test_hours_are_scaled_by_the_flops_of_what_is_trained():
    """Multiply-adds per example by hand: 196 patches, 49 image tokens, 81 tokens, 12 labels."""
    blocks = 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 196 * 768)
    tower = 196 * (2 * 3 * 16**2 * 768 + 3 * blocks)
    projector = 3 * 49 * 4 * 768 * 576
    layers = 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
    weights = 81 * layers + 12 * 576 * 49152
    whole = tower + projector + 3 * weights + 3 * (81 * 82 // 2) * 30 * 2 * 576
    ms = {}
    for options, share in (
        ("", 1.0),
        ("--lora-rank 8", (whole - weights) / whole),
        ("--lr-language 0", (whole - weights) / whole),
    ):
        rows = plan(*parse_config(f"--preset nanovlm-222m {options} --dry-run".split()))
        line = rows["on an H100"]
        ms[options] = float(line.split(" ms a step")[0])
        assert ms[options] == pytest.approx(share * ms[""], rel=0.01)
        assert (f"scaled by FLOPs to {share:.0%}" in line) == (share < 1)
    assert ms["--lora-rank 8"] == pytest.approx(0.89 * ms[""], rel=0.01)
