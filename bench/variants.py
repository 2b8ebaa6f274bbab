"""The ways to take one optimizer step that bench.train_step compares, and the check that all of them are the same step.

`Padded` is nanoVLM v0.1's way. `Packed` is ours, a `Recipe` of techniques that can be switched one by one. All packed
variants share one set of weights and, but for the unfused one, one optimizer. Learning rates are 0: an update costs
what it costs, and every variant is timed on the weights on which it was compared.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workload import Work
from nanovlm_fast import reference
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.stream import Feed, StreamBatch
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.ops import choose_ops
from nanovlm_fast.optim import make_optimizers, set_lr
from nanovlm_fast.packing import IGNORE, Budget, Document, PackedBatch, Sample, pack, pad
from nanovlm_fast.recompute import POLICIES

FLOOR = 1e-3  # of the float32 value: what bfloat16 may be off by where the reference happens to hit it
SLICE = 16  # rows at a time for the float32 reference, which need not fit the device's memory whole


@dataclass(frozen=True)
class Recipe:
    """How `Packed` computes. The ablation changes one field at a time."""

    packing: bool = True  # documents end to end; or each padded to the longest there may be
    shared_images: bool = True  # one encoding an image; or one a question
    labelled_head: bool = True  # last MLP, head and loss on labelled positions; or on all of them, as v0.1 does
    prefetch: bool = True  # the next batch's bytes copied while a step computes; or float images, waited for
    fused_optimizer: bool = True
    attention: str = "auto"
    kernels: str = "auto"
    compile: str = "none"
    recompute: str = "none"


class Workbench:
    """What the variants share: the work, the device, the types, and the weights of both models."""

    def __init__(self, work: Work, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.work, self.device, self.dtype = work, device, dtype
        self.autocast = autocast_to(dtype, device)
        torch.backends.cudnn.allow_tf32 = False  # or the float32 reference's convolution would round its patches
        torch.manual_seed(seed)
        self.packed = VisionLanguageModel(work.config)
        for name, weight in self.packed.named_parameters():
            if name.endswith("weight") and not weight.any():
                nn.init.normal_(weight, std=0.02)  # branches that start at zero would hide the gradients behind them
        self.packed.to(device)
        self.padded: SeedModel | None = SeedModel(work.config).to(device)
        self.padded.load_state_dict(self.packed.reference_state_dict())
        self.optimizers: list[torch.optim.Optimizer] = make_optimizers(self.packed, TrainConfig())
        set_lr(self.optimizers, 0.0)
        self.forwards: dict[tuple[str, ...], tuple[VisionLanguageModel, Callable[[PackedBatch], Tensor]]] = {}

    def forward_of(self, recipe: Recipe) -> tuple[VisionLanguageModel, Callable[[PackedBatch], Tensor]]:
        """The packed model with a recipe's operations, and it compiled; recipes that agree in them share both."""
        key = recipe.kernels, recipe.attention, recipe.recompute, recipe.compile
        if key not in self.forwards:
            model = copy.copy(self.packed)  # the same modules and weights
            model.ops = choose_ops(recipe.kernels, self.device, recipe.attention, self.dtype, recipe.recompute)
            step = model
            if recipe.compile != "none":
                torch._dynamo.config.recompile_limit = 64  # all variants compile one function
                step = torch.compile(model, fullgraph=True, dynamic=False, mode=recipe.compile)
            self.forwards[key] = model, step
        return self.forwards[key]

    def optimizer_bytes(self) -> int:
        """Of the shared optimizer's state, none before its first step."""
        tensors = [t for o in self.optimizers for state in o.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)


