"""The bench: it runs, its gate holds, its files say where they come from."""

from __future__ import annotations

import json

import pytest
import torch

from bench import kernels, report, train_step
from bench.registry import KERNELS, NOTHING, PROVIDERS, call_of


def test_train_step_compares_and_writes(tmp_path, capsys):
    arguments = ["--data", "synthetic", "--tokens", "600", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert train_step.main(arguments) == 0
    (file,) = tmp_path.glob("*/train_step.json")
    result = json.loads(file.read_text())
    assert result["parity"]["passed"] and result["parity"]["gradient"] < 1e-4
    assert {"device", "commit", "command", "torch", "date"} <= set(result)
    assert result["variants"].keys() == {"reference", "packed"} and len(result["variants"]["packed"]["seconds"]) == 2
    assert all(row["peak_mib"] > 0 for row in result["variants"].values())
    assert "times as many questions" in capsys.readouterr().out


def test_no_time_without_parity(tmp_path, capsys, monkeypatch):
    loss = train_step.Step.loss
    monkeypatch.setattr(train_step.Step, "loss", lambda self: loss(self) * (1.01 if self.variant == "packed" else 1))
    assert train_step.main(["--data", "synthetic", "--tokens", "600", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.rglob("*.json")) and "no time is reported" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_train_step_on_the_gpu(tmp_path):
    arguments = ["--data", "synthetic", "--tokens", "2048", "--repeats", "3", "--out", str(tmp_path)]
    assert train_step.main([*arguments, "--tolerance", "1e-3"]) == 0


def test_the_readme_says_what_the_result_files_say():
    assert report.main(["--check"]) == 0


def test_a_stale_table_or_a_file_without_origin_is_found(tmp_path):
    result = dict(device="X", date="d", commit="abcdef123", command="c", torch="2", preset="tiny", speedup=5.0)
    result["python"] = "3"
    result |= dict(work={"questions": 7}, parity={"gradient": 1e-6})
    row = {"questions_per_s": 10.0, "peak_mib": 3.0}
    result["variants"] = {"packed": row, "reference": row}
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "train_step.json"
    file.write_text(json.dumps(result))
    text = "\n".join(("before", *report.MARKS, "after"))
    once = report.updated(text, report.table(tmp_path))
    assert "**5.0x**" in once and once.endswith("after") and report.updated(once, report.table(tmp_path)) == once
    file.write_text(json.dumps({**result, "speedup": 6.0}))
    assert report.updated(once, report.table(tmp_path)) != once
    file.write_text(json.dumps({**result, "commit": "unknown"}))
    with pytest.raises(ValueError, match="no commit"):
        report.table(tmp_path)
    with pytest.raises(ValueError, match="marks"):
        report.updated("no marks", "")


def test_the_kernel_bench_rehearses_on_any_machine(tmp_path, capsys):
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--only", "rms_norm", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    providers = json.loads(file.read_text())["kernels"]["rms_norm"]["providers"]
    assert providers.keys() == set(PROVIDERS)
    assert providers["ours"].keys() == {"graph", "forward", "backward", "both"} and "error" in providers["liger"]
    assert providers["in place"]["error"] == NOTHING and providers["transformers"]["both"]["noise"] >= 0
    assert "its times mean nothing" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert kernels.main([]) == 1 and "measured on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_competitor_here_computes_the_same(kernel):
    """In float32 at toy sizes, so that a wrong call of a rival's operation is found without a GPU."""
    inputs = kernel.module.make_inputs(**kernel.small, dtype=torch.float32, device="cpu")
    calls = {name: call_of(PROVIDERS[name], kernel) for name in ("eager", "transformers", "ours", "in place")}
    wrong = {name: kernels.agrees(call, kernel, inputs) for name, call in calls.items() if call != NOTHING}
    assert set(wrong.values()) == {None} and {"eager", "ours"} <= wrong.keys()


def test_what_is_not_installed_is_told_from_what_does_not_exist():
    rms_norm = next(kernel for kernel in KERNELS if kernel.name == "rms_norm")

    def missing(kernel):
        import no_such_package  # noqa: F401

    def of_another_version(kernel):
        from torch.nn import NoSuchModule  # noqa: F401

    assert call_of(missing, rms_norm) == "not installed: no_such_package"
    assert call_of(lambda kernel: None, rms_norm) == NOTHING
    assert call_of(of_another_version, rms_norm).startswith("ImportError: cannot import name")


def test_a_kernel_that_is_wrong_gets_no_time(tmp_path, monkeypatch):
    wrong = {"ours": lambda kernel: lambda x, weight, eps, residual: (x * 1.001, residual + x + 0 * weight.sum())}
    monkeypatch.setattr(kernels, "PROVIDERS", wrong)
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--only", "rms_norm", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    row = json.loads(file.read_text())["kernels"]["rms_norm"]["providers"]["ours"]
    assert row.keys() == {"error"} and "allowed" in row["error"]
