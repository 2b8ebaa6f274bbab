"""One optimizer step on the same samples: nanoVLM's padded way, ours, and ours minus one technique.

    python -m bench.train_step                                   preset tiny on easy-VQA
    python -m bench.train_step --preset nanovlm-222m             nanoVLM's model; batch 256 on a GPU
    python -m bench.train_step --preset nanovlm-222m --layers 2  two layers per tower, for a CPU

`reference` trains as nanoVLM v0.1 does (bench/subjects/variants.py), `reference_compiled` is the
same under torch.compile. `ours` is the fast path, on a GPU compiled and replayed as CUDA graphs:
the step of train.py, with the padding of its budgets and the norm of its gradients. The other
rows are ours with one technique switched off, or with recomputation. Every row is first compared
with the float32 reference in this process, and timed only if loss and gradients agree. Tokens are
real ones, image and text; padding never counts. A question is what nanoVLM calls a sample.

Rows are timed in interleaved pairs, each together with the base. What a technique is worth is the
ratio within the pair. The base is ours; on a GPU it is ours compiled but without graphs, which is
the row `graphs`. Graphs never release their memory, and there may be no room for them beside the
reference's 65 GB. The choice costs little accuracy, because at the sizes of a GPU run the launches
are hidden behind the work. An ablation in eager mode would be cheaper, but wrong: there a technique
also gets credit for what a compiler would do anyway.

A compiled row needs about a minute of compilation before its first step. `--budget-s` is therefore
spent on the references and ours first, then on rows that need no new compilation. Techniques that
need one and no longer fit are listed as not run; a second run finds the compiler's cache. When the
budget is spent, a pair is still timed three times. The result file is written after every row;
bench.report draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.processes import peak_of_process
from bench.harness.results import write
from bench.harness.tables import line
from bench.harness.timing import interleave, summary
from bench.subjects.variants import Judge, Packed, Padded, Recipe, Step, Workbench, ablation
from bench.subjects.workload import default_data, load_work
from nanovlm_fast.command import Parser, ran_out_of_memory, reports_errors
from nanovlm_fast.device import make_current, pick_device, pick_dtype
from nanovlm_fast.model.attention import VISION_BACKENDS
from nanovlm_fast.model.flops import peak_flops
from nanovlm_fast.ranges import Range

MAIN = ("reference", "reference_compiled", "ours")
WARMUP = 1  # uncounted rounds of a pair


class Failed(RuntimeError):
    """Our step differs from the reference's."""


def make_bench(args: argparse.Namespace) -> Workbench:
    device = make_current(torch.device(args.device))
    work = load_work(args.preset, args.data, args.samples, args.layers, device.type == "cuda")
    return Workbench(work, device, pick_dtype(args.dtype, device))


def make_step(bench: Workbench, name: str, recipe: Recipe) -> Step:
    if name.startswith("reference"):
        return Padded(bench, compiled=name == "reference_compiled")
    return Packed(bench, recipe)


