"""What the assembler makes of every kernel.

What a training step launches is compiled ahead of time for sm_90, by each Triton that users have.
"""

from __future__ import annotations

import json
import re

import pytest
from packaging.specifiers import SpecifierSet

from bench.codegen import SHARED, WARPS_PER_SM, narrow_offsets, occupancy, training_launches
from bench.subjects.operators import ALL
from nanovlm_fast.model.capability import SHARED_KB
from tests.support import tritons
from tests.support.processes import ROOT, run_python

# Two of their programs share a multiprocessor, so that one multiplies while the other does not.
IN_PAIRS = ("_gelu_mlp_bwd_kernel", "_swiglu_mlp_bwd_kernel")
FILES = sorted((ROOT / "kernels").glob("*.py"))


# Works on eight numbers per weight, which lie wherever the optimizer's state does.
SCALARS = "_adamw_scalars_kernel"


def problems(row: dict) -> list[str]:
    """What the design forbids or asks for."""
    found = {
        "spills": row["stack"] or row["local"],
        "local memory in the code": row["local_instructions"],
        "too much shared memory": row["shared"] > SHARED,
        "32-bit offsets into a matrix": row["narrow_offsets"],
        "no 128-bit load": not row["wide_loads"] and row["kernel"] != SCALARS,
        # One store alone is a number per row: the loss, where no gradient is asked for.
        "no 128-bit store": not row["wide_stores"]
        and row["stores"] > 1
        and not row["matrix"]
        and row["kernel"] != SCALARS,
        "no wgmma": row["matrix"] and not row["wgmma"],
        "alone on a multiprocessor": row["kernel"] in IN_PAIRS
        and row["occupancy"] < 2 * row["warps"] / WARPS_PER_SM,
    }
    return [what for what, wrong in found.items() if wrong]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", tritons.VERSIONS)
