"""What the assembler makes of every kernel.

The kernels are compiled ahead of time for sm_90 at the seed's sizes.
"""

from __future__ import annotations

import json

import pytest

from bench.codegen import SHARED, narrow_offsets, occupancy
from bench.subjects.operators import KERNELS
from tests.support.processes import ROOT, run_python

FILES = sorted(file.stem for file in (ROOT / "kernels").glob("*.py"))


def problems(row: dict) -> list[str]:
    """What the design forbids or asks for."""
    found = {
        "spills": row["stack"] or row["local"],
        "local memory in the code": row["local_instructions"],
        "too much shared memory": row["shared"] > SHARED,
        "32-bit offsets into a matrix": row["narrow_offsets"],
        "no 128-bit load": not row["wide_loads"],
        "no 128-bit store": not row["wide_stores"] and not row["matrix"],
        "no wgmma": row["matrix"] and not row["wgmma"],
    }
    return [what for what, wrong in found.items() if wrong]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    result = run_python("-m", "bench.codegen", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_what_it_should_be(rows):
    wrong = {row["kernel"]: problems(row) for row in rows if problems(row)}
    assert not wrong
    assert {row["op"] for row in rows} == {kernel.name for kernel in KERNELS}


def test_a_kernel_file_has_its_tests_its_line_and_its_parts():
    assert [kernel.name for kernel in KERNELS] == list(
        dict.fromkeys(kernel.name for kernel in KERNELS)
    )
    assert sorted(kernel.name for kernel in KERNELS) == FILES
    for kernel in KERNELS:
        assert (ROOT / "tests" / "kernels" / f"test_{kernel.name}.py").exists(), kernel.name
        for part in (kernel.name, f"{kernel.name}_reference", "make_inputs", "cost", "aot"):
            assert callable(getattr(kernel.module, part)), f"{kernel.name}: {part}"


BAD = """
import json
import triton, triton.language as tl
from bench.codegen import compile_for_sm90

@triton.jit
def hoarder(x_ptr, y_ptr, M, N: tl.constexpr, ROWS: tl.constexpr):
    # far more live values than registers, narrow offsets, a stride that no wide load can follow
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
    offsets = (rows[:, None] * N + columns[None, :]) * 3
    x = tl.load(x_ptr + offsets)
    y = tl.load(x_ptr + offsets + 1)
    tl.store(y_ptr + offsets, x * tl.sum(y) + y * tl.sum(x))

spec = dict(kernel=hoarder, signature=dict(x_ptr="*bf16", y_ptr="*bf16", M="i32"),
            launch=dict(ROWS=32, num_warps=1), constexprs=dict(N=256))
print(json.dumps(compile_for_sm90(spec) | {"matrix": False}))
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
