"""The bench: it runs, its gate holds, its files say where they come from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import dataloader, kernels, report, roofline
from bench.harness import commit as commits
from bench.harness import passes as passes_module
from bench.harness import results
from bench.harness.timing import summary
from bench.pages import rows as rows_module
from bench.pages import sections
from bench.pages.figures import figures
from bench.subjects import rivals
from bench.subjects.operators import KERNELS, NOTHING, call_of
from bench.subjects.rivals import PROVIDERS, as_timed
from bench.subjects.step_time import H100
from nanovlm_fast.presets import preset


def test_the_readmes_and_pictures_say_what_the_result_files_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_the_front_page_has_six_rows_of_the_summary_without_their_commits():
    summary = [line.split(" | ") for line in report.overview().splitlines()]
    shown = report.highlights().splitlines()[2:]
    assert len(shown) == 6
    assert not [row for row in shown if row.split(" | ") not in [[*r[:3], *r[4:]] for r in summary]]


def test_every_committed_result_says_where_it_comes_from():
    files = sorted(report.ROOT.glob("*/*.json"))
    assert len(files) >= 5
    for file in files:
        results.load(file)


@pytest.mark.parametrize("lost", [*results.NEEDED, "driver", "triton"])
def test_a_result_without_origin_is_refused(tmp_path, lost):
    whole = dict.fromkeys((*results.NEEDED, "driver", "triton"), "x") | {"device": "NVIDIA H100"}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(whole))
    assert results.load(file) == whole
    file.write_text(
        json.dumps({**whole, lost: "unknown"} | ({"device": ""} if lost == "device" else {}))
    )
    with pytest.raises(ValueError, match=f"no {lost}"):
        results.load(file)


def test_a_result_is_of_the_code_that_was_loaded(monkeypatch):
    empty = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's tree without files
    monkeypatch.delenv(commits.VARIABLE, raising=False)
    monkeypatch.setattr(commits, "LOADED", empty)
    found = results.facts(torch.device("cpu"))
    assert found["commit"] == empty and not found["clean"]


def timed(seconds: float, **more: object) -> dict:
    times = [seconds * (1 + i / 100) for i in range(9)]
    return {**summary(times, noise=0.01), "seconds": times, "flops_per_s": 1e9, **more}


def all_suites(folder: Path) -> None:
    """A result file of every suite, with what it can hold, for a device with everything."""
    facts = dict(
        device="NVIDIA X",
        date="2026-01-02T",
        commit="abcdef123",
        command="c",
        torch="2",
        python="3",
    )
    facts |= dict(driver="1", triton="3", preset="nanovlm-222m", layers=0)
    passes = {name: timed(1e-4) for name in passes_module.PASSES}
    rates = dict(questions_per_s=9.0, tokens_per_s=99.0, peak_mib=10.0, mfu=0.4)
    failed = {"error": "it cannot | run"}
    variants = {
        "reference": timed(1.0, times_base=5.0, **rates),
        "graphs": timed(0.2, **rates),
        "packing": failed,
    }
    step = dict(
        variants={**variants, "ours": timed(0.2, times_base=1.0, **rates)},
        work={"questions": 7, "tokens": 70},
    )
    found = {
        "train_step_nanovlm-222m": dict(**step, speedup=5.0, parity={"gradient": 1e-3}),
        "kernels": dict(small=False, copy_bytes_per_s=1e12, kernels={"rms_norm": {
            "cost": {"forward": [10**8, 10**8]},
            "providers": {
                "compile": passes, "ours": passes, "liger": failed, "in place": {"error": NOTHING},
            },
        }}),
        "attention": dict(cases={"mixed": {"providers": {"reference": passes, "flex": failed}}}),
        "memory": dict(published_mib={"1": 4400, "512": None}, peaks={
            "reference": {"1": {"peak_mib": 4000.0}, "2": {"error": "out of memory"}},
            "none": {"1": {"peak_mib": 9.0}},
        }),
        "generate": dict(batches={"8": {"variants": {"transformers": failed, "ours": dict(
            first_token=timed(1.0), all_tokens=timed(2.0),
            tokens_per_s=1.0, decode_tokens_per_s=2.0,
        )}}}),
        "dataloader": dict(stages={"decode": 50.0}, speedup={"1": 2.0},
                           samples_per_s={"on the fly": {"1": 10.0}, "prepared": {"1": 20.0}}),
        "peer_tiny": dict(preset="tiny", layers=2, nanovlm={"commit": "v0.1"}, cases={
            name: dict(
                work={"padded_waste": waste},
                variants={"nanovlm": timed(1.0, **rates), "ours": ours},
            )
            for name, waste, ours in (
                ("plain", 0.0, timed(1.0, **rates)), ("ten", 0.4, timed(0.5, **rates)),
            )
        }),
        "roofline": roofline.summarised(
            preset("tiny")[0], roofline.Counts(4, 144, 48, 2664), H100
        ),
    }  # fmt: skip
    folder.mkdir()
    for name, result in found.items():
        (folder / f"{name}.json").write_text(json.dumps({**facts, **result}))


def test_the_page_of_all_suites(tmp_path):
    """The page has the table and picture of every suite, with rows that failed.

    Missing suites cause no error.
    """
    all_suites(tmp_path / "x")
    page = sections.suites_page(tmp_path)
    assert (
        "5.00x" in page
        and "it cannot / run" in page
        and "same (0." in page
        and "| 1 worker | 10 | 20 | 2.00x |" in page
    )
    assert all(
        f"### {name}\n" in page
        for name in ("train_step", "kernels", "attention", "memory", "generate")
    )
    assert (
        "| ten | ours | 520 (510-530) | 2.00x (1.8" in page
        and "| plain | ours |" in page
        and "### peer" in page
    )
    assert "plain **1.00x** (0.9" in report.overview(tmp_path)
    assert "ten (40% of their rows are padding) **2.00x** (1.8" in report.overview(tmp_path)
    assert rows_module.timed_rows({"a": {"b": timed(0.1)}})[1] == ("a · b", "104 (102-106)")
    assert (
        "GPU timings: NVIDIA X" in page and page.count("<picture>") == 3 and "not drawn" not in page
    )
    (tmp_path / "y").mkdir()
    assert (
        report.overview(tmp_path).count("\n") == 4
        and sections.suites_page(tmp_path / "y").count("###") == 1
    )  # the race


def test_a_picture_is_drawn_twice_and_known_when_stale(tmp_path):
    all_suites(tmp_path / "x")
    drawn = figures(tmp_path / "x")
    assert [figure.stem.name for figure in drawn] == [
        "train_step_nanovlm-222m",
        "roofline",
        "memory",
    ]
    assert len(report.stale_pictures(tmp_path)[0]) == 3
    for figure in drawn:
        figure.write()
        sizes = [Image.open(figure.file(theme)).size for theme in ("light", "dark")]
        assert sizes[0] == sizes[1] and 900 <= sizes[0][0] <= 1300
    assert report.stale_pictures(tmp_path) == ([], [])
    assert len(report.stale_pictures(tmp_path, redraw=True)[0]) == 3
    memory = tmp_path / "x" / "memory.json"
    memory.write_text(memory.read_text().replace("4000.0", "5000.0"))
    assert [figure.stem.name for figure in report.stale_pictures(tmp_path)[0]] == ["memory"]
    memory.unlink()
    assert {file.name for file in report.stale_pictures(tmp_path)[1]} == {
        "memory_light.png",
        "memory_dark.png",
    }


def test_records_stand_on_result_files():
    """Every row names a result file that exists.

    If the file is still from the row's commit, it contains the row's tokens/s.
    """
    bench = report.ROOT.parent
    rows = [
        line.split(" | ")
        for line in (bench / "records.md").read_text().splitlines()
        if line.startswith("| 2")
    ]
    assert rows and [row[0] for row in rows] == sorted(row[0] for row in rows)
    for *_, tokens, _, commit, link in rows:
        result = results.load(bench / re.search(r"\((.+\.json)\)", link).group(1))
        if result["commit"].startswith(commit):
            rates = {f"{rate:,.0f}" for rate in all_of(result, "tokens_per_s")}
            assert tokens in rates


def all_of(node: object, name: str) -> list[float]:
    if not isinstance(node, dict):
        return []
    return [v for k, value in node.items() for v in ([value] if k == name else all_of(value, name))]


def test_a_stale_table_or_a_file_without_origin_is_found(tmp_path):
    result = dict(
        device="X", date="d", commit="abcdef123", command="c", torch="2", preset="tiny", speedup=5.0
    )
    result["python"] = "3"
    result |= dict(work={"questions": 7}, parity={"gradient": 1e-6})
    row = {"questions_per_s": 10.0, "peak_mib": 3.0}
    result["variants"] = {"ours": row, "reference": row}
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "train_step.json"
    file.write_text(json.dumps(result))
    text = "\n".join(("before", *report.MARKS, "after"))
    once = report.updated(text, report.overview(tmp_path))
    assert (
        "**5.0x**" in once
        and once.endswith("after")
        and report.updated(once, report.overview(tmp_path)) == once
    )
    stopped = {**result, "variants": {"reference": row}}
    del stopped["parity"]
    (file.parent / "train_step_stopped.json").write_text(json.dumps(stopped))
    assert report.updated(once, report.overview(tmp_path)) == once, "no time of ours, no row"
    file.write_text(json.dumps({**result, "speedup": 6.0}))
    assert report.updated(once, report.overview(tmp_path)) != once
    file.write_text(json.dumps({**result, "commit": "unknown"}))
    with pytest.raises(ValueError, match="no commit"):
        report.overview(tmp_path)
    with pytest.raises(ValueError, match="marks"):
        report.updated("no marks", "")


def test_the_kernel_bench_rehearses_on_any_machine(tmp_path, capsys):
    arguments = [
        "--small",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--only",
        "rms_norm",
        "--out",
        str(tmp_path),
    ]
    assert kernels.main(arguments) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    providers = json.loads(file.read_text())["kernels"]["rms_norm"]["providers"]
    assert providers.keys() == set(PROVIDERS)
    assert (
        providers["ours"].keys() == {"graph", "forward", "backward", "both"}
        and "error" in providers["liger"]
    )
    assert (
        providers["in place"]["error"] == NOTHING
        and providers["transformers"]["both"]["noise"] >= 0
    )
    assert "the times mean nothing" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert kernels.main([]) == 1 and "measured on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_competitor_here_computes_the_same(kernel):
    """Every provider computes the same result in float32 at toy sizes.

    A wrong call of another library's operation is thus found without a GPU.
    """
    inputs = kernel.module.make_inputs(**kernel.small, dtype=torch.float32, device="cpu")
    calls = {
        name: call_of(PROVIDERS[name], kernel)
        for name in ("eager", "transformers", "ours", "in place")
    }
    wrong = {
        name: passes_module.agrees(call, kernel, inputs)
        for name, call in calls.items()
        if call != NOTHING
    }
    assert set(wrong.values()) == {None} and {"eager", "ours"} <= wrong.keys()


def test_the_rival_of_image_attention_does_not_pay_for_the_bias(tmp_path, monkeypatch):
    """Its product adds the bias; what is timed is the rest, with the bias's gradient."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == "image_attention")
    inputs = kernel.module.make_inputs(**kernel.small, dtype=torch.float32, device="cpu")
    checked = rivals.eager(kernel)
    after = as_timed("eager", kernel, checked)
    biased = {**inputs, "qkv": inputs["qkv"] + inputs["bias"]}
    found = passes_module.results_of(after, biased)
    torch.testing.assert_close(found, passes_module.results_of(checked, inputs))
    assert not torch.allclose(after(**inputs), checked(**inputs)), "the bias was added again"

    timed = []

    def recorded(*arguments, **named):
        timed.append(named.keys())
        return after(*arguments, **named)

    monkeypatch.setattr(rivals, "attention_after_bias", recorded)
    monkeypatch.setattr(kernels, "PROVIDERS", {"eager": rivals.eager})
    only = "image_attention,document_attention"
    options = f"--small --device cpu --repeats 1 --only {only} --out".split()
    assert kernels.main([*options, str(tmp_path)]) == 0 and timed


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
    wrong = {
        "ours": lambda kernel: (
            lambda x, weight, eps, residual: (x * 1.001, residual + x + 0 * weight.sum())
        )
    }
    monkeypatch.setattr(kernels, "PROVIDERS", wrong)
    arguments = [
        "--small",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--only",
        "rms_norm",
        "--out",
        str(tmp_path),
    ]
    assert kernels.main(arguments) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    row = json.loads(file.read_text())["kernels"]["rms_norm"]["providers"]["ours"]
    assert row.keys() == {"error"} and "allowed" in row["error"]


