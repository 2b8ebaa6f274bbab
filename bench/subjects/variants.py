"""The optimizer steps that bench.train_step compares, and the check that they are the same step.

`Padded` is nanoVLM v0.1's way. `Packed` is ours, by a `Recipe` of techniques that can be switched
one by one; it calls what train.py calls, on a batch of the sizes that training would measure. Both
take AdamW, whatever optimizer the preset trains with, so that the rows differ in nothing else. All
packed variants share one set of weights and, except for the unfused one, one optimizer. Learning
rates are 0: an update costs the same, and every variant is timed on the weights with which it was
compared.

Shapes: padded rows are (B, text_length) with images (B, 3, H, W); a packed batch holds all tokens
in one row (T,) and its images in (N, 3, H, W).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.subjects.workload import Work
from nanovlm_fast.data.budget import LABEL_MULTIPLE
from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.device import autocast_to
from nanovlm_fast.model import reference
from nanovlm_fast.model.lora import Adapter, add_adapter
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.packing.batch import PackedBatch, pack, pad, pad_whole
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.optim import apply_gradients, make_optimizers, set_lr
from nanovlm_fast.training.steps import accumulate_gradients

# Share of the float32 value by which bfloat16 may be off in any case: the reference in bfloat16
# happens to hit some values exactly, and twice no error would allow none.
SLACK = 1e-3
SLICE = 16  # rows at a time for the float32 reference, which may not fit the device's memory whole

# A model, and a callable that runs it.
Forward: TypeAlias = tuple[VisionLanguageModel, Callable[[PackedBatch], Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How `Packed` computes. The ablation changes one field at a time."""

    packing: bool = True  # documents end to end; else each is padded to the longest possible one
    shared_images: bool = True  # one encoding per image; else one per question
    # The last MLP, head and loss run on labelled positions; else on all of them, as in v0.1.
    labelled_head: bool = True
    # uint8 images of the next batch are copied during a step; else float images, waited for.
    prefetch: bool = True
    fused_optimizer: bool = True
    attention: str = "auto"
    vision_attention: str = "auto"
    kernels: str = "auto"
    compile: str = "none"
    recompute: str = "none"


