"""The GPU tests as a result file, the profile and the device's facts.

gpu_all.sh writes these in addition to the results of the older suites.
"""

from __future__ import annotations

import json

import pytest
import torch

from bench import checks, device_facts, kernels, profile_step
from bench.checks import check_rows, red_kernels
from bench.harness.results import write
from bench.profile_step import kernel_kind, profile_rows
from bench.subjects.step_time import H100

TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_right():
    pass

def test_wrong():
    assert 1 == 2, "far | from it"

@pytest.mark.skipif(True, reason="needs a device")
def test_skipped():
    pass
"""


@pytest.fixture
def checked(tmp_path):
    """`bench.checks` over test files that are written for it; returns its exit code and result."""

    def call(limit: float = 60.0, **files: str) -> tuple[int, dict]:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        options = [
            "--rootdir",
            str(tmp_path),
            "-c",
            "/dev/null",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
        ]
        places = [str(tmp_path / f"{name}.py") for name in files]
        out = ["--device", "cpu", "--out", str(tmp_path / "out"), "--limit", str(limit)]
        code = checks.main([*out, "--", *options, *places])
        (file,) = (tmp_path / "out").glob("*/tests.json")
        return code, json.loads(file.read_text())

    return call


def test_what_failed_is_counted_and_makes_its_kernel_red(checked, tmp_path):
    code, result = checked(test_rms_norm=TESTS, test_swiglu="import no_such_module")
    assert code == 1 and (result["passed"], result["failed"], result["skipped"]) == (1, 2, 1)
    assert result["red"] == ["rms_norm", "swiglu"], (
        "one with a wrong test, one that could not even be read"
    )
    assert any("far | from it" in failure["message"] for failure in result["failures"])
    assert red_kernels(torch.device("cpu"), tmp_path / "out") == {"rms_norm", "swiglu"}
    assert len(check_rows(result)) == 4


@pytest.mark.slow
def test_tests_that_hang_are_stopped_and_what_was_known_is_written(checked):
    hangs = TESTS.replace("assert 1 == 2", "import time; time.sleep(60); assert 1 == 2")
    code, result = checked(limit=15.0, test_rms_norm=hangs)
    assert code == 1 and result["passed"] == 1 and result["exit_code"] == 2


def test_a_red_kernel_gets_no_time_and_its_rivals_do(tmp_path, monkeypatch):
    monkeypatch.setattr(
        kernels, "PROVIDERS", {name: kernels.PROVIDERS[name] for name in ("eager", "ours")}
    )
    write("tests", torch.device("cpu"), {"red": ["rms_norm"]}, tmp_path)
    options = [
        "--small",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--only",
        "rms_norm,swiglu",
        "--out",
        str(tmp_path),
    ]
    assert kernels.main(options) == 0
    (file,) = tmp_path.glob("*/kernels.json")
    found = {
        name: kernel["providers"]
        for name, kernel in json.loads(file.read_text())["kernels"].items()
    }
    assert (
        found["rms_norm"]["ours"] == {"error": kernels.RED} and "both" in found["rms_norm"]["eager"]
    )
    assert "both" in found["swiglu"]["ours"]
    write("tests", torch.device("cpu"), {"red": ["rms_norm"], "commit": "another"}, tmp_path)
    assert red_kernels(torch.device("cpu"), tmp_path) == set(), (
        "of a commit that may have been wrong where this is not"
    )


def test_the_profile_of_a_step(tmp_path, capsys):
    options = [
        "--data",
        "synthetic",
        "--samples",
        "2",
        "--repeats",
        "1",
        "--steps",
        "1",
        "--trace",
        "--device",
        "cpu",
    ]
    for more, name in (([], "profile"), (["--reference"], "profile_reference")):
        assert profile_step.main([*options, *more, "--out", str(tmp_path)]) == 0
        (file,) = tmp_path.glob(f"*/{name}.json")
        result = json.loads(file.read_text())
        assert {"product", "attention"} <= result["by_kind"].keys()
        assert sum(result["by_kind"].values()) == pytest.approx(result["busy_seconds"])
        assert result["kernels"] == sorted(result["kernels"], key=lambda row: -row["seconds"])
        assert (
            len(profile_rows(result)) > 10
            and (tmp_path / "logs" / f"{name}_trace.json.gz").stat().st_size > 1000
        )
    assert profile_step.main(["--steps", "0", "--device", "cpu"]) == 2
    assert "--steps: must be" in capsys.readouterr().err


def test_kernels_of_a_gpu_fall_into_kinds():
    kinds = {
        "triton_red_fused__scaled_dot_product_flash_attention_backward_mm_3": "compiled",
        "_linear_cross_entropy_fwd_kernel": "ours",
        "_rms_norm_bwd_kernel_0": "ours",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "product",
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90>>"
        ): "attention",
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel"
            "<FusedAdamMathFunctor>"
        ): "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copy",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel": "other",
    }
    assert {name: kernel_kind(name) for name in kinds} == kinds


def test_the_devices_facts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        device_facts, "measured_rates", lambda device, repeats: H100
    )  # bench.roofline's, tested there
    assert device_facts.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/facts.json")
    result = json.loads(file.read_text())
    assert result["copy_bytes_per_s"] > 1e8 and result["product_flops_per_s"] > 1e8
    assert all(rate > 0 for rate in result["products"].values()) and result["packages"]["numpy"]
    assert len(device_facts.facts_rows(result)) == 5 + len(device_facts.PRODUCTS)
    assert "GB/s" in capsys.readouterr().out
