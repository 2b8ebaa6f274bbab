"""What the tuner finds on this device, as a result file.

    python -m bench.harness.tune --preset nanovlm-222m

It measures what `python -m nanovlm_fast.tune` does, and writes the table beside the other results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.harness.results import write
from bench.harness.tables import Rows
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.presets import defaults_of
from nanovlm_fast.ranges import Range
from nanovlm_fast.tune.__main__ import measured
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.report import HEADS, cells, options_of, summary
from nanovlm_fast.tune.search import Row


def result_of(entry: Entry) -> dict[str, Any]:
    """What a result file keeps of a measurement."""
    return {
        "key": entry.key,
        "seconds": entry.seconds,
        "plain": entry.plain.to_json(),
        "choice": entry.choice.to_json(),
        "chosen": options_of(entry.choice, entry.plain),
        "rows": [row.to_json() for row in entry.rows],
    }


def tune_rows(result: dict[str, Any]) -> Rows:
    """The tuner's table, and what it chose."""
    rows: Rows = [HEADS]
    rows += [cells(Row.from_json(row)) for row in result["rows"]]
    return [*rows, ("chosen", "", "", "", "", result["chosen"])]


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m bench.harness.tune", description="The tuner's table as a result file."
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=Range(float, above=0, most=1e6))
    parser.add_argument("--name", default="", help="of the result file; default: tune_PRESET")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    defaults_of(args.preset)  # an unknown name is refused before anything is measured
    device = pick_device(args.device)
    entry = measured(["--preset", args.preset, "--device", args.device], args.seconds)
    print(summary(entry))
    write(args.name or f"tune_{args.preset}", device, result_of(entry), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
