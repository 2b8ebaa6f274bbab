"""Train a small vision-language model: the whole loop, from top to bottom.

python train.py                     preset tiny: from scratch on easy-VQA, on a laptop, in minutes
python train.py --help              every option with its default

`training/setup.py` prepares what a run needs; from there on this file is the training: the loop,
the optimizer step, evaluation, checkpoints, and the end. With torchrun, every rank runs this file.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nanovlm_fast.command import begin, reports_errors

# Before PyTorch is imported, which takes seconds: Ctrl-C is one line, and threads' waiting is set.
begin(__name__ == "__main__")

from tqdm import tqdm

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.stream import undeal
from nanovlm_fast.data.workers import batches_of
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.journal import Stopped
from nanovlm_fast.reporting.metrics import summary_table
from nanovlm_fast.reporting.plan import plan
from nanovlm_fast.reporting.summary import score, summarise
from nanovlm_fast.runs import hold
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.optim import apply_gradients, lr_factor, set_lr
from nanovlm_fast.training.parallel import unsharded
from nanovlm_fast.training.setup import Run
from nanovlm_fast.training.signals import EXIT_SAVED
from nanovlm_fast.training.steps import (
    StepData,
    accumulate_gradients,
    agree,
    fill_with_padding,
    next_batches,
)


class Trainer(Run):
    """A run that is ready (`Run`), and its training. With several ranks, one of them."""

    def train(self) -> None:
        """The loop.

        Raises Stopped when the run cannot go on, and SystemExit(EXIT_SAVED) after a signal.
        """
        config = self.config
        state = self.state
        alone = self.world.size == 1

        # Batches are packed by workers and copied to the device ahead of their step. Padding can
        # only be trimmed where shapes may change: not for compiled code, and not with other ranks.
        batches = batches_of(self.stream, pin_memory=self.device.type == "cuda")
        feed = Feed(batches, self.device, trim=config.compile == "none" and alone)
        self.warm_up()

        # A run that was ended during an evaluation resumes with that evaluation.
        if state.evaluated != state.step and is_due(state.step, config.eval_every):
            self.validate()

        # The clock starts in the past, by what the run has trained before it was resumed.
        started = time.perf_counter() - state.seconds
        meter = self.make_meter()
        # Collections would stop the host at random and let the device run dry: `save` collects.
        gc.collect()
        gc.disable()
        with self.progress_bar() as bar:
            while not config.max_steps or state.step < config.max_steps:
                # Data: this rank's micro-batches. The host waits only for its own workers.
                self.watchdog.beat(f"waiting for the data of step {state.step + 1}")
                step = next_batches(feed, self.accumulate, state, meter, self.journal)
                before = self.progress()
                # The ranks end the data together: a rank that stopped alone would leave the
                # others waiting for its gradients.
                n_labels = self.agree_on(step)
                if not n_labels:
                    self.journal.note_the_datas_end()
                    break
                # The rate needs the examples of all ranks, which are counted by now.
                after = self.progress(steps=1)
                lr = lr_factor(before, after, config.warmup, config.min_lr)

                # Compute: kernels are queued; nothing here waits for the device.
                self.watchdog.beat(f"computing step {state.step + 1}")
                self.optimizer_step(step.batches, n_labels, lr)
                state.seconds = time.perf_counter() - started
                bar.update((state.step if config.max_steps else state.examples) - bar.n)

                # A line begun now is written a logging interval later, when its loss has arrived.
                if is_due(state.step, config.log_every):
                    self.journal.finish_line(bar)
                    speed = meter.read(feed.waited(), self.world)
                    self.journal.begin_line(speed, lr, self.optimizers, self.stats)
                if is_due(state.step, config.eval_every):
                    self.validate()  # which saves
                    # Evaluation is not training time.
                    started = time.perf_counter() - state.seconds
                    meter.reset()
                elif is_due(state.step, config.save_every):
                    self.save()
                # With other ranks, a signal stops the run at the step that all agreed on.
                if self.stopping or (alone and self.signals.came):
                    self.stop()
        self.validate()
        # A signal during the last evaluation: some ranks may have received it and others not.
        if self.world.sum([self.signals.came])[0]:
            self.stop()
        self.wait_for_checkpoint()

    def progress_bar(self) -> tqdm:
        """In steps where --max-steps sets the run's length, else in examples."""
        by_steps = self.config.max_steps > 0
        return tqdm(
            total=self.config.max_steps if by_steps else self.total,
            initial=self.state.step if by_steps else self.state.examples,
            unit="step" if by_steps else "image",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not self.world.first,
        )

    def progress(self, steps: int = 0) -> float:
        """How far the run is, in [0, 1]: by examples or, with --max-steps, after `steps` more."""
        if limit := self.config.max_steps:
            return min((self.state.step + steps) / limit, 1.0)
        return min(self.state.examples / self.total, 1.0)

    def agree_on(self, step: StepData) -> int:
        """Count the step's data over all ranks; return its labels (0: all data is exhausted)."""
        state = self.state
        self.watchdog.beat(
            f"waiting for the other ranks before step {state.step + 1}", waiting=True
        )
        skips = len(self.journal.pending_skips)
        agreed = agree(self.world, step, skips, self.signals.came)
        state.examples += agreed.taken.examples
        state.tokens += agreed.taken.tokens
        state.capacity += agreed.taken.capacity
        before = state.filled or {}  # none in a checkpoint of an older version
        state.filled = {n: before.get(n, 0) + more for n, more in agreed.taken.filled.items()}
        dropped = Counter(state.dropped or {})
        dropped.update(agreed.taken.dropped)
        state.dropped = {reason: count for reason, count in dropped.items() if count} or None
        self.stopping = agreed.signals > 0
        # Naming them is a collective too: every rank comes here if any has one.
        if agreed.pending_skips:
            self.journal.note_skipped()
        # Sharded, every forward fetches weights from all ranks; replicated, only the last backward
        # of a step reduces. One rank alone never needs padding.
        if agreed.n_labels and self.world.size > 1:
            wanted = self.accumulate if self.config.shard else 1
            budget = self.stream.budget
            fill_with_padding(step, wanted, budget, self.model.config, self.device)
        return agreed.n_labels

    def optimizer_step(self, batches: list[PackedBatch], n_labels: int, lr: float) -> None:
        """Forward and backward of every micro-batch, then one update.

        The loss is the mean over the `n_labels` labelled tokens of all micro-batches on all ranks.
        """
        set_lr(self.optimizers, lr)
        labels_per_rank = n_labels / self.world.size
        total = accumulate_gradients(
            self.forward, self.step_model, batches, labels_per_rank, self.autocast, self.scaler
        )
        # An update whose gradients are not finite is skipped on the device; the host learns of it
        # a logging interval later, from the statistics.
        update = apply_gradients(
            self.model, self.optimizers, self.config.clip, self.keep_gradients, self.scaler
        )
        self.stats.add(total, n_labels, update.norm, update.skipped)
        self.state.step += 1
        self.journal.remember_samples(self.state.step, batches)

    def validate(self) -> None:
        """Save, then score the held-out images and --eval, at most once per step."""
        state = self.state
        # First, because an evaluation takes minutes and may be what fails.
        self.save()
        if state.evaluated == state.step or not (len(self.val_source) or self.benchmark):
            return
        state.evaluated = state.step
        # The first rank scores on a whole model, which sharded weights need all ranks for.
        model = unsharded(self.model)
        if self.world.first:
            with self.autocast():
                scores = score(
                    model,
                    self.tokenizer,
                    held_out=self.val_source,
                    benchmark=self.benchmark,
                    config=self.config,
                    state=state,
                    alive=self.watchdog.evaluating,
                )
            self.journal.write({"step": state.step, **scores, "seconds": round(state.seconds, 3)})
        self.watchdog.evaluated()
        # What the first rank noted in its state is the state of all.
        noted = {name: getattr(state, name) for name in SCORED}
        for name, value in self.world.gather(noted)[0].items():
            setattr(state, name, value)
        # Again: the best checkpoint is known now, and the scores are not evaluated twice.
        self.save()

    def save(self) -> None:
        """Begin a checkpoint; it is written in the background.

        Raises Stopped, OSError or ValueError for what the checkpoint before it met.
        """
        state = self.state
        self.watchdog.beat(f"waiting for the other ranks to save step {state.step}", waiting=True)
        self.journal.finish_line()
        read_stats = self.stats.peek()
        shares = self.world.gather(state.stream)
        values = {**state.to_json(), "stream": undeal(shares)}
        # One at a time: both would copy into the same host memory.
        self.wait_for_checkpoint()
        factors = [g["lr"] / g["peak_lr"] for o in self.optimizers for g in o.param_groups]
        advice = self.journal.advice(state.step, max(factors))

        # The statistics are on the device: the writer thread reads them, and the loop goes on.
        def late() -> dict[str, Any]:
            return self.journal.to_save(read_stats())

        self.checkpoints.save(self.model, self.optimizers, values, late, advice)
        gc.collect()

    def stop(self) -> None:
        """Save and leave, after a signal."""
        self.save()
        self.checkpoints.wait()
        # Together: torchrun ends all ranks as soon as it sees that one has left.
        self.world.barrier()
        done = f"interrupted at step {self.state.step}: saved"
        self.journal.say(f"{done}; go on with --resume --out {self.run}")
        raise SystemExit(EXIT_SAVED)

    def finish(self) -> None:
        """Curves, the test split with and without images, a grid of answers, and the summary."""
        model = unsharded(self.model)
        accuracies = {}
        if self.world.first:
            with self.autocast():
                accuracies = summarise(
                    self.run,
                    model,
                    self.tokenizer,
                    held_out=self.val_source,
                    config=self.config,
                    state=self.state,
                    alive=self.watchdog.evaluating,
                )
        self.watchdog.evaluated()
        self.watchdog.stop()
        # Last: it may wait for a network, which the watchdog must not take for a hang.
        self.journal.close(accuracies)


# What an evaluation changes in the state.
SCORED = ("bad", "best_step", "best_accuracy", "eval")


def is_due(step: int, every: int) -> bool:
    """Whether something that is done `every` so many steps (0: never) follows this one."""
    return every > 0 and step % every == 0


@reports_errors(Stopped)
def main(argv: list[str] | None = None) -> int:
    model_config, config = parse_config(argv)
    if config.dry_run:
        print(summary_table(plan(model_config, config)))
        return 0
    world = World.join(config.device)
    # The lock of the folder is held until the last picture is written.
    with hold(Path(config.out), world):
        trainer = Trainer(model_config, config, world)
        # Only now: a signal that comes earlier ends the command at once, with nothing to save.
        trainer.signals.listen()
        trainer.train()
        # All is saved but the last scores, which --auto-resume computes again.
        trainer.signals.leave_at_once()
        trainer.finish()
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
