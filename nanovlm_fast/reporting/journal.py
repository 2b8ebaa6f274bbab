"""What a run reports while it trains, and when it must stop.

Lines go to metrics.jsonl, to Weights & Biases and to the terminal. Losses arrive one logging
interval late, so that no step waits for them: a line is begun when its interval ends and written at
the end of the next. With several ranks all of them must call, and the first one writes.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanovlm_fast.command import one_line
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.files import naming
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.metrics import MetricsLog, SpikeDetector, StepStats
from nanovlm_fast.runs import RunState
from nanovlm_fast.weights.folder import newest_checkpoint

UPLOAD = 600.0  # seconds that Weights & Biases may take at the end for what it has not sent yet
NAMED = 100  # samples over the budget that are named before they are only counted
SLOW_DATA = 0.05  # share of the time that the device may wait for data without a remark
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(RuntimeError):
    """A run that had to stop; the message says why and what to do."""


@dataclasses.dataclass
class PendingLine:
    """A line of metrics.jsonl whose losses are still on their way from the device."""

    values: dict[str, Any]
    read: Callable[[], dict[str, Any]]  # from `StepStats`; waits for the copy


class Journal:
    """The reports of one run. Keeps in the run's `state` what a resume must know."""

    def __init__(
        self, run: Path, model: VLMConfig, config: TrainConfig, state: RunState, world: World
    ):
        self.run = run
        self.config = config
        self.state = state
        self.world = world
        # Weights & Biases before the log: it may refuse, and then nothing has been written.
        self.wandb = start_wandb(run, model, config) if world.first else None
        self.log = MetricsLog(run, state.step, state.evaluated) if world.first else None
        self.spikes = SpikeDetector(state.spikes)
        # Waits until checkpoints that were begun are written; the trainer sets it.
        self.settle: Callable[[], object] = lambda: None
        self.pending: PendingLine | None = None
        self.intervals = 0  # logging intervals that this process has begun a line for
        self.said_slow_data = False
        # Sample names of the last steps. Losses arrive up to two intervals after their step.
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=2 * config.log_every + 1)
        # Examples left out since the ranks last agreed: (index, or None if too long; reason).
        self.pending_skips: list[tuple[int | str | None, str]] = []

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.world.first:
            tqdm.write(text)

    def write(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and send its numbers to Weights & Biases."""
        if self.log:
            try:
                self.log.write(values)
            except OSError as error:
                if error.errno not in DISK_FULL or self.config.on_save_error == "stop":
                    raise naming(error, self.log.path) from error
                self.say(f"warning: a line of {self.log.path} is lost: {error}")
        if "skipped" not in values and "spike" not in values:
            self.tell_wandb(lambda run: run.log(values, step=values["step"]))

    def close(self, accuracies: dict[str, float]) -> None:
        """Finish the upload, after the run is scored and all its files are written."""
        self.tell_wandb(lambda run: run.summary.update(accuracies))
        self.tell_wandb(lambda run: run.finish())

    def tell_wandb(self, say: Callable[[Any], object]) -> None:
        """Call `say` with the Weights & Biases run, if there is one.

        Whatever goes wrong there, training continues, without Weights & Biases from then on.
        """
        try:
            if self.wandb:
                say(self.wandb)
        except Exception as error:  # of its service, of a connection, of the disk
            self.wandb = None
            self.say(f"warning: no more is logged to Weights & Biases: {one_line(error)[:300]}")

    def begin_line(
        self,
        speed: dict[str, float],
        lr: float,
        optimizers: list[torch.optim.Optimizer],
        stats: StepStats,
    ) -> None:
        """Begin the line of the interval that ends now; `finish_line` writes it."""
        state = self.state
        # `loss` takes its place in the order of the columns now and its value when it arrives.
        values: dict[str, Any] = {"step": state.step, "loss": None, "lr": lr}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                values[f"lr_{group['name']}"] = group["lr"]
        values |= {"seconds": round(state.seconds, 3), "examples": state.examples, **speed}
        self.pending = PendingLine(values, stats.take())
        self.intervals += 1
        self.note_data_wait(speed["data_wait"])

    def finish_line(self, bar: tqdm | None = None) -> None:
        """Write the line that was begun.

        Raises Stopped after too many skipped steps in a row, or steps with a loss scale below 1.
        """
        if not self.pending:
            return
        values = self.pending.values
        arrived = self.pending.read()
        # Before anything can raise: a line must not be written twice.
        self.pending = None
        del arrived["kept"]
        losses = arrived.pop("losses")
        row = arrived.pop("skipped_in_a_row")
        values["skipped_steps"] = arrived.pop("skipped")
        scaling = arrived.pop("loss_scale", None)
        if scaling:
            self.state.loss_scale = scaling
            values["overflow_steps"] = int(scaling["counts"][0])
            values["loss_scale"] = scaling["scale"]
        values |= arrived
        self.note_spikes(values["step"] - len(losses) + 1, losses)
        self.write(values)
        if bar and values["loss"] is not None:
            speed = f"{values['tokens_per_s']:,.0f} tok/s wait {values['data_wait']:.0%}"
            if scaling:
                speed += f" loss scale {scaling['scale']:g}, {values['overflow_steps']} overflows"
            fill = (
                f"filled {values['packing']:.0%} of tokens, {values['image_fill']:.0%} of images, "
                f"{values['label_fill']:.0%} of labels"
            )
            bar.set_postfix_str(f"loss {values['loss']:.4f} lr x{values['lr']:.2f} {speed} {fill}")
        if row >= self.config.max_skipped_steps:
            steps = f"{row} steps in a row up to step {values['step']} were skipped"
            advice = self.advice(values["step"], values["lr"])
            what = "losses" if scaling else "gradients"
            raise Stopped(f"{steps}: their {what} are not finite{advice}")
        if scaling:
            self.check_scale(scaling, values["step"], values["lr"])

    def to_save(self, stats: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the statistics of `StepStats.peek`."""
        saved = {"interval": stats["kept"]}
        if "loss_scale" in stats:
            # The summary's too: the last line may have been written some steps before the end.
            saved["loss_scale"] = self.state.loss_scale = stats["loss_scale"]
        return saved

    def check_scale(self, scaling: dict[str, Any], step: int, lr: float) -> None:
        """Raise Stopped if the loss scale of float16 was below 1 for too many steps in a row."""
        row = int(scaling["counts"][2])
        if row < self.config.max_skipped_steps:
            return
        low = f"the loss scale of float16 was below 1 for {row} steps in a row up to step {step}"
        why = "gradients overflow though the loss is made smaller, or are not numbers"
        ways = "--resume --dtype float32 goes on without a scale, and a lower rate may help"
        raise Stopped(f"{low}: {why}; {ways}{self.advice(step, lr)}")

    def note_data_wait(self, share: float) -> None:
        """Say once what to do if the device waited for data in the interval that ends now."""
        # The first interval holds the start of the workers and the first fill of their buffers.
        if self.said_slow_data or self.intervals < 2 or share <= SLOW_DATA:
            return
        self.said_slow_data = True
        config = self.config
        advice = f"a new run can take more --workers than {config.workers}"
        if not config.data.startswith("prepared:"):
            names = f"--preset {config.preset} --data {shlex.quote(config.data)}"
            command = f"python -m nanovlm_fast.data.prepare {names} --out DIR"
            advice = f"decode it once ({command}; then --data prepared:DIR), or {advice}"
        step = self.state.step
        self.say(f"step {step}: {share:.0%} of the last interval was waiting for data: {advice}")

    def note_spikes(self, first: int, losses: list[float]) -> None:
        """Name the samples of steps whose loss is a spike; `first` is the step of the first one."""
        # The mean before these steps, which a spike among them would have moved.
        mean = self.spikes.mean
        found = []
        for step, loss in enumerate(losses, first):
            if self.spikes.observe(loss):
                found.append((step, loss))
        self.state.spikes = self.spikes.kept()
        for step, loss in found:
            shares = self.world.gather(self.samples(step))
            names = [name for share in shares for name in share]
            shown = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
            self.write({"step": step, "spike": shown, "mean": mean, "samples": names})
            self.say(
                f"step {step}: loss {loss:.4g}, the mean is {mean:.4g}; "
                "its samples are in metrics.jsonl"
            )

    def remember_samples(self, step: int, batches: Sequence[PackedBatch]) -> None:
        """Keep the names of a step's samples until its loss is known."""
        self.recent.append((step, [name for batch in batches for name in batch.names]))

    def samples(self, step: int) -> list[str]:
        """Names of this rank's samples of a recent step."""
        return dict(self.recent).get(step, [])

    def advice(self, step: int, lr: float) -> str:
        """The end of an error about numbers: learning rate, samples, the last good checkpoint."""
        # The checkpoint that is being written would replace the one that is named.
        self.settle()
        kept = newest_checkpoint(self.run)
        last_good = "No checkpoint had been written yet."
        if kept:
            last_good = f"The last good checkpoint is {kept}."
        names = ", ".join(self.samples(step)) or "unknown"
        return f", learning rate x{lr:.3f} of its peak. Samples of the batch: {names}. {last_good}"

    def note_left_out(self, batch: StreamBatch) -> None:
        """Remember the examples that were left out before this batch, until ranks exchange them."""
        self.pending_skips += [(index, reason) for index, reason in batch.bad.items()]
        self.pending_skips += [(None, reason) for reason in batch.too_long]

    def note_skipped(self) -> None:
        """Name and count the examples that were left out on all ranks.

        Raises Stopped when more than --max-bad-samples of them are unreadable.
        """
        state = self.state
        limit = self.config.max_bad_samples
        new: dict[str, str] = {}
        too_long: list[str] = []
        for share in self.world.gather(self.pending_skips):
            for index, reason in share:
                if index is None:
                    too_long.append(reason)
                elif str(index) not in state.bad:  # else it was named in an earlier epoch
                    new[str(index)] = reason
        self.pending_skips = []
        state.bad |= new
        # Long examples of a large data set would fill the log: 100 are named, the rest counted.
        named = too_long[: max(NAMED - state.too_long, 0)]
        state.too_long += len(too_long)
        for kind, reasons in (("unreadable", list(new.values())), ("too long", named)):
            for reason in reasons:
                self.say(f"skipped, {kind}: {reason}")
                self.write({"step": state.step + 1, "skipped": reason})
        if len(state.bad) > limit:
            raise Stopped(f"{len(state.bad)} unreadable samples are over --max-bad-samples {limit}")

    def note_the_datas_end(self) -> None:
        """No rank has data left. Raise Stopped if more steps were wanted, or if there were none."""
        state = self.state
        wanted = self.config.max_steps
        if wanted or not state.step:
            of_all = f" of {wanted}" if wanted else ""
            when = f"after step {state.step}{of_all} a whole epoch had nothing to learn from"
            counts = f"{len(state.bad)} unreadable, {state.too_long} times too long"
            raise Stopped(f"{when}: {counts}, the rest without an answer")


def start_wandb(run: Path, model: VLMConfig, config: TrainConfig) -> Any:
    """Start a Weights & Biases run; None without --wandb. Raises OSError if it cannot."""
    if not config.wandb:
        return None
    try:
        import wandb

        values = {**dataclasses.asdict(model), **dataclasses.asdict(config)}
        # Without a limit it waits at the end for the network, for ever if that stays away.
        options: dict[str, Any] = {}
        if hasattr(wandb.Settings(), "finish_timeout"):  # an option of newer versions
            options = {"finish_timeout": UPLOAD}
        return wandb.init(
            project=config.wandb_project,
            name=run.resolve().name,
            dir=run,
            config=values,
            settings=wandb.Settings(**options),
        )
    except Exception as error:  # of its package, its options, a key, a connection
        raise OSError(
            f"--wandb: {one_line(error)[:300]} "
            "(WANDB_MODE=offline needs neither a key nor a network)"
        ) from error