LOADER = "--pictures 24 --image-size 32 --seconds 0.1 --repeats 1 --workers 0 1 --device cpu --out"


def test_the_data_loader_is_measured_both_ways(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert dataloader.main([*LOADER.split(), str(tmp_path), "--rate", "100000"]) == 0
    (file,) = tmp_path.glob("*/dataloader.json")
    result = json.loads(file.read_text())
    assert 50_000 < result["data"]["mean_jpeg_bytes"] < 200_000, "the size of real ones"
    assert {"read", "decode and resize", "tokenise", "read prepared", "pack"} == result[
        "stages"
    ].keys()
    assert all(rate > 0 for rate in result["stages"].values())
    assert {name: [*rates] for name, rates in result["samples_per_s"].items()} == {
        "on the fly": ["0", "1"], "prepared": ["0", "1"],
    }  # fmt: skip
    assert result["speedup"]["0"] > 1
    assert "data loader, photographs" in report.overview(tmp_path)
    ways = result["samples_per_s"].items()
    assert result["workers_for_rate"] == {way: math.ceil(1e5 / rates["1"]) for way, rates in ways}
    assert "workers for 100,000 samples/s" in capsys.readouterr().out
    assert dataloader.workers_for({"on the fly": {"0": 1.0}}, 5.0) == {}
    assert "| to feed 100,000 samples/s, at the rate of 1 worker |" in sections.suites_page(
        tmp_path
    )
    assert dataloader.main(["--rate", "0"]) == 2 and "--rate: must be" in capsys.readouterr().err


def test_no_loader_time_when_the_batches_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    plain = dataloader.load_image
    from nanovlm_fast.data import samples

    made: list[int] = []

    def other(image, size):
        made.append(1)
        return plain(image, size) ^ (len(made) > 40)  # other than what was prepared

    monkeypatch.setattr(samples, "load_image", other)
    assert dataloader.main([*LOADER.split(), str(tmp_path)]) == 1
    assert "no time is reported" in capsys.readouterr().err and not list(tmp_path.glob("*/*.json"))


def test_a_rows_share_of_the_bases_time_has_an_interval_where_the_pairs_times_are_kept():
    base, slower, alike = timed(0.2), timed(0.5, times_base=2.5), timed(0.3, times_base=1.01)
    alike["base_seconds"] = [0.3 * (1 + i / 100) for i in range(9)]
    rest = dict(questions_per_s=1.0, tokens_per_s=1.0)
    rows = {
        "ours": base,
        "reference": slower,
        "packing": alike,
        "other": timed(0.7, times_base=1.3),
    }
    shares = {
        row[0]: row[2:4]
        for row in rows_module.train_step_rows(
            {"variants": {n: {**r, **rest} for n, r in rows.items()}}
        )
    }
    assert shares["ours"][0] == "the base" and shares["ours"][1].startswith("2.50x (2.")
    assert shares["reference"][0] == shares["ours"][1] and shares["reference"][1] == "1.00x"
    assert shares["other"] == ("1.30x", "1.92x")  # its base's times are not the file's
    alike["times_base"] = 1.0
    assert rows_module.over_base({"variants": rows}, "packing").same
