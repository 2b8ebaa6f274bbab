"""The step of one GPU, as `bench.scaling` takes it: measured, else predicted, else a floor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bench.compiled_step import predicted_step
from bench.harness.results import ROOT, load
from bench.roofline import Counts, operators
from bench.subjects.step_time import H100
from nanovlm_fast.config import VLMConfig

TEXT = 32  # tokens per sample, as in bench.roofline
LABELS = 12
# Module -> the roofline's name for that part of the model.
PARTS = {"decoder": "language", "MP": "projector", "vision_encoder": "vision"}


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU's step, {part of the model: seconds}, and where the numbers come from."""

    forward: dict[str, float]
    backward: dict[str, float]
    update: float
    samples: int
    source: str
    measured: bool

    @property
    def seconds(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values()) + self.update

    def scaled(self, factor: float) -> Compute:
        """The same step, slower by `factor` in all its parts."""
        return dataclasses.replace(
            self,
            forward={part: factor * seconds for part, seconds in self.forward.items()},
            backward={part: factor * seconds for part, seconds in self.backward.items()},
            update=factor * self.update,
        )


def floor_of(config: VLMConfig, samples: int) -> Compute:
    """The roofline's step on an H100."""
    found = operators(config, Counts.of_samples(config, samples, TEXT, LABELS), H100.element)

    def seconds(direction: str) -> dict[str, float]:
        parts = dict.fromkeys(PARTS.values(), 0.0)
        for operator in found:
            if operator.direction == direction:
                parts[operator.part] += operator.floor(H100)
        return parts

    update = sum(o.floor(H100) for o in found if o.direction == "update")
    source = f"estimate, not measured: the floor of bench.roofline, {H100.name}"
    return Compute(seconds("forward"), seconds("backward"), update, samples, source, False)


def measured_step(preset_name: str, results: Path = ROOT) -> tuple[float, int, str] | None:
    """(seconds, samples, source) of our step in the newest GPU result of bench.train_step, if any.

    Only results of the whole model count, not those of fewer layers.
    """
    found = []
    for file in results.glob("*/train_step*.json"):
        step = load(file)
        ours = step["variants"].get("ours", {})
        whole = step["preset"] == preset_name and not step.get("layers")
        if "driver" in step and whole and "median" in ours:  # only GPU results name a driver
            source = f"bench.train_step on {step['device']}, {step['commit'][:7]}"
            found.append((step["date"], ours["median"], step["work"]["images"], source))
    return max(found)[1:] if found else None


def compute_of(config: VLMConfig, preset_name: str, samples: int, results: Path = ROOT) -> Compute:
    """The measured step, divided as the roofline divides it; without one, the predicted step.

    Without that too, the roofline's step.
    """
    step = measured_step(preset_name, results)
    if step is None:
        return predicted_compute(config, preset_name, samples, results)
    seconds, images, source = step
    floor = floor_of(config, images)
    return dataclasses.replace(floor.scaled(seconds / floor.seconds), source=source, measured=True)


def predicted_compute(
    config: VLMConfig, preset_name: str, samples: int, results: Path = ROOT
) -> Compute:
    """The compiled step's predicted time, divided over the model as the roofline divides it."""
    floor = floor_of(config, samples)
    step = predicted_step(preset_name, results)
    if step is None:
        return floor
    # The prediction is of its own number of samples: how far it lies above the floor carries over.
    base = floor_of(config, step.images)
    forward = step.forward_ms / 1e3 / sum(base.forward.values())
    backward = step.backward_ms / 1e3 / sum(base.backward.values())
    return dataclasses.replace(
        floor,
        forward={part: forward * seconds for part, seconds in floor.forward.items()},
        backward={part: backward * seconds for part, seconds in floor.backward.items()},
        update=step.update_ms / 1e3,
        source=f"predicted, not measured: {step.source}, {H100.name}",
    )
