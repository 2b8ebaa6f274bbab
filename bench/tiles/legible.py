"""`tiny-split` on large canvases, with its tiles and with each canvas squashed to a square.

    python -m bench.tiles.legible              both runs, at the preset's length
    python -m bench.tiles.legible -- --epochs 1     options after -- go to both runs of train.py

Training canvases have all sizes, those of the test split are large: there a shape is hard to tell
outside a tile (nanovlm_fast/data/sources/canvas.py), so the model that sees tiles must answer more
of the questions. Pictures with the answers of both are written beside the result.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness.options import split_options
from bench.harness.results import place, write
from bench.harness.tables import Rows, lined_up
from bench.train_run import TRAIN_PY, train
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device

# A square takes fewer tokens than tiles do: with a budget of so many, a step of either run has
# about as many canvases, and the runs have as many steps
WAYS = {"tiles": [], "square": ["--max-img-size", "0", "--tokens-per-batch", "4608"]}


def legible_rows(result: dict[str, Any]) -> Rows:
    head = ("canvases seen as", "sees", "blind", "open questions", "yes or no", "of")
    rows: Rows = [(*head, "steps", "minutes")]
    for way in WAYS:
        run = result[way]
        kinds = (run["by_kind"].get(kind) for kind in ("open", "yes/no"))
        shares = (f"{kind['accuracy']:.1%}" if kind else "" for kind in kinds)
        scores = (f"{run['sees']:.1%}", f"{run['blind']:.1%}", *shares)
        length = (f"{run['steps']:,}", f"{run['train_seconds'] / 60:.1f}")
        rows.append((way, *scores, f"{run['questions']:,}", *length))
    return rows


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.tiles.legible", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    own, handed_on = split_options(argv)
    args = make_parser().parse_args(own)
    device = pick_device(args.device)
    options = ["--preset", "tiny-split", *handed_on]
    if args.device != "auto":
        options += ["--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        runs = {way: Path(folder) / way for way in WAYS}
        result = {way: train(runs[way], TRAIN_PY, [*options, *WAYS[way]]) for way in WAYS}
        file = write("tiny_split", device, result, args.out)
        for way, run in runs.items():
            for picture in ("curves", "samples"):
                target = place(f"tiny_split_{way}_{picture}", device, args.out)
                shutil.copy(run / f"{picture}.png", target.with_suffix(".png"))
    print(lined_up(legible_rows(result)))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
