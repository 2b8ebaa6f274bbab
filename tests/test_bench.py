"""The bench: it runs, its gate holds, its files say where they come from."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import dataloader, kernels, report
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


LOADER = "--pictures 24 --image-size 32 --seconds 0.1 --repeats 1 --workers 0 1 --device cpu --out"


def test_the_data_loader_is_measured_both_ways(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert dataloader.main([*LOADER.split(), str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/dataloader.json")
    result = json.loads(file.read_text())
    assert 50_000 < result["data"]["mean_jpeg_bytes"] < 200_000, "the size of real ones"
    assert {"read", "decode and resize", "tokenise", "read prepared", "pack"} == result["stages"].keys()
    assert all(rate > 0 for rate in result["stages"].values())
    assert {name: [*rates] for name, rates in result["samples_per_s"].items()} == {
        "on the fly": ["0", "1"], "prepared": ["0", "1"],
    }  # fmt: skip
    assert result["speedup"]["0"] > 1
    assert "data loader, 1 workers" in report.table(tmp_path)
    assert "on the fly" in capsys.readouterr().out


def test_no_loader_time_when_the_batches_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    plain = dataloader.load_image
    from nanovlm_fast.data import stream

    made: list[int] = []

    def other(image, size):
        made.append(1)
        return plain(image, size) ^ (len(made) > 40)  # not what was prepared

    monkeypatch.setattr(stream, "load_image", other)
    assert dataloader.main([*LOADER.split(), str(tmp_path)]) == 1
    assert "no time is reported" in capsys.readouterr().err and not list(tmp_path.glob("*/*.json"))
