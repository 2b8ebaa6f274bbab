"""What torch.compile makes of a training step on an H100: bytes, launches, floors; without a GPU.

    python -m bench.compiled_step                        the whole nanovlm-222m, plain PyTorch
    python -m bench.compiled_step --layers 2 --kernels all
    python -m bench.compiled_step --variants             kernels, streams, Inductor's own options
    python -m bench.compiled_step --templates --inductor combo_kernels=True
    python -m bench.compiled_step --variants --tokens-per-batch 20736 --images-per-batch 256

PyTorch compiles for a device that is not there (`subjects/fake_h100.py`). The generated code is
then run on tensors without memory, and every launch is entered with its bytes and FLOPs. The step
is `train.py`'s, with padding, gradient norm and optimizer. Nothing is timed: floor and expected
time are predictions, and `subjects/step_time.py` says what they assume.

The whole model takes a minute on one idle core, and a variant is kept in the result file as soon as
it is done: a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.results import ROOT, facts, read, write_file
from bench.harness.step_tables import report, variants_table
from bench.subjects.fake_h100 import VISION_ATTENTION, built_library
from bench.subjects.step_process import STREAMS, Options
from bench.subjects.step_time import EPILOGUE, FLASH, H100, OURS, POINTWISE, PRODUCT, REDUCTION
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.model.attention import BACKENDS
from nanovlm_fast.model.ops import KERNELS
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range

FOLDER = "sm-90-ahead-of-time"
DEVICE = "none: compiled ahead of time for sm_90"
HERE = ROOT.parent.parent
# What one block may cost, held by a test. It may be lowered by any change.
BUDGET = ROOT.parent / "compiled_step_budget.json"
TOLERANCE = 1e-3


def result_file(options: Options, out: Path | None = None) -> Path:
    """Where a step of this preset and these layers belongs."""
    name = "compiled_step"
    if options.preset != Options.preset:
        name += f"_{options.preset}"
    if options.language_layers:
        name += f"_{options.language_layers}layers"
    if options.tokens_per_batch:
        name += f"_{options.tokens_per_batch}tokens"
    if options.images_per_batch:
        name += f"_{options.images_per_batch}images"
    return (out or ROOT) / FOLDER / f"{name}.json"


def label_of(options: Options) -> str:
    """A variant's name: its kernels, and whatever is not as in training."""
    parts = [f"kernels {options.kernels}"]
    for name in ("stream", "recompute", "attention", "vision_attention"):
        value = getattr(options, name)
        if value != getattr(Options, name):
            parts.append(f"{name.replace('_', ' ')} {value}")
    if options.templates:
        parts.append("templates")
    parts += [f"{name}={value!r}" for name, value in options.inductor.items()]
    return ", ".join(parts)


def variants_of(base: Options) -> Iterator[Options]:
    """The side by side table: kernels none and all with both streams and each alone; Inductor's.

    Inductor's options are shown on the narrow stream, whose working weights leave it the fewest
    conversions to merge. Options that change neither bytes nor launches have no row: PDL, and
    searches for tiles.
    """
    base = dataclasses.replace(base, machine_code=False)
    for stream in STREAMS:
        for kernels in ("none", "all"):
            yield dataclasses.replace(base, kernels=kernels, stream=stream)
    for kernels in KERNELS:
        yield dataclasses.replace(base, kernels=kernels)
    for kernels in ("none", "all"):
        narrow = dataclasses.replace(base, kernels=kernels, stream="bfloat16")
        yield dataclasses.replace(narrow, inductor={"combo_kernels": True})
        yield dataclasses.replace(narrow, templates=True)


def run(*steps: Options) -> list[dict[str, Any]]:
    """Measure steps in a process of their own, which they share; all but the layers should agree.

    What Inductor and Triton write goes to a temporary folder: caches of real runs stay clean.
    Raises ValueError with the line that the process fails with.
    """
    with tempfile.TemporaryDirectory(prefix="compiled_step-") as folder:
        place = Path(folder)
        asked = place / "options.json"
        answer = place / "result.json"
        asked.write_text(json.dumps([dataclasses.asdict(options) for options in steps]))
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "TRITON_CACHE_DIR": str(place / "triton"),
            "OMP_NUM_THREADS": "1",
        }
        env.pop("TRITON_INTERPRET", None)  # the tests set it, and no kernel compiles under it
        command = [sys.executable, "-m", "bench.subjects.step_process", str(asked), str(answer)]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["killed: no memory was left"]
            raise ValueError(f"{label_of(steps[0])}: {lines[-1].removeprefix('error: ')}")
        return json.loads(answer.read_text())


def parse_inductor(settings: list[str]) -> dict[str, Any]:
    """{'name': value} of 'name=value' settings; values are Python literals.

    Raises ValueError for what is none, and for a name that Inductor does not have.
    """
    import torch._inductor.config as inductor

    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--inductor {setting}: expected NAME=VALUE")
        holder: Any = inductor
        for part in name.split("."):
            if not hasattr(holder, part):
                raise ValueError(f"--inductor {name}: torch._inductor.config has no such option")
            holder = getattr(holder, part)
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            example = "True, 3 or 'text'"
            raise ValueError(
                f"--inductor {setting}: the value is no literal ({example})"
            ) from error
    return found


