"""What a run computes with: what its options say and, where they say `auto`, what was measured.

| --tune | on a GPU | on a CPU |
| --- | --- | --- |
| `auto` | from the cache; measured now if it is not there | from the cache, else plain |
| `off` | plain PyTorch | plain PyTorch |
| `again` | measured now | measured now, in processes of its own |

A resumed run on the device of its start repeats what its config.json notes, whatever the cache
says by now. `--deterministic` takes nothing from a cache: the same command must give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nanovlm_fast.command import one_line
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.ranks import World
from nanovlm_fast.tune import cache
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.cpu import tune_cpu
from nanovlm_fast.tune.key import GPU_AUTOS, free_in, key_of
from nanovlm_fast.tune.parts import Job
from nanovlm_fast.tune.report import options_of, summary
from nanovlm_fast.tune.tuner import tune_apart

Measure = Callable[[dict[str, Any], Choice, Entry | None], Entry]


@dataclass(frozen=True)
class Settled:
    """A choice, where it comes from, and what config.json notes of it (`record`)."""

    choice: Choice
    device: str
    tuned: bool = False
    how: str = ""  # a line for people; empty if there is nothing to say

    @property
    def record(self) -> dict[str, Any]:
        choice = self.choice.to_json() if self.tuned else None
        return {"device": self.device, "choice": choice}

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The configuration with every `auto` replaced by what is chosen."""
        chosen: dict[str, Any] = {
            "kernels": self.choice.kernel_option,
            "attention": self.choice.attention,
            "vision_attention": self.choice.vision_attention,
            "inductor": ",".join(self.choice.inductor) or "none",
            "compile": self.choice.compile,
            "workers": self.choice.workers,
        }
        autos = {**GPU_AUTOS, "workers": -1 if self.choice.workers >= 0 else None}
        free = {name: chosen[name] for name, auto in autos.items() if getattr(config, name) == auto}
        return dataclasses.replace(config, **free)


def plain_choice(config: TrainConfig, device: torch.device) -> Choice:
    """What `auto` means where nothing was measured."""
    compiled = config.compile
    if compiled == "auto":
        compiled = "default" if device.type == "cuda" else "none"
    return Choice(compile=compiled)


def settle(
    config: TrainConfig,
    device: torch.device,
    world: World,
    key: dict[str, Any],
    measure: Measure,
    record: dict[str, Any] | None = None,
) -> Settled:
    """Decide for all ranks, which must all call it; the first one looks and measures.

    Args:
        key: what a choice depends on, see `key_of`.
        measure: measures for the key, over a plain choice, knowing an earlier entry.
        record: of a resumed run, what its config.json notes ({} if it notes nothing).
    """
    plain = Settled(plain_choice(config, device), key["device"])
    if config.deterministic and config.tune == "again":
        raise ValueError("--deterministic takes nothing that is measured: leave out --tune again")
    if config.tune == "off":
        return plain
    same_device = record is not None and record.get("device", key["device"]) == key["device"]
    if config.tune == "auto" and record is not None and same_device:
        return repeated(plain, record, world)
    if config.deterministic:
        return plain
    found: dict[str, Any] | None = None
    if world.first:
        found = look_or_measure(config, device, key, plain.choice, measure)
    found = world.gather(found)[0]
    if found is None:
        return plain
    return dataclasses.replace(
        plain, choice=Choice.from_json(found["choice"]), tuned=True, how=found["how"]
    )


def repeated(plain: Settled, record: dict[str, Any], world: World) -> Settled:
    """What a resumed run has noted; plain if it noted nothing that is still known here."""
    if record.get("choice") is None:
        return plain
    try:
        choice = Choice.from_json(record["choice"])
    except ValueError as error:
        print(f"warning: config.json notes a choice of another version ({error}): plain PyTorch")
        return plain
    if world.size > 1 and choice.compile == "reduce-overhead":
        # CUDA graphs are for one process, as this run then was.
        choice = dataclasses.replace(choice, compile="default")
    how = f"as this run was tuned: {options_of(choice)}"
    return dataclasses.replace(plain, choice=choice, tuned=True, how=how)


def look_or_measure(
    config: TrainConfig,
    device: torch.device,
    key: dict[str, Any],
    plain: Choice,
    measure: Measure,
) -> dict[str, Any] | None:
    """On the first rank: {"choice": ..., "how": ...}, or None for plain."""
    before = cache.read(key)
    if config.tune == "auto":
        if before and before.done:
            how = f"tuned on {before.date}: {options_of(before.choice, before.plain)}"
            return {"choice": before.choice.to_json(), "how": how}
        if device.type != "cuda" or not free_in(key):
            return None
    try:
        entry = measure(key, plain, before)
    # Whatever it is: a run must not end because nothing faster was found, and the other ranks wait
    # for an answer.
    except Exception as error:
        print(f"warning: --tune failed, plain PyTorch takes its place: {one_line(error)}")
        return None
    print(summary(entry), flush=True)
    return {
        "choice": entry.choice.to_json(),
        "how": f"tuned now: {options_of(entry.choice, entry.plain)}",
    }


class Place(NamedTuple):
    """Where a run computes."""

    device: torch.device
    dtype: torch.dtype
    world: World


def measure_run(
    model: VLMConfig, config: TrainConfig, place: Place, budget: Budget | None = None
) -> tuple[dict[str, Any], Measure]:
    """The key of a run, and what measures for it: on a CPU without its budgets, else with them."""
    several = place.world.size > 1
    key = key_of(model, config, budget, place.device, place.dtype, several)

    def measure(key: dict[str, Any], plain: Choice, before: Entry | None) -> Entry:
        limit = f"at most about {config.tune_seconds:.0f} s"
        if budget is None:
            types = ", and bfloat16" if "dtype" in free_in(key) else ""
            what = f"threads, waiting, workers and --compile{types}"
            print(f"no GPU: measuring {what}, {limit}", flush=True)
            return tune_cpu(model, config, key, plain, before)
        how = f"{limit} (--tune off: not)"
        print(f"measuring what computes fastest on this device, {how}", flush=True)
        job = Job.of(model, config, budget, place.device, place.dtype)
        return tune_apart(job, key, plain, config.tune_seconds, before)

    return key, measure


def settle_run(
    model: VLMConfig,
    config: TrainConfig,
    place: Place,
    budget: Budget | None,
    record: dict[str, Any] | None = None,
) -> Settled:
    """`settle` for a run."""
    key, measure = measure_run(model, config, place, budget)
    return settle(config, place.device, place.world, key, measure, record)


def measure_now(
    model: VLMConfig, config: TrainConfig, place: Place, budget: Budget | None
) -> Entry:
    """Measure for a run whatever the cache holds. Raises what measuring raises."""
    key, measure = measure_run(model, config, place, budget)
    return measure(key, plain_choice(config, place.device), cache.read(key))
