"""The bench: it runs, its gate holds, its files say where they come from."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import kernels, report
from bench.timing import interleave, summary


def test_variants_take_turns():
    calls: list[str] = []
    seconds = interleave({name: lambda n=name: calls.append(n) for name in "ab"}, repeats=3, warmup=1)
    assert calls == list("abababab") and [len(times) for times in seconds.values()] == [3, 3]
    seconds = interleave({"a": lambda: None}, repeats=9, deadline=time.perf_counter() - 1)
    assert len(seconds["a"]) == 3, "late or not, three rounds"
    assert summary([1.0, 2.0, 9.0])["median"] == 2.0 and summary([5.0])["median"] == 5.0


def test_the_readme_says_what_the_result_files_say():
    assert report.main(["--check"]) == 0


def test_a_stale_table_or_a_file_without_origin_is_found(tmp_path):
    result = dict(device="X", date="d", commit="abcdef123", command="c", torch="2", preset="tiny", speedup=5.0)
    result |= dict(work={"questions": 7}, parity={"gradient": 1e-6})
    row = {"questions_per_s": 10.0, "peak_mib": 3.0}
    result["variants"] = {"ours": row, "reference": row}
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
    assert providers.keys() == {"eager", "compile", "liger", "ours"}
    assert providers["ours"].keys() == {"graph", "forward", "backward", "both"} and "error" in providers["liger"]
    if not torch.cuda.is_available():
        assert kernels.main([]) == 1 and "measured on a GPU" in capsys.readouterr().err


def test_a_kernel_that_is_wrong_gets_no_time(tmp_path, monkeypatch):
    wrong = {"ours": lambda kernel: lambda x, weight, eps, residual: (x * 1.001, residual + x + 0 * weight.sum())}
    monkeypatch.setattr(kernels, "PROVIDERS", wrong)
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--only", "rms_norm", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    row = json.loads(file.read_text())["kernels"]["rms_norm"]["providers"]["ours"]
    assert row.keys() == {"error"} and "allowed" in row["error"]
