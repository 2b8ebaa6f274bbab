"""The two sides of bench.race: how each computes loss and gradients of a packed batch.

Shapes: the reference unpacks a batch of D documents into rows (D, text_length) of text and images
(D, 3, H, W); ours takes it packed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.timing import synchronize
from bench.subjects.variants import NanoVLMModel
from nanovlm_fast.command import ran_out_of_memory
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model import reference
from nanovlm_fast.model.ops import Ops, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.documents import IGNORE
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.training.steps import accumulate_gradients
from nanovlm_fast.training.warmup import warm_up


@dataclass
class Setting:
    """What both sides receive."""

    config: VLMConfig
    train: TrainConfig
    budget: Budget
    device: torch.device
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]


class Fast:
    """Our side, as train.py runs it."""

    def __init__(self, setting: Setting, start: dict[str, Tensor]):
        train = setting.train
        ops = choose_ops(
            train.kernels,
            setting.device,
            train.attention,
            setting.dtype,
            train.recompute,
            train.vision_attention,
        )
        self.model = VisionLanguageModel(setting.config, ops).to(setting.device)
        self.model.load_reference_state_dict(start)
        self.setting = setting
        self.graphs = train.compile == "reduce-overhead"
        self.run_model: Callable = self.model
        if train.compile != "none":
            self.run_model = torch.compile(
                self.model, fullgraph=True, dynamic=False, mode=train.compile
            )
        # Compiled code needs static shapes; without it, padding is only a waste of time.
        self.trim = train.compile == "none"
        self.about = {"compile": train.compile, "operations": str(ops)}

    def forward(self, batch: PackedBatch) -> Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.run_model(batch)

    def warm_up(self) -> None:
        # Graphs are recorded in the second round and checked in the third.
        rounds = 3 if self.graphs else 1
        setting = self.setting
        warm_up(self.forward, self.model, setting.budget, setting.autocast, rounds=rounds)

    def backward(self, batch: PackedBatch) -> Tensor:
        """Return the mean loss over the labelled tokens; add its gradients to the model's."""
        labels = batch.n_labels
        total = accumulate_gradients(
            self.forward, self.run_model, [batch], labels, self.setting.autocast
        )
        return total / labels

    def to_evaluate(self) -> VisionLanguageModel:
        return self.model


class PaddedModel(NanoVLMModel):
    """nanoVLM v0.1's model, in which no parameter holds several matrices in one.

    `make_optimizers` asks for such matrices, because Muon orthogonalises each by itself, for the
    operations, because one of them may be the update, and for adapters, of which it has none.
    """

    ops = Ops()
    adapter = None

    def fused_parts(self) -> dict[str, dict[str, int]]:
        return {}


class Reference:
    """nanoVLM v0.1's side."""

    trim = True

    def __init__(self, setting: Setting, start: dict[str, Tensor]):
        self.setting = setting
        self.parts = 1  # micro-batches of rows
        self.model = PaddedModel(setting.config).to(setting.device)
        self.model.load_state_dict(start)
        plain = choose_ops("none", setting.device, "auto", setting.dtype)
        self.twin = VisionLanguageModel(setting.config, plain).to(setting.device)
        room = setting.budget.max_seqlen - setting.config.image_tokens
        self.text_length = max(setting.config.lm_max_length, room)

    @property
    def about(self) -> dict:
        return {
            "row_length": self.setting.config.image_tokens + self.text_length,
            "micro_batches": self.parts,
        }

    def warm_up(self) -> None:
        """Run a full batch; while memory does not hold it, halve the rows per micro-batch."""
        rows = self.setting.budget.documents
        for parts in (1, 2, 4, 8, 16):
            self.parts = parts
            try:
                some = -(-rows // parts)
                size = self.setting.config.vit_img_size
                shape = (some, self.text_length)
                device = self.setting.device
                ids = torch.randint(self.setting.config.lm_vocab_size, shape, device=device)
                pixels = torch.randn(some, 3, size, size, device=device)
                with self.setting.autocast():
                    loss = self.model(ids, pixels, torch.ones_like(ids), ids)
                loss.backward()
                synchronize()
                break
            except RuntimeError as error:
                if parts == 16 or not ran_out_of_memory(error):
                    raise
            finally:
                self.model.zero_grad(set_to_none=True)
                loss = None  # frees the graph and with it the activations before the next try
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def backward(self, batch: PackedBatch) -> Tensor:
        """Return the mean loss over the labelled tokens; add its gradients to the model's."""
        rows = padded_rows(batch, self.setting.config, self.text_length)
        total = torch.zeros((), device=self.setting.device)
        for some in zip(*(tensor.chunk(self.parts) for tensor in rows), strict=True):
            # Weighted by labels, so that micro-batches add up to the mean over the whole batch.
            share = (some[-1] != IGNORE).sum() / batch.n_labels
            with self.setting.autocast():
                loss = self.model(*some) * share
            loss.backward()
            total += loss.detach()
        total.item()  # a synchronisation per step, as in v0.1
        return total

    def to_evaluate(self) -> VisionLanguageModel:
        """Our model with the same weights, for its KV cache: evaluation is not what is compared."""
        self.twin.load_reference_state_dict(self.model.state_dict())
        return self.twin


def padded_rows(
    batch: PackedBatch, config: VLMConfig, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unpack a batch on its device into what nanoVLM's model takes: ids, pixels, mask, targets.

    One row per document of one image and its text; the same rows as `nanovlm_fast.packing.pad`.
    """
    count = batch.n_documents
    device = batch.input_ids.device
    starts = batch.cu_seqlens[:count].long()
    lengths = batch.cu_seqlens[: count + 1].diff().long()
    # `output_size` avoids a synchronisation: the length of the result is known on the host.
    document = torch.arange(count, device=device)
    document = document.repeat_interleave(lengths, output_size=batch.n_tokens)
    (text,) = (batch.image_rows[: batch.n_tokens] < 0).nonzero(as_tuple=True)
    row = document[text]
    where = row, length - lengths[row] + batch.position_ids[text]  # padded on the left
    next_ids = torch.full((batch.n_tokens,), IGNORE, device=device)
    next_ids[batch.label_index[: batch.n_labels]] = batch.labels[: batch.n_labels]
    ids = torch.zeros(count, length, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORE)
    ids[where] = batch.input_ids[text]
    mask[where] = 1
    targets[where] = next_ids[text]
    # An image that several documents share is repeated, once per document, as v0.1 does.
    images = batch.images[batch.image_rows[starts].long() // config.image_tokens]
    pixels = reference.normalise(images, config)
    return ids, pixels, mask, targets
