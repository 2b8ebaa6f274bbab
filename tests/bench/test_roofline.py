"""The floor of a step: its FLOPs are the model's, one layer agrees with arithmetic by hand."""

from __future__ import annotations

import json

import pytest
import torch

from bench import roofline
from bench.roofline import Counts, Rates, by_kind, kind_of, operators, profiled, worth_fusing
from bench.subjects.step_time import H100
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.training.warmup import full_batch


@pytest.mark.parametrize("name", ["tiny", "nanovlm-222m"])
def test_the_operators_flops_are_the_models(name):
    """`step_flops` itself is held against PyTorch's flop counter in test_metrics.py."""
    config, _ = preset(name)
    work = Counts.of_samples(config, samples=7, text=20, labels=5)
    counted = step_flops(config, work.images, work.tokens, work.labels, work.pairs)
    assert sum(operator.flops for operator in operators(config, work)) == counted


def test_one_layer_by_hand():
    """nanovlm-222m at 256 samples of 49 + 32 tokens.

    This gives 50,176 vision rows of 768 and 20,736 language rows of 576.
    """
    config, _ = preset("nanovlm-222m")
    work = Counts.of_samples(config, samples=256, text=32, labels=12)
    found = {(o.part, o.name, o.direction): o for o in operators(config, work)}
    qkv = found["vision", "qkv", "forward"]
    assert qkv.calls == 12 and qkv.flops / 12 == 2 * 50176 * 768 * 2304
    assert qkv.bytes / 12 == 2 * (50176 * 768 + 768 * 2304 + 50176 * 2304)
    norm = found["language", "norm + residual", "forward"]
    assert norm.calls == 61 and norm.bytes / 61 == 20736 * 576 * (
        2 + 4 + 4 + 2
    )  # in: branch and stream; out: stream and norm
    down = found["language", "down", "backward"]
    assert down.flops / 30 == 4 * 20736 * 1536 * 576
    vision = (
        sum(found["vision", name, "forward"].flops for name in ("qkv", "out", "fc1", "fc2")) / 12
    )
    assert vision / 700e12 == pytest.approx(1013e-6, rel=2e-3)
    assert found["optimizer", "AdamW", "update"].bytes == 28 * 222_081_600


def test_the_binding_bound_and_what_fusing_saves():
    config, _ = preset("nanovlm-222m")
    found = operators(config, Counts.of_samples(config, 256, 32, 12))
    bounds = {(o.part, o.name): o.bound(H100) for o in found}
    assert bounds["vision", "fc1"] == "compute" and bounds["vision", "GELU"] == "memory"
    slow = Rates("slow memory", 798e12, 1e9)
    assert {o.bound(slow) for o in found} == {"memory"}
    saved = worth_fusing(found, H100)
    assert sum(s for _, s in saved) == pytest.approx(
        sum(
            s
            for kind, s in by_kind(found, H100).items()
            if kind in ("norm", "activation", "rotary", "gather")
        )
    )
    assert [s for _, s in saved] == sorted((s for _, s in saved), reverse=True)


def test_a_profiled_step_falls_into_the_kinds(small_config: VLMConfig):
    model = VisionLanguageModel(small_config, choose_ops("none"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = full_batch(Budget(600, 40, 6, 200, 64), small_config)

    def step() -> None:
        model(batch).backward()
        optimizer.step()

    kinds = profiled(step, torch.device("cpu"))
    assert {
        "product",
        "attention",
        "norm",
        "activation",
        "gather",
        "optimizer",
        "other",
    } <= kinds.keys()
    assert all(seconds > 0 for seconds in kinds.values())
    assert kind_of("nanovlm_fast::rms_norm_fwd") == "norm" and kind_of("aten::copy_") == "other"
    assert kind_of("nanovlm_fast::swiglu_mlp_fwd") == "product"
    assert kind_of("nanovlm_fast::swiglu_fwd") == "activation"


def test_the_command(tmp_path, capsys):
    options = ["--preset", "tiny", "--samples", "4", "--device", "cpu", "--out", str(tmp_path)]
    assert roofline.main(options) == 0
    (file,) = tmp_path.glob("*/roofline.json")
    result = json.loads(file.read_text())
    assert (
        result["floor_seconds"] > 0
        and result["rates"]["bandwidth"] > 1e8
        and {"commit", "command"} <= result.keys()
    )
    assert roofline.main(["--device", "h100", "--out", str(tmp_path)]) == 0
    assert (
        "fused into the products" in capsys.readouterr().out
        and len(list(tmp_path.rglob("*.json"))) == 1
    )
    assert roofline.main(["--device", "t4", "--out", str(tmp_path)]) == 0
    assert "NVIDIA T4 (data sheet): 65.00 TFLOP/s, 320 GB/s" in capsys.readouterr().out
    assert roofline.main(["--labels", "40", "--device", "h100"]) == 1
    assert roofline.main(["--preset", "nano", "--device", "h100"]) == 1


def test_the_floor_beside_a_profiled_step(tmp_path, capsys):
    options = [
        "--preset",
        "tiny",
        "--samples",
        "2",
        "--layers",
        "1",
        "--device",
        "cpu",
        "--measure",
    ]
    assert roofline.main([*options, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/roofline.json")
    result = json.loads(file.read_text())
    assert result["work"]["images"] == 2 and result["measured_by_kind"]["product"] > 0
    assert "floor ms" in capsys.readouterr().out
    assert roofline.main([*options[:-3], "--device", "h100", "--measure"]) == 1
