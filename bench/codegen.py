"""Compiles every kernel ahead of time for sm_90, on any machine, and reads the assembler's output.

python -m bench.codegen                    a table
python -m bench.codegen --json             the same as JSON
python -m bench.codegen --only swiglu      selected kernels
python -m bench.codegen --target sm_80     another GPU; sm_75 has no bf16, and needs --dtype float16
python -m bench.codegen --target sm_75 --dtype float16 --unfit    also what cannot run there
python -m bench.codegen --preset nanovlm-460m    at the sizes of another model
python -m bench.codegen --write            the table, and the result file that kernels/README.md
                                           is written from

What is compiled is what a training step of the preset launches (`subjects/kernel_launches.py`).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness.results import ROOT, facts, write_file
from bench.subjects.kernel_launches import DTYPES, PRESET
from bench.subjects.operators import ALL, named
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.model.capability import unfit_for
from nanovlm_fast.model.ops import KERNELS
from nanovlm_fast.presets import preset

TARGETS = ("sm_90", "sm_89", "sm_80", "sm_75")
PROJECT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Limits of one multiprocessor of sm_90.
REGISTERS = 65536
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
SHARED = 227 * 1024


def compile_launch(kernel: Any, launch: dict[str, Any], target: str = "sm_90") -> dict[str, Any]:
    """Compile one launch as `kernel_launches` describes it.

    Returns registers, spilled and local bytes, shared memory, instruction counts and theoretical
    occupancy (by the limits of sm_90).
    """
    positions = {name: (kernel.arg_names.index(name),) for name in launch["aligned"]}
    divisible = {at: [["tt.divisibility", 16]] for at in positions.values()}
    source = ASTSource(kernel, launch["signature"], launch["constants"], divisible)
    options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=gpu, options=options)
    sass = disassemble(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    shared = compiled.metadata.shared
    usage = resources(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "warps": warps,
        "stages": compiled.metadata.num_stages,
        "shared": shared,
        **usage,
        "occupancy": occupancy(usage["registers"], warps, shared),
        # Local loads and stores are spills, or arrays whose indices the assembler does not know.
        "local_instructions": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        # 128-bit loads, those that copy to shared memory, and loads by the TMA unit.
        "wide_loads": len(
            re.findall(r"\bLDG(?:\.\w+)*\.128\b|\bLDGSTS(?:\.\w+)*\.128\b|\bUTMALDG", sass)
        ),
        "loads": len(re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG(?:\.\w+)*\.128\b|\bUTMASTG", sass)),
        "stores": len(re.findall(r"\b(?:STG|UTMASTG)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\bHMMA\b", sass)),  # tensor cores before sm_90
        "narrow_offsets": len(narrow_offsets(compiled.asm["ttir"])),
    }


def narrow_offsets(ttir: str) -> list[str]:
    """Tiles of pointers that are moved by 32-bit offsets.

    Such offsets overflow in tensors of 2^31 elements and more.
    """
    pointers = r"tt\.addptr [^:]*: tensor<((?:\d+x)+\d+)x!tt\.ptr<\w+>>"
    moves = re.findall(pointers + r", tensor<(?:\d+x)+\d+x(i\d+)>", ttir)
    return [shape for shape, kind in moves if kind != "i64"]


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    return _tool("nvdisasm", "-c", cubin=cubin)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory per thread (spills live there)."""
    text = _tool("cuobjdump", "-res-usage", cubin=cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def occupancy(registers: int, warps: int, shared: int) -> float:
    """Share of the 64 warps of a multiprocessor that fit at once.

    Registers are allocated in units of 8 per thread (256 per warp); a block takes 1 KB of shared
    memory more than it declares.
    """
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps
    by_shared = SHARED // (shared + 1024) if shared else BLOCKS_PER_SM
    return min(by_registers, by_shared, BLOCKS_PER_SM, WARPS_PER_SM // warps) * warps / WARPS_PER_SM


def training_launches(dtype: str, preset_name: str = PRESET) -> list[dict[str, Any]]:
    """What `kernel_launches` finds. Raises RuntimeError, with its last line, if it fails."""
    options = ["--dtype", dtype, "--preset", preset_name]
    command = [sys.executable, "-m", "bench.subjects.kernel_launches", *options]
    # Not in Triton's interpreter, which has no launches to look at.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the kernels of a training step could not be recorded: {lines[-1]}")
    return json.loads(done.stdout)


def compiled_rows(
    only: str, dtype: str, target: str, preset_name: str = PRESET, unfit: bool = False
) -> list[dict[str, Any]]:
    """One row per launch of the kernels of an --only option, an `error` where one does not compile.

    Next to the assembler's output a row holds the launch: types, constants and alignment. A kernel
    that the target cannot run is `unavailable`, and compiled only with `unfit`.
    """
    number = int(target.removeprefix("sm_"))
    left_out = unfit_for(KERNELS, (number // 10, number % 10))
    kernels = {kernel.name: kernel for kernel in named(only, ALL)}
    rows = []
    for launch in training_launches(dtype, preset_name):
        if launch["op"] not in kernels:
            continue
        module = importlib.import_module(f"nanovlm_fast.kernels.{launch['op']}")
        row = {**launch, "matrix": kernels[launch["op"]].matrix, "target": target}
        if launch["op"] in left_out:
            row["unavailable"] = left_out[launch["op"]]
        try:
            if unfit or "unavailable" not in row:
                row |= compile_launch(getattr(module, launch["kernel"]), launch, target)
        except Exception as error:  # the others are still worth seeing
            lines = str(error).strip().splitlines() or [""]
            row["error"] = f"{type(error).__name__}: {lines[0]}"
        rows.append(row)
    order = list(kernels)
    return sorted(rows, key=lambda row: order.index(row["op"]))


def case_of(row: dict[str, Any]) -> str:
    """What tells the cases of one kernel apart: types of pointers, and the switches that are on."""
    types = [kind[1:] for kind in row["signature"].values() if kind.startswith("*")]
    switches = [name for name, value in row["constants"].items() if value is True]
    return " ".join([",".join(dict.fromkeys(types)), *switches])


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        f"{'kernel':36} {'regs':>4} {'stack':>5} {'shared':>8} {'warps':>5} {'stages':>6} "
        f"{'occ.':>5} {'128-bit':>9} {'wgmma':>5}  case"
    )
    lines = [columns]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['kernel']:36} {row['error']}  {case_of(row)}")
            continue
        if "registers" not in row:
            lines.append(f"{row['kernel']:36} not on {row['target']}: {row['unavailable']}")
            continue
        wide = f"{row['wide_loads']}/{row['loads']} {row['wide_stores']}/{row['stores']}"
        lines.append(
            f"{row['kernel']:36} {row['registers']:>4} {row['stack']:>5} {row['shared']:>8,} "
            f"{row['warps']:>5} {row['stages']:>6} {row['occupancy']:>5.0%} {wide:>9} "
            f"{row['wgmma']:>5}  {case_of(row)}"
        )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kernels, separated by commas")
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0])
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type under autocast")
    parser.add_argument("--unfit", action="store_true", help="compile what cannot run there too")
    parser.add_argument("--preset", default=PRESET, help="whose sizes are compiled")
    parser.add_argument("--write", action="store_true", help="also write the result file")
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="folder of results (default: bench/results)"
    )
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    preset(args.preset)  # raises for an unknown one
    rows = compiled_rows(args.only, args.dtype, args.target, args.preset, args.unfit)
    print(json.dumps(rows) if args.json else table(rows))
    if args.write:
        device = {"device": f"none: compiled ahead of time for {args.target}"}
        versions = {"triton": triton.__version__, "dtype": args.dtype}
        result = {"suite": "codegen", **facts(torch.device("cpu")), **device, **versions}
        folder = f"{args.target.replace('_', '-')}-ahead-of-time"
        name = "codegen" if args.preset == PRESET else f"codegen_{args.preset}"
        written = write_file(args.out / folder / f"{name}.json", result | {"kernels": rows})
        print(f"written: {written}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