def make_alone(args: argparse.Namespace, name: str, recipe: Recipe) -> Step:
    """The step in a process that holds nothing else."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    return make_step(make_bench(args), name, recipe)


class Comparison:
    """Prepares, compares and times the rows of a result, one after the other."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.started = time.perf_counter()
        self.bench = make_bench(args)
        self.device = self.bench.device
        self.work = self.bench.work
        self.peak_flops = peak_flops(self.device, self.bench.dtype)
        self.on_gpu = self.device.type == "cuda"
        self.ours = Recipe(
            attention=args.attention,
            vision_attention=args.vision_attention,
            kernels=args.kernels,
            compile=args.compile,
        )
        self.base = dataclasses.replace(self.ours, compile="default") if self.graphs else self.ours
        self.base_name = "graphs" if self.graphs else "ours"
        switches, unused = ablation(self.base, self.bench)
        if not self.graphs:
            why = f"--compile {args.compile}" if self.on_gpu else "there are none on a CPU"
            unused["graphs"] = why
        unknown = set(args.variants) - {*MAIN, "graphs", *switches, *unused, "all"}
        if unknown:
            known = ", ".join([*MAIN, "graphs", *switches])
            raise ValueError(f"--variants {','.join(sorted(unknown))}: there are all, {known}")
        self.switches = {name: recipe for name, recipe in switches.items() if self.wanted(name)}
        self.rows: dict[str, dict] = {}
        self.slowest_compile = 0.0
        operations = str(self.bench.forward_of(self.base)[0].ops)
        self.result: dict[str, Any] = {
            "preset": args.preset,
            "layers": args.layers,
            "data": args.data,
            "work": self.work.as_result(),
            "dtype": str(self.bench.dtype).removeprefix("torch."),
            "recipe": {**dataclasses.asdict(self.ours), "operations": operations},
            "peak_flops": self.peak_flops,
            "variants": self.rows,
            "not_applicable": unused,
            "not_run": {},
        }
        self.stages = 1 + self.graphs + self.wanted("reference_compiled") + len(self.switches)

    @property
    def graphs(self) -> bool:
        return self.ours.compile == "reduce-overhead"

    def wanted(self, name: str) -> bool:
        named = self.args.variants
        if name == "reference_compiled" and not self.on_gpu:  # compiling can take a CPU ten minutes
            return name in named
        return name in named or "all" in named or (self.args.no_ablation and name in MAIN)

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.args.budget_s - (time.perf_counter() - self.started)

    def run(self) -> dict:
        """Measure all rows. Raises Failed if our step differs from the reference's."""
        work = self.result["work"]
        print(self.result["recipe"]["operations"])
        waste = f"{work['padded_waste']:.0%} of the padded rows wasted"
        print(f"step on {work['tokens']:,} tokens, {waste}")
        print(line(tuple(COLUMNS), WIDTHS))
        self.judge = Judge(Padded(self.bench), self.bench.dtype, self.args.tolerance)
        base = self.prepare(self.base_name, self.base)
        if base is None:
            raise Failed(self.rows[self.base_name]["error"])
        self.compare("reference", self.base, base)
        if "median" not in self.rows[self.base_name]:  # the reference failed, so no pair was timed
            self.time({self.base_name: base}, time.perf_counter() + self.left() / self.stages)
        self.print_row(self.base_name)
        self.save()
        if self.wanted("reference_compiled"):
            self.stages -= 1
            self.compare("reference_compiled", self.base, base)
        elif "all" in self.args.variants:
            why = "on a CPU it is compiled when --variants names it"
            self.result["not_run"]["reference_compiled"] = why
        self.bench.padded = None  # frees memory of the device for the graphs
        if self.graphs:
            self.stages -= 1
            self.compare_graphs(base)
        for name, recipe in self.switches.items():
            self.stages -= 1
            self.compare(name, recipe, base)
        return self.result

    def compare_graphs(self, base: Step) -> None:
        """The row `ours`. Where graphs cannot be recorded it is the base, as in train.py."""
        self.compare("ours", self.ours, base)
        row = self.rows["ours"]
        if not row.get("parity", {"passed": True})["passed"]:
            raise Failed(row["error"])
        if "error" in row:
            self.rows["ours"] = {**self.rows[self.base_name], "fell_back": row["error"]}
            self.print_row("ours")
            self.save()

    def prepare(self, name: str, recipe: Recipe) -> Step | None:
        """Build the step, compare it and run it once.

        Returns None if any of that fails; the row then says why.
        """
        row: dict[str, Any] = {}
        self.rows[name] = row
        began = time.perf_counter()
        compiled = self.compiles(name, recipe)
        before = self.allocated() if self.on_gpu else 0
        if not name.startswith("reference") and recipe.fused_optimizer:
            # The shared optimizer's state may be there already, but is part of what a step needs.
            before -= self.bench.optimizer_bytes()
        try:
            step = make_step(self.bench, name, recipe)
            # CUDA graphs run plainly, are recorded, and are replayed: all three must be right.
            for _ in range(3 if recipe.compile == "reduce-overhead" else 1):
                row["parity"] = self.judge(step)
            if not row["parity"]["passed"]:
                row["error"] = (
                    "not the reference's step: {loss:.1e} in the loss, {gradient:.1e} in a "
                    "gradient, {of_allowed:.1f} times what is allowed".format(**row["parity"])
                )
                return None
            step()
            if self.on_gpu:
                weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before + weights) / 2**20
            elif not compiled:  # a compiler's own memory would be part of the peak
                peak = peak_of_process(make_alone, self.args, name, recipe)
                if peak is not None:
                    row["peak_mib"] = peak
            return step
        except Exception as error:  # a variant that cannot run is a row of the table, not its end
            row["error"] = reason(error)
            return None
        finally:
            if compiled:
                self.slowest_compile = max(self.slowest_compile, time.perf_counter() - began)

    def allocated(self) -> int:
        """Bytes of live tensors, after caches are emptied and the peak is reset."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def compiles(self, name: str, recipe: Recipe) -> bool:
        """Whether the row waits for the compiler.

        Ours without the fused optimizer or without prefetching runs the compiled code of the base.
        """
        if name.startswith("reference"):
            return name == "reference_compiled"
        shared = dataclasses.replace(recipe, fused_optimizer=True, prefetch=True) == self.base
        return recipe.compile != "none" and not (shared and name != self.base_name)

    def compare(self, name: str, recipe: Recipe, base: Step) -> None:
        """Prepare the row and time it in turn with the base.

        The time that is left is divided evenly among the stages that are left.
        """
        if name not in MAIN and self.compiles(name, recipe) and self.left() < self.slowest_compile:
            why = f"compiling it was over --budget-s {self.args.budget_s:.0f}"
            self.result["not_run"][name] = why
            return
        step = self.prepare(name, recipe)
        deadline = time.perf_counter() + self.left() / self.stages
        if step is not None:
            try:
                self.time({name: step, self.base_name: base}, deadline)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                # There was room for each, but not for both.
                self.rows[name] = {"error": reason(error)}
        self.print_row(name)
        self.save()

    def time(self, steps: dict[str, Step], deadline: float) -> None:
        """Time the steps in turn and enter the times; the base keeps those of its first pair."""
        seconds = interleave(steps, self.args.repeats, WARMUP, deadline)
        times = {name: summary(each) for name, each in seconds.items()}
        for name in steps:
            median = times[name]["median"]
            if "median" not in self.rows[name]:
                rates = self.work.rates(median, self.peak_flops)
                self.rows[name] |= {**times[name], "seconds": seconds[name], **rates}
            if name != self.base_name:
                self.rows[name]["times_base"] = median / times[self.base_name]["median"]
                self.rows[name]["base_seconds"] = seconds[self.base_name]

    def save(self) -> Path:
        """Write what there is so far; add what the report reads: our parity and speed-ups."""
        # Until the row with CUDA graphs is there, ours is the base: a run may be stopped before.
        ours = self.rows.get("ours") or self.rows.get(self.base_name, {})
        if "median" in ours:
            self.result["parity"] = ours["parity"]
            speedups = {"speedup": "reference", "speedup_over_compiled": "reference_compiled"}
            for key, name in speedups.items():
                if times := self.rows.get(name, {}).get("times_base"):
                    self.result[key] = times / ours.get("times_base", 1.0)
        return write(result_name(self.args), self.device, self.result, self.args.out)

    def print_row(self, name: str) -> None:
        row = self.rows[name]
        label = f"ours without {name}"
        if name in MAIN:
            label = name
        elif name.startswith("recompute"):
            label = f"ours, {name}"
        if "median" not in row:
            print(line((label, row.get("error", "")), WIDTHS))
            return
        quartiles = ("median", "lower_quartile", "upper_quartile")
        times = (f"{row[part] * 1e3:,.1f}" for part in quartiles)
        rates = [row[f"{what}_per_s"] for what in ("questions", "tokens", "labels", "images")]
        per_s = (f"{rate:,.{1 if rate < 100 else 0}f}" for rate in rates)
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        memory = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "-"
        share = f"{row.get('times_base', 1.0):.2f}"
        parity = f"{row['parity']['gradient']:.0e}"
        print(line((label, *times, share, *per_s, mfu, memory, parity), WIDTHS))


# Rows are printed as they are measured, so the widths of the columns are fixed.
COLUMNS = {
    "": 38,
    "step ms": 8,
    "quarter": 8,
    "3/4": 8,
    "x base": 6,
    "quest./s": 10,
    "tokens/s": 10,
    "labels/s": 10,
    "images/s": 10,
    "MFU": 6,
    "peak MiB": 9,
    "gradient": 8,
}
WIDTHS = tuple(COLUMNS.values())


def reason(error: Exception) -> str:
    """An error as a single line for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def result_name(args: argparse.Namespace) -> str:
    if args.name:
        return args.name
    preset = "" if args.preset == "tiny" else f"_{args.preset}"
    layers = f"_{args.layers}layer{'s' * (args.layers > 1)}" if args.layers else ""
    return f"train_step{preset}{layers}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's"
    )
    parser.add_argument(
        "--data",
        default="",
        help="as for train.py, cauldron_like or finevision_like; default: what suits the preset",
    )
    parser.add_argument(
        "--samples",
        type=Range(int),
        default=0,
        help="per step; 0: 256 on a GPU, 16 on a CPU, 32 of a data set",
    )
    parser.add_argument(
        "--variants", default="all", help="rows beside reference and ours, separated by commas"
    )
    parser.add_argument("--no-ablation", action="store_true", help="only the references and ours")
    parser.add_argument(
        "--compile", default="auto", choices=("auto", "none", "default", "reduce-overhead")
    )
    parser.add_argument("--kernels", default="auto", help="as train.py's; auto is none")
    parser.add_argument("--attention", default="auto", help="as train.py's")
    parser.add_argument(
        "--vision-attention",
        default="auto",
        choices=("auto", *VISION_BACKENDS),
        help="as train.py's",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--repeats", type=Range(int, least=1), default=15, help="timed rounds of a pair, at most"
    )
    parser.add_argument(
        "--budget-s",
        type=Range(float),
        default=0.0,
        help="seconds in all; 0: 240 on a GPU, 600 on a CPU",
    )
    parser.add_argument("--tolerance", type=Range(float), default=1e-4, help="relative, in float32")
    parser.add_argument(
        "--threads", type=Range(int), default=0, help="CPU threads; 0: PyTorch's choice"
    )
    parser.add_argument("--name", default="", help="of the result file; default: train_step[...]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    args.device = str(pick_device(args.device))
    on_gpu = args.device.startswith("cuda")
    args.variants = () if args.no_ablation else tuple(args.variants.split(","))
    args.budget_s = args.budget_s or (240.0 if on_gpu else 600.0)
    args.data = args.data or default_data(args.preset)
    if args.compile == "auto":
        args.compile = "reduce-overhead" if on_gpu else "none"
    if args.compile == "reduce-overhead" and not on_gpu:
        raise ValueError("--compile reduce-overhead replays CUDA graphs and needs a GPU")
    return args


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    comparison = Comparison(args)
    try:
        result = comparison.run()
    except Failed as error:
        raise ValueError(f"ours gets no time: {error}") from error
    for name, why in {**result["not_applicable"], **result["not_run"]}.items():
        print(f"{name}: {'not run' if name in result['not_run'] else 'not applicable'}, {why}")
    rivals = {"speedup": "the padded reference", "speedup_over_compiled": "it under torch.compile"}
    for key, rival in rivals.items():
        if key in result:
            print(f"ours answers {result[key]:.1f} times as many questions/s as {rival}")
    file = comparison.save()
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