# ---- the result file


def summary_of(measured: dict[str, Any]) -> dict[str, Any]:
    """What the file keeps of a variant; the dearest kernels are kept where they were compiled."""
    kept = {k: v for k, v in measured.items() if k not in ("budget", "work", "layers")}
    if "machine_code" not in measured:
        kept.pop("dearest", None)
    return rounded(kept)


def rounded(value: Any) -> Any:
    """Six digits of every number: more would be noise in a file that people compare."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def kept_variants(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Variants that an earlier run has measured on this commit and this PyTorch.

    Empty where either tree had changes: a commit does not tell what was compiled then. `about` is
    the `facts` of this run.
    """
    if not file.exists():
        return {}
    before = read(file)
    same = all(before.get(name) == about[name] for name in ("commit", "torch"))
    clean = bool(before.get("clean") and about["clean"])
    return before.get("variants", {}) if same and clean else {}


def refuse_to_drop(file: Path, kept: set[str]) -> None:
    """Raise ValueError if a file with only the variants `kept` would lose others by it."""
    there = read(file).get("variants", {}) if file.exists() else {}
    if lost := there.keys() - kept:
        raise ValueError(
            f"{file} would lose {len(lost)} of its variants, which are of another tree: "
            "measure all of them with --variants, or take another folder with --out"
        )


def written(
    file: Path,
    about: dict[str, Any],
    variants: dict[str, Any],
    measured: dict[str, Any],
    small: bool,
) -> dict[str, Any]:
    """Write the result file with these variants, `measured` the last; return its content."""
    import triton

    options = measured["options"]
    result = {
        "suite": "compiled_step",
        **about,
        "device": DEVICE,
        "triton": triton.__version__,
        "preset": options["preset"],
        "layers": measured["layers"],
        "small": small,
        "budget": measured["budget"],
        "work": measured["work"],
        "rates": {
            "floor": {"bytes_per_s": H100.bandwidth, "flops_per_s": H100.flops},
            "predicted": {
                "pointwise": POINTWISE,
                "reduction": REDUCTION,
                "product": PRODUCT,
                "epilogue": EPILOGUE,
                "flash": FLASH,
                "our_attention": OURS,
            },
        },
        "variants": variants,
    }
    write_file(file, result)
    return result


# ---- what other suites take from it


@dataclass(frozen=True)
class Predicted:
    """The predicted step of a whole preset, as training takes it without kernels."""

    images: int
    tokens: int
    floor_ms: float
    forward_ms: float
    backward_ms: float
    update_ms: float
    tokens_per_s: float
    source: str

    @property
    def step_ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.update_ms


def predicted_step(preset_name: str, results: Path = ROOT) -> Predicted | None:
    """The committed prediction for a preset; None if there is none for the whole of it."""
    file = result_file(Options(preset=preset_name), results)
    if not file.exists():
        return None
    result = read(file)
    row = result["variants"].get(label_of(Options()))
    if row is None or result["small"]:
        return None
    sums = {
        direction: sum(kind["expected_ms"] for kind in kinds.values())
        for direction, kinds in row["by_kind"].items()
    }
    return Predicted(
        images=result["work"]["images"],
        tokens=result["work"]["tokens"],
        floor_ms=row["floor_ms"],
        forward_ms=sums["forward"],
        backward_ms=sums["backward"],
        update_ms=sums["update"],
        tokens_per_s=row["predicted"]["tokens_per_s"],
        source=f"bench.compiled_step, {result['commit'][:7]}",
    )


# ---- the budget of a block


def slices(base: Options) -> tuple[Options, Options, Options]:
    """One layer in each tower; one more in the vision tower; one more in the language model."""
    one = dataclasses.replace(base, vision_layers=1, language_layers=1)
    vision = dataclasses.replace(one, vision_layers=2, machine_code=False)
    language = dataclasses.replace(one, language_layers=2, machine_code=False)
    return one, vision, language


def budgeted(base: Options) -> tuple[Options, ...]:
    """The `slices` whose blocks have a budget: plain PyTorch's, and those with all that is here."""
    best = dataclasses.replace(base, kernels="all", stream="bfloat16", machine_code=False)
    return *slices(base), *slices(best)


