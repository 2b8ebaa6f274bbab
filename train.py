"""Train a small vision-language model: the whole loop, from top to bottom.

python train.py                     preset tiny: from scratch on easy-VQA, on a laptop, in minutes
python train.py --help              every option with its default
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanovlm_fast.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from nanovlm_fast.config import TrainConfig, VLMConfig, parse_config, save_run_config
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.sources import Source, load_source, split_off, texts
from nanovlm_fast.data.stream import PackedStream, SampleLoader, advance, initial_states, loader, measure_budget
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.generate import generate
from nanovlm_fast.metrics import Meter, MetricsLog, summary_table
from nanovlm_fast.model import VisionLanguageModel
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
        prepare_folder(self.run, config)
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
        self.model = VisionLanguageModel(model_config).to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        self.state = {
            "step": 0, "examples": 0, "bad": 0, "too_long": 0, "seconds": 0.0, "tokens": 0, "capacity": 0,
            "evaluated": 0, "best_step": None, "best_accuracy": -1.0, "loss_sum": 0.0, "loss_labels": 0,
            "stream": initial_states(max(config.workers, 1)),
        }  # fmt: skip
        checkpoint = newest_checkpoint(self.run)
        if config.resume and checkpoint:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
        save_run_config(self.run, model_config, config)
        self.log = MetricsLog(self.run, self.state["step"])
        self.wandb = start_wandb(self.run, model_config, config)
        self.step_model = torch.compile(self.model, fullgraph=True, dynamic=False) if config.compile else self.model
        epochs = 10**9 if config.max_steps else config.epochs
        self.stream = PackedStream(load, budget, epochs, self.state["stream"])
        self.interrupted = False

    def load_tokenizer(self, model: VLMConfig) -> Tokenizer:
        """The run's own, or made from the training text, or a Hugging Face one. Saved in the run folder."""
        if (self.run / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(self.run)
        elif model.lm_tokenizer == "train":
            tokenizer = Tokenizer.train(texts(self.train_source, model.prompt), model.lm_vocab_size)
        else:
            tokenizer = Tokenizer.from_hub(model.lm_tokenizer)
        if len(tokenizer) > model.lm_vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, --lm-vocab-size is {model.lm_vocab_size}")
        tokenizer.save(self.run)
        return tokenizer

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: what the learning rate follows."""
        if self.config.max_steps:
            return min(self.state["step"] / self.config.max_steps, 1.0)
        return min(self.state["examples"] / self.stream.total, 1.0)

    def train(self) -> None:
        """The loop. Returns at the end of the run; raises Stopped, or SystemExit(0) once a signal's save is done."""
        config, state, meter = self.config, self.state, Meter()
        batches = iter(loader(self.stream, pin_memory=self.device.type == "cuda"))
        unit = ("step", config.max_steps, "step") if config.max_steps else ("image", self.stream.total, "examples")
        bar = tqdm(total=unit[1], initial=state[unit[2]], unit=unit[0], dynamic_ncols=True, smoothing=0.05)
        started = time.perf_counter() - state["seconds"]
        while not config.max_steps or state["step"] < config.max_steps:
            micro_batches = self.next_batches(batches, meter)
            if not micro_batches:
                break
            lr = lr_factor(self.progress(), config.warmup, config.min_lr)
            set_lr(self.optimizers, lr)
            n_labels = sum(batch.n_labels for batch in micro_batches)
            loss = 0.0
            for batch in micro_batches:
                with self.autocast():
                    loss_sum = self.step_model(batch.to(self.device))
                (loss_sum / n_labels).backward()
                loss += loss_sum.item()
            if not math.isfinite(loss):
                raise Stopped(self.non_finite(loss, lr, micro_batches))
            if config.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            state["step"] += 1
            state["loss_sum"] += loss
            state["loss_labels"] += n_labels
            state["seconds"] = time.perf_counter() - started
            bar.update(state[unit[2]] - bar.n)
            if state["step"] % config.log_every == 0:
                self.log_line(meter, lr, bar)
            if config.eval_every and state["step"] % config.eval_every == 0:
                self.validate(bar)
                started = time.perf_counter() - state["seconds"]  # evaluation is not training time
            elif config.save_every and state["step"] % config.save_every == 0:
                self.save()
            if self.interrupted:
                self.save()
                bar.close()
                print(f"interrupted at step {state['step']}: saved; continue with --resume --out {self.run}")
                raise SystemExit(0)
        self.validate(bar)
        bar.close()

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
            if batch.state["epoch"] >= self.config.curriculum_epochs:  # before that images, not tokens, are the limit
                state["tokens"] += batch.packed.n_tokens
                state["capacity"] += batch.packed.input_ids.numel()
            for kind, reasons in (("bad", batch.bad), ("too_long", batch.too_long)):
                state[kind] += len(reasons)
                for reason in reasons:
                    tqdm.write(f"skipped ({kind.replace('_', ' ')}, {state[kind]} so far): {reason}")
                    self.log.write({"step": state["step"], "skipped": reason})
            if state["bad"] > self.config.max_bad_samples:
                raise Stopped(
                    f"{state['bad']} unreadable samples are over --max-bad-samples {self.config.max_bad_samples}"
                )
            if batch.packed.n_labels:
                micro_batches.append(batch.packed if self.config.compile else batch.packed.trimmed())
        return micro_batches

    def log_line(self, meter: Meter, lr: float, bar: tqdm) -> None:
        state, speed = self.state, meter.read()
        values = {"step": state["step"], "loss": state["loss_sum"] / state["loss_labels"], "progress": self.progress()}
        values |= {f"lr_{group['name']}": group["lr"] for o in self.optimizers for group in o.param_groups}
        values |= {"seconds": round(state["seconds"], 3), "examples": state["examples"], **speed}
        state["loss_sum"], state["loss_labels"] = 0.0, 0
        self.log.write(values)
        if self.wandb:
            self.wandb.log(values, step=state["step"])
        bar.set_postfix_str(
            f"loss {values['loss']:.4f} lr x{lr:.2f} {speed['tokens_per_s']:,.0f} tok/s wait {speed['data_wait']:.0%}"
        )

    def validate(self, bar: tqdm) -> None:
        """Score the held-out images, remember the best, save."""
        state = self.state
        if len(self.val_source) and state["evaluated"] < state["step"]:
            state["evaluated"] = state["step"]
            with self.autocast():
                result = evaluate(self.model, self.tokenizer, self.val_source)
            values = {"step": state["step"], "accuracy": result.accuracy, "seconds": round(state["seconds"], 3)}
            if result.accuracy > state["best_accuracy"]:
                state["best_accuracy"], state["best_step"] = result.accuracy, state["step"]
            self.log.write(values)
            if self.wandb:
                self.wandb.log(values, step=state["step"])
            tqdm.write(f"step {state['step']}: {result.accuracy:.1%} of {result.total} held-out questions")
        self.save()

    def save(self) -> None:
        save_checkpoint(self.run, self.model, self.tokenizer, self.optimizers, self.state)

    def non_finite(self, loss: float, lr: float, batches: list[PackedBatch]) -> str:
        names = list(itertools.chain.from_iterable(batch.names for batch in batches))
        kept = newest_checkpoint(self.run)
        return (
            f"loss is {loss} at step {self.state['step'] + 1}, learning rate x{lr:.3f} of its peak. "
            f"Samples of the batch: {', '.join(names)}. "
            + (f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet.")
        )

    def finish(self) -> None:
        """Curves, the test split seeing and blind, a grid of answers, and the summary."""
        plot_curves(self.run)
        state, config = self.state, self.config
        rows = {
            "run": self.run,
            "steps": f"{state['step']:,} in {state['seconds'] / 60:.1f} min on {self.device}",
            "packing": f"{state['tokens'] / max(state['capacity'], 1):.1%} of the token budget filled (curriculum aside)",
            "skipped": f"{state['bad']} unreadable, {state['too_long']} too long",
        }
        if config.final_eval:
            test = test_split(config.data) or self.val_source
            with self.autocast():
                sees = evaluate(self.model, self.tokenizer, test, progress=True)
                blind = evaluate(self.model, self.tokenizer, test, blank_images=True, progress=True)
                plot_samples(self.run / "samples.png", self.answer_samples(test))
            result = {"seeing": sees.as_dict(), "blind": blind.as_dict(), **state}
            (self.run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            for kind, (correct, total) in sorted(sees.by_kind.items()):
                rows[f"  {kind}"] = f"{correct / total:.1%} of {total:,} questions"
            rows["test split"] = f"sees: {sees.accuracy:.1%} · blind: {blind.accuracy:.1%}"
            if self.wandb:
                self.wandb.summary.update({"sees": sees.accuracy, "blind": blind.accuracy})
        print(summary_table(rows))
        if self.wandb:
            self.wandb.finish()

    def answer_samples(self, source: Source, count: int = 18) -> list[tuple[np.ndarray, str, str, str]]:
        """(image, question, right answer, the model's) for examples spread over the source."""
        config = self.model.config
        text = TextProcessor(self.tokenizer, config.prompt, config.image_tokens)
        samples = []
        for i, index in enumerate(np.unique(np.linspace(0, len(source) - 1, count).astype(int))):
            example = source[int(index)]
            images = [load_image(image, config.vit_img_size) for image in example.images]
            question, answer = example.turns[i % len(example.turns)]
            prompt = text.document([(question, "")], len(images))
            pixels = torch.from_numpy(np.stack(images)).to(self.device)
            (reply,) = generate(self.model, pixels, [prompt], self.tokenizer.eos_id)
            samples.append((images[0], question, answer, self.tokenizer.decode(reply).strip()))
        return samples


def test_split(data: str) -> Source | None:
    """The data set's test split, or None where it has none."""
    with contextlib.suppress(FileNotFoundError):
        return load_source(data, "test")
    return None


def prepare_folder(run: Path, config: TrainConfig) -> None:
    """Make the run folder. Raises ValueError if it holds a run and neither --resume nor --overwrite is given."""
    if (run / "config.json").exists() and not config.resume:
        if not config.overwrite:
            raise ValueError(
                f"{run} already holds a run: --resume continues it, --overwrite deletes it, --out names another"
            )
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no CUDA device")
    return device


def pick_autocast(dtype: str, device: torch.device):
    """A context manager factory: bfloat16 compute on a GPU that has it, float32 elsewhere."""
    fits = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or (dtype == "auto" and fits):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


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
            signal.signal(signum, lambda *_: setattr(trainer, "interrupted", True))
        trainer.train()
        for signum in (signal.SIGTERM, signal.SIGINT):  # everything is saved: nothing is lost by stopping now
            signal.signal(signum, lambda *_: sys.exit(0))
        trainer.finish()
    except (OSError, ValueError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
