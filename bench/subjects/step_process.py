"""Training steps, compiled for an H100 that is not there: a process of `bench.compiled_step`.

    python -m bench.subjects.step_process OPTIONS.json RESULT.json

It reads a list of `Options` and writes a list of results. It is a process of its own because
`fake_h100` must come before torch, and changes it. The step is `train.py`'s: the batch has the
budgets that a run measures, with their slack; forward under autocast, backward, gradient norm,
clipping and the optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.subjects import fake_h100
from nanovlm_fast.command import Parser, reports_errors

if TYPE_CHECKING:  # for names in annotations only: torch must not be imported before `pretend`
    from torch import Tensor

    from bench.subjects.launches import Launch, Recorder
    from bench.subjects.lowered import Graph
    from nanovlm_fast.config import TrainConfig, VLMConfig
    from nanovlm_fast.packing.batch import PackedBatch
    from nanovlm_fast.packing.packer import Budget

DRAWN = 1000  # samples that the budgets are measured on, as in a run
STREAMS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """What is compiled: options of train.py, and Inductor's own."""

    preset: str = "nanovlm-222m"
    vision_layers: int = 0  # 0: the preset's
    language_layers: int = 0
    kernels: str = "none"
    stream: str = "float32"
    recompute: str = "none"
    attention: str = "torch"  # what `auto` takes where the package flash-attn is not installed
    vision_attention: str = "flash"
    inductor: dict[str, Any] = field(default_factory=dict)
    templates: bool = False  # Triton templates in place of cuBLAS, with epilogues
    tokens_per_batch: int = 0  # 0: the preset's
    images_per_batch: int = 0  # 0: measured, as a run does
    machine_code: bool = False  # registers and spills of every generated kernel


@dataclass(frozen=True)
class Step:
    """A step that was compiled and replayed."""

    launches: list[Launch]
    graphs: list[Graph]
    graph_breaks: int
    resident: int  # bytes of weights, buffers and the optimizer's state
    peak: int  # bytes


def measure(options: Options) -> dict[str, Any]:
    """Compile and replay the step; return what the result file has on one variant.

    `fake_h100.pretend` must have been called.
    """
    began = time.perf_counter()
    from bench.subjects import step_time
    from bench.subjects.lowered import WITH_TEMPLATES, by_kernel, machine_code, template_chosen

    _configure_inductor((WITH_TEMPLATES if options.templates else {}) | options.inductor)
    config, train = _configs(options)
    budget, batch = budget_and_batch(options, config, train)
    with template_chosen() if options.templates else contextlib.nullcontext():
        step = compile_step(options, config, train, batch)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "layers": [config.vit_n_blocks, config.lm_n_blocks],
        "graphs": len(step.graphs),
        "graph_breaks": step.graph_breaks,
        "resident_gb": step.resident / 1e9,
        "peak_gb": step.peak / 1e9,
        "budget": dataclasses.asdict(budget),
        "work": _sizes(config, batch, padded=False),
        "computed": _sizes(config, batch, padded=True),
        **step_time.totals(step.launches),
        "by_kind": step_time.by_kind(step.launches),
        "dearest": step_time.dearest(step.launches),
        "seconds_to_compile": round(seconds, 1),
    }
    result["predicted"] = _predicted(result)
    if options.machine_code:
        sources = {name: text for graph in step.graphs for name, text in graph.kernels.items()}
        result["machine_code"] = by_kernel(machine_code(sources))
    return result


