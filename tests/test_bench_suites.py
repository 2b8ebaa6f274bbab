"""The suites beside the kernels' and the step's: each runs, its gate holds, its arithmetic is what a hand gets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import attention
from nanovlm_fast.config import preset

CPU = torch.device("cpu")


def result_of(folder: Path, name: str) -> dict:
    (file,) = folder.glob(f"*/{name}.json")
    result = json.loads(file.read_text())
    assert {"device", "commit", "command", "torch", "date"} <= set(result)
    return result


# ---- attention


def attention_cases(tokens: int = 200, images: int = 2) -> dict[str, attention.Case]:
    return {case.name: case for case in attention.cases(preset("nanovlm-222m")[0], tokens, images)}


def test_attention_runs_what_can_run_here(tmp_path, capsys):
    arguments = ["--quick", "--tokens", "200", "--images", "1", "--repeats", "1", "--device", "cpu"]
    assert attention.main([*arguments, "--out", str(tmp_path)]) == 0
    cases = result_of(tmp_path, "attention")["cases"]
    assert cases.keys() == {"language, 81", "language, mixed", "vision"}
    for case in cases.values():
        rows = case["providers"]
        assert rows.keys() == {"reference", "flash_attn", "torch", "torch_fa3", "torch_fa4", "sdpa", "flex"}
        for name in ("reference", "sdpa"):
            assert rows[name]["both"]["flops_per_s"] * rows[name]["both"]["median"] == pytest.approx(3 * case["flops"])
        assert "CUDA device" in rows["torch"]["error"] and "no backward on a CPU" in rows["flex"]["error"]
    assert "CUDA device" in capsys.readouterr().out
    assert attention.main(["--tokens", "-1"]) == 1


def test_an_attention_that_is_wrong_gets_no_time(monkeypatch):
    case = attention_cases()["language, 81"]
    everything = lambda inputs: attention.backend_of("sdpa", dataclasses.replace(inputs, case=not_causal))  # noqa: E731
    not_causal = dataclasses.replace(case, causal=False)
    monkeypatch.setattr(attention, "PROVIDERS", {"reference": attention.reference_of, "wrong": everything})
    rows = attention.measure(case, 1, CPU, lambda: None)["providers"]
    assert "both" in rows["reference"] and rows["wrong"].keys() == {"error"} and "allowed" in rows["wrong"]["error"]


def test_attentions_work_by_hand():
    cases = attention_cases(20736, 256)
    assert cases["language, 81"].lengths == [81] * 256 and cases["language, 81"].waste == 1 - 81 / 128
    assert cases["language, 81"].flops == 256 * (81 * 82 // 2) * 4 * 9 * 64
    assert cases["language, 1024"].lengths == [1024] * 20 + [256] and cases["language, 1024"].row == 1024
    assert cases["vision"].flops == 256 * 196**2 * 4 * 12 * 64 and cases["vision"].waste == 0
    mixed = cases["language, mixed"]
    assert mixed.tokens == 20736 and max(mixed.lengths) <= mixed.row == 128 and len(set(mixed.lengths)) > 20


@pytest.mark.parametrize("name", ["language, 48", "vision"])
def test_flex_attention_sees_what_the_reference_sees(name, monkeypatch):
    """Forward only and not compiled; on a GPU the suite's own gate compares what is compiled, and the gradients."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    inputs = attention_cases(128, 2)[name].make(torch.float32, CPU)
    padded = attention.reference_of(inputs).call(*(inputs.pad(x) for x in (inputs.q, inputs.k, inputs.v)))
    with torch.no_grad():
        out = attention.flex_of(inputs).call(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(out, inputs.unpad(padded), rtol=1e-4, atol=1e-5)
