"""What a run needs before its first step: data, device, tokenizer, state, model, folder.

`Run.__init__` prepares these in an order that matters; each block of it says why. Nothing is
written into the run's folder before the last block, so a command that cannot start (no data, no
memory, a wrong option) leaves everything as it was.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import SampleLoader, WellRated
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer, open_stream
from nanovlm_fast.data.split import Split, begin_again, split_run
from nanovlm_fast.data.stream import PackedStream, deal, initial_states
from nanovlm_fast.data.streaming import HeldOut, StreamedStream, split_stream
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.data.workers import usable_cores, workers_for
from nanovlm_fast.device import (
    autocast_to,
    be_deterministic,
    describe,
    leave_busy_cores,
    make_current,
    pick_device,
    pick_dtype,
)
from nanovlm_fast.model.flops import peak_flops
from nanovlm_fast.model.lora import adapter_size
from nanovlm_fast.model.scaling import make_scaler
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.packing.waves import wave_fill
from nanovlm_fast.presets import preset
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.journal import Journal
from nanovlm_fast.reporting.metrics import Meter, StepStats
from nanovlm_fast.runs import (
    RunState,
    beginning,
    check_run_folder,
    save_run_config,
    standing,
    tuned_in,
)
from nanovlm_fast.training.build import build
from nanovlm_fast.training.checkpoint import Checkpointer, newest_state
from nanovlm_fast.training.fit import tokens_that_fit, without_a_gpu
from nanovlm_fast.training.signals import Signals
from nanovlm_fast.training.warmup import warm_up
from nanovlm_fast.training.watchdog import Watchdog
from nanovlm_fast.tune.key import GPU_AUTOS
from nanovlm_fast.tune.settle import Place, settle_run
from nanovlm_fast.weights.adapter import described


class Run:
    """One rank's part of a run that is ready to train; `state` is what its checkpoints keep.

    Raises ValueError or OSError, with a message for the user, for a run that cannot start.
    """

    # Set by `warm_up`: gradients that live in a CUDA graph's memory are zeroed in place.
    keep_gradients = False

    def __init__(self, model_config: VLMConfig, config: TrainConfig, world: World | None = None):
        self.born = time.perf_counter()
        self.world = world or World()
        self.run = Path(config.out)
        self.watchdog = Watchdog(config.hang_timeout, self.run, self.world)
        # Data and weights may come from far away: only from the budgets on is silence a fault.
        self.watchdog.pause()

        # The data first: what it was when the checkpoint was written decides whether the run may
        # resume at all. All ranks must find the same checkpoint and the same data.
        checkpoint: Path | None = None
        saved: dict[str, Any] | None = None
        if config.resume:
            checkpoint, saved = newest_state(self.run, self.world)
        if config.streaming:
            split = split_stream(open_stream(config.data, "train"), config, self.world, saved)
        else:
            split = split_run(load_source(config.data, "train"), config, self.world, saved)
        self.train_source: Source = split.train
        self.val_source: Source = WellRated(split.held_out, config)
        check_run_folder(self.run, config)
        self.benchmark = load_source(config.eval, "test") if config.eval else None

        self._prepare_device(config)
        # What a resume on the same device repeats.
        self.noted = tuned_in(standing(self.run)) if config.resume else None
        wanted = config = without_a_gpu(config, self.device, self.world)
        config = self._settle(model_config, config)

        # Before the data is dealt: a worker reads a shard of its own, and all ranks must have as
        # many of them. The number is the run's from here on.
        if config.workers < 0:
            here = workers_for(self.device.type == "cuda", self.world.local_size)
            config = dataclasses.replace(config, workers=min(self.world.gather(here)))

        # Sizes that are measured on the data now are the run's from here on, and are written to
        # its config.json: a resume that measured again could pack other batches.
        self.tokenizer = self._load_tokenizer(model_config, config)
        load = self._sample_loader(model_config, config)
        budget = self._measure_budget(model_config, config, load)
        config = with_sizes(config, budget)
        self.config = config = self._settle(model_config, config, budget)

        # The model after the state, because a state that these ranks cannot share should be an
        # error before gigabytes of weights are read.
        self.state = begin_state(config, self.world, split, checkpoint, saved)
        self.accumulate = micro_batches_per_rank(self.state, self.world)
        place = self.device, self.dtype, self.world
        self.model, self.optimizers, self.step_model = build(
            model_config, config, *place, checkpoint
        )

        self.checkpoints = Checkpointer(
            self.run,
            self.tokenizer,
            keep=config.keep_checkpoints,
            first=self.world.first,
            saved=self.state.step if checkpoint else None,
        )
        self.scaler = make_scaler(self.dtype, self.device, self.state.loss_scale)
        self.stats = StepStats(self.device, self.world, self.state.interval, self.scaler)
        self.stream = make_stream(load, budget, self.state, split)
        self.total = self.stream.total  # examples in the whole run
        self.signals = Signals()
        self.stopping = False

        # All ranks have read what the folder holds; only now may the first one change it. What
        # fails in here (a full disk, Weights & Biases) is undone.
        self.world.barrier()
        with beginning(self.run, config.resume, self.world):
            if self.world.first:
                self._save_config(model_config, wanted)
                self.tokenizer.save(self.run)
            self.journal = Journal(self.run, model_config, config, self.state, self.world)
        # An error that names the last checkpoint must first wait until it is written.
        self.journal.settle = self.wait_for_checkpoint
        self._introduce(split, resumed=checkpoint is not None)

    def _prepare_device(self, config: TrainConfig) -> None:
        """Pick where to compute, and how, before anything is put there."""
        self.device = make_current(pick_device(self.world.device(config.device)))
        if self.device.type == "mps":
            check_mps(config, self.world)
        self.dtype = pick_dtype(config.dtype, self.device)
        if config.stream == "bfloat16" and self.dtype != torch.bfloat16:
            computed = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"--stream bfloat16 is for products in bfloat16, and {self.device} computes in "
                f"{computed} here: add --dtype bfloat16, or use --stream float32"
            )
        self.autocast = autocast_to(self.dtype, self.device)
        # Sums in another number of threads round differently, so a deterministic run must not
        # depend on what others compute.
        self.beside = "" if config.deterministic else leave_busy_cores(self.device)
        if config.deterministic:
            be_deterministic()

    def _measure_budget(self, model: VLMConfig, config: TrainConfig, load: SampleLoader) -> Budget:
        """The sizes of a batch, by the data and, where --tokens-per-batch is auto, by trial."""
        self.watchdog.beat("measuring the budgets on the data")
        if not config.tokens_per_batch:
            preset_tokens = preset(config.preset)[1].tokens_per_batch
            some = dataclasses.replace(config, tokens_per_batch=preset_tokens)
            measured = measure_budget(load, some)
            self.watchdog.pause()
            tokens = tokens_that_fit(model, config, self.device, self.dtype, measured)
            config = dataclasses.replace(config, tokens_per_batch=tokens)
        budget = measure_budget(load, config)
        self.watchdog.pause()
        return budget

    def _settle(
        self, model: VLMConfig, config: TrainConfig, budget: Budget | None = None
    ) -> TrainConfig:
        """Replace every `auto` by what is chosen.

        On a CPU before the data is dealt, because that depends on the number of workers; on a GPU
        once the budgets are known, because speeds depend on them.
        """
        if (self.device.type == "cpu") == (budget is None):
            place = Place(self.device, self.dtype, self.world)
            self.settled = settle_run(model, config, place, budget, self.noted)
            # Other processes may have taken cores by now, which then are theirs.
            if self.settled.choice.threads and not self.beside:
                torch.set_num_threads(self.settled.choice.threads)
            # Not into the configuration, in which it stays `auto`: another CPU may differ.
            if config.dtype == "auto" and self.settled.choice.dtype != "auto":
                self.dtype = getattr(torch, self.settled.choice.dtype)
                self.autocast = autocast_to(self.dtype, self.device)
            return self.settled.apply(config)
        return config

    def _save_config(self, model: VLMConfig, wanted: TrainConfig) -> None:
        """Write config.json. What is `auto` in `wanted` stays so: another device may differ."""
        as_given = {name: getattr(wanted, name) for name in GPU_AUTOS}
        kept = dataclasses.replace(self.config, **as_given)
        save_run_config(self.run, model, kept, self.settled.record)

    def _load_tokenizer(self, model: VLMConfig, config: TrainConfig) -> Tokenizer:
        """The tokenizer of a resumed run, or a new one: a retrained one may number tokens anew."""
        if config.resume and (self.run / "tokenizer.json").exists():
            return Tokenizer.load(self.run)
        return make_tokenizer(model, self.train_source)

    def _sample_loader(self, model: VLMConfig, config: TrainConfig) -> SampleLoader:
        text = make_text(self.tokenizer, model, config.turns)
        return SampleLoader(self.train_source, model, config, text)

    def _introduce(self, split: Split, resumed: bool) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        how = f"{dtype} · compile: {self.config.compile} · {self.model.ops}{self.world}"
        self.journal.say(f"device: {describe(self.device)}, {how}")
        if adapter := self.model.adapter:
            size = adapter_size(self.model.config, adapter.rank)
            self.journal.say(
                f"adapters of rank {adapter.rank}, alpha {adapter.alpha:g}: {size:,} weights on "
                f"{described(adapter.base)}, whose language model is frozen"
            )
        if self.beside:
            self.journal.say(self.beside)
        if self.settled.how:
            self.journal.say(self.settled.how)
        workers = len(self.stream.states) if self.config.workers else 0
        each = " per process" if self.world.size > 1 else ""
        self.journal.say(f"loader workers: {workers}{each} · cores: {usable_cores()}")
        self.journal.say(f"a batch: {self._batch_sizes()}")
        if resumed:
            self.journal.say(f"resuming {self.run} after step {self.state.step}")
        self.journal.say("\n".join(split.lines))

    def _batch_sizes(self) -> str:
        """The budgets, and on a GPU how well they suit it."""
        budget = self.stream.budget
        sizes = (
            f"{budget.tokens:,} tokens · {budget.images:,} images · {budget.labels:,} labels · "
            f"{budget.documents:,} documents of at most {budget.max_seqlen:,} tokens"
        )
        if self.device.type != "cuda":
            return sizes
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        fill = wave_fill(budget.tokens, self.model.config, sms)
        return f"{sizes} · tiles fill {fill:.0%} of their waves on {sms} SMs"

    def forward(self, batch: PackedBatch) -> Tensor:
        """The summed loss of a packed batch."""
        # Without the mark, CUDA graphs of one micro-batch could overwrite the outputs of another.
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return self.step_model(batch)

    def warm_up(self) -> None:
        """Compile, load kernels, try the memory and the first reduction, before the clock starts.

        The batch is made up and fills the budget: a run that does not fit ends here and not hours
        later, at the first full batch.
        """
        # The first compilation takes minutes, which must not count as a hang.
        self.watchdog.pause()
        graphs = self.config.compile == "reduce-overhead"
        if self.config.compile != "none" or self.device.type == "cuda" or self.world.size > 1:
            # Graphs are recorded in the second round and replayed in the third.
            rounds = 3 if graphs else 1
            warm_up(self.forward, self.model, self.stream.budget, self.autocast, rounds=rounds)
        # The next micro-batch would overwrite gradients that live in a graph's memory, so they are
        # allocated here, outside of it, and added to.
        self.keep_gradients = graphs and self.accumulate > 1
        if self.keep_gradients:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    weight = self.model.masters.of(parameter)
                    weight.grad = torch.zeros_like(weight)
        seconds = time.perf_counter() - self.born
        self.journal.say(f"ready for the first step {seconds:.1f} s after the start")

    def make_meter(self) -> Meter:
        """A meter that counts no backward FLOPs for parts that are frozen."""
        frozen = []
        for name, part in self.model.named_children():
            if not next(part.parameters()).requires_grad:
                frozen.append(name)
        return Meter(self.model.config, peak_flops(self.device, self.dtype), frozen)

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that was begun is written.

        Raises OSError if it could not be, unless --on-save-error is continue; ValueError for
        weights that are not finite.
        """
        self.watchdog.beat("waiting for a checkpoint to be written")
        try:
            self.checkpoints.wait()
        except OSError as error:
            if self.config.on_save_error == "stop":
                raise
            self.journal.say(f"warning: {error}; training goes on")


