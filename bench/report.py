"""Writes tables, pictures and the plan's rates from the committed result files.

No number in a page is typed by hand.

python -m bench.report            write what is out of date
python -m bench.report --redraw   and draw every picture again: their code has changed
python -m bench.report --check    exit with 1 if a table or a picture is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench.harness.results import ROOT
from bench.pages.figures import THEMES, Figure, figures, source_of
from bench.pages.rates import rates
from bench.pages.readme import highlights, overview, predictions, reliability, scale
from bench.pages.rows import kernel_table
from bench.pages.sections import devices, suites_page
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.reporting.plan import RATES

README = ROOT.parent.parent / "README.md"


def marks(name: str) -> tuple[str, str]:
    """The comments that enclose a table in a page."""
    return f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"


MARKS = marks("results")

# ---- all of them
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"results": highlights, "predictions": predictions},
    README.parent / "kernels" / "README.md": {"results": kernel_table},
    README.parent / "bench" / "README.md": {"summary": overview, "results": suites_page},
    README.parent / "nanovlm_fast" / "training" / "README.md": {
        "scale": scale,
        "reliability": reliability,
    },
}


def updated(text: str, written: str, name: str = "results") -> str:
    """Return `text` with the part between the marks replaced; raise ValueError without marks."""
    first, last = marks(name)
    start = text.find(first)
    end = text.find(last)
    if start < 0 or end < start:
        raise ValueError(f"a README has lost the marks around its {name} table")
    return f"{text[: start + len(first)]}\n{written}\n{text[end:]}"


def page(file: Path) -> str:
    """The page with all its tables written again."""
    text = file.read_text()
    for name, make in TABLES[file].items():
        text = updated(text, make(), name)
    return text


def stale_pictures(results: Path = ROOT, redraw: bool = False) -> tuple[list[Figure], list[Path]]:
    """Pictures to draw (all to `redraw`), and drawn files that no result calls for any more.

    A drawn file has a digest.
    """
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    wanted = {figure.file(theme) for figure in drawn for theme in THEMES}
    files = (file for theme in THEMES for file in results.glob(f"*/*_{theme}.png"))
    there = {file for file in files if source_of(file)}
    return [figure for figure in drawn if redraw or figure.stale()], sorted(there - wanted)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("--redraw", action="store_true", help="also pictures that are up to date")
    return parser


@reports_errors(KeyError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    after = {file: page(file) for file in TABLES}
    after[RATES] = rates()
    to_draw, left_over = stale_pictures(redraw=args.redraw)
    # rates.json may not exist yet; a page whose marks are gone has failed in `page` already.
    stale = [f for f, text in after.items() if not f.exists() or text != f.read_text()]
    if args.check:
        for file in (*stale, *(figure.file("light") for figure in to_draw), *left_over):
            how = "is out of date with bench/results: run python -m bench.report"
            print(f"{file} {how}", file=sys.stderr)
        return int(bool(stale or to_draw or left_over))
    for file in stale:
        file.write_text(after[file])
    for figure in to_draw:
        figure.write()
    for file in left_over:
        file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