def test_every_kernel_of_a_training_step_is_what_it_should_be(version):
    path = tritons.python_path(version)
    result = run_python("-m", "bench.codegen", "--json", PYTHONPATH=path)
    rows = json.loads(result.stdout.splitlines()[-1]) if result.stdout else []
    wrong = {row["kernel"]: row["error"] for row in rows if "error" in row}
    assert result.returncode == 0, wrong or result.stderr
    assert not {row["kernel"]: problems(row) for row in rows if problems(row)}
    assert {row["op"] for row in rows} == {kernel.name for kernel in ALL}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_projection_of_512_pixel_tiles_is_what_it_should_be():
    """A shuffle by 4 into 960 channels, and into 576: 12,288 columns of the weight."""
    for preset, channels in (("nanovlm-460m", 960), ("nanovlm-230m", 576)):
        launches = training_launches("bfloat16", preset)
        ours = [la for la in launches if la["op"] == "pixel_shuffle_proj"]
        assert {la["constants"]["S"] for la in ours} == {4}
        assert {la["constants"]["N"] for la in ours} == {channels}
    check_in_460m("pixel_shuffle_proj", kernels=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_vocabulary_that_is_no_multiple_of_8_is_read_in_128_bits():
    """49,218 entries: the tokenizer's and 66 for images. Rows are padded in memory."""
    check_in_460m("linear_cross_entropy", kernels=2)


def check_in_460m(op: str, kernels: int) -> None:
    """Every kernel of an operation, compiled at the sizes of nanovlm-460m."""
    options = ["--json", "--only", op, "--preset", "nanovlm-460m"]
    result = run_python("-m", "bench.codegen", *options)
    rows = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 0 and len({row["kernel"] for row in rows}) == kernels, result.stderr
    assert not {row["kernel"]: problems(row) for row in rows if problems(row)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_gpu_before_sm90_takes_is_what_the_capabilities_say():
    """In float16; and a T4 is told that it has no such kernel, without compiling it."""
    options = ["--json", "--only", "image_attention", "--dtype", "float16", "--target"]
    result = run_python("-m", "bench.codegen", *options, "sm_80")
    rows = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 0 and len(rows) == 2, result.stderr
    assert all(row["mma"] and not row["local"] for row in rows)
    assert max(row["shared"] for row in rows) == SHARED_KB["image_attention"] * 1024
    result = run_python("-m", "bench.codegen", *options[1:], "sm_75")
    assert result.stdout.count("not on sm_75: Triton multiplies on tensor cores from") == 2


@pytest.mark.slow
def test_what_is_compiled_is_what_training_launches():
    """Every kernel of the folder, and the cases that a list by hand had wrong."""
    launches = training_launches("bfloat16")
    kernels = {launch["kernel"] for launch in launches}
    jitted = r"^@triton\.jit.*\n(?:def (\w+_kernel)\()"
    written = [re.findall(jitted, file.read_text(), re.MULTILINE) for file in FILES]
    assert kernels == {name for names in written for name in names}
    # The table of embeddings is float32, the image tokens are what autocast made of them.
    splices = [la["signature"] for la in launches if la["kernel"] == "_embed_splice_fwd_kernel"]
    assert {(la["table_ptr"], la["image_ptr"]) for la in splices} == {("*fp32", "*bf16")}
    for norm in ("rms_norm", "layer_norm"):
        cases = {
            (launch["signature"]["x_ptr"], launch["constants"]["HAS_RESIDUAL"])
            for launch in launches
            if launch["kernel"] == f"_{norm}_fwd_kernel"
        }
        # The first block has no residual and reads the stream, which is float32 or bfloat16.
        assert cases == {("*fp32", False), ("*bf16", False), ("*bf16", True)}
    updates = {
        tuple(launch["constants"][name] for name in ("NARROW", "HAS_WORKING", "HAS_FACTOR"))
        for launch in launches
        if launch["kernel"] == "_adamw_kernel"
    }
    assert updates == {(n, n, clipped) for n in (False, True) for clipped in (False, True)}
    # An argument that Triton should not specialise on is declared as it declares it.
    loss = next(la for la in launches if la["kernel"] == "_linear_cross_entropy_fwd_kernel")
    assert loss["aligned"] == ["logits_ptr"]


def test_each_supported_pytorch_has_its_triton():
    project = (ROOT / "pyproject.toml").read_text()
    torch_range, triton_range = (
        SpecifierSet(found.group(1))
        for name in ("torch", "triton")
        if (found := re.search(rf'"{name}([<>=][^";]*)', project))
    )
    supported = {f"2.{minor}" for minor in range(100) if f"2.{minor}.0" in torch_range}
    assert supported == set(tritons.PAIRED)
    assert all(version in triton_range for version in tritons.VERSIONS)


def test_a_triton_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tritons.VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"python -m tests\.support\.tritons"):
        tritons.python_path("0.0.1")
    # As in CI, where a version that is not tested must not pass.
    monkeypatch.setenv(tritons.VARIABLE, str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"no Triton 0\.0\.1"):
        tritons.python_path("0.0.1")


def test_without_a_network_the_installer_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(tritons.VARIABLE, str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"^pip could not install triton==0\.0\.1 into .*: .*$"):
        tritons.install("0.0.1")


def test_a_kernel_file_has_its_tests_its_line_and_its_parts():
    assert [kernel.name for kernel in ALL] == list(dict.fromkeys(kernel.name for kernel in ALL))
    assert sorted(kernel.name for kernel in ALL) == [file.stem for file in FILES]
    for kernel in ALL:
        assert (ROOT / "tests" / "kernels" / f"test_{kernel.name}.py").exists(), kernel.name
        for part in (kernel.name, f"{kernel.name}_reference", "make_inputs", "cost"):
            assert callable(getattr(kernel.module, part)), f"{kernel.name}: {part}"


BAD = """
import json
import triton, triton.language as tl
from bench.codegen import compile_launch

@triton.jit
def hoarder(x_ptr, y_ptr, M, N: tl.constexpr, ROWS: tl.constexpr):
    # far more live values than registers, narrow offsets, a stride that no wide load can follow
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
    offsets = (rows[:, None] * N + columns[None, :]) * 3
    x = tl.load(x_ptr + offsets)
    y = tl.load(x_ptr + offsets + 1)
    tl.store(y_ptr + offsets, x * tl.sum(y) + y * tl.sum(x))

types = dict(x_ptr="*bf16", y_ptr="*bf16", M="i32", N="constexpr", ROWS="constexpr")
launch = dict(signature=types, constants=dict(N=256, ROWS=32), aligned=["x_ptr", "y_ptr", "M"])
print(json.dumps(compile_launch(hoarder, launch | {"num_warps": 1}) | {"matrix": False}))
"""


def test_a_kernel_made_bad_on_purpose_is_caught(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    result = run_python(str(tmp_path / "bad.py"), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    found = problems(json.loads(result.stdout))
    assert {
        "spills",
        "local memory in the code",
        "32-bit offsets into a matrix",
        "no 128-bit load",
    } <= set(found)


def test_the_arithmetic_of_occupancy():
    assert occupancy(registers=32, warps=4, shared=0) == 1.0
    assert occupancy(registers=64, warps=8, shared=0) == 0.5
    assert occupancy(registers=255, warps=4, shared=0) == 0.125
    assert occupancy(registers=40, warps=4, shared=100 * 1024) == 2 * 4 / 64


def test_offsets_are_read_from_the_ir():
    line = "%7 = tt.addptr %5, %6 : tensor<4x1024x!tt.ptr<bf16>>, tensor<4x1024x{}> loc(#loc1)"
    assert (
        narrow_offsets(line.format("i32")) == ["4x1024"]
        and narrow_offsets(line.format("i64")) == []
    )
