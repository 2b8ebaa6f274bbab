"""What is judged and timed: a few chained blocks of one tower, at a run's own sizes.

| part | what runs, forward and backward |
| --- | --- |
| `vision` | patch embedding, `BLOCKS` vision blocks, the last norm |
| `language` | `BLOCKS` language blocks on embeddings, the last norm |
| `ends` | projector, token embedding with the images in it, head and loss |
| `blocks` | all of these: a step of a shallow model |
| `update` | gradient norm, clip and optimizer, over the weights of all blocks |
| `whole step` | the model with all its blocks, and the update |

The language blocks have the adapters of a run with `--lora-rank`. What a run does not train has no
gradients here either.

Shapes: T packed tokens, N images, P patches, C channels.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.device import autocast_to, make_current
from nanovlm_fast.model.compiling import compiled
from nanovlm_fast.model.lora import Adapter, add_adapter
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.training.optim import apply_gradients, make_optimizers
from nanovlm_fast.training.warmup import full_batch
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.search import WHOLE

# The first block has no residual to add, and the others do: two show both.
BLOCKS = 2
LAUNCHES = "launches"  # `blocks` as the host launches it, not replayed as one CUDA graph
UPDATE = "update"
# What of a TrainConfig an update depends on.
UPDATES = (
    "optimizer",
    "muon_scale",
    "beta2",
    "weight_decay",
    "clip",
    "lr_projector",
    "lr_vision",
    "lr_language",
)
TOWERS = {"vision": "vision_encoder", "language": "decoder", "projector": "MP"}
# Rates of an update that is judged. A float32 weight near 1 is no finer than 1e-7, which is much of
# a step at the rates of a run, and nothing of these. They differ, so that a mix-up would show.
JUDGED_RATES = {"lr_projector": 0.04, "lr_vision": 0.03, "lr_language": 0.02}


@dataclass(frozen=True)
class Job:
    """The run that is tuned for."""

    model: VLMConfig
    budget: Budget
    device: str
    dtype: str = "float32"
    recompute: str = "none"
    stream: str = "float32"
    frozen: tuple[str, ...] = ()  # of `TOWERS`
    lora_rank: int = 0  # of adapters on the language model, which is frozen then; 0: none
    update: dict[str, Any] = field(default_factory=dict)  # `UPDATES`, as the run has them

    @classmethod
    def of(
        cls,
        model: VLMConfig,
        train: TrainConfig,
        budget: Budget,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Job:
        return cls(
            model,
            budget,
            str(device),
            dtype=str(dtype).removeprefix("torch."),
            recompute=train.recompute,
            stream=train.stream,
            frozen=tuple(name for name in TOWERS if getattr(train, f"lr_{name}") == 0),
            lora_rank=train.lora_rank,
            update={name: getattr(train, name) for name in UPDATES},
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        model = VLMConfig(**values["model"])
        budget = Budget(**values["budget"])
        frozen = tuple(values["frozen"])
        return cls(**{**values, "model": model, "budget": budget, "frozen": frozen})

    @property
    def type(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def layers(self, part: str) -> tuple[int, int]:
        """Vision and language blocks of the model that the part is taken from."""
        wanted = self.model.vit_n_blocks, self.model.lm_n_blocks
        return (
            wanted if part in (WHOLE, UPDATE) else (min(BLOCKS, wanted[0]), min(BLOCKS, wanted[1]))
        )


@dataclass
class Data:
    """A batch, what enters the parts in its place, and a gradient for what leaves them."""

    batch: PackedBatch
    x: Tensor  # (T, C): what enters the language blocks
    seen: Tensor  # (N, P, C): what leaves the vision tower


# What a call returns: outputs ("out0", ...) and gradients ("d decoder.norm.weight", "d x", ...).
Results = dict[str, Tensor]


class Parts:
    """Makes the calls that are judged and timed. Weights and data are the same at each start."""

    def __init__(self, job: Job):
        self.job = job
        self.device = make_current(torch.device(job.device))
        self.models: dict[tuple[int, int, str], VisionLanguageModel] = {}
        self.batches: dict[str, PackedBatch] = {}
        # Every choice compiles the same functions anew.
        self.limit_before = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = 256

    def call(
        self,
        part: str,
        choice: Choice,
        size: str = "real",
        dtype: torch.dtype | None = None,
        mode: str = "none",
    ) -> Callable[[], Results]:
        """A function that computes a part forward and backward, as the choice says.

        `size` is "real" (the run's) or "odd"; `dtype` is the run's type or another; `mode` is how
        it is compiled. Raises what choosing the operations raises.
        """
        dtype = dtype or self.job.type
        # What is compared with float32 is compared with all of it in float32.
        stream = self.job.stream if dtype == self.job.type else "float32"
        model = copy.copy(self.model(part, stream))  # shallow: the same modules and weights
        model.ops = choose_ops(
            choice.kernel_option,
            self.device,
            choice.attention,
            dtype,
            self.job.recompute,
            choice.vision_attention,
            stream,
        )
        data = self.data(size, dtype)
        leaves: dict[str, Tensor] = {"d x": data.x, "d seen": data.seen}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                leaves[f"d {name}"] = parameter
        run = compiled(FORWARDS.get(part, step), mode, choice.inductor)
        autocast = autocast_to(dtype, self.device)
        upstream: list[Tensor] = []

        def call() -> Results:
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with autocast():
                outputs = run(model, data)
            results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
            differentiable = [output for output in outputs if output.requires_grad]
            if differentiable:
                if not upstream:
                    upstream.extend(map(random_like, differentiable))
                grads = torch.autograd.grad(
                    differentiable, list(leaves.values()), upstream, allow_unused=True
                )
                found = zip(leaves, grads, strict=True)
                results |= {name: grad for name, grad in found if grad is not None}
            return results

        return call

    def update(
        self, choice: Choice, size: str = "real", dtype: torch.dtype | None = None
    ) -> Callable[[], Results]:
        """A function that takes an optimizer step on given gradients.

        With `size` "odd" it takes two of them from the start, at `JUDGED_RATES` and on few blocks,
        and returns by how much the weights have moved. Otherwise it goes on, on all blocks, and
        returns nothing.
        """
        stream = self.job.stream if dtype in (None, self.job.type) else "float32"
        # A copy, because the weights move; they are those of all other parts.
        model = copy.deepcopy(self.model("blocks" if size == "odd" else UPDATE, stream))
        model.ops = choose_ops(choice.kernel_option, self.device, stream=stream)
        config = TrainConfig(**self.job.update)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = [random_like(parameter) for parameter in trained]
        begun: Results = {}
        if size == "odd":
            rates = {name: rate for name, rate in JUDGED_RATES.items() if getattr(config, name)}
            config = TrainConfig(**{**self.job.update, **rates})
            begun = {name: weight.clone() for name, weight in model.state_dict().items()}
        optimizers = make_optimizers(model, config)

        def go_on() -> Results:
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad
            apply_gradients(model, optimizers, config.clip)
            return {}

        def from_the_start() -> Results:
            nonlocal optimizers
            # Masters where there are any: they are what the state dict holds.
            with torch.no_grad():
                for name, weight in model.state_dict().items():
                    weight.copy_(begun[name])
            model.masters.round()
            optimizers = make_optimizers(model, config)
            for number in range(2):
                for parameter, grad in zip(trained, grads, strict=True):
                    # Others the second time: AdamW's step would be the same with any betas. Each
                    # is a copy, because a clip scales gradients where they are.
                    parameter.grad = grad.flatten().roll(number).view_as(grad)
                apply_gradients(model, optimizers, config.clip)
            moved = model.state_dict().items()
            return {f"moved {name}": weight - begun[name] for name, weight in moved}

        return from_the_start if size == "odd" else go_on

    def model(self, part: str, stream: str) -> VisionLanguageModel:
        """The model that a part is taken from, with weights that hide nothing."""
        key = (*self.job.layers(part), stream)
        if key not in self.models:
            vision, language, _ = key
            config = dataclasses.replace(self.job.model, vit_n_blocks=vision, lm_n_blocks=language)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = VisionLanguageModel(config)
                if rank := self.job.lora_rank:  # of any scale, which changes no time
                    add_adapter(model, Adapter(rank, alpha=rank, base={}, hashes={}))
                show_everything(model)
            for name in self.job.frozen:
                getattr(model, TOWERS[name]).requires_grad_(False)
            model.to(self.device)
            if stream == "bfloat16":
                model.keep_masters()
            self.models[key] = model
        return self.models[key]

    def data(self, size: str, dtype: torch.dtype) -> Data:
        """Random ids, pixels and embeddings."""
        config = self.job.model
        if size not in self.batches:
            budget = self.job.budget
            batch = full_batch(budget, config) if size == "real" else odd_batch(budget, config)
            self.batches[size] = batch.to(self.device)
        batch = self.batches[size]
        generator = torch.Generator().manual_seed(0)
        tokens, images = len(batch.input_ids), len(batch.images)
        x = torch.randn(tokens, config.lm_hidden_dim, generator=generator)
        # Rows of all sizes: only in small ones does an epsilon matter.
        x *= torch.logspace(-4, 0, tokens)[torch.randperm(tokens, generator=generator), None]
        seen = torch.randn(images, config.grid**2, config.vit_hidden_dim, generator=generator)
        # Embeddings are float32; what a norm hands to a product has the product's type.
        return Data(
            batch,
            x.to(self.device).requires_grad_(),
            seen.to(self.device, dtype).requires_grad_(),
        )


def show_everything(model: VisionLanguageModel) -> None:
    """Change fresh weights so that no wrong result is hidden by a zero or a large number."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
        # Rows of all sizes enter the first vision block, as in `Parts.data`.
        embedding = model.vision_encoder.patch_embedding
        patches = embedding.position_embedding.shape[1]
        embedding.position_embedding.mul_(torch.logspace(-4, 0, patches)[:, None])
        for weight in embedding.conv.parameters():
            weight.mul_(1e-3)


def odd_batch(budget: Budget, config: VLMConfig) -> PackedBatch:
    """A small batch of odd sizes, with empty documents, and labels that do not count."""
    tokens = (2 * budget.max_seqlen + 71) | 1
    small = Budget(
        tokens=tokens,
        documents=-(-tokens // budget.max_seqlen) + 2,  # two of them empty, at the end
        images=min(3, tokens // config.image_tokens, max(budget.images, 1)),
        labels=37,
        max_seqlen=budget.max_seqlen,
    )
    batch = full_batch(small, config)
    starts = batch.cu_seqlens
    # Two equal neighbours are an empty document: here one in the middle, beside those at the end.
    starts = torch.cat([starts[:2], starts[1:-1]])
    labels = batch.labels.clone()
    labels[::3] = -100
    return dataclasses.replace(batch, cu_seqlens=starts, labels=labels)


def random_like(output: Tensor) -> Tensor:
    """An upstream gradient: the same numbers for every type and every call."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output.device, output.dtype)


def vision(model: VisionLanguageModel, data: Data) -> tuple[Tensor, ...]:
    return (model.vision_encoder(model.ops, data.batch.images),)


def language(model: VisionLanguageModel, data: Data) -> tuple[Tensor, ...]:
    x = data.x.to(model.ops.stream_type or data.x.dtype)
    return (model.decode(x, data.batch),)


def ends(model: VisionLanguageModel, data: Data) -> tuple[Tensor, ...]:
    batch = data.batch
    shown = model.MP(model.ops, data.seen)
    x, head = model.splice(batch.input_ids, batch.image_rows, shown)
    rows = data.x.index_select(0, batch.label_index).to(shown.dtype)
    loss, _ = model.ops.linear_cross_entropy(rows, head, batch.labels)
    return x, loss


def step(model: VisionLanguageModel, data: Data) -> tuple[Tensor, ...]:
    return (model(data.batch),)


FORWARDS = {"vision": vision, "language": language, "ends": ends}
