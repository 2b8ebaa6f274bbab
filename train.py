"""Train a small vision-language model: the whole loop, from top to bottom.

python train.py                     preset tiny: from scratch on easy-VQA, on a laptop, in minutes
python train.py --help              every option with its default
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from pathlib import Path

from nanovlm_fast.command import end_on_interrupt, reports_errors

end_on_interrupt(__name__ == "__main__")

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.split import begin_again, split_run
from nanovlm_fast.data.stream import PackedStream, advance, deal, initial_states, undeal
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import batches_of
from nanovlm_fast.device import autocast_to, be_deterministic, pick_device, pick_dtype
from nanovlm_fast.model.flops import peak_flops
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.journal import Journal, Stopped
from nanovlm_fast.reporting.metrics import Meter, StepStats, summary_table
from nanovlm_fast.reporting.plan import plan
from nanovlm_fast.reporting.summary import score, summarise
from nanovlm_fast.runs import beginning, check_run_folder, hold, save_run_config
from nanovlm_fast.training.build import build
from nanovlm_fast.training.checkpoint import Checkpointer, newest_state
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.optim import lr_factor, set_lr, skip_if_not_finite
from nanovlm_fast.training.parallel import reducing, unsharded, whole
from nanovlm_fast.training.signals import SAVED, Signals
from nanovlm_fast.training.warmup import warm_up
from nanovlm_fast.training.watchdog import Watchdog


class Trainer:
    """One run: what it needs, and the state that a checkpoint keeps (`self.state`). With several ranks, one of them."""

    def __init__(self, model_config: VLMConfig, config: TrainConfig, world: World | None = None):
        self.born, self.world = time.perf_counter(), world or World()
        self.run = Path(config.out)
        self.watchdog = Watchdog(config.hang_timeout, self.run, self.world)
        self.watchdog.pause()  # data and weights may come from far away
        newest = newest_state(self.run, self.world) if config.resume else (None, None)
        checkpoint, saved_state = newest
        split = split_run(load_source(config.data, "train"), config, self.world, saved_state)
        self.train_source, self.val_source = split.train, split.held_out
        check_run_folder(self.run, config)
        self.benchmark = load_source(config.eval, "test") if config.eval else None
        self.device = pick_device(self.world.device(config.device))
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # events are the current device's
        self.dtype = pick_dtype(config.dtype, self.device)
        self.autocast = autocast_to(self.dtype, self.device)
        if config.deterministic:
            be_deterministic()
        self.tokenizer = self.load_tokenizer(model_config, config)
        text = TextProcessor(
            self.tokenizer, model_config.prompt, model_config.image_tokens, config.turns
        )
        load = SampleLoader(self.train_source, model_config, config, text)
        self.watchdog.beat("measuring the budgets on the data")
        budget = measure_budget(load, config)
        self.watchdog.pause()
        # sizes measured now are the run's from here on: a resume must not measure again
        self.config = config = dataclasses.replace(
            config,
            images_per_batch=budget.images,
            documents_per_batch=budget.documents,
            labels_per_batch=budget.labels,
            max_seqlen=budget.max_seqlen,
        )
        self.state = {
            "step": 0, "examples": 0, "bad": {}, "too_long": 0, "seconds": 0.0, "tokens": 0, "capacity": 0,
            "evaluated": 0, "best_step": None, "best_accuracy": -1.0, "interval": None, "spikes": None,
            "micro_batches": config.accumulate * self.world.size,
            "stream": initial_states(max(config.workers, 1) * self.world.size),
        }  # fmt: skip
        if checkpoint:
            begun, self.state = self.state, saved_state
            if missing := begun.keys() - self.state.keys():
                raise ValueError(
                    f"{checkpoint / 'state.json'}: no {', '.join(sorted(missing))}: of another version?"
                )
        begin_again(self.state, split.record)
        self.state["stream"] = deal(self.state["stream"], self.world.rank, self.world.size)
        micro_batches = self.state["micro_batches"]
        self.accumulate, uneven = divmod(micro_batches, self.world.size)
        if uneven:
            raise ValueError(
                f"{self.world.size} processes cannot share {micro_batches} micro-batches a step"
            )
        built = build(model_config, config, self.device, self.dtype, self.world, checkpoint)
        self.model, self.optimizers, self.step_model = built
        saved = self.state["step"] if checkpoint else None
        self.checkpoints = Checkpointer(
            self.run, self.tokenizer, config.keep_checkpoints, self.world.first, saved
        )
        self.stats = StepStats(self.device, self.world, self.state["interval"])
        self.stream = PackedStream(load, budget, self.state["stream"], self.state["micro_batches"])
        self.total = self.stream.total  # examples
        self.taken = [0, 0, 0]  # of a step, see `next_batches`
        self.signals, self.stopping = Signals(), False
        self.world.barrier()  # all have read what the run's folder holds
        # nothing was written or moved until here, and what fails in here (a full disk, Weights & Biases) is undone:
        # a command that cannot start leaves everything as it was
        with beginning(self.run, config.resume, self.world):
            if self.world.first:
                save_run_config(self.run, model_config, config)
                self.tokenizer.save(self.run)
            self.journal = Journal(self.run, model_config, config, self.state, self.world)
        self.journal.settle = self.wait_for_checkpoint  # before an error says which is the last
        how = f"{str(self.dtype)[6:]} · compile: {config.compile} · {self.model.ops}{self.world}"
        self.journal.say(f"device: {self.device}, {how}")
        if checkpoint:
            self.journal.say(f"resuming {self.run} after step {self.state['step']}")
        self.journal.say("\n".join(split.lines))

    def load_tokenizer(self, model: VLMConfig, config: TrainConfig) -> Tokenizer:
        """A resumed run's own, or a new one."""
        if config.resume and (self.run / "tokenizer.json").exists():
            return Tokenizer.load(self.run)
        return make_tokenizer(model, self.train_source)

    def train(self) -> None:
        """The loop. Raises Stopped when the run cannot go on, and SystemExit(SAVED) once a signal's save is done."""
        config, state, alone = self.config, self.state, self.world.size == 1
        unit, total, done = (
            ("step", config.max_steps, "step")
            if config.max_steps
            else ("image", self.total, "examples")
        )
        batches = batches_of(self.stream, pin_memory=self.device.type == "cuda")
        feed = Feed(batches, self.device, trim=config.compile == "none" and alone)
        self.warm_up()
        if (
            state["evaluated"] != state["step"]
            and config.eval_every
            and state["step"] % config.eval_every == 0
        ):
            self.validate()  # the run had ended in the middle of it
        started, meter = time.perf_counter() - state["seconds"], self.make_meter()
        gc.collect()
        gc.disable()  # its pauses fall between kernels; `save` collects
        shown = dict(unit=unit, dynamic_ncols=True, smoothing=0.05, disable=not self.world.first)
        with tqdm(total=total, initial=state[done], **shown) as bar:
            while not config.max_steps or state["step"] < config.max_steps:
                self.watchdog.beat(f"waiting for the data of step {state['step'] + 1}")
                micro_batches = self.next_batches(feed, meter)
                before = self.progress()
                if not (n_labels := self.agree(micro_batches)):  # which counts the step's examples
                    self.journal.note_the_datas_end()
                    break
                lr = lr_factor(before, self.progress(steps=1), config.warmup, config.min_lr)
                self.watchdog.beat(f"computing step {state['step'] + 1}")
                self.optimizer_step(micro_batches, n_labels, lr)
                state["seconds"] = time.perf_counter() - started
                bar.update(state[done] - bar.n)
                if state["step"] % config.log_every == 0:
                    self.journal.finish_line(bar)
                    self.journal.begin_line(
                        meter.read(feed.waited(), self.world), lr, self.optimizers, self.stats
                    )
                if config.eval_every and state["step"] % config.eval_every == 0:
                    self.validate()
                    started = time.perf_counter() - state["seconds"]  # that was not training time
                    meter.reset()
                elif config.save_every and state["step"] % config.save_every == 0:
                    self.save()
                if self.stopping or (alone and self.signals.came):
                    self.stop()
        self.validate()
        if self.world.sum([self.signals.came])[0]:
            self.stop()
        self.wait_for_checkpoint()

    def stop(self) -> None:
        """Save and leave, for a signal. The ranks leave together: torchrun ends all when it sees that one has."""
        self.save()
        self.checkpoints.wait()
        self.world.barrier()
        self.journal.say(
            f"interrupted at step {self.state['step']}: saved; go on with --resume --out {self.run}"
        )
        raise SystemExit(SAVED)

    def warm_up(self) -> None:
        """Compile, load kernels, try the memory, and the first reduction, on made-up data, before the clock starts."""
        self.watchdog.pause()
        graphs = self.config.compile == "reduce-overhead"
        if self.config.compile != "none" or self.device.type == "cuda" or self.world.size > 1:
            warm_up(
                self.forward,
                self.model,
                self.stream.budget,
                self.autocast,
                rounds=3 if graphs else 1,
            )
        # gradients that live in a graph's memory would be overwritten by the next micro-batch
        self.keep_gradients = graphs and self.accumulate > 1
        for parameter in self.model.parameters():
            if self.keep_gradients and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.journal.say(
            f"ready for the first step {time.perf_counter() - self.born:.1f} s after the start"
        )

    def make_meter(self) -> Meter:
        frozen = [
            name
            for name, part in self.model.named_children()
            if not next(part.parameters()).requires_grad
        ]
        return Meter(self.model.config, peak_flops(self.device, self.dtype), frozen)

    def optimizer_step(self, micro_batches: list[PackedBatch], n_labels: int, lr: float) -> None:
        """Forward and backward of every micro-batch, then one update: the mean loss over the labelled tokens of all.

        `n_labels` counts them on all ranks, over which reducing averages the gradients. The update is skipped, without
        anybody waiting to know, where a gradient is not finite.
        """
        set_lr(self.optimizers, lr)
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches, 1):
            with reducing(self.step_model, now=i == len(micro_batches)):
                with self.autocast():
                    loss_sum = self.forward(batch)
                (loss_sum / (n_labels / self.world.size)).backward()
            total += loss_sum.detach()
        norm = whole(
            nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        )
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        skipped = skip_if_not_finite(self.optimizers, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.stats.add(total, n_labels, norm, skipped)
        self.state["step"] += 1
        self.journal.recent.append(
            (self.state["step"], [name for batch in micro_batches for name in batch.names])
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """The summed loss of a packed batch."""
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return self.step_model(batch)

    def progress(self, steps: int = 0) -> float:
        """How far the run is, in [0, 1], by the examples taken or, with --max-steps, after so many `steps` more."""
        state, limit = self.state, self.config.max_steps
        return min(
            (state["step"] + steps) / limit if limit else state["examples"] / self.total, 1.0
        )

    def next_batches(self, feed: Feed, meter: Meter) -> list[PackedBatch]:
        """This rank's micro-batches of one optimizer step, each with labels, on the device; fewer at the data's end."""
        self.taken = [0, 0, 0]  # examples, tokens and capacity
        micro_batches: list[PackedBatch] = []
        while len(micro_batches) < self.accumulate:
            batch, on_device = next(feed, (None, None))
            if batch is None:
                break
            meter.add(batch.packed)
            self.state["stream"] = advance(self.state["stream"], batch)
            tokens = (
                [0, 0]
                if batch.curriculum
                else [batch.packed.n_tokens, batch.packed.input_ids.numel()]
            )
            # while a curriculum lasts images, not tokens, are the limit
            self.taken = [a + b for a, b in zip(self.taken, [batch.consumed, *tokens], strict=True)]
            self.journal.hear(batch)
            if batch.packed.n_labels:
                micro_batches.append(on_device)
        return micro_batches

    def agree(self, micro_batches: list[PackedBatch]) -> int:
        """The labels of the step on all ranks, 0 at the end of everybody's data; and whether it is the last one.

        A rank whose data is at its end goes on with batches of padding until the last has no more: none waits.
        """
        self.watchdog.beat(
            f"waiting for the other ranks before step {self.state['step'] + 1}", waiting=True
        )
        mine = [
            sum(batch.n_labels for batch in micro_batches),
            len(self.journal.unheard),
            self.signals.came,
            *self.taken,
        ]
        n_labels, unheard, signals, *taken = (int(value) for value in self.world.sum(mine))
        self.taken, self.stopping = [0, 0, 0], signals > 0
        for name, more in zip(("examples", "tokens", "capacity"), taken, strict=True):
            self.state[name] += more
        if unheard:
            self.journal.note_skipped()
        # sharded, every forward needs all ranks; replicated, only the last backward does
        needed = (
            (self.accumulate if self.config.shard else 1) if self.world.size > 1 and n_labels else 0
        )
        while len(micro_batches) < needed:
            config = self.model.config
            micro_batches.append(
                pack([], self.stream.budget, config.image_tokens, config.vit_img_size).to(
                    self.device
                )
            )
        return n_labels

    def validate(self) -> None:
        """Save, then score what there is to score, once a step: the first rank, on a whole model."""
        state = self.state
        self.save()
        if state["evaluated"] == state["step"] or not (len(self.val_source) or self.benchmark):
            return
        state["evaluated"] = state["step"]
        model = unsharded(self.model)
        if self.world.first:
            with self.autocast():
                parts = self.tokenizer, self.val_source, self.benchmark, self.config, state
                scores = score(model, *parts, self.watchdog.evaluating)
            self.journal.write(
                {"step": state["step"], **scores, "seconds": round(state["seconds"], 3)}
            )
        self.watchdog.evaluated()
        scored = {
            name: state[name]
            for name in ("bad", "best_step", "best_accuracy", "eval")
            if name in state
        }
        state |= self.world.gather(scored)[0]
        self.save()

    def save(self) -> None:
        """Begin a checkpoint; raises Stopped or OSError for what the one before it met."""
        self.watchdog.beat(
            f"waiting for the other ranks to save step {self.state['step']}", waiting=True
        )
        self.journal.finish_line()
        stats, lr = (
            self.stats.peek(),
            max(g["lr"] / g["peak_lr"] for o in self.optimizers for g in o.param_groups),
        )
        state = {**self.state, "stream": undeal(self.world.gather(self.state["stream"]))}
        self.wait_for_checkpoint()
        advice = self.journal.advice(state["step"], lr)
        self.checkpoints.save(
            self.model, self.optimizers, state, lambda: {"interval": stats()["kept"]}, advice
        )
        gc.collect()

    def wait_for_checkpoint(self) -> None:
        """Until what was begun is written; what cannot be written stops the run, unless --on-save-error continue."""
        self.watchdog.beat("waiting for a checkpoint to be written")
        try:
            self.checkpoints.wait()
        except OSError as error:
            if self.config.on_save_error == "stop":
                raise
            self.journal.say(f"warning: {error}; training goes on")

    def finish(self) -> None:
        """Curves, the test split seeing and blind, a grid of answers, and the summary."""
        model, accuracies = unsharded(self.model), {}
        if self.world.first:
            parts = (
                self.run,
                model,
                self.tokenizer,
                self.val_source,
                self.config,
                self.state,
                self.autocast,
            )
            accuracies = summarise(*parts, self.watchdog.evaluating)
        self.watchdog.evaluated()
        self.watchdog.stop()
        self.journal.close(accuracies)  # may wait for a network: nobody waits for it


@reports_errors(Stopped)
def main(argv: list[str] | None = None) -> int:
    model_config, config = parse_config(argv)
    if config.dry_run:
        print(summary_table(plan(model_config, config)))
        return 0
    world = World.join(config.device)
    with hold(Path(config.out), world):
        trainer = Trainer(model_config, config, world)
        trainer.signals.listen()
        trainer.train()
        trainer.signals.leave_at_once()
        trainer.finish()
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
