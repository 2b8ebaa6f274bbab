"""The suites other than those of the kernels and of the step.

Each suite runs, its gate holds, and its arithmetic agrees with calculations by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from bench import attention, generate, memory
from bench.harness import processes
from bench.subjects.variants import Packed
from bench.subjects.workload import cauldron_like
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.packing.documents import IGNORE
from nanovlm_fast.presets import preset

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
        assert rows.keys() == {
            "reference",
            "flash_attn",
            "torch",
            "torch_fa3",
            "torch_fa4",
            "sdpa",
            "efficient",
            "flex",
        }
        for name in ("reference", "sdpa"):
            assert rows[name]["both"]["flops_per_s"] * rows[name]["both"][
                "median"
            ] == pytest.approx(3 * case["flops"])
        assert (
            "CUDA device" in rows["torch"]["error"]
            and "no backward on a CPU" in rows["flex"]["error"]
        )
    assert "CUDA device" in capsys.readouterr().out
    assert attention.main(["--tokens", "-1"]) == 2


def test_an_attention_that_is_wrong_gets_no_time(monkeypatch):
    case = attention_cases()["language, 81"]
    not_causal = dataclasses.replace(case, causal=False)

    def everything(inputs):
        return attention.backend_of("sdpa", dataclasses.replace(inputs, case=not_causal))

    monkeypatch.setattr(
        attention, "PROVIDERS", {"reference": attention.reference_of, "wrong": everything}
    )
    rows = attention.measure(case, 1, CPU, lambda: None)["providers"]
    assert (
        "both" in rows["reference"]
        and rows["wrong"].keys() == {"error"}
        and "allowed" in rows["wrong"]["error"]
    )


def test_attentions_work_by_hand():
    cases = attention_cases(20736, 256)
    assert (
        cases["language, 81"].lengths == [81] * 256 and cases["language, 81"].waste == 1 - 81 / 128
    )
    assert cases["language, 81"].flops == 256 * (81 * 82 // 2) * 4 * 9 * 64
    assert (
        cases["language, 1024"].lengths == [1024] * 20 + [256]
        and cases["language, 1024"].row == 1024
    )
    assert cases["vision"].flops == 256 * 196**2 * 4 * 12 * 64 and cases["vision"].waste == 0
    mixed = cases["language, mixed"]
    assert (
        mixed.tokens == 20736
        and max(mixed.lengths) <= mixed.row == 128
        and len(set(mixed.lengths)) > 20
    )


@pytest.mark.parametrize("name", ["language, 48", "vision"])
def test_flex_attention_sees_what_the_reference_sees(name, monkeypatch):
    """Checks the forward pass only, without compilation.

    On a GPU, the suite's own gate compares the compiled operation and the gradients.
    """
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    inputs = attention_cases(128, 2)[name].make(torch.float32, CPU)
    padded = attention.reference_of(inputs).call(
        *(inputs.pad(x) for x in (inputs.q, inputs.k, inputs.v))
    )
    with torch.no_grad():
        out = attention.flex_of(inputs).call(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(out, inputs.unpad(padded), rtol=1e-4, atol=1e-5)


# ---- memory


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Run in this process what has one of its own: starting it takes seconds, and these tests
    measure nothing that it would measure better."""

    def here(generator, *args):
        return generator(*args)

    monkeypatch.setattr(processes, "from_a_process", here)
    monkeypatch.setattr(memory, "from_a_process", here)


MEMORY = ["--preset", "tiny", "--data", "synthetic", "--layers", "1", "--device", "cpu"]


def test_memory_measures_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "VARIANTS", ("blocks",))
    options = ["--samples", "2", "--lora-rank", "4", "--out", str(tmp_path)]
    assert memory.main([*MEMORY, *options]) == 0
    result = result_of(tmp_path, "memory")
    assert result["parity"].keys() == {"reference", *POLICIES, "LoRA, rank 4"}
    assert all(parity["passed"] for parity in result["parity"].values())
    assert all(result["peaks"][name]["2"]["peak_mib"] > 0 for name in ("blocks", "LoRA, rank 4"))
    said = capsys.readouterr().out
    assert "ours, recompute blocks" in said and "ours, LoRA, rank 4" in said


