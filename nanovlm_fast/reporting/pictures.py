"""The pictures of a run: curves.png and samples.png.

Shapes: an image is (3, H, W) uint8.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nanovlm_fast.data.images import printable
from nanovlm_fast.reporting.metrics import read_metrics


def pyplot() -> ModuleType:
    """matplotlib.pyplot, which draws into files and needs no display."""
    # Imported here, because it takes a second that most commands should not pay.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path, **options: Any) -> None:
    """Write the figure and close it.

    Raises OSError naming the file if it cannot be written. A file that failed half-way is removed.
    """
    try:
        with warnings.catch_warnings():
            # A character that no font has is drawn as a box.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure.savefig(file, **options)
    except Exception as error:
        with contextlib.suppress(OSError):  # a folder stands there, or the disk is gone
            file.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{file} could not be written: {error}") from error
        raise
    finally:
        pyplot().close(figure)


def legible(text: str, lines: int, width: int = 30) -> str:
    """Shorten any text to a few lines without control characters."""
    text = printable(" ".join(text.split()))
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


@contextlib.contextmanager
def panels(file: Path, titles: Sequence[str]) -> Iterator[Sequence]:
    """Axes side by side with the step on every x axis; saved as `file` at the end of the block."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(titles), figsize=(4.35 * len(titles), 3.6), constrained_layout=True
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    save(figure, file, dpi=110)


def plot_curves(run: Path) -> None:
    """RUN/curves.png: loss, held-out accuracy and tokens/s against the step, from metrics.jsonl."""
    lines = read_metrics(run)
    drawn = {"loss": "training loss", "accuracy": "held-out accuracy", "tokens_per_s": "tokens/s"}
    with panels(run / "curves.png", list(drawn.values())) as axes:
        for axis, name in zip(axes, drawn, strict=True):
            having = [line for line in lines if line.get(name) is not None]
            if having:
                # Markers, or a curve of a single point would not be visible.
                marker = "o" if len(having) < 40 else None
                steps = [line["step"] for line in having]
                values = [line[name] for line in having]
                axis.plot(steps, values, marker=marker, color="#1f6feb", lw=1.5)
        axes[0].set_yscale("log")
        axes[1].set_ylim(0, 1)
        axes[2].set_ylim(bottom=0)


def plot_samples(
    file: Path, samples: Sequence[tuple[np.ndarray, str, str, str]], columns: int = 6
) -> None:
    """Draw a grid of (image, question, right answer, model's answer), with wrong answers in red."""
    plt = pyplot()
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.75 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, question, right, answer) in zip(axes.flat, samples, strict=False):
        axis.imshow(image.transpose(1, 2, 0))
        said = answer
        colour = "#1a7f37"
        if answer != right.strip():
            said = f"{answer} (it is: {right})"
            colour = "#cf222e"
        title = f"{legible(question, 2)}\n{legible(said, 3)}"
        # Not parsed: a dollar sign in an answer would begin a formula.
        axis.set_title(title, fontsize=9, color=colour, parse_math=False)
    # Tight, because the titles of the first row reach out of the layout.
    save(figure, file, dpi=90, bbox_inches="tight")
