"""The two sides of bench.race: how each takes the loss and the gradients of a packed batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import synchronize
from bench.variants import SeedModel
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.ops import choose_ops
from nanovlm_fast.packing import IGNORE, Budget, PackedBatch
from nanovlm_fast.warmup import warm_up


@dataclass
class Setting:
    """What both sides are given."""

    config: VLMConfig
    train: TrainConfig
    budget: Budget
    device: torch.device
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]


class Fast:
    """Ours."""

    def __init__(self, setting: Setting, start: dict[str, Tensor]):
        train = setting.train
        ops = choose_ops(train.kernels, setting.device, train.attention, setting.dtype, train.recompute)
        self.model = VisionLanguageModel(setting.config, ops).to(setting.device)
        self.model.load_reference_state_dict(start)
        self.setting, self.graphs, self.step = setting, train.compile == "reduce-overhead", self.model
        if train.compile != "none":
            self.step = torch.compile(self.model, fullgraph=True, dynamic=False, mode=train.compile)
        self.trim = train.compile == "none"
        self.about = {"compile": train.compile, "operations": str(ops)}

    def forward(self, batch: PackedBatch) -> Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.step(batch)

    def warm_up(self) -> None:
        warm_up(self.forward, self.model, self.setting.budget, self.setting.autocast, rounds=3 if self.graphs else 1)

    def backward(self, batch: PackedBatch) -> Tensor:
        """The mean loss over the labelled tokens, its gradients added."""
        with self.setting.autocast():
            loss = self.forward(batch) / batch.n_labels
        loss.backward()
        return loss.detach()

    def to_evaluate(self) -> VisionLanguageModel:
        return self.model


class PaddedModel(SeedModel):
    """nanoVLM v0.1's model; no matrix of it is several in one but those that `make_optimizers` knows."""

    def fused_parts(self) -> dict[str, dict[str, int]]:
        return {}


class Reference:
    """nanoVLM v0.1's way."""

    trim = True

    def __init__(self, setting: Setting, start: dict[str, Tensor]):
        self.setting, self.parts = setting, 1
        self.model = PaddedModel(setting.config).to(setting.device)
        self.model.load_state_dict(start)
        plain = choose_ops("none", setting.device, "auto", setting.dtype)
        self.twin = VisionLanguageModel(setting.config, plain).to(setting.device)
        self.text_length = max(setting.config.lm_max_length, setting.budget.max_seqlen - setting.config.image_tokens)

    @property
    def about(self) -> dict:
        return {"row_length": self.setting.config.image_tokens + self.text_length, "micro_batches": self.parts}

    def warm_up(self) -> None:
        """A full batch; if the memory does not hold it, half of its rows at a time, and so on."""
        rows = self.setting.budget.documents
        for parts in (1, 2, 4, 8, 16):
            self.parts = parts
            try:
                some, size = -(-rows // parts), self.setting.config.vit_img_size
                ids = torch.zeros(some, self.text_length, dtype=torch.long, device=self.setting.device)
                pixels = torch.zeros(some, 3, size, size, device=self.setting.device)
                with self.setting.autocast():
                    loss = self.model(ids, pixels, torch.ones_like(ids), ids)
                loss.backward()
                synchronize()
                break
            except torch.OutOfMemoryError:
                if parts == 16:
                    raise
            finally:
                self.model.zero_grad(set_to_none=True)
                loss = None
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def backward(self, batch: PackedBatch) -> Tensor:
        rows = padded_rows(batch, self.setting.config, self.text_length)
        total = torch.zeros((), device=self.setting.device)
        for some in zip(*(tensor.chunk(self.parts) for tensor in rows), strict=True):
            share = (some[-1] != IGNORE).sum() / batch.n_labels
            with self.setting.autocast():
                loss = self.model(*some) * share
            loss.backward()
            total += loss.detach()
        total.item()  # as v0.1 does
        return total

    def to_evaluate(self) -> VisionLanguageModel:
        """The same weights with a cache of keys and values: how it is asked is not what is compared."""
        self.twin.load_reference_state_dict(self.model.state_dict())
        return self.twin


def padded_rows(batch: PackedBatch, config: VLMConfig, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A packed batch as what `SeedModel` takes, a row a document of one image and its text: ids, pixels, mask, targets.

    The rows of `nanovlm_fast.packing.pad`, made on the batch's device.
    """
    count, device = batch.n_documents, batch.input_ids.device
    starts, lengths = batch.cu_seqlens[:count].long(), batch.cu_seqlens[: count + 1].diff().long()
    document = torch.arange(count, device=device).repeat_interleave(lengths, output_size=batch.n_tokens)
    (text,) = (batch.image_rows[: batch.n_tokens] < 0).nonzero(as_tuple=True)
    row = document[text]
    place_ = row, length - lengths[row] + batch.position_ids[text]
    next_ids = torch.full((batch.n_tokens,), IGNORE, device=device)
    next_ids[batch.label_index[: batch.n_labels]] = batch.labels[: batch.n_labels]
    ids = torch.zeros(count, length, dtype=torch.long, device=device)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    ids[place_], mask[place_], targets[place_] = batch.input_ids[text], 1, next_ids[text]
    images = batch.images[batch.image_rows[starts].long() // config.image_tokens]
    return ids, (images.float() / 255 - config.image_mean) / config.image_std, mask, targets