class SeedModel(reference.VisionLanguageModel):
    """The reference with nanoVLM v0.1's head: over every position, image tokens too, and sliced only then."""

    def forward(self, input_ids: Tensor, images: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over labelled positions."""
        logits = self.decoder.head(self.hidden(input_ids, images, attention_mask))[:, -input_ids.shape[1] :]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE)


class Step:
    """One variant: called, it takes an optimizer step; `gradients` takes the same step's forward and backward only."""

    model: nn.Module

    def loss(self) -> Tensor:
        """Mean loss over the labelled tokens, of a batch that comes from the host."""
        raise NotImplementedError

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and every gradient under the reference's names; `clear` drops them."""
        loss = self.loss()
        loss.backward()
        return loss.item(), {name: p.grad for name, p in self.model.named_parameters()}

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


class Padded(Step):
    """As nanoVLM v0.1 trains: left-padded rows, float images from pageable memory, unfused AdamW, the loss read."""

    def __init__(self, bench: Workbench, compiled: bool = False):
        config, self.bench, self.model = bench.work.config, bench, bench.padded
        batch = pad(bench.work.samples, bench.work.text_length)
        pixels = (batch.images.float() / 255 - config.image_mean) / config.image_std
        self.rows = batch.input_ids, pixels, batch.attention_mask, batch.targets
        self.step = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def loss(self) -> Tensor:
        rows = [tensor.to(self.bench.device) for tensor in self.rows]
        with self.bench.autocast():
            return self.step(*rows)

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def sliced_gradients(self, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        """`gradients` by the plain reference in `dtype`, a few rows at a time: sums weighted by labelled tokens."""
        total, device = self.bench.work.counts["labels"], self.bench.device
        loss_sum = 0.0
        for rows in zip(*(tensor.split(SLICE) for tensor in self.rows), strict=True):
            input_ids, pixels, mask, targets = (tensor.to(device) for tensor in rows)
            if not (labelled := int((targets != IGNORE).sum())):
                continue
            with autocast_to(dtype, device)():
                _, mean = reference.VisionLanguageModel.forward(self.model, input_ids, pixels, mask, targets)
            (mean * (labelled / total)).backward()
            loss_sum += mean.item() * labelled / total
        return loss_sum, {name: p.grad for name, p in self.model.named_parameters()}


class Packed(Step):
    """Ours, by a recipe. The batch of the next step is asked for as soon as this step's work is queued."""

    def __init__(self, bench: Workbench, recipe: Recipe):
        self.bench, self.recipe = bench, recipe
        self.model, self.step = bench.forward_of(recipe)
        self.optimizers = bench.optimizers
        if not recipe.fused_optimizer:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.0)]
        batch = packed_batch(bench.work, recipe)
        if recipe.prefetch and bench.device.type == "cuda":
            batch = batch.pin_memory()
        self.feed = Feed(itertools.repeat(StreamBatch(batch, {}, [], 0, 0, False, {})), bench.device)
        self.floats = None if recipe.prefetch else dataclasses.replace(batch, images=batch.images.float())
        self.batch: PackedBatch | None = None

    def next_batch(self) -> PackedBatch:
        if self.floats is None:
            self.feed.waited()  # lets go of the events it keeps
            return next(self.feed)[1]
        there = self.floats.to(self.bench.device)
        there.images = there.images.to(torch.uint8)
        if there.images.is_cuda:
            torch.cuda.synchronize()
        return there

    def loss(self) -> Tensor:
        batch, self.batch = self.batch or self.next_batch(), None
        if self.recipe.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with self.bench.autocast():
            return self.step(batch) / self.bench.work.counts["labels"]

    def __call__(self) -> None:
        self.loss().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.recipe.prefetch:
            self.batch = self.next_batch()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, grads = super().gradients()
        return loss, self.model.by_reference_name(grads)


