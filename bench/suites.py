"""The table of suites: what runs, on which machine, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """`python -m bench.<name>`, its options for a CPU, a GPU and --quick, and what it needs.

    `seconds` and `quick_seconds` are expected times. `needs` and `quick_needs` list 'gpu', 'cpu' or
    packages. A suite that runs `anywhere` gets no --device.
    """

    name: str
    about: str
    full: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    seconds: float = 60.0
    quick_seconds: float = 10.0
    needs: tuple[str, ...] = ()
    quick_needs: tuple[str, ...] = ()
    anywhere: bool = False
    in_quick: bool = True
    # Runs only when --only names it: too long to run with the others, or meant for gpu_all.sh.
    alone: bool = False
    of: str = ""  # the suite whose module it uses, if that is not its own name

    @property
    def module(self) -> str:
        return f"bench.{self.of or self.name}"


# Options of the suites.
SEED = ("--preset", "nanovlm-222m", "--budget-s", "180")
TOY = ("--data", "synthetic", "--samples", "8", "--repeats", "5", "--variants", "ours")
SLICED = ("--preset", "nanovlm-222m", "--layers", "2")
SLICE = (*SLICED, "--budget-s", "60", "--variants", "packing,labelled_head")
TINIEST = ("--preset", "tiny", "--samples", "4")
MEASURED = ("--samples", "16", "--layers", "2", "--measure")
TINY = ("--quick", "--preset", "tiny")
LOADED = ("--seconds", "2", "--repeats", "3")
LOADED_LITTLE = ("--pictures", "32", "--seconds", "0.3", "--repeats", "2", "--workers", "1")
UNCOUNTED = ("--preset", "tiny", "--samples", "4", "--steps", "0")
FEW = ("--small", "--repeats", "3", "--only", "rms_norm,rotary")
TINIEST_STEP = ("--preset", "tiny", "--data", "synthetic", "--samples", "4", "--repeats", "3")
RACE = ("--preset", "nanovlm-222m", "--budget-s", "200")
SUITES = (
    Suite("facts", "what the device can do", quick=(), seconds=10, quick_seconds=5,
          of="device_facts", alone=True),
    Suite("train_step", "a whole optimizer step against padded nanoVLM", ("--budget-s", "60"),
          SEED, TOY, seconds=90),
    Suite("train_step_slice", "nanoVLM's width, two layers per tower", SLICE, quick=TOY,
          seconds=120, needs=("cpu",), of="train_step", in_quick=False),
    Suite("kernels", "each kernel against its rivals", quick=FEW, seconds=100, quick_seconds=15,
          needs=("gpu",)),
    Suite("attention", "attention inside packed documents", seconds=70, quick_seconds=5),
    Suite("memory", "peak memory against the batch", quick=(*TINY, "--samples", "2"), seconds=75,
          quick_seconds=15),
    Suite("dataloader", "images and text to packed batches", LOADED, LOADED, LOADED_LITTLE,
          seconds=80),
    Suite("generate", "prefill and decoding", quick=TINY),
    Suite("profile", "one of our steps, kernel by kernel",
          gpu=("--preset", "nanovlm-222m", "--trace"), quick=TINIEST_STEP, seconds=40,
          quick_seconds=5, of="profile_step", alone=True),
    Suite("roofline", "the floor of a step", MEASURED, ("--measure",), TINIEST, seconds=25,
          quick_seconds=5),
    Suite("scaling", "communication on 1 to 1,024 GPUs, a model", quick=UNCOUNTED, seconds=20,
          quick_seconds=5),
    Suite("codegen", "the kernels' machine code for sm_90", ("--write",), ("--write",),
          ("--write", "--only", "swiglu"), seconds=30, quick_seconds=5, needs=("triton",),
          quick_needs=("triton",), anywhere=True),
    Suite("race", "from scratch to 95% of the test split, padded against ours", ("--budget-s",
    "150"),
          RACE, seconds=500, quick_seconds=15, alone=True),
)  # fmt: skip
