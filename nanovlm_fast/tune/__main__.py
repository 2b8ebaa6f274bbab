"""Measures what computes fastest on this device, before any run needs it.

    python -m nanovlm_fast.tune                           preset tiny, on whatever is here
    python -m nanovlm_fast.tune --preset nanovlm-222m     with any option of train.py
    python -m nanovlm_fast.tune --report                  what was measured, for an issue

On a GPU it times kernels, attention backends, the compiler's options and CUDA graphs; on a CPU
threads, how they wait, loader workers and compiling. `train.py --tune auto` takes what was found.
"""

from __future__ import annotations

import dataclasses
import sys

from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import Parser, UsageError, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import LABEL_MULTIPLE, measure_budget
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import is_local, load_source, make_tokenizer
from nanovlm_fast.device import pick_device, pick_dtype
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import COUNTS
from nanovlm_fast.ranges import Range
from nanovlm_fast.ranks import World
from nanovlm_fast.tune import cache
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.report import for_an_issue, summary
from nanovlm_fast.tune.settle import Place, measure_now

SECONDS = {"cuda": 480.0, "cpu": 110.0}


def expected_budget(model: VLMConfig, config: TrainConfig) -> Budget:
    """The sizes of a run's batches without its data, which may be hundreds of gigabytes.

    They follow from the recipe's counts. Raises ValueError if these are not known.
    """
    known = COUNTS.get((config.data, config.turns))
    if known is None or not config.max_seqlen:
        raise ValueError(
            f"--data {config.data} is not on this machine, and its sizes are not known: "
            "train.py measures once it has the data"
        )
    _, images, tokens, labels = known
    examples = config.tokens_per_batch / tokens
    multiple = LABEL_MULTIPLE["cuda"]
    return Budget(
        tokens=config.tokens_per_batch,
        documents=config.documents_per_batch or round(1.1 * examples) + 1,
        images=config.images_per_batch or round(examples * images),
        labels=config.labels_per_batch
        or -(-round(1.05 * examples * labels) // multiple) * multiple,
        max_seqlen=config.max_seqlen,
    )


def budget_of(model: VLMConfig, config: TrainConfig) -> Budget:
    """The sizes that a run would measure on its data; see `expected_budget`."""
    if not is_local(config.data):
        return expected_budget(model, config)
    source = load_source(config.data, "train")
    text = make_text(make_tokenizer(model, source), model, config.turns)
    return measure_budget(SampleLoader(source, model, config, text), config)


def run_of(argv: list[str]) -> tuple[VLMConfig, TrainConfig]:
    """Model and run that options of train.py describe.

    A preset's own towers are not looked up: it has their sizes, and no weights are needed here.
    """
    model, config = parse_config([*argv, "--dry-run"])
    return model, dataclasses.replace(config, dry_run=False).validate()


def measured(argv: list[str], seconds: float | None) -> Entry:
    """Measure for the run that options of train.py describe."""
    model, config = run_of(argv)
    if not config.tokens_per_batch:
        raise ValueError(
            "--tokens-per-batch auto: a run finds the number (see its config.json): give it here"
        )
    device = pick_device(config.device)
    if device.type not in SECONDS:
        raise ValueError(f"--device {config.device}: only a CPU or a CUDA GPU is measured")
    # With the options that train.py has too, or it would not find the measurement. On a CPU a
    # preset says nothing of compiling, which is worth a trial.
    if device.type == "cpu" and config.compile == "none":
        print(
            "--compile auto is tried too: give it to train.py as well, and it takes what is found"
        )
        config = dataclasses.replace(config, compile="auto")
    limit = seconds or SECONDS[device.type]
    config = dataclasses.replace(config, tune_seconds=limit)
    place = Place(device, pick_dtype(config.dtype, device), World())
    budget = budget_of(model, config) if device.type == "cuda" else None
    return measure_now(model, config, place, budget)


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.tune",
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other options are train.py's, such as --preset, --device and --compile.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=Range(float, above=0, most=1e6),
        help="after which no further measurement begins; default: 480 on a GPU, 110 on a CPU",
    )
    parser.add_argument(
        "--report", action="store_true", help="only print what was measured last, as Markdown"
    )
    return parser


def report() -> int:
    entry = cache.newest()
    if entry is None:
        raise ValueError(f"{cache.folder()} holds no measurement: leave out --report to make one")
    print(for_an_issue(entry))
    return 0


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args, others = make_parser().parse_known_args(argv)
    if args.report:
        if others:
            raise UsageError(f"--report takes no other option, got {others[0]}")
        return report()
    for option in others:
        name = option.split("=")[0].replace("_", "-")
        if name in ("--dry-run", "--device-like"):
            raise UsageError(f"{name} plans a run, and this command measures: give it to train.py")
    print(summary(measured(others, args.seconds)))
    print("python -m nanovlm_fast.tune --report prints this for an issue: it would help others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
