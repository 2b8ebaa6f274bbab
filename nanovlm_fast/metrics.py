"""What a run reports: speed as the field counts it, and the log."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Meter:
    """Counts between two log lines. Tokens are nanoVLM's: text and image tokens of real documents, never padding.

    Time is wall-clock with the wait for data in it; `wait` is that share.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.counts = {"tokens": 0, "labels": 0, "images": 0, "questions": 0}
        self.capacity, self.waited, self.since = 0, 0.0, time.perf_counter()

    def add(self, packed: Any, waited: float) -> None:
        """Count a PackedBatch whose arrival took `waited` seconds."""
        added = (packed.n_tokens, packed.n_labels, packed.n_images, packed.n_documents)
        for name, more in zip(self.counts, added, strict=True):
            self.counts[name] += more
        self.capacity += packed.input_ids.numel()
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and start again."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        values = {f"{name}_per_s": count / elapsed for name, count in self.counts.items()}
        values |= {"data_wait": self.waited / elapsed, "packing": self.counts["tokens"] / max(self.capacity, 1)}
        self.reset()
        return values


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops the lines after that step (a resume)."""

    def __init__(self, run: Path, step: int = 0):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
            temporary = run / ".metrics.jsonl"
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self.file = self.path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def summary_table(rows: dict[str, Any]) -> str:
    """Names and values in two aligned columns."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
