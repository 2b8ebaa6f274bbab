"""The one table of suites: what each measures, how it is run, for how long, and what its page says.

`python -m bench` runs the suites, bench/gpu_all.sh those with a `stage`, and `bench.report` writes
a section for each. All three take this order, the most valuable results on a GPU first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# A suite may take this many seconds, or this many times what is expected, whichever is more.
SHORTEST_LIMIT = 120.0
LIMIT_FACTOR = 4.0
STARTING = 20.0  # seconds that `python -m bench` takes before it starts the suite and its clock


@dataclass(frozen=True)
class Stage:
    """How bench/gpu_all.sh runs a suite on a GPU.

    A stage is not started with less than `least` seconds: what it needs to load, to compile on an
    H100 and to write a first result. It may take `limit` seconds; 0 means the suite's own limit,
    and infinity all that is left. A stage with `options` calls the suite itself and not through
    `python -m bench`; "{seconds}" in them is the time that it has, less half a minute in which it
    writes what it found. A `script` of bash takes the place of a suite in Python.
    """

    least: float
    limit: float = 0.0
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    script: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """`python -m bench.<name>`, its options for a CPU, a GPU and --quick, and what it needs.

    `name` is also how the names of its result files begin. `about` is a sentence, `details` a
    paragraph after it in the page. `seconds` and `quick_seconds` are expected times. `needs` and
    `quick_needs` list 'gpu', 'cpu' or packages. A suite that runs `anywhere` gets no --device.
    """

    name: str
    about: str
    details: str = ""
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
    # `python -m bench` does not know it: it takes over ten minutes, or needs more than options.
    by_hand: bool = False
    of: str = ""  # the suite whose module it uses, if that is not its own name
    section: bool = True  # whether the page has a section for it, once there is a result
    promised: bool = False  # its section is there before any result, and says so
    stage: Stage | None = None

    @property
    def module(self) -> str:
        return f"bench.{self.of or self.name}"

    def expected(self, quick: bool) -> float:
        """Seconds that it takes."""
        return self.quick_seconds if quick else self.seconds

    def limit(self, quick: bool) -> float:
        """Seconds after which it is stopped."""
        return max(SHORTEST_LIMIT, LIMIT_FACTOR * self.expected(quick))

    def stage_limit(self) -> float:
        """Seconds after which bench/gpu_all.sh stops it; infinity for all that is left."""
        assert self.stage is not None
        return self.stage.limit or self.limit(quick=False) + STARTING


STEP_DETAILS = """Rows are timed in pairs, interleaved with the base. "Of the base's time" is the
ratio of the medians within the pair, with its interval where the file has the times of both.
"Speed" is relative to the reference. It goes through the base, and has an interval only where base
and reference are that pair."""
RACE_DETAILS = """Both start from the same weights and train on the same batches; only the cost of a
step differs."""
PEER_DETAILS = """Its own collator makes its rows. With texts of one length and one question per
image, there is no padding for ours to skip and no image to share."""
LEGIBLE_DETAILS = """Both runs see the same canvases in the same order, and are scored on large ones
only. "Blind" is the same checkpoint with every pixel painted grey."""
DEMO_DETAILS = """Every drawing in the test split is new to the model. [What is
asked](../nanovlm_fast/demo/README.md). "Blind" is the same checkpoint with every pixel painted
grey. Drawings: Noto Emoji by Google, Apache-2.0; Twemoji, © Twitter, CC-BY 4.0."""
SCALING_DETAILS = """The first rows are a model of an H100's step on 1 to 1,024 GPUs, not a
measurement on more than one. The last rows count the bytes that two gloo processes send, which
checks the model's formulas. `bench/scaling.py` says what is modelled and what is left out; its
command prints all numbers of GPUs, and strong scaling. "No overlap" is what a backward compiled
into one graph gets. FSDP2 may exceed 100%, because it divides the optimizer's update as well.
gloo's reduce-scatter sends as much as an all-reduce, twice as much as a ring's."""
CPU_THREADS_DETAILS = """`unset` is what GNU OpenMP does by itself, `ours` what our commands set;
`spin-N` sets GOMP_SPINCOUNT, `passive` OMP_WAIT_POLICY. Each reading is the real command in a
process of its own. Training is read over a few seconds: compare rows with each other, and not with
the rate of a whole run. The table of many settings was made before commands left busy cores to
other processes. In the table with `ours` they do, whatever the setting. The other commands were
read once; most of their time is their start."""
COMPILED_DETAILS = """The whole compiler runs for a device that is not there, and every launch of
the step is entered with its bytes and FLOPs; padding, gradient norm and optimizer are included.
"GB" is what is read and written, each element once per launch. The floor takes the roofline's
rates. The prediction takes rates that kernels reach in practice; `bench/subjects/step_time.py`
states them. Gaps between launches, the caches and waiting for data are left out. A buffer counts
once for a kernel, in Inductor's kernels for the loss too, so that a kernel of ours that saves a
second reading shows no gain. The stream is `--stream` of `train.py`, with bfloat16 working
weights."""

KERNEL_SETS_DETAILS = """Each set of `--kernels` is a process of its own, and they take turns on the
device. "bfloat16" after a comma is `--stream bfloat16`; other options have their names. "The
tuner's" is what it chose on an H100, with adamw: see `TUNED` in
[kernel_sets.py](harness/kernel_sets.py). "Gradient" is the relative error of all gradients against
float32, at most twice that of plain PyTorch."""
TUNE_DETAILS = """What `train.py --tune auto` takes on this device. Each candidate was compared with
what was taken before it, in pairs of readings. It is taken if the interval of the ratio excludes 1
and the gain is at least 0.3% of the step. [How it decides](../nanovlm_fast/tune/README.md)."""

# As many samples as fill the preset's budget of 22,528 tokens, with 78 of a sample on average. What
# is measured then has the padded sizes of training and of the prediction in compiled_step.
GPU_STEP = ("--preset", "nanovlm-222m", "--samples", "288")
# A rehearsal of a step takes seconds.
QUICK_STEP = ("--data", "synthetic", "--samples", "8", "--repeats", "5", "--variants", "ours")

SUITES = (
    Suite(
        "facts",
        "Rates, clocks and power of the device.",
        of="device_facts",
        quick=(),
        seconds=10,
        quick_seconds=5,
        alone=True,
        stage=Stage(least=20),
    ),
    Suite(
        "train_step",
        "One optimizer step on the same samples: padded nanoVLM, ours, ours minus one technique.",
        STEP_DETAILS,
        full=("--budget-s", "60"),
        # The reference in eager mode and ours: two compilations. With those of train_step_ablation
        # it would not end in one call.
        gpu=(*GPU_STEP, "--variants", "ours", "--budget-s", "180"),
        quick=QUICK_STEP,
        seconds=90,
        # Its 180 s, and the compilation that is under way when they are spent.
        stage=Stage(least=240),
    ),
    Suite(
        "train_step_slice",
        "An optimizer step at nanoVLM's width, with two layers per tower.",
        of="train_step",
        full=(
            *("--preset", "nanovlm-222m", "--layers", "2"),
            *("--budget-s", "60", "--variants", "packing,labelled_head"),
        ),
        quick=QUICK_STEP,
        seconds=120,
        needs=("cpu",),
        in_quick=False,
        section=False,  # its files are in the section of train_step
    ),
    Suite(
        "profile",
        "One of our steps, kernel by kernel.",
        of="profile_step",
        gpu=(*GPU_STEP, "--trace"),
        quick=("--preset", "tiny", "--data", "synthetic", "--samples", "4", "--repeats", "3"),
        seconds=90,
        quick_seconds=5,
        alone=True,
        stage=Stage(least=100),  # two minutes of compilation, less what train_step left cached
    ),
    Suite(
        "tests",
        "`pytest -m gpu` on the device.",
        of="checks",
        by_hand=True,
        stage=Stage(
            least=120,
            limit=280,
            options=("--processes", "6", "--limit", "{seconds}"),
            quick=("--quick", "--limit", "{seconds}"),
        ),
    ),
    Suite(
        "kernels",
        "Each kernel beside its rivals, at nanoVLM's sizes.",
        quick=("--small", "--repeats", "3", "--only", "rms_norm,rotary"),
        seconds=100,
        quick_seconds=15,
        needs=("gpu",),
        stage=Stage(least=60),
    ),
    Suite(
        "attention",
        "Attention backends on documents of several lengths.",
        seconds=70,
        quick_seconds=5,
        stage=Stage(least=60),
    ),
    Suite(
        "memory",
        "Peak memory of a step by samples per step.",
        quick=("--quick", "--preset", "tiny", "--samples", "2"),
        seconds=75,
        quick_seconds=15,
        stage=Stage(least=60),
    ),
    Suite(
        "generate",
        "Greedy generation on the same weights.",
        quick=("--quick", "--preset", "tiny"),
        stage=Stage(least=60),
    ),
    Suite(
        "kernel_sets",
        "The whole step with sets of kernels and both streams, against plain compiled PyTorch.",
        KERNEL_SETS_DETAILS,
        of="harness.kernel_sets",
        by_hand=True,
    ),
    Suite(
        "tune",
        "What the tuner finds fastest on this device.",
        TUNE_DETAILS,
        of="harness.tune",
        by_hand=True,
        # The seconds are those after which it begins no further measurement; the last one, and a
        # comparison of whole steps, follow.
        stage=Stage(
            least=200,
            limit=540,
            options=("--preset", "nanovlm-222m", "--seconds", "400"),
            quick=("--preset", "tiny", "--seconds", "1"),
        ),
    ),
    Suite(
        "train_step_ablation",
        "The same step with the reference compiled, and ours minus one technique.",
        of="train_step",
        # A file of its own: a call that is stopped must not replace the whole one of train_step.
        gpu=(*GPU_STEP, "--budget-s", "300", "--name", "train_step_nanovlm-222m_ablation"),
        quick=(*QUICK_STEP, "--name", "train_step_ablation"),
        seconds=100,
        needs=("gpu",),
        alone=True,
        section=False,  # its files are in the section of train_step
        stage=Stage(least=360),
    ),
    Suite(
        "roofline",
        "The least time of a step at the machine's rates.",
        full=("--samples", "16", "--layers", "2", "--measure"),
        gpu=("--measure",),
        quick=("--preset", "tiny", "--samples", "4"),
        seconds=25,
        quick_seconds=5,
        stage=Stage(least=40),
    ),
    Suite(
        "dataloader",
        "From images and text to packed batches.",
        full=("--seconds", "2", "--repeats", "3"),
        gpu=("--seconds", "2", "--repeats", "3"),
        quick=("--pictures", "32", "--seconds", "0.3", "--repeats", "2", "--workers", "1"),
        seconds=80,
        stage=Stage(least=90),  # it writes its result at its end only
    ),
    Suite(
        "scaling",
        "What communication costs.",
        SCALING_DETAILS,
        quick=("--preset", "tiny", "--samples", "4", "--steps", "0"),
        seconds=20,
        quick_seconds=5,
    ),
    Suite(
        "compiled_step",
        "What torch.compile makes of a training step on an H100: **predicted, not measured**.",
        COMPILED_DETAILS,
        by_hand=True,
    ),
    Suite(
        "codegen",
        "The kernels' machine code for sm_90.",
        full=("--write",),
        gpu=("--write",),
        quick=("--write", "--only", "swiglu"),
        seconds=30,
        quick_seconds=5,
        needs=("triton",),
        quick_needs=("triton",),
        anywhere=True,
        section=False,  # its table is in kernels/README.md
    ),
    Suite(
        "train_tiny",
        "Whole runs of `train.py`, with and without images.",
        of="train_run",
        by_hand=True,
    ),
    Suite(
        "demo",
        "Pretrained towers from PyPI packages, fine-tuned on drawings of things.",
        DEMO_DETAILS,
        of="train_run",
        by_hand=True,
    ),
    Suite(
        "tiny_split",
        "`tiny-split` on large canvases, with its tiles and with each canvas squashed to a square.",
        LEGIBLE_DETAILS,
        of="tiles.legible",
        by_hand=True,
    ),
    Suite("loss_curves", "The same training several ways, relative to seeds.", by_hand=True),
    Suite(
        "peer",
        "huggingface/nanoVLM's own code and ours, on the same weights and samples.",
        PEER_DETAILS,
        by_hand=True,
    ),
    Suite(
        "cpu_threads",
        "How OpenMP's threads wait on a CPU, idle and beside busy processes.",
        CPU_THREADS_DETAILS,
        by_hand=True,
    ),
    Suite("optimizers", "Steps to the same loss with Muon and AdamW.", by_hand=True),
    Suite(
        "sanitize",
        "compute-sanitizer over every kernel.",
        by_hand=True,
        section=False,
        stage=Stage(least=60, limit=120, script=("bench/sanitize.sh", "memcheck")),
    ),
    Suite(
        "race",
        "Time from random weights to 95% of easy-VQA's test split, padded nanoVLM against ours.",
        RACE_DETAILS,
        full=("--budget-s", "150"),
        gpu=("--preset", "nanovlm-222m", "--budget-s", "200"),
        seconds=500,
        quick_seconds=15,
        alone=True,
        promised=True,
        # Its state is saved, so the next call continues a race that found no time to finish.
        stage=Stage(
            least=150,
            limit=math.inf,
            options=("--preset", "nanovlm-222m", "--wall-s", "{seconds}"),
            quick=("--preset", "tiny", "--quick"),
        ),
    ),
)
STAGES = {suite.name: suite for suite in SUITES if suite.stage}
