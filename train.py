"""Train a small vision-language model: the whole loop, from top to bottom.

python train.py                     preset tiny: from scratch on easy-VQA, on a laptop, in minutes
python train.py --help              every option with its default
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nanovlm_fast.backbones import load_pretrained_weights
from nanovlm_fast.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from nanovlm_fast.config import TrainConfig, VLMConfig, check_run_folder, holds_run, parse_config, save_run_config
from nanovlm_fast.data.sources import Source, load_source, split_off, texts
from nanovlm_fast.data.stream import (
    PackedStream,
    SampleLoader,
    StreamBatch,
    advance,
    initial_states,
    loader,
    measure_budget,
)
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import pick_autocast, pick_device
from nanovlm_fast.evaluate import answer_samples, evaluate
from nanovlm_fast.metrics import Meter, MetricsLog, summary_table
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.ops import choose_ops
from nanovlm_fast.optim import lr_factor, make_optimizers, set_lr
from nanovlm_fast.packing import PackedBatch
from nanovlm_fast.pictures import plot_curves, plot_samples


class Stopped(RuntimeError):
    """A run that had to stop; the message says why and what to do."""


class Trainer:
    """One run: what it needs, and the state that a checkpoint keeps (`self.state`)."""

    def __init__(self, model_config: VLMConfig, config: TrainConfig):
        self.config = config
        self.run = Path(config.out)
        source = load_source(config.data, "train")
        self.train_source, self.val_source = split_off(source, config.val_samples, config.seed)
        check_run_folder(self.run, config)
        self.device = pick_device(config.device)
        self.autocast = pick_autocast(config.dtype, self.device)
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
        self.ops = choose_ops(config.kernels, self.device)
        self.model = VisionLanguageModel(model_config, self.ops).to(self.device)
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
        print(f"device: {self.device} · kernels: {', '.join(self.ops.kernels) or 'none, plain PyTorch'}")
        save_run_config(self.run, model_config, config)
        self.tokenizer.save(self.run)
        if checkpoint:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
            print(f"resuming {self.run} after step {self.state['step']}")
        self.log = MetricsLog(self.run, self.state["step"])
        self.wandb = start_wandb(self.run, model_config, config)
        self.step_model = torch.compile(self.model, fullgraph=True, dynamic=False) if config.compile else self.model
        self.stream = PackedStream(load, budget, self.state["stream"])
        self.total = self.stream.total  # examples
        self.unlabelled = 0  # examples since the last label
        self.last_names: list[str] = []
        self.interrupted = False

    def load_tokenizer(self, model: VLMConfig) -> Tokenizer:
        """A resumed run's own, or made from the training text, or a Hugging Face one."""
        if self.config.resume and (self.run / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(self.run)
        elif model.lm_tokenizer == "train":
            tokenizer = Tokenizer.train(texts(self.train_source, model.prompt), model.lm_vocab_size)
        else:
            tokenizer = Tokenizer.from_hub(model.lm_tokenizer)
        if len(tokenizer) > model.lm_vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, --lm-vocab-size is {model.lm_vocab_size}")
        return tokenizer

    def train(self) -> None:
        """The loop. Raises Stopped when the run cannot go on, and SystemExit(0) once a signal's save is done."""
        config, state, meter = self.config, self.state, Meter()
        unit, total, done = (
            ("step", config.max_steps, "step") if config.max_steps else ("image", self.total, "examples")
        )
        batches = iter(loader(self.stream, pin_memory=self.device.type == "cuda"))
        started = time.perf_counter() - state["seconds"]
        with tqdm(total=total, initial=state[done], unit=unit, dynamic_ncols=True, smoothing=0.05) as bar:
            while not config.max_steps or state["step"] < config.max_steps:
                micro_batches = self.next_batches(batches, meter)
                if not micro_batches:
                    break
                lr = lr_factor(self.progress(), config.warmup, config.min_lr)
                self.optimizer_step(micro_batches, lr)
                state["seconds"] = time.perf_counter() - started
                bar.update(state[done] - bar.n)
                if state["step"] % config.log_every == 0:
                    self.log_line(meter, lr, bar)
                if config.eval_every and state["step"] % config.eval_every == 0:
                    self.validate()
                    started, meter = time.perf_counter() - state["seconds"], Meter()  # that was not training time
                elif config.save_every and state["step"] % config.save_every == 0:
                    self.save()
                if self.interrupted:
                    break
        if self.interrupted:
            self.save()
            print(f"interrupted at step {state['step']}: saved; continue with --resume --out {self.run}")
            raise SystemExit(0)
        self.validate()

    def interrupt(self, signum: int, _frame: object) -> None:
        """Signal handler: save after this step and stop; a second signal stops at once."""
        self.interrupted = True
        signal.signal(signum, signal.SIG_DFL)

    def optimizer_step(self, micro_batches: list[PackedBatch], lr: float) -> None:
        """Forward and backward of every micro-batch, then one update: the mean loss over all their labelled tokens."""
        set_lr(self.optimizers, lr)
        n_labels = sum(batch.n_labels for batch in micro_batches)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with self.autocast():
                loss_sum = self.step_model(batch.to(self.device))
            (loss_sum / n_labels).backward()
            total += loss_sum.detach()
        loss = total.item()
        self.last_names = [name for batch in micro_batches for name in batch.names]
        if not math.isfinite(loss):
            raise Stopped(self.not_finite(f"the loss is {loss} at step {self.state['step'] + 1}", lr))
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state["step"] += 1
        self.state["loss_sum"] += loss
        self.state["loss_labels"] += n_labels

    def progress(self) -> float:
        """How far the run will be after the coming step, in [0, 1]: what the learning rate follows."""
        if self.config.max_steps:
            return min((self.state["step"] + 1) / self.config.max_steps, 1.0)
        return min(self.state["examples"] / self.total, 1.0)

    def next_batches(self, batches, meter: Meter) -> list[PackedBatch]:
        """The micro-batches of one optimizer step, with at least one label among them; empty at the end of the data."""
        state, micro_batches = self.state, []
        while len(micro_batches) < self.config.accumulate:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            meter.add(batch.packed, time.perf_counter() - asked)
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
                micro_batches.append(batch.packed if self.config.compile else batch.packed.trimmed())
        return micro_batches

    def note_skipped(self, batch: StreamBatch) -> None:
        """Name and count the examples that were left out; raise Stopped when too many of them are unreadable."""
        state, limit = self.state, self.config.max_bad_samples
        new = {str(i): reason for i, reason in batch.bad.items() if str(i) not in state["bad"]}  # not every epoch anew
        state["bad"] |= new
        state["too_long"] += len(batch.too_long)
        for kind, reason in [("unreadable", reason) for reason in new.values()] + [
            ("too long", r) for r in batch.too_long
        ]:
            tqdm.write(f"skipped, {kind}: {reason}")
            self.log.write({"step": state["step"] + 1, "skipped": reason})
        if len(state["bad"]) > limit:
            raise Stopped(f"{len(state['bad'])} unreadable samples are over --max-bad-samples {limit}")

    def log_line(self, meter: Meter, lr: float, bar: tqdm) -> None:
        state, speed = self.state, meter.read()
        values = {"step": state["step"], "loss": state["loss_sum"] / state["loss_labels"]}
        values |= {f"lr_{group['name']}": group["lr"] for o in self.optimizers for group in o.param_groups}
        values |= {"seconds": round(state["seconds"], 3), "examples": state["examples"], **speed}
        state["loss_sum"], state["loss_labels"] = 0.0, 0
        self.log.write(values)
        if self.wandb:
            self.wandb.log(values, step=state["step"])
        bar.set_postfix_str(
            f"loss {values['loss']:.4f} lr x{lr:.2f} {speed['tokens_per_s']:,.0f} tok/s wait {speed['data_wait']:.0%}"
        )

    def validate(self) -> None:
        """Save, score the held-out images, remember the best."""
        state = self.state
        self.save()
        if len(self.val_source) == 0 or state["evaluated"] == state["step"]:
            return
        with self.autocast():
            result = evaluate(self.model, self.tokenizer, self.val_source, self.config.turns)
        state["evaluated"] = state["step"]
        if result.accuracy > state["best_accuracy"]:
            state["best_accuracy"], state["best_step"] = result.accuracy, state["step"]
        values = {"step": state["step"], "accuracy": result.accuracy, "seconds": round(state["seconds"], 3)}
        self.log.write(values)
        if self.wandb:
            self.wandb.log(values, step=state["step"])
        tqdm.write(f"step {state['step']}: {result.accuracy:.1%} of {result.total} held-out questions")
        for reason in result.skipped:
            if reason not in state["bad"]:
                state["bad"][reason] = reason
                tqdm.write(f"skipped, held out: {reason}")
        self.save()

    def save(self) -> None:
        """Write a checkpoint; raises Stopped instead of replacing a good one by weights that are not finite."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            lr = max(g["lr"] / g["peak_lr"] for o in self.optimizers for g in o.param_groups)
            raise Stopped(self.not_finite(f"weights are not finite after step {self.state['step']}", lr))
        save_checkpoint(self.run, self.model, self.tokenizer, self.optimizers, self.state)

    def not_finite(self, what: str, lr: float) -> str:
        kept = newest_checkpoint(self.run)
        return f"{what}, learning rate x{lr:.3f} of its peak. Samples of the batch: {', '.join(self.last_names)}. " + (
            f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet."
        )

    def finish(self) -> None:
        """Curves, the test split seeing and blind, a grid of answers, and the summary."""
        plot_curves(self.run)
        state = self.state
        filled = f"{state['tokens'] / state['capacity']:.1%} of the token budget" if state["capacity"] else "-"
        rows = {
            "run": self.run,
            "steps": f"{state['step']:,} in {state['seconds'] / 60:.1f} min on {self.device}",
            "packing": f"{filled} (curriculum aside)" if self.config.curriculum else filled,
            "skipped": f"{len(state['bad'])} unreadable, {state['too_long']} too long",
        }
        test = test_split(self.config.data)
        name, source = ("test split", test) if test else ("held-out images", self.val_source)
        if self.config.final_eval and len(source):
            with self.autocast():
                ask = functools.partial(evaluate, self.model, self.tokenizer, source, self.config.turns, progress=True)
                sees, blind = ask(), ask(blank_images=True)
                if samples := answer_samples(self.model, self.tokenizer, source):
                    plot_samples(self.run / "samples.png", samples)
            kept = ("step", "seconds", "examples", "tokens", "capacity", "too_long", "bad")
            result = {"split": name, "seeing": sees.as_dict(), "blind": blind.as_dict(), **{k: state[k] for k in kept}}
            (self.run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            for kind, (correct, total) in sorted(sees.by_kind.items()):
                rows[f"  {kind}"] = f"{correct / total:.1%} of {total:,} questions"
            rows[name] = f"sees: {sees.accuracy:.1%} · blind: {blind.accuracy:.1%}"
            if self.wandb:
                self.wandb.summary.update({"sees": sees.accuracy, "blind": blind.accuracy})
        print(summary_table(rows))
        if self.wandb:
            self.wandb.finish()


def test_split(data: str) -> Source | None:
    """The data set's test split, or None where it has none."""
    with contextlib.suppress(FileNotFoundError):
        return load_source(data, "test")
    return None


def start_wandb(run: Path, model: VLMConfig, config: TrainConfig):
    if not config.wandb:
        return None
    import wandb

    values = {**dataclasses.asdict(model), **dataclasses.asdict(config)}
    return wandb.init(project=config.wandb_project, name=run.name, dir=run, config=values)


def main(argv: list[str] | None = None) -> int:
    model_config, config = parse_config(argv)
    try:
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
