"""Compiles every kernel ahead of time for sm_90, on any machine, and reads the assembler's output.

python -m bench.codegen                    a table
python -m bench.codegen --json             the same as JSON
python -m bench.codegen --only swiglu      selected kernels
python -m bench.codegen --write            the table, and the result file that kernels/README.md
                                           is written from
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness.results import ROOT, facts, write_file
from bench.subjects.operators import named
from nanovlm_fast.command import Parser, reports_errors

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Limits of one multiprocessor of sm_90.
REGISTERS = 65536
WARPS = 64
BLOCKS = 32
SHARED = 227 * 1024


def compile_for_sm90(spec: dict) -> dict:
    """Compile one entry of a kernel's `aot()`: {kernel, signature, launch, constexprs}.

    `launch` holds the constexprs and num_warps / num_stages of the launch. Pointers and integers
    are declared divisible by 16, which is what Triton finds at nanoVLM's sizes. Returns registers,
    spilled and local bytes, shared memory, instruction counts and theoretical occupancy.
    """
    kernel = spec["kernel"]
    launch = dict(spec["launch"])
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages") if name in launch}
    constexprs = launch | spec["constexprs"]
    signature = {name: spec["signature"].get(name, "constexpr") for name in kernel.arg_names}
    untyped = [name for name, kind in signature.items() if kind == "constexpr"]
    if missing := [name for name in untyped if name not in constexprs]:
        raise ValueError(f"{kernel.__name__}: no type and no value for {', '.join(missing)}")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind[0] in "*i"
    }
    source = ASTSource(kernel, signature, constexprs, divisible)
    compiled = triton.compile(source, target=TARGET, options=options)
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
    by_shared = SHARED // (shared + 1024) if shared else BLOCKS
    return min(by_registers, by_shared, BLOCKS, WARPS // warps) * warps / WARPS


def table(rows: list[dict]) -> str:
    columns = (
        f"{'kernel':36} {'regs':>4} {'stack':>5} {'shared':>8} {'warps':>5} {'stages':>6} "
        f"{'occ.':>5} {'128-bit':>9} {'wgmma':>5}"
    )
    lines = [columns]
    for row in rows:
        wide = f"{row['wide_loads']}/{row['loads']} {row['wide_stores']}/{row['stores']}"
        lines.append(
            f"{row['kernel']:36} {row['registers']:>4} {row['stack']:>5} {row['shared']:>8,} "
            f"{row['warps']:>5} {row['stages']:>6} {row['occupancy']:>5.0%} {wide:>9} "
            f"{row['wgmma']:>5}"
        )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="kernels, separated by commas")
    parser.add_argument("--write", action="store_true", help="also write the result file")
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="folder of results (default: bench/results)"
    )
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    rows = [
        {"op": kernel.name, "matrix": kernel.matrix, **compile_for_sm90(spec)}
        for kernel in named(args.only)
        for spec in kernel.module.aot()
    ]
    print(json.dumps(rows) if args.json else table(rows))
    if args.write:
        device = {"device": "none: compiled ahead of time for sm_90", "triton": triton.__version__}
        result = {"suite": "codegen", **facts(torch.device("cpu")), **device, "kernels": rows}
        print(f"written: {write_file(args.out / 'sm-90-ahead-of-time' / 'codegen.json', result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