def check_mps(config: TrainConfig, world: World) -> None:
    """Raise ValueError naming the first option that MPS is not supported with."""
    if world.size > 1:
        raise ValueError("--device mps is for one process: start train.py without torchrun")
    if config.compile not in ("none", "auto"):
        raise ValueError(f"--compile {config.compile} is not supported on MPS: --compile none")
    if config.tune == "again":
        raise ValueError("--tune again measures a CPU or a CUDA GPU, and not MPS: leave it out")


def make_stream(load: SampleLoader, budget: Budget, state: RunState, split: Split) -> PackedStream:
    """The packed batches of this rank's shards."""
    if split.rows is None:
        return PackedStream(load, budget, state.stream, state.micro_batches)
    assert state.data is not None, "the record of what is held out"
    return StreamedStream(split.rows, load, budget, state.stream, HeldOut(state.data["marks"]))


def with_sizes(config: TrainConfig, budget: Budget) -> TrainConfig:
    """The configuration with the sizes that were measured on the data."""
    return dataclasses.replace(
        config,
        tokens_per_batch=budget.tokens,
        images_per_batch=budget.images,
        documents_per_batch=budget.documents,
        labels_per_batch=budget.labels,
        max_seqlen=budget.max_seqlen,
    )


def begin_state(
    config: TrainConfig,
    world: World,
    split: Split,
    checkpoint: Path | None,
    saved: dict[str, Any] | None,
) -> RunState:
    """A new run's state, or that of the checkpoint, with this rank's share of the data's shards.

    Raises ValueError if keys are missing or the ranks cannot share the shards evenly.
    """
    if saved is None:
        shards = max(config.workers, 1) * world.size
        state = RunState(
            micro_batches=config.accumulate * world.size, stream=initial_states(shards)
        )
    else:
        try:
            state = RunState.from_json(saved)
        except ValueError as error:
            assert checkpoint is not None
            raise ValueError(f"{checkpoint / 'state.json'}: {error}") from error
    # On all shards, before they are dealt: data that changed is read anew in every one of them.
    begin_again(state, split.record)
    state.stream = deal(state.stream, world.rank, world.size)
    return state


def micro_batches_per_rank(state: RunState, world: World) -> int:
    """The micro-batches of a step that each rank takes. Raises ValueError if they do not divide.

    The run fixes their number over all ranks, so that a resume on other ranks trains the same.
    """
    each, uneven = divmod(state.micro_batches, world.size)
    if uneven:
        raise ValueError(
            f"{world.size} processes cannot share {state.micro_batches} micro-batches a step"
        )
    return each