def budgeted_costs(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`block_costs` of both halves of the `budgeted` slices."""
    best = block_costs(measured[3:])
    return block_costs(measured[:3]) | {
        f"{block}, kernels and narrow stream": costs for block, costs in best.items()
    }


def block_costs(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Launches and MB of one block in each tower, and of the rest, from the three `slices`."""
    one, vision, language = (
        {"launches": step["launches"], "mb": 1e3 * (step["read_gb"] + step["written_gb"])}
        for step in measured
    )
    costs: dict[str, dict[str, float]] = {"vision block": {}, "language block": {}, "rest": {}}
    for name in one:
        costs["vision block"][name] = round(vision[name] - one[name], 1)
        costs["language block"][name] = round(language[name] - one[name], 1)
        rest = 3 * one[name] - vision[name] - language[name]
        costs["rest"][name] = round(rest, 1)
    return costs


def changes(costs: dict[str, dict[str, float]], budget: dict[str, Any]) -> tuple[list[str], bool]:
    """What rose over the budget, a line each, and whether something fell below it."""
    risen = []
    fell = False
    for block, values in costs.items():
        for name, value in values.items():
            limit = budget.get(block, {}).get(name, float("inf"))
            if value > limit * (1 + TOLERANCE):
                risen.append(f"{block}: {value:,.1f} {name}, the budget is {limit:,.1f}")
            fell |= value < limit * (1 - TOLERANCE)
    return risen, fell


def hold_budget(may_rise: bool) -> None:
    """Measure the blocks, print them, and lower the budget file to them.

    Raises ValueError if something rose and `may_rise` is not set.
    """
    costs = budgeted_costs(run(*budgeted(Options())))
    print(json.dumps(costs, indent=2))
    if BUDGET.exists() and not may_rise:
        risen, _ = changes(costs, json.loads(BUDGET.read_text()))
        if risen:
            raise ValueError(f"{'; '.join(risen)} (--raise-budget allows it)")
    # What Inductor generates differs between versions of PyTorch.
    version = ".".join(torch.__version__.split(".")[:2])
    BUDGET.write_text(json.dumps({"torch": version, **costs}, indent=2) + "\n")
    print(f"written: {BUDGET}")


# ---- the command


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.compiled_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=Options.preset)
    parser.add_argument(
        "--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's"
    )
    parser.add_argument("--kernels", default="none", help="as of train.py: none, all, or names")
    parser.add_argument("--stream", choices=STREAMS, default="float32", help="as of train.py")
    parser.add_argument("--recompute", choices=POLICIES, default="none")
    parser.add_argument("--attention", choices=("auto", *BACKENDS), default=Options.attention)
    parser.add_argument("--vision-attention", choices=VISION_ATTENTION, default="flash")
    parser.add_argument(
        "--inductor", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    parser.add_argument(
        "--templates", action="store_true", help="products as Triton templates, with epilogues"
    )
    for name, most in (("tokens", 2**20), ("images", 2**14)):
        parser.add_argument(
            f"--{name}-per-batch",
            type=Range(int, most=most),
            default=0,
            help="as of train.py; 0: as a run of the preset has it",
        )
    parser.add_argument("--variants", action="store_true", help="the table of variants")
    parser.add_argument(
        "--budget", action="store_true", help="measure one block in each tower; lower its budget"
    )
    parser.add_argument("--raise-budget", action="store_true", help="with --budget: let it rise")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one layer in each tower")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    built_library()  # without g++ everything below would fail
    if args.budget or args.raise_budget:
        hold_budget(args.raise_budget)
        return 0
    base = base_of(args)
    file = result_file(base, args.out)
    wanted = {label_of(base): base}
    if args.variants:
        wanted |= {label: v for v in variants_of(base) if (label := label_of(v)) not in wanted}
    # Once: a commit that is made meanwhile must not part the variants of one table.
    about = facts(torch.device("cpu"))
    variants = kept_variants(file, about)
    if not args.variants and not base.language_layers:
        refuse_to_drop(file, variants.keys() | wanted.keys())
    result: dict[str, Any] = {}
    for label, options in wanted.items():
        if args.variants and label in variants:
            print(f"{label}: measured before")
            continue
        (measured,) = run(options)
        variants[label] = summary_of(measured)
        result = written(file, about, variants, measured, args.quick)
        print(report(result, label), flush=True)
    result = result or read(file)
    if len(result["variants"]) > 1:
        print(variants_table(result["variants"]))
    print(f"written: {file}")
    return 0


def base_of(args: argparse.Namespace) -> Options:
    """The options of the command line. Raises ValueError for an unknown preset or kernel."""
    preset(args.preset)  # fails now, not in a process of its own
    names = {name.strip() for name in args.kernels.split(",")}
    if unknown := sorted(names - {"none", "all", *KERNELS}):
        there = ", ".join(KERNELS)
        raise ValueError(f"--kernels {','.join(unknown)}: there are none, all, {there}")
    layers = 1 if args.quick else args.layers
    return Options(
        preset=args.preset,
        vision_layers=layers,
        language_layers=layers,
        kernels=args.kernels,
        stream=args.stream,
        recompute=args.recompute,
        attention=args.attention,
        vision_attention=args.vision_attention,
        inductor=parse_inductor(args.inductor),
        templates=args.templates,
        tokens_per_batch=args.tokens_per_batch,
        images_per_batch=args.images_per_batch,
        machine_code=True,
    )


if __name__ == "__main__":
    sys.exit(main())
