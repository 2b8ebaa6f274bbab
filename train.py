"""Train a small vision-language model: the whole loop, from top to bottom.

python train.py                     preset tiny: from scratch on easy-VQA, on a laptop, in minutes
python train.py --help              every option with its default
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanovlm_fast.backbones import load_pretrained_weights
from nanovlm_fast.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from nanovlm_fast.config import TrainConfig, VLMConfig, check_run_folder, holds_run, parse_config, save_run_config
from nanovlm_fast.data.sources import load_source, make_tokenizer, split_off
from nanovlm_fast.data.stream import (
    Feed,
    PackedStream,
    SampleLoader,
    StreamBatch,
    advance,
    initial_states,
    loader,
    measure_budget,
)
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.metrics import Meter, MetricsLog, StepStats, peak_flops, summary_table
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.ops import choose_ops
from nanovlm_fast.optim import lr_factor, make_optimizers, set_lr
from nanovlm_fast.packing import PackedBatch
from nanovlm_fast.plan import plan
from nanovlm_fast.summary import score, summarise
from nanovlm_fast.warmup import warm_up

NAMED = 100  # samples over the budget that are named before they are only counted


class Stopped(RuntimeError):
    """A run that had to stop; the message says why and what to do."""


class Trainer:
    """One run: what it needs, and the state that a checkpoint keeps (`self.state`)."""

    def __init__(self, model_config: VLMConfig, config: TrainConfig):
        self.born, self.config = time.perf_counter(), config
        self.run = Path(config.out)
        source = load_source(config.data, "train")
        self.train_source, self.val_source = split_off(source, config.val_samples, config.seed)
        check_run_folder(self.run, config)
        self.benchmark = load_source(config.eval, "test") if config.eval else None
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.autocast = autocast_to(self.dtype, self.device)
        self.tokenizer = self.load_tokenizer(model_config)
        text = TextProcessor(self.tokenizer, model_config.prompt, model_config.image_tokens, config.turns)
        load = SampleLoader(self.train_source, model_config, config, text)
        budget = measure_budget(load, config)
        # sizes measured now are the run's from here on: a resume must not measure again
        self.config = config = dataclasses.replace(
            config,
            images_per_batch=budget.images,
            documents_per_batch=budget.documents,
            labels_per_batch=budget.labels,
            max_seqlen=budget.max_seqlen,
        )
        torch.manual_seed(config.seed)
        ops = choose_ops(config.kernels, self.device, config.attention, self.dtype, config.recompute)
        self.model = VisionLanguageModel(model_config, ops).to(self.device)
        checkpoint = newest_checkpoint(self.run) if config.resume else None
        if checkpoint is None:
            load_pretrained_weights(self.model, config)
        self.optimizers = make_optimizers(self.model, config)
        self.state = {
            "step": 0, "examples": 0, "bad": {}, "too_long": 0, "seconds": 0.0, "tokens": 0, "capacity": 0,
            "evaluated": 0, "best_step": None, "best_accuracy": -1.0, "loss_sum": 0.0, "loss_labels": 0,
            "stream": initial_states(max(config.workers, 1)),
        }  # fmt: skip
        # nothing was written or deleted until here: a command that cannot start leaves everything as it was
        if config.overwrite and holds_run(self.run):
            shutil.rmtree(self.run)
        self.run.mkdir(parents=True, exist_ok=True)
        print(f"device: {self.device}, {str(self.dtype)[6:]} · compile: {config.compile} · {ops}")
        save_run_config(self.run, model_config, config)
        self.tokenizer.save(self.run)
        if checkpoint:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
            print(f"resuming {self.run} after step {self.state['step']}")
        self.log = MetricsLog(self.run, self.state["step"])
        self.wandb = start_wandb(self.run, model_config, config)
        self.step_model: Callable[[PackedBatch], Tensor] = self.model
        if config.compile != "none":
            self.step_model = torch.compile(self.model, fullgraph=True, dynamic=False, mode=config.compile)
        self.stats = StepStats(self.device, self.state["loss_sum"], self.state["loss_labels"])
        self.pending: tuple[dict, Callable] | None = None  # a line of the log whose loss is on its way from the device
        self.stream = PackedStream(load, budget, self.state["stream"])
        self.total = self.stream.total  # examples
        self.unlabelled = 0  # examples since the last label
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=2 * config.log_every + 1)  # samples of the last steps
        self.interrupted = False

    def load_tokenizer(self, model: VLMConfig) -> Tokenizer:
        """A resumed run's own, or a new one."""
        if self.config.resume and (self.run / "tokenizer.json").exists():
            return Tokenizer.load(self.run)
        return make_tokenizer(model, self.train_source)

    def train(self) -> None:
        """The loop. Raises Stopped when the run cannot go on, and SystemExit(0) once a signal's save is done."""
        config, state = self.config, self.state
        unit, total, done = (
            ("step", config.max_steps, "step") if config.max_steps else ("image", self.total, "examples")
        )
        batches = iter(loader(self.stream, pin_memory=self.device.type == "cuda"))
        feed = Feed(batches, self.device, trim=config.compile == "none")
        self.warm_up()
        started, meter = time.perf_counter() - state["seconds"], self.make_meter()
        gc.collect()
        gc.disable()  # its pauses fall between kernels; `save` collects
        with tqdm(total=total, initial=state[done], unit=unit, dynamic_ncols=True, smoothing=0.05) as bar:
            while not config.max_steps or state["step"] < config.max_steps:
                micro_batches = self.next_batches(feed, meter)
                if not micro_batches:
                    break
                lr = lr_factor(self.progress(), config.warmup, config.min_lr)
                self.optimizer_step(micro_batches, lr)
                state["seconds"] = time.perf_counter() - started
                bar.update(state[done] - bar.n)
                if state["step"] % config.log_every == 0:
                    self.log_line(meter.read(feed.waited()), lr, bar)
                if config.eval_every and state["step"] % config.eval_every == 0:
                    self.validate()
                    started = time.perf_counter() - state["seconds"]  # that was not training time
                    meter.reset()
                elif config.save_every and state["step"] % config.save_every == 0:
                    self.save()
                if self.interrupted:
                    break
        if self.interrupted:
            self.save()
            print(f"interrupted at step {state['step']}: saved; continue with --resume --out {self.run}")
            raise SystemExit(0)
        self.validate()

    def warm_up(self) -> None:
        """Compile, load kernels and try the memory on made-up data, before the clock starts."""
        graphs = self.config.compile == "reduce-overhead"
        if self.config.compile != "none" or self.device.type == "cuda":
            warm_up(self.forward, self.model, self.stream.budget, self.autocast, rounds=3 if graphs else 1)
        # gradients that live in a graph's memory would be overwritten by the next micro-batch
        self.keep_gradients = graphs and self.config.accumulate > 1
        for parameter in self.model.parameters():
            if self.keep_gradients and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        print(f"ready for the first step {time.perf_counter() - self.born:.1f} s after the start")

    def make_meter(self) -> Meter:
        frozen = [name for name, part in self.model.named_children() if not next(part.parameters()).requires_grad]
        return Meter(self.model.config, peak_flops(self.device, self.dtype), frozen)

    def interrupt(self, signum: int, _frame: object) -> None:
        """Signal handler: save after this step and stop; a second signal stops at once."""
        self.interrupted = True
        signal.signal(signum, signal.SIG_DFL)

    def optimizer_step(self, micro_batches: list[PackedBatch], lr: float) -> None:
        """Forward and backward of every micro-batch, then one update: the mean loss over all their labelled tokens."""
        set_lr(self.optimizers, lr)
        step, n_labels = self.state["step"] + 1, sum(batch.n_labels for batch in micro_batches)
        total, norm = torch.zeros((), device=self.device), None
        for batch in micro_batches:
            with self.autocast():
                loss_sum = self.forward(batch)
            (loss_sum / n_labels).backward()
            total += loss_sum.detach()
        if self.config.clip or step % self.config.log_every == 0:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.stats.add(step, total, n_labels, norm)
        self.recent.append((step, [name for batch in micro_batches for name in batch.names]))
        self.state["step"] = step

    def forward(self, batch: PackedBatch) -> Tensor:
        """The summed loss of a packed batch."""
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return self.step_model(batch)

    def progress(self) -> float:
        """How far the run will be after the coming step, in [0, 1]: what the learning rate follows."""
        if self.config.max_steps:
            return min((self.state["step"] + 1) / self.config.max_steps, 1.0)
        return min(self.state["examples"] / self.total, 1.0)

    def next_batches(self, feed: Feed, meter: Meter) -> list[PackedBatch]:
        """The micro-batches of one optimizer step, each with labels, on the device; empty at the end of the data."""
        state, micro_batches = self.state, []
        while len(micro_batches) < self.config.accumulate:
            batch, on_device = next(feed, (None, None))
            if batch is None:
                break
            meter.add(batch.packed)
            state["stream"] = advance(state["stream"], batch)
            state["examples"] += batch.consumed
            if not batch.curriculum:  # while it lasts images, not tokens, are the limit
                state["tokens"] += batch.packed.n_tokens
                state["capacity"] += batch.packed.input_ids.numel()
            self.note_skipped(batch)
            self.unlabelled = 0 if batch.packed.n_labels else self.unlabelled + batch.consumed
            if self.unlabelled > len(self.train_source):
                raise Stopped("a whole epoch without one labelled token: there is nothing to learn in this data")
            if batch.packed.n_labels:
                micro_batches.append(on_device)
        return micro_batches

    def note_skipped(self, batch: StreamBatch) -> None:
        """Name and count the examples that were left out; raise Stopped when too many of them are unreadable."""
        state, limit = self.state, self.config.max_bad_samples
        new = {str(i): reason for i, reason in batch.bad.items() if str(i) not in state["bad"]}  # not every epoch anew
        state["bad"] |= new
        room = max(NAMED - state["too_long"], 0)
        state["too_long"] += len(batch.too_long)
        for kind, reason in [("unreadable", reason) for reason in new.values()] + [
            ("too long", r) for r in batch.too_long[:room]
        ]:
            tqdm.write(f"skipped, {kind}: {reason}")
            self.log.write({"step": state["step"] + 1, "skipped": reason})
        if len(state["bad"]) > limit:
            raise Stopped(f"{len(state['bad'])} unreadable samples are over --max-bad-samples {limit}")

    def log_line(self, speed: dict[str, float], lr: float, bar: tqdm) -> None:
        """Write the line of the interval before, whose loss has arrived by now, and begin this one's."""
        self.write_pending(bar)
        state = self.state
        values = {"step": state["step"], "loss": None, "lr": lr}
        values |= {f"lr_{group['name']}": group["lr"] for o in self.optimizers for group in o.param_groups}
        values |= {"seconds": round(state["seconds"], 3), "examples": state["examples"], **speed}
        self.pending = values, self.stats.take()

    def write_pending(self, bar: tqdm | None = None) -> None:
        """Write the line whose loss was on its way; raises Stopped if that loss is not finite."""
        if not self.pending:
            return
        (values, read), self.pending = self.pending, None
        values |= read()
        if bad := values.pop("bad_step"):
            raise Stopped(self.not_finite(f"the loss is not finite at step {bad}", bad, values["lr"]))
        self.log.write(values)
        if self.wandb:
            self.wandb.log(values, step=values["step"])
        if bar:
            speed = f"{values['tokens_per_s']:,.0f} tok/s wait {values['data_wait']:.0%}"
            bar.set_postfix_str(f"loss {values['loss']:.4f} lr x{values['lr']:.2f} {speed}")

    def validate(self) -> None:
        """Save, then score what there is to score, once a step."""
        state = self.state
        self.save()
        if state["evaluated"] == state["step"] or not (len(self.val_source) or self.benchmark):
            return
        state["evaluated"] = state["step"]
        with self.autocast():
            scores = score(self.model, self.tokenizer, self.val_source, self.benchmark, self.config, state)
        values = {"step": state["step"], **scores, "seconds": round(state["seconds"], 3)}
        self.log.write(values)
        if self.wandb:
            self.wandb.log(values, step=state["step"])
        self.save()

    def save(self) -> None:
        """Write a checkpoint; raises Stopped instead of replacing a good one by weights that are not finite."""
        self.write_pending()
        state = self.state
        state["loss_sum"], state["loss_labels"] = self.stats.loss_sum.item(), self.stats.labels
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            lr = max(g["lr"] / g["peak_lr"] for o in self.optimizers for g in o.param_groups)
            raise Stopped(self.not_finite(f"weights are not finite after step {state['step']}", state["step"], lr))
        save_checkpoint(self.run, self.model, self.tokenizer, self.optimizers, self.state)
        gc.collect()

    def not_finite(self, what: str, step: int, lr: float) -> str:
        kept, names = newest_checkpoint(self.run), dict(self.recent).get(step, [])
        return f"{what}, learning rate x{lr:.3f} of its peak. Samples of the batch: {', '.join(names)}. " + (
            f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet."
        )

    def finish(self) -> None:
        """Curves, the test split seeing and blind, a grid of answers, and the summary."""
        accuracies = summarise(
            self.run, self.model, self.tokenizer, self.val_source, self.config, self.state, self.autocast
        )
        if self.wandb:
            self.wandb.summary.update(accuracies)
            self.wandb.finish()


def start_wandb(run: Path, model: VLMConfig, config: TrainConfig):
    if not config.wandb:
        return None
    import wandb

    values = {**dataclasses.asdict(model), **dataclasses.asdict(config)}
    return wandb.init(project=config.wandb_project, name=run.name, dir=run, config=values)


def main(argv: list[str] | None = None) -> int:
    model_config, config = parse_config(argv)
    try:
        if config.dry_run:
            print(summary_table(plan(model_config, config)))
            return 0
        trainer = Trainer(model_config, config)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, trainer.interrupt)
        trainer.train()
        if trainer.interrupted:
            return 0
        for signum in (signal.SIGTERM, signal.SIGINT):  # everything is saved: nothing is lost by stopping now
            signal.signal(signum, lambda *_: sys.exit(0))
        trainer.finish()
    except (OSError, ValueError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