def packed_batch(work: Work, recipe: Recipe) -> PackedBatch:
    """The work as one batch on the host: of static shapes for a compiler, without padding for eager mode."""
    samples = work.samples
    if not recipe.shared_images:
        samples = [Sample(s.name, s.images, [document]) for s in samples for document in s.documents]
    if not recipe.packing:
        samples = [
            dataclasses.replace(s, documents=[padded(document, work.row_length) for document in s.documents])
            for s in samples
        ]
    counts = [sum(sizes) for sizes in zip(*(sample.sizes for sample in samples), strict=True)]
    tokens, documents, images, labels = counts
    whole = -(-tokens // 128) * 128
    spare = -(-(whole - tokens) // work.row_length)
    budget = Budget(whole, max(documents + spare, -(-whole // work.row_length)), images, labels, work.row_length)
    batch = pack(samples, budget, work.config.image_tokens, work.config.vit_img_size)
    batch = batch.trimmed() if recipe.compile == "none" else batch
    return batch if recipe.labelled_head else labelled_everywhere(batch)


def padded(document: Document, length: int) -> Document:
    """The document with placeholders behind it, which nothing that counts attends to."""
    room = (0, length - len(document))
    values = {"input_ids": 0, "image_rows": -1, "labels": IGNORE}
    arrays = {name: np.pad(getattr(document, name), room, constant_values=fill) for name, fill in values.items()}
    return Document(**arrays, question=document.question)


def labelled_everywhere(batch: PackedBatch) -> PackedBatch:
    """The batch with a place for a label at every position; most say that there is none."""
    labels, real = torch.full_like(batch.input_ids, IGNORE), batch.labels != IGNORE
    labels[batch.label_index[real]] = batch.labels[real]
    return dataclasses.replace(batch, label_index=torch.arange(len(labels)), labels=labels)


class Judge:
    """Whether a step's loss and gradients are the reference's.

    In float32 they may differ by `tolerance`, relative. In bfloat16 they may be twice as far from the float32 reference
    as the same reference in bfloat16 is, and FLOOR more. The distance of a gradient is the norm of its difference.
    """

    def __init__(self, reference: Padded, dtype: torch.dtype, tolerance: float):
        self.loss, self.grads = reference.sliced_gradients(torch.float32)
        reference.clear()
        self.sizes = {"loss": abs(self.loss), **norms(self.grads.items())}
        if dtype == torch.float32:
            self.allowed = {name: tolerance * size for name, size in self.sizes.items()}
        else:
            rounded = self.distances(*reference.sliced_gradients(dtype))
            reference.clear()
            self.allowed = {name: 2 * rounded[name] + FLOOR * size for name, size in self.sizes.items()}

    def distances(self, loss: float, grads: dict[str, Tensor]) -> dict[str, float]:
        """From the float32 reference, of the loss and of every gradient."""
        return {"loss": abs(loss - self.loss), **norms((name, grads[name] - g) for name, g in self.grads.items())}

    def __call__(self, step: Step) -> dict[str, float | bool]:
        """Relative differences of the loss and of the worst gradient, the largest share of what is allowed, verdict."""
        far = self.distances(*step.gradients())
        step.clear()
        relative = {name: value / max(self.sizes[name], 1e-12) for name, value in far.items()}
        shares = [value / max(self.allowed[name], 1e-16) for name, value in far.items()]
        return {
            "loss": relative.pop("loss"),
            "gradient": max(relative.values()),
            "of_allowed": max(shares),
            "passed": all(share <= 1 for share in shares),
        }


def norms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    values = {name: tensor.norm() for name, tensor in tensors}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def ablation(recipe: Recipe, bench: Workbench) -> tuple[dict[str, Recipe], dict[str, str]]:
    """What can be switched off, or for recomputation on, in `recipe`: names with the recipe that is left.

    Those that compile nothing anew come first. And names with the reason why there is nothing to switch.
    """
    ops, without, why = bench.forward_of(recipe)[0].ops, {}, {}

    def switch(name: str, unused: str = "", **fields: object) -> None:
        if unused:
            why[name] = unused
        else:
            without[name] = dataclasses.replace(recipe, **fields)

    on_cpu = "host and device are one on a CPU" if bench.device.type == "cpu" else ""
    one_question = "" if len(bench.work.documents) > len(bench.work.samples) else "one question an image"
    switch("compile", "" if recipe.compile != "none" else "--compile none", compile="none")
    switch("fused_optimizer", fused_optimizer=False)
    switch("prefetch", on_cpu, prefetch=False)
    switch("packing", packing=False)
    switch("labelled_head", labelled_head=False)
    switch("shared_images", one_question, shared_images=False)
    switch("attention", "sdpa is what runs here" if ops.backend == "sdpa" else "", attention="sdpa")
    if not ops.kernels:
        why["kernels"] = f"none is on with --kernels {recipe.kernels}"
    for kernel in ops.kernels:
        others = ",".join(name for name in ops.kernels if name != kernel)
        switch(f"kernel:{kernel}", kernels=others or "none")
    for policy in POLICIES[1:]:
        switch(f"recompute:{policy}", recompute=policy)
    return without, why
