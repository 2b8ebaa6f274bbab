"""Tables of the suites: lined up for a terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Rows = list[tuple[str, ...]]  # of a table; the first row is its head


def lined_up(rows: Rows, left: Collection[int] = (0,)) -> str:
    """The rows in columns: cells of those in `left` begin at one place, all others end at one.

    A row with fewer cells than the head ends with a text, as an error is; it may be of any length.
    """
    columns = len(rows[0])
    whole = [row for row in rows if len(row) == columns]
    short = [row[:-1] for row in rows if len(row) < columns]
    widths = [0] * columns
    for row in (*whole, *short):
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], len(cell))
    return "\n".join(line(row, widths, left) for row in rows)


def line(cells: Sequence[str], widths: Sequence[int], left: Collection[int] = (0,)) -> str:
    """One row of a table whose columns are `widths` wide; see `lined_up`."""
    parts = []
    for i, cell in enumerate(cells):
        is_text = i == len(cells) - 1 and len(cells) < len(widths)
        begins = i in left or is_text
        parts.append(cell.ljust(widths[i]) if begins else cell.rjust(widths[i]))
    return "  ".join(parts).rstrip()


def markdown(rows: Rows) -> str:
    """The rows as Markdown; `|` in a cell would end it, so it becomes a slash."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
