"""Which specialisations of our Triton kernels a training step launches: types, sizes, alignment.

python -m bench.subjects.kernel_launches [--dtype bfloat16] [--preset nanovlm-222m]    as JSON

The step is the model's own: a preset's, with the training run's real shapes and every kernel on,
forward and backward under autocast, on a pretended H100 (`fake_h100`). At each launch Triton works
out what it would compile for these arguments, and is stopped there. Nothing is written by hand, so
what is compiled ahead of time is what training will ask for.

Needs a process of its own, because `fake_h100` changes torch and triton.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.subjects import fake_h100
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.presets import preset

if TYPE_CHECKING:
    import torch

    from nanovlm_fast.config import VLMConfig
    from nanovlm_fast.packing.batch import PackedBatch

PRESET = "nanovlm-222m"
DTYPES = ("bfloat16", "float16")
# A batch of nanovlm-222m's order of magnitude, not the one that its budgets make: what is compiled
# depends on these only through their divisibility by 16. The widths come from the preset.
TOKENS = 20736
DOCUMENTS = 270
IMAGES = 256
LABELS = 3072
# Two blocks per tower: the first has no residual to add, and the second does.
LAYERS = 2


@dataclass(frozen=True)
class Step:
    """One way to take a step; each may launch a kernel with other arguments."""

    recompute: str = "none"
    frozen: tuple[str, ...] = ()
    training: bool = True
    image_mean: float = 0.0
    max_seqlen: int = 128  # as in the preset
    stream: str = "float32"
    clip: float = 0.0
    kernels: str = "all"


STEPS = (
    Step(),
    Step(recompute="blocks"),
    Step(recompute="norms_and_activations"),
    Step(image_mean=0.5),
    Step(frozen=("vision_encoder",)),
    Step(frozen=("decoder",)),
    Step(frozen=("vision_encoder", "decoder")),
    Step(training=False),
    # One kernel rotates and attends in documents of up to 128 tokens; in longer ones they are two.
    Step(max_seqlen=64),
    Step(max_seqlen=1024),
    Step(clip=1.0),
    Step(stream="bfloat16"),
    Step(stream="bfloat16", clip=1.0),
    # With all kernels, `swiglu` is inside the language model's MLP.
    Step(kernels="swiglu"),
)


def launches(dtype_name: str, preset_name: str = PRESET) -> list[dict[str, Any]]:
    """Return the distinct launches of all `STEPS`.

    Each is {op, kernel, signature, constants, aligned, num_warps, num_stages}: `signature` maps
    every argument to its type ("constexpr" for a constant), `constants` the constant ones to their
    values, and `aligned` names the pointers and integers that are divisible by 16.
    """
    fake_h100.pretend()
    import torch

    config = dataclasses.replace(preset(preset_name)[0], vit_n_blocks=LAYERS, lm_n_blocks=LAYERS)
    dtype = getattr(torch, dtype_name)
    found: dict[str, dict[str, Any]] = {}
    with recorded(lambda launch: found.setdefault(json.dumps(launch), launch)):
        for step in STEPS:
            if step.stream not in ("float32", dtype_name):
                continue  # training refuses a bfloat16 stream beside float16 products
            run(step, dataclasses.replace(config, image_mean=step.image_mean), dtype)
    return list(found.values())


def run(step: Step, config: VLMConfig, dtype: torch.dtype) -> None:
    """Run the model forward, and if the step trains backward and update, without memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nanovlm_fast.model.ops import choose_ops
    from nanovlm_fast.model.packed import VisionLanguageModel
    from nanovlm_fast.presets import preset
    from nanovlm_fast.training.optim import apply_gradients, make_optimizers

    _, train = preset("nanovlm-222m")
    with FakeTensorMode():
        ops = choose_ops(step.kernels, "cuda", "auto", dtype, step.recompute, stream=step.stream)
        with torch.device("cuda"):
            model = VisionLanguageModel(config, ops)
            if step.stream == "bfloat16":
                model.keep_masters()
            batch = empty_batch(config, step.max_seqlen)
        for part in step.frozen:
            getattr(model, part).requires_grad_(False)
        with kernels_entered(), torch.autocast("cuda", dtype):
            with nullcontext() if step.training else torch.no_grad():
                loss = model(batch)
            if step.training:
                (loss / batch.n_labels).backward()
        if step.training and not step.frozen:
            with kernels_entered():
                apply_gradients(model, make_optimizers(model, train), step.clip)


def empty_batch(config: VLMConfig, max_seqlen: int) -> PackedBatch:
    """A batch of the shapes and types that training has, on the default device."""
    import torch

    from nanovlm_fast.packing.batch import PackedBatch

    size = config.vit_img_size
    return PackedBatch(
        input_ids=torch.empty(TOKENS, dtype=torch.int64),
        position_ids=torch.empty(TOKENS, dtype=torch.int32),
        cu_seqlens=torch.empty(DOCUMENTS + 1, dtype=torch.int32),
        images=torch.empty(IMAGES, 3, size, size, dtype=torch.uint8),
        image_rows=torch.empty(TOKENS, dtype=torch.int32),
        label_index=torch.empty(LABELS, dtype=torch.int64),
        labels=torch.empty(LABELS, dtype=torch.int64),
        max_seqlen=max_seqlen,
        n_labels=LABELS,
    )


@contextmanager
def kernels_entered() -> Iterator[None]:
    """Run the body of our operators, where they launch kernels.

    Under `FakeTensorMode` PyTorch would take the registered shapes of their results instead.
    """
    from torch._library.custom_ops import OPDEFS
    from torch.utils._python_dispatch import TorchDispatchMode

    class Enter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().split(".")[0]
            ours = name.startswith("nanovlm_fast::")
            return (OPDEFS[name]._init_fn if ours else func)(*args, **(kwargs or {}))

    with Enter():
        yield


class Pointer:
    """What Triton asks of a tensor, for one that has no memory."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        # PyTorch's allocator aligns every storage to 512 bytes.
        self.address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


@contextmanager
def recorded(enter: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Call `enter` with each kernel that Triton is about to compile, and do not compile it."""
    import torch
    from triton import knobs
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        pointers = [Pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return launch(self, *pointers, **kwargs)

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        enter(entry(fn.jit_function, compile))
        return True  # Triton then neither compiles nor launches

    JITFunction.run = run
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        JITFunction.run = launch
        knobs.runtime.jit_cache_hook = None


def entry(kernel: Any, compiled: dict[str, Any]) -> dict[str, Any]:
    """Triton's description of what it would compile, by names of arguments instead of positions."""
    names = kernel.arg_names
    attributes = {at: value for at, value in compiled["configs"][0].items() if value}
    if any(value != [["tt.divisibility", 16]] for value in attributes.values()):
        raise ValueError(f"{kernel.__name__}: Triton has new attributes of arguments: {attributes}")
    return {
        "op": kernel.module.rsplit(".", 1)[-1],
        "kernel": kernel.__name__,
        "signature": {name: str(compiled["signature"][name]) for name in names},
        "constants": {names[at[0]]: value for at, value in compiled["constants"].items()},
        "aligned": [names[at[0]] for at in sorted(attributes)],
        "num_warps": compiled["num_warps"],
        "num_stages": compiled["num_stages"],
    }


def make_parser() -> Parser:
    about = __doc__.splitlines()[0]
    parser = Parser(prog="python -m bench.subjects.kernel_launches", description=about)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--preset", default=PRESET)
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    preset(args.preset)  # raises for an unknown one
    print(json.dumps(launches(args.dtype, args.preset)))
    return 0


if __name__ == "__main__":
    fake_h100.leave(main())