def _configure_inductor(settings: dict[str, Any]) -> None:
    """Set Inductor's options, `name.of.it: value`."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    # It would time products with and without padding, on a device that is not there.
    inductor.shape_padding = False
    for name, value in settings.items():
        *folders, last = name.split(".")
        holder: Any = inductor
        for folder in folders:
            holder = getattr(holder, folder)
        setattr(holder, last, value)


def _configs(options: Options) -> tuple[VLMConfig, TrainConfig]:
    from nanovlm_fast.presets import preset

    config, train = preset(options.preset)
    vision = options.vision_layers or config.vit_n_blocks
    language = options.language_layers or config.lm_n_blocks
    tokens = options.tokens_per_batch or train.tokens_per_batch
    return (
        dataclasses.replace(config, vit_n_blocks=vision, lm_n_blocks=language),
        dataclasses.replace(train, tokens_per_batch=tokens),
    )


def budget_and_batch(
    options: Options, config: VLMConfig, train: TrainConfig
) -> tuple[Budget, PackedBatch]:
    """The budgets that a run measures on its data, and one real batch that was packed for them.

    Raises ValueError if a sample does not fit into what the options say.
    """
    from bench.subjects.workload import finevision_like, load_work
    from nanovlm_fast.data.budget import LABEL_MULTIPLE
    from nanovlm_fast.packing.batch import pack
    from nanovlm_fast.packing.packer import Budget, Packer

    if config.max_img_size:
        samples = finevision_like(config, DRAWN, blank=True)
    else:
        samples = load_work(options.preset, samples=DRAWN).samples
    longest = train.max_seqlen or config.lm_max_position_embeddings
    fitting = [s for s in samples if max(map(len, s.documents)) <= longest]
    multiple = LABEL_MULTIPLE["cuda"]
    budget = Budget.measure(fitting, train.tokens_per_batch, longest, label_multiple=multiple)
    if options.images_per_batch:
        budget = dataclasses.replace(budget, images=options.images_per_batch)
    packer = Packer(budget)
    for sample in fitting:
        packer.add(sample)
    return budget, pack(packer.next(), budget, config.image_tokens, config.vit_img_size)


def compile_step(
    options: Options, config: VLMConfig, train: TrainConfig, batch: PackedBatch
) -> Step:
    """Trace, differentiate, lower and replay one training step on fake tensors."""
    import torch
    from torch._dynamo.utils import counters
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.subjects.launches import Recorder, entered_kernels
    from bench.subjects.lowered import collected
    from nanovlm_fast.model.ops import choose_ops
    from nanovlm_fast.model.packed import VisionLanguageModel
    from nanovlm_fast.training.optim import make_optimizers

    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    lengths = batch.cu_seqlens.diff().tolist()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        ops = choose_ops(
            options.kernels,
            "cuda",
            options.attention,
            torch.bfloat16,
            options.recompute,
            options.vision_attention,
            options.stream,
        )
        with torch.device("cuda"):
            model = VisionLanguageModel(config, ops)
            if options.stream == "bfloat16":
                model.keep_masters()
        optimizers = make_optimizers(model, train)
        on_device = batch._map(_on_device)
        _allocate_state(model, optimizers)
        # After `choose_ops`, which imports the kernels: the recorder looks their operators up.
        recorder = Recorder(lengths)
        graphs = stack.enter_context(collected(recorder))
        stack.enter_context(entered_kernels(recorder))
        state = [tensor for o in optimizers for tensor in _tensors_of(o.state)]
        masters = model.masters.weights.values()
        recorder.hold([*model.parameters(), *masters, *model.buffers(), *state])
        resident = recorder.in_use
        step_model = torch.compile(model, fullgraph=True, dynamic=False)
        _train_step(step_model, model, optimizers, train, on_device, recorder)
    breaks = sum(counters["graph_break"].values())
    return Step(recorder.launches, graphs, breaks, resident, recorder.peak)


def _on_device(tensor: Tensor) -> Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def _tensors_of(state: Any) -> list[Tensor]:
    import torch.utils._pytree as pytree
    from torch import Tensor

    return [leaf for leaf in pytree.tree_leaves(dict(state)) if isinstance(leaf, Tensor)]


def _allocate_state(model: Any, optimizers: list[Any]) -> None:
    """Make the optimizers' state, which the first update of a run does, outside of the record."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            weight = model.masters.of(parameter)
            weight.grad = torch.empty_like(weight)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _train_step(
    step_model: Any,
    model: Any,
    optimizers: list[Any],
    train: TrainConfig,
    batch: PackedBatch,
    recorder: Recorder,
) -> None:
    """`Trainer.optimizer_step` of train.py for one micro-batch; compiled code records itself."""
    import torch

    from nanovlm_fast.device import autocast_to
    from nanovlm_fast.training.optim import apply_gradients

    device = torch.device("cuda")
    with autocast_to(torch.bfloat16, device)():
        loss_sum = step_model(batch)
    with recorder:
        loss = loss_sum / max(batch.n_labels, 1)
    loss.backward()
    recorder.direction = "update"
    with recorder:
        apply_gradients(model, optimizers, train.clip)


def _sizes(config: VLMConfig, batch: PackedBatch, padded: bool) -> dict[str, int]:
    """Sizes of the step and its model FLOPs, without padding or with it."""
    from nanovlm_fast.model.flops import step_flops

    images = batch.n_images
    tokens = batch.n_tokens
    labels = batch.n_labels
    pairs = batch.n_pairs
    if padded:
        images = len(batch.images)
        tokens = len(batch.input_ids)
        labels = len(batch.labels)
        pairs = sum(n * (n + 1) // 2 for n in batch.cu_seqlens.diff().tolist())
    return {
        "images": images,
        "tokens": tokens,
        "labels": labels,
        "pairs": pairs,
        "flops": step_flops(config, images, tokens, labels, pairs),
    }


def _predicted(result: dict[str, Any]) -> dict[str, float]:
    """Rates of a step that takes the expected time."""
    from nanovlm_fast.model.flops import PEAK_FLOPS

    seconds = result["expected_ms"] / 1e3
    work = result["work"]
    return {
        "step_ms": result["expected_ms"],
        "tokens_per_s": work["tokens"] / seconds,
        "images_per_s": work["images"] / seconds,
        "mfu": work["flops"] / seconds / PEAK_FLOPS[fake_h100.PROPERTIES.name],
    }


def make_parser() -> Parser:
    about = __doc__.splitlines()[0]
    parser = Parser(prog="python -m bench.subjects.step_process", description=about)
    parser.add_argument("options", type=Path, help="a list of the fields of `Options`, in JSON")
    parser.add_argument("result", type=Path, help="the file to write")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    steps = [Options(**options) for options in json.loads(args.options.read_text())]
    (vision_attention,) = {options.vision_attention for options in steps}
    fake_h100.pretend(vision_attention)
    args.result.write_text(json.dumps([measure(options) for options in steps]))
    return 0


if __name__ == "__main__":
    fake_h100.leave(main())