def test_what_does_not_fit_is_a_row_and_ends_the_column(
    tmp_path, capsys, monkeypatch, in_this_process
):
    def peaks(args, variant: str):
        yield 7.0
        raise RuntimeError(processes.NO_ROOM)

    monkeypatch.setattr(memory, "measured_peaks", peaks)
    assert memory.main([*MEMORY, "--samples", "8,2,4", "--out", str(tmp_path)]) == 0
    rows = result_of(tmp_path, "memory")["peaks"]["reference"]
    assert rows == {
        "2": {"peak_mib": 7.0},
        "4": {"error": processes.NO_ROOM},
        "8": {"error": "out of memory with fewer"},
    }
    assert "reference at 4: out of memory" in capsys.readouterr().out
    assert (
        memory.main([*MEMORY, "--samples", "1,x"]) == 2
        and "--samples: must be" in capsys.readouterr().err
    )


def test_no_memory_without_parity(tmp_path, monkeypatch, in_this_process):
    forward = Packed.forward
    monkeypatch.setattr(Packed, "forward", lambda self, batch: forward(self, batch) * 1.01)
    assert memory.main([*MEMORY, "--samples", "1", "--out", str(tmp_path)]) == 0
    peaks = result_of(tmp_path, "memory")["peaks"]
    assert (
        peaks["reference"]["1"]["peak_mib"] > 0
        and "not the reference's step" in peaks["none"]["1"]["error"]
    )


def without_room() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_a_process_that_fails_or_is_killed_says_so():
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        processes.in_a_process(int, "x")
    with pytest.raises(RuntimeError, match="out of memory"):
        processes.in_a_process(os._exit, 9)
    with pytest.raises(RuntimeError, match=r"^out of memory"):
        processes.in_a_process(without_room)


# ---- generation


GENERATE = [
    "--preset",
    "tiny",
    "--layers",
    "1",
    "--batches",
    "1,3",
    "--new-tokens",
    "5",
    "--repeats",
    "1",
]


def test_generation_compares_the_three(tmp_path, capsys):
    assert generate.main([*GENERATE, "--device", "cpu", "--out", str(tmp_path)]) == 0
    batches = result_of(tmp_path, "generate")["batches"]
    assert batches.keys() == {"1", "3"}
    for batch, result in batches.items():
        assert result["variants"].keys() == {"reference", "transformers", "ours"}
        for row in result["variants"].values():
            assert row["parity"]["passed"] and row["parity"]["same_tokens"] == 1
            assert row["tokens_per_s"] == pytest.approx(
                int(batch) * 5 / row["all_tokens"]["median"]
            )
    assert "first token ms" in capsys.readouterr().out
    assert (
        generate.main(["--batches", "0"]) == 2 and "--batches: must be" in capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_that_is_not_greedy_or_fails_gets_no_time(monkeypatch, dtype):
    models = generate.Models(preset("tiny")[0], CPU, dtype)

    def blind(models, prompts, new: int) -> torch.Tensor:
        prompts = copy.copy(prompts)
        prompts.images = torch.zeros_like(prompts.images)
        return generate.by_ours(models, prompts, new)

    def short(models, prompts, new: int) -> torch.Tensor:
        return generate.by_ours(models, prompts, new)[:, 1:]

    variants = {"blind": blind, "short": short, "fails": lambda *_: 1 / 0, "ours": generate.by_ours}
    monkeypatch.setattr(generate, "VARIANTS", variants)
    rows = generate.measure(models, 3, 6, 1, lambda: None)["variants"]
    assert all(
        "error" in rows[name] and "tokens_per_s" not in rows[name]
        for name in ("blind", "short", "fails")
    )
    assert rows["blind"]["parity"]["missed_by"] > 5 * rows["blind"]["parity"]["allowed"]
    assert "ZeroDivisionError" in rows["fails"]["error"] and "tokens_per_s" in rows["ours"]


def test_what_is_asked_is_the_question_alone():
    """The prompts keep the image and the question.

    The replies to different prompts differ, so the gate can detect a difference.
    """
    config = preset("tiny")[0]
    models = generate.Models(config, CPU, torch.float32)
    prompts = generate.Prompts(models, 4)
    samples = cauldron_like(config, 4)
    for prompt, sample in zip(prompts.documents, samples, strict=True):
        (document,) = sample.documents
        assert len(prompt) == len(document) - sample.labels and (prompt.labels == IGNORE).all()
        assert (prompt.input_ids == document.input_ids[: len(prompt)]).all()
    assert len({tuple(reply) for reply in generate.by_ours(models, prompts, 4).tolist()}) == 4
