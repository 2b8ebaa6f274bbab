"""What a run tells while it trains: metrics.jsonl, Weights & Biases, the terminal; and when it must stop.

Losses arrive a logging interval late, so that no step waits for them: a line is begun when its interval ends and
written at the end of the next. With several ranks all of them must call, and the first one writes.
"""

from __future__ import annotations

import dataclasses
import errno
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.files import naming
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.metrics import MetricsLog, Spikes, StepStats
from nanovlm_fast.weights.folder import newest_checkpoint

UPLOAD = 600.0  # seconds that Weights & Biases may take at the end for what it has not sent yet
NAMED = 100  # samples over the budget that are named before they are only counted


class Stopped(RuntimeError):
    """A run that had to stop; the message says why and what to do."""


class Journal:
    """Lines of one run. `state` is the run's, in which it keeps what a resume must know."""

    def __init__(
        self, run: Path, model: VLMConfig, config: TrainConfig, state: dict[str, Any], world: World
    ):
        self.run, self.config, self.state, self.world = run, config, state, world
        self.wandb = (
            start_wandb(run, model, config) if world.first else None
        )  # it may refuse: nothing is written yet
        self.log = MetricsLog(run, state["step"], state["evaluated"]) if world.first else None
        self.spikes = Spikes(state["spikes"])
        self.settle: Callable[[], object] = lambda: (
            None
        )  # waits until checkpoints that were begun are written
        self.pending: tuple[dict[str, Any], Callable[[], dict[str, Any]]] | None = None
        # samples of the last steps
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=2 * config.log_every + 1)
        self.unheard: list[
            tuple[int | None, str]
        ] = []  # left out since the last step: (example or too long, reason)

    def say(self, text: str) -> None:
        """To the terminal, once for all ranks."""
        if self.world.first:
            tqdm.write(text)

    def write(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and its numbers for Weights & Biases."""
        if self.log:
            try:
                self.log.write(values)
            except OSError as error:
                if (
                    error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                    or self.config.on_save_error == "stop"
                ):
                    raise naming(error, self.log.path) from error
                self.say(f"warning: a line of {self.log.path} is lost: {error}")
        if "skipped" not in values and "spike" not in values:
            self.tell_wandb(lambda run: run.log(values, step=values["step"]))

    def close(self, accuracies: dict[str, float]) -> None:
        """The run is done and scored, and all of it is written."""
        self.tell_wandb(lambda run: run.summary.update(accuracies))
        self.tell_wandb(lambda run: run.finish())

    def tell_wandb(self, say: Callable[[Any], object]) -> None:
        """Whatever goes wrong there, a run that trains goes on, without Weights & Biases from then on."""
        try:
            if self.wandb:
                say(self.wandb)
        except Exception as error:  # of its service, of a connection, of the disk
            self.wandb = None
            self.say(f"warning: no more is logged to Weights & Biases: {one_line(error)}")

    def begin_line(
        self,
        speed: dict[str, float],
        lr: float,
        optimizers: list[torch.optim.Optimizer],
        stats: StepStats,
    ) -> None:
        """The interval that ends now becomes a line once its loss has arrived."""
        state, rates = (
            self.state,
            {f"lr_{g['name']}": g["lr"] for o in optimizers for g in o.param_groups},
        )
        values = {"step": state["step"], "loss": None, "lr": lr, **rates}
        values |= {"seconds": round(state["seconds"], 3), "examples": state["examples"], **speed}
        self.pending = values, stats.take()

    def finish_line(self, bar: tqdm | None = None) -> None:
        """Write the line that was begun; raises Stopped after too many skipped steps in a row."""
        if not self.pending:
            return
        (values, read), self.pending = self.pending, None
        arrived = read()
        del arrived["kept"]
        losses, row = arrived.pop("losses"), arrived.pop("skipped_in_a_row")
        values["skipped_steps"] = arrived.pop("skipped")
        values |= arrived
        self.note_spikes(values["step"] - len(losses) + 1, losses)
        self.write(values)
        if bar and values["loss"] is not None:
            speed = f"{values['tokens_per_s']:,.0f} tok/s wait {values['data_wait']:.0%}"
            bar.set_postfix_str(f"loss {values['loss']:.4f} lr x{values['lr']:.2f} {speed}")
        if row >= self.config.max_skipped_steps:
            what = f"{row} steps in a row up to step {values['step']} were skipped: their gradients are not finite"
            raise Stopped(what + self.advice(values["step"], values["lr"]))

    def note_spikes(self, first: int, losses: list[float]) -> None:
        """Name the samples of steps whose loss stands out; `first` is the step of the first loss."""
        mean = self.spikes.mean
        found = [(first + i, loss) for i, loss in enumerate(losses) if self.spikes.is_one(loss)]
        self.state["spikes"] = self.spikes.kept()
        for step, loss in found:
            names = [name for names in self.world.gather(self.samples(step)) for name in names]
            shown = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
            self.write({"step": step, "spike": shown, "mean": mean, "samples": names})
            self.say(
                f"step {step}: loss {loss:.4g}, the mean is {mean:.4g}; its samples are in metrics.jsonl"
            )

    def samples(self, step: int) -> list[str]:
        return dict(self.recent).get(step, [])

    def advice(self, step: int, lr: float) -> str:
        """How an error about numbers ends: where the rate stood, what was in the batch, what is left."""
        self.settle()
        kept = newest_checkpoint(self.run)
        there = (
            f"The last good checkpoint is {kept}."
            if kept
            else "No checkpoint had been written yet."
        )
        names = ", ".join(self.samples(step)) or "unknown"
        return f", learning rate x{lr:.3f} of its peak. Samples of the batch: {names}. {there}"

    def hear(self, batch: StreamBatch) -> None:
        """Remember what was left out on the way to this batch, until the ranks tell each other."""
        self.unheard += [(index, reason) for index, reason in batch.bad.items()]
        self.unheard += [(None, reason) for reason in batch.too_long]

    def note_skipped(self) -> None:
        """Name and count the examples that were left out; raises Stopped when too many of them are unreadable."""
        state, limit = self.state, self.config.max_bad_samples
        heard = [
            (index, reason) for share in self.world.gather(self.unheard) for index, reason in share
        ]
        self.unheard = []
        new = {
            str(i): reason for i, reason in heard if i is not None and str(i) not in state["bad"]
        }
        state["bad"] |= new  # not every epoch anew
        too_long = [reason for index, reason in heard if index is None]
        named = too_long[: max(NAMED - state["too_long"], 0)]
        state["too_long"] += len(too_long)
        for kind, reasons in (("unreadable", new.values()), ("too long", named)):
            for reason in reasons:
                self.say(f"skipped, {kind}: {reason}")
                self.write({"step": state["step"] + 1, "skipped": reason})
        if len(state["bad"]) > limit:
            raise Stopped(
                f"{len(state['bad'])} unreadable samples are over --max-bad-samples {limit}"
            )

    def note_the_datas_end(self) -> None:
        """No rank has more to learn from. Raises Stopped if there were to be more steps, or any."""
        state, wanted = self.state, self.config.max_steps
        if wanted or not state["step"]:
            of_all = f" of {wanted}" if wanted else ""
            when = f"after step {state['step']}{of_all} a whole epoch had nothing to learn from"
            counts = f"{len(state['bad'])} unreadable, {state['too_long']} times too long"
            raise Stopped(f"{when}: {counts}, the rest without an answer")


def start_wandb(run: Path, model: VLMConfig, config: TrainConfig) -> Any:
    """The run there, or None without --wandb. Raises OSError, in one line, if it cannot be begun."""
    if not config.wandb:
        return None
    try:
        import wandb

        values = {**dataclasses.asdict(model), **dataclasses.asdict(config)}
        # at the end it waits for the network, for ever where that stays away
        patience = {"finish_timeout": UPLOAD} if hasattr(wandb.Settings(), "finish_timeout") else {}
        place = dict(project=config.wandb_project, name=run.resolve().name, dir=run)
        return wandb.init(**place, config=values, settings=wandb.Settings(**patience))
    except Exception as error:  # of its package, its options, a key, a connection
        raise OSError(
            f"--wandb: {one_line(error)} (WANDB_MODE=offline needs neither a key nor a network)"
        ) from error


def one_line(error: Exception) -> str:
    """What a foreign error says, shortened."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