class Workbench:
    """What the variants share: the work, the device, the dtype, and the weights of both models."""

    def __init__(self, work: Work, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.work = work
        self.device = device
        self.dtype = dtype
        self.autocast = autocast_to(dtype, device)
        # TF32 would round the patches in the convolution of the float32 reference.
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(seed)
        self.packed: VisionLanguageModel | None = VisionLanguageModel(work.config)
        for name, weight in self.packed.named_parameters():
            # Branches that start at zero would hide errors in the gradients behind them.
            if name.endswith("weight") and not weight.any():
                nn.init.normal_(weight, std=0.02)
        self.packed.to(device)
        self.padded: NanoVLMModel | None = NanoVLMModel(work.config).to(device)
        self.padded.load_state_dict(self.packed.reference_state_dict())
        adamw = dataclasses.replace(work.train, optimizer="adamw")
        self.optimizers: list[torch.optim.Optimizer] = make_optimizers(self.packed, adamw)
        set_lr(self.optimizers, 0.0)  # see the module: every variant meets the same weights
        self.forwards: dict[tuple[str, ...], Forward] = {}

    def forward_of(self, recipe: Recipe) -> Forward:
        """The packed model with a recipe's operations, and a callable that runs it, maybe compiled.

        Recipes that agree in operations and compilation share both.
        """
        how = recipe.kernels, recipe.attention, recipe.recompute, recipe.vision_attention
        key = *how, recipe.compile
        if key not in self.forwards:
            assert self.packed is not None
            model = copy.copy(self.packed)  # shallow: the same modules and weights
            model.ops = choose_ops(
                recipe.kernels,
                self.device,
                recipe.attention,
                self.dtype,
                recipe.recompute,
                recipe.vision_attention,
            )
            run_model: Callable[[PackedBatch], Tensor] = model
            if recipe.compile != "none":
                torch._dynamo.config.recompile_limit = 64  # all variants compile the same function
                run_model = torch.compile(model, fullgraph=True, dynamic=False, mode=recipe.compile)
            self.forwards[key] = model, run_model
        return self.forwards[key]

    def optimizer_bytes(self) -> int:
        """Bytes of the shared optimizer's state; 0 before its first step."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return sum(t.numel() * t.element_size() for state in states for t in state.values())


class NanoVLMModel(reference.VisionLanguageModel):
    """The reference with nanoVLM v0.1's head.

    The head runs over every position, image tokens included, and its output is sliced afterwards.
    """

    def forward(  # type: ignore[override]  # nanoVLM's loss alone, not (logits, loss)
        self,
        input_ids: Tensor,
        images: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        image_rows: Tensor | None = None,
    ) -> Tensor:
        """The mean cross-entropy over labelled positions."""
        logits = self.decoder.head(self.hidden(input_ids, images, attention_mask, image_rows))
        logits = logits[:, -input_ids.shape[1] :].reshape(-1, logits.shape[-1])
        return F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE)


class Step:
    """One variant. A call takes an optimizer step; `gradients` runs forward and backward alone."""

    model: nn.Module

    def __call__(self) -> object:
        raise NotImplementedError

    def backward(self) -> Tensor:
        """The mean loss over the labelled tokens of a batch from the host; adds its gradients."""
        raise NotImplementedError

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and every gradient under the reference's name; `clear` drops the gradients."""
        loss = self.backward()
        return loss.item(), grads_of(self.model)

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


class Padded(Step):
    """As nanoVLM v0.1 trains.

    Left-padded rows, float images from pageable memory, unfused AdamW, and the loss read per step.
    """

    def __init__(self, bench: Workbench, compiled: bool = False):
        assert bench.padded is not None
        self.bench = bench
        self.padded = bench.padded
        self.model = bench.padded
        self.rows = self.laid_out(bench.work.samples)
        self.run_model: Callable = torch.compile(self.padded) if compiled else self.padded
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def laid_out(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """The arguments of the model's forward, on the host."""
        work = self.bench.work
        if work.interleaved:
            batch = pad_whole([(s, document) for s in samples for document in s.documents])
        else:
            batch = pad(samples, work.text_length)
        pixels = reference.normalise(batch.images, work.config)
        rows = batch.input_ids, pixels, batch.attention_mask, batch.targets
        return rows if batch.image_rows is None else (*rows, batch.image_rows)

    def slices(self) -> Iterable[tuple[Tensor, ...]]:
        """Rows that together are those of the batch, a few at a time."""
        if self.bench.work.interleaved:  # whose images belong to no row by their place
            return (self.laid_out([sample]) for sample in self.bench.work.samples)
        return zip(*(tensor.split(SLICE) for tensor in self.rows), strict=True)

    def backward(self) -> Tensor:
        # From pageable memory, without a copy ahead: v0.1 has neither.
        rows = [tensor.to(self.bench.device) for tensor in self.rows]
        with self.bench.autocast():
            loss = self.run_model(*rows)
        loss.backward()
        return loss.detach()

    def __call__(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def sliced_gradients(self, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        """`gradients` by the plain reference in `dtype`, a few rows at a time.

        Slices are weighted by labelled tokens, so that they add up to the mean of the whole batch.
        """
        total = self.bench.work.counts["labels"]
        device = self.bench.device
        loss_sum = 0.0
        for rows in self.slices():
            input_ids, pixels, mask, targets, *places = (tensor.to(device) for tensor in rows)
            if not (labelled := int((targets != IGNORE).sum())):
                continue  # the mean over no label would be NaN
            with autocast_to(dtype, device)():
                _, mean = reference.VisionLanguageModel.forward(
                    self.padded, input_ids, pixels, mask, targets, *places
                )
            assert mean is not None
            (mean * (labelled / total)).backward()
            loss_sum += mean.item() * labelled / total
        return loss_sum, grads_of(self.model)


class UnfusedAdamW(torch.optim.AdamW):
    """PyTorch's plain AdamW, which cannot skip an update on the device."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]  # no loss
        # `apply_gradients` sets it; PyTorch's loop over parameters refuses it.
        self.found_inf = None
        super().step(closure)


class Packed(Step):
    """Ours, by a recipe. The next batch is requested as soon as this step's work is queued."""

    def __init__(self, bench: Workbench, recipe: Recipe):
        self.bench = bench
        self.recipe = recipe
        self.packed, self.run_model = bench.forward_of(recipe)
        self.model = self.packed
        self.optimizers = bench.optimizers
        if not recipe.fused_optimizer:
            self.optimizers = [UnfusedAdamW(self.model.parameters(), lr=0.0)]
        batch = packed_batch(bench.work, recipe, LABEL_MULTIPLE[bench.device.type])
        if recipe.prefetch and bench.device.type == "cuda":
            batch = batch.pin_memory()
        # As in training: a compiler needs static shapes, everything else is spared the padding.
        trim = recipe.compile == "none"
        # The same batch at every step; the feed copies it to the device as in training.
        batches = itertools.repeat(StreamBatch(batch, {}, [], 0, 0, False, {}))
        self.feed = Feed(batches, bench.device, trim=trim)
        self.floats: PackedBatch | None = None
        if not recipe.prefetch:
            batch = batch.trimmed() if trim else batch
            self.floats = dataclasses.replace(batch, images=batch.images.float())
        self.batch: PackedBatch | None = None

    def next_batch(self) -> PackedBatch:
        if self.floats is None:
            self.feed.waited()  # releases the events that it keeps for the metrics
            return next(self.feed)[1]
        there = self.floats.to(self.bench.device)
        there.images = there.images.to(torch.uint8)  # ours computes from bytes in any case
        if there.images.is_cuda:  # without prefetching, a step starts when its batch has arrived
            torch.cuda.synchronize()
        return there

    def forward(self, batch: PackedBatch) -> Tensor:
        """The summed loss."""
        if self.recipe.compile == "reduce-overhead":
            # Or outputs of the previous step would count as live, and replay could not reuse them.
            torch.compiler.cudagraph_mark_step_begin()
        return self.run_model(batch)

    def backward(self) -> Tensor:
        batch = self.batch or self.next_batch()
        self.batch = None
        labels = self.bench.work.counts["labels"]
        total = accumulate_gradients(
            self.forward, self.run_model, [batch], labels, self.bench.autocast
        )
        return total / labels

    def __call__(self) -> None:
        self.backward()
        apply_gradients(self.model, self.optimizers, self.bench.work.train.clip)
        if self.recipe.prefetch:
            self.batch = self.next_batch()  # its copy overlaps with the kernels queued above

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, grads = super().gradients()
        return loss, self.packed.by_reference_name(grads)


class Adapted(Packed):
    """Ours with adapters of a rank on a frozen language model. It changes the bench's model."""

    def __init__(self, bench: Workbench, recipe: Recipe, rank: int):
        assert bench.packed is not None
        if bench.packed.adapter is None:
            add_adapter(bench.packed, Adapter(rank, 2.0 * rank, {}, {}))
            adamw = dataclasses.replace(bench.work.train, optimizer="adamw")
            bench.optimizers = make_optimizers(bench.packed, adamw)
            set_lr(bench.optimizers, 0.0)
        super().__init__(bench, recipe)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradients of what the reference trains too: not those of adapters.

        They have passed through the whole language model.
        """
        loss = self.backward()
        towers = (self.packed.vision_encoder, self.packed.MP)
        prefixes = ("vision_encoder", "MP")
        grads: dict[str, Tensor] = {}
        for prefix, tower in zip(prefixes, towers, strict=True):
            grads |= {f"{prefix}.{name}": grad for name, grad in grads_of(tower).items()}
        return loss.item(), grads


def packed_batch(work: Work, recipe: Recipe, label_multiple: int = 1) -> PackedBatch:
    """The work as one batch on the host, in a budget with training's slack, padding included."""
    samples = work.samples
    if not recipe.shared_images:
        samples = [
            Sample(s.name, s.images, [document]) for s in samples for document in s.documents
        ]
    if not recipe.packing:
        length = work.row_length
        samples = [
            dataclasses.replace(s, documents=[lengthened(d, length) for d in s.documents])
            for s in samples
        ]
    budget = budget_of(samples, label_multiple)
    batch = pack(samples, budget, work.config.image_tokens, work.config.vit_img_size)
    return batch if recipe.labelled_head else labelled_everywhere(batch)


def budget_of(samples: list[Sample], label_multiple: int = 1) -> Budget:
    """The sizes that training would measure for batches of as many tokens as the samples hold."""
    tokens = sum(sample.tokens for sample in samples)
    whole = -(-tokens // 128) * 128  # a multiple of the kernels' tiles, as --tokens-per-batch is
    budget = Budget.measure(samples, whole, label_multiple=label_multiple)
    # In training, a batch whose padding takes more documents than there is room for would be
    # packed otherwise. Here all samples are in one batch.
    documents = sum(len(sample.documents) for sample in samples)
    needed = documents + budget.pad_documents(whole - tokens)
    return dataclasses.replace(budget, documents=max(budget.documents, needed))


def lengthened(document: Document, length: int) -> Document:
    """The document with placeholders after it: causal attention keeps them from its tokens."""
    room = (0, length - len(document))
    values = {"input_ids": 0, "image_rows": -1, "labels": IGNORE}
    arrays = {
        name: np.pad(getattr(document, name), room, constant_values=fill)
        for name, fill in values.items()
    }
    return Document(question=document.question, **arrays)


def labelled_everywhere(batch: PackedBatch) -> PackedBatch:
    """The batch with a label at every position, most of them IGNORE, as v0.1's head has it."""
    labels = torch.full_like(batch.input_ids, IGNORE)
    real = batch.labels != IGNORE
    labels[batch.label_index[real]] = batch.labels[real]
    # Every position counts as labelled, so that `trimmed` keeps all but the padding.
    index = torch.arange(len(labels))
    return dataclasses.replace(batch, label_index=index, labels=labels, n_labels=batch.n_tokens)


class Judge:
    """Checks whether the loss and the gradients of a step are the reference's.

    In float32 they may differ by `tolerance`, relative. In bfloat16 they may be twice as far from
    the float32 reference as the same reference in bfloat16 is, plus SLACK. The distance between two
    gradients is the norm of their difference.
    """

    def __init__(self, judged_by: Padded, dtype: torch.dtype, tolerance: float):
        self.loss, self.grads = judged_by.sliced_gradients(torch.float32)
        judged_by.clear()
        self.sizes = {"loss": abs(self.loss), **norms(self.grads.items())}
        if dtype == torch.float32:
            self.allowed = {name: tolerance * size for name, size in self.sizes.items()}
        else:
            rounded = self.distances(*judged_by.sliced_gradients(dtype))
            judged_by.clear()
            self.allowed = {
                name: 2 * rounded[name] + SLACK * size for name, size in self.sizes.items()
            }

    def without(self, part: str) -> Judge:
        """A judge of steps in which this part of the model has no gradient of its own."""
        judge = copy.copy(self)
        judge.grads = {n: grad for n, grad in self.grads.items() if not n.startswith(f"{part}.")}
        return judge

    def distances(self, loss: float, grads: dict[str, Tensor]) -> dict[str, float]:
        """Distances of the loss and of every gradient from the float32 reference."""
        differences = ((name, grads[name] - g) for name, g in self.grads.items())
        return {"loss": abs(loss - self.loss), **norms(differences)}

    def __call__(self, step: Step) -> dict[str, float | bool]:
        """Relative differences of the loss and of the worst gradient, and whether they `passed`.

        `of_allowed` is the largest difference as a multiple of what is allowed.
        """
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


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter."""
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"  # or it would go unchecked
        grads[name] = parameter.grad
    return grads


def norms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Norm of each tensor; stacked, so that one synchronisation reads them all."""
    values = {name: tensor.norm() for name, tensor in tensors}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def ablation(recipe: Recipe, bench: Workbench) -> tuple[dict[str, Recipe], dict[str, str]]:
    """What can be switched off in `recipe`, or on for recomputation.

    Returns {name: the remaining recipe}, those first that need no new compilation, and {name: why
    there is nothing to switch}.
    """
    ops = bench.forward_of(recipe)[0].ops
    without: dict[str, Recipe] = {}
    why: dict[str, str] = {}

    def switch(name: str, unused: str = "", **fields: Any) -> None:
        if unused:
            why[name] = unused
        else:
            without[name] = dataclasses.replace(recipe, **fields)

    on_cpu = "host and device are one on a CPU" if bench.device.type == "cpu" else ""
    several = len(bench.work.documents) > len(bench.work.samples)
    one_question = "" if several else "one question per image"
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
