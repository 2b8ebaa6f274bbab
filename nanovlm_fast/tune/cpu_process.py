"""A process of `cpu.py`: a run that trains for a moment whenever it is asked to."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.workers import batches_of
from nanovlm_fast.ranks import end_with_parent
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.optim import apply_gradients, set_lr
from nanovlm_fast.training.setup import Run
from nanovlm_fast.training.steps import accumulate_gradients, next_batches
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.gate import Gate, judged
from nanovlm_fast.tune.parts import Job, Parts

LR = 0.1  # of the peak: a rate at which any run stays finite for as long as it is timed


class Training:
    """A run's loop, without logs, evaluation and checkpoints."""

    def __init__(self, run: Run):
        self.run = run
        batches = batches_of(run.stream, pin_memory=False)
        self.feed = Feed(batches, run.device, trim=run.config.compile == "none")
        self.meter = run.make_meter()
        run.warm_up()
        set_lr(run.optimizers, LR)

    def train(self, seconds: float) -> dict[str, float]:
        """Whole steps for at least `seconds`: what they took, and the real tokens in them."""
        began = time.perf_counter()
        tokens = 0
        while (took := time.perf_counter() - began) < seconds or not tokens:
            tokens += self.step()
        return {"seconds": took, "tokens": tokens}

    def step(self) -> int:
        """One optimizer step; the real tokens in it."""
        run = self.run
        step = next_batches(self.feed, run.accumulate, run.state, self.meter, run.journal)
        if not step.batches:
            raise RuntimeError("the data has no batch to train on")
        labels = sum(batch.n_labels for batch in step.batches)
        accumulate_gradients(
            run.forward, run.step_model, step.batches, labels, run.autocast, run.scaler
        )
        clip = run.config.clip
        apply_gradients(run.model, run.optimizers, clip, run.keep_gradients, run.scaler)
        return step.taken.tokens


def serve() -> None:
    """Read a run, then questions: {"seconds": s} to train, {"gate": choice} to judge a choice."""
    end_with_parent()
    # Whatever prints meanwhile must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    model = VLMConfig(**first["model"])
    run = Run(model, TrainConfig(**first["train"]))
    training = Training(run)
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(answer(training, model, json.loads(line))), file=answers, flush=True)


def answer(training: Training, model: VLMConfig, question: dict[str, Any]) -> dict[str, Any]:
    if "gate" not in question:
        return training.train(question["seconds"])
    run = training.run
    job = Job.of(model, run.config, run.stream.budget, run.device, run.dtype)
    return {"wrong": judged(Gate(Parts(job)), Choice.from_json(question["gate"]), "blocks")}
