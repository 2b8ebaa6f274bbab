"""The whole training step with sets of kernels and both streams, against plain compiled PyTorch.

    python -m bench.harness.kernel_sets                          nanovlm-222m, needs a GPU
    python -m bench.harness.kernel_sets --sets "none;all;all,bfloat16,vision_attention=cudnn"

A set is what --kernels takes, and beside it perhaps the stream, and options of train.py that the
tuner chooses too: attention=, vision_attention=, inductor=. The work is the batch that
bench.compiled_step predicts, so that a prediction can be held against its measurement. Each set is
compiled in a process of its own, four at once; then all take turns on the device, a few steps each,
round after round. Before that, the gradients of each are compared with those of the plain model in
float32. A set gets no time if it is more than twice as far from them as plain compiled PyTorch is.

Memory: at nanovlm-222m's sizes a step takes 33 GB while it runs. Between its turns a set is taken
to hold 4 GB: weights, masters, AdamW's state, and the CUDA context. Eight sets and a step are then
65 GB of an H100's 80.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.harness.results import ROOT, write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import summary, synchronize
from bench.subjects.step_process import Options, budget_and_batch
from nanovlm_fast.command import Parser, ran_out_of_memory, reports_errors
from nanovlm_fast.device import autocast_to, make_current, pick_device, pick_dtype
from nanovlm_fast.model.attention import BACKENDS, VISION_BACKENDS
from nanovlm_fast.model.compiling import INDUCTOR, compiled, inductor_names
from nanovlm_fast.model.flops import peak_flops, step_flops
from nanovlm_fast.model.ops import KERNELS, choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range
from nanovlm_fast.training.optim import apply_gradients, drop_gradients, make_optimizers, set_lr
from nanovlm_fast.training.steps import accumulate_gradients
from nanovlm_fast.tune.launcher import END_LIMIT

T = TypeVar("T")
PLAIN = "none"
# What the tuner chose on an H100 (bench/NOTES.md), and adamw, which its gate left out wrongly.
TUNED = "document_attention,swiglu_mlp,layer_norm,rms_norm,adamw,vision_attention=cudnn"
SETS = (
    PLAIN,
    TUNED,
    "none,bfloat16",
    f"{TUNED},bfloat16",
    "all",
    "all,bfloat16",
    "document_attention,bfloat16",
    f"{TUNED},inductor=combo_kernels",
)
_NO_ATTENTION = ",".join(name for name in KERNELS if not name.endswith("attention"))
LABELS = {
    TUNED: "the tuner's",
    f"{TUNED},bfloat16": "the tuner's, bfloat16",
    f"{TUNED},inductor=combo_kernels": "the tuner's, inductor=combo_kernels",
    _NO_ATTENTION: "all but attention",
    f"{_NO_ATTENTION},bfloat16": "all but attention, bfloat16",
}
# What a set may name beside kernels; a stream by its value alone.
VALUES = {
    "stream": ("float32", "bfloat16"),
    "attention": ("auto", *BACKENDS),
    "vision_attention": ("auto", *VISION_BACKENDS),
    "inductor": ("none", *INDUCTOR),
}
AT_ONCE = 4  # sets that are compiled at once: six do not fit into 80 GB (bench/NOTES.md)
OUT_OF_MEMORY_RETRIES = 100  # other sets use the device while they compile
STEPS_LIMIT = 60.0  # seconds that a set may take for the steps of a round
ALLOWED = 2.0  # times plain PyTorch's own error


@dataclass(frozen=True)
class Wanted:
    """What a set names: values of options of train.py."""

    kernels: str
    stream: str = "float32"
    attention: str = "auto"
    vision_attention: str = "auto"
    inductor: str = "none"

    @classmethod
    def read(cls, name: str) -> Wanted:
        """Read a set. Raises ValueError naming what it may not have."""
        kernels: list[str] = []
        named: dict[str, str] = {}
        for word in map(str.strip, name.split(",")):
            option, equals, value = word.partition("=")
            if word in VALUES["stream"]:
                named["stream"] = word
            elif not equals:
                kernels.append(word)
            elif value in VALUES.get(option, ()):
                # Several of Inductor's options are several words.
                more = option == "inductor" and option in named
                named[option] = f"{named[option]},{value}" if more else value
            else:
                known = "; ".join(f"{one}={'|'.join(VALUES[one])}" for one in VALUES)
                raise ValueError(f"--sets {name}: {word} is none of {known}")
        if kernels not in (["none"], ["all"]) and (not kernels or {*kernels} - {*KERNELS}):
            known = ", ".join(KERNELS)
            raise ValueError(f"--sets {name}: its kernels are none, all, or some of {known}")
        return cls(",".join(kernels), **named)


class Subject:
    """One set of kernels: a model, its optimizer, and one batch on the device."""

    def __init__(
        self, name: str, preset_name: str, device: torch.device, compile: str, batch: PackedBatch
    ):
        wanted = Wanted.read(name)
        self.device = device
        self.compile = compile
        dtype = pick_dtype("auto", device)
        self.config, train = preset(preset_name)
        self.train = dataclasses.replace(train, optimizer="adamw")
        self.labels = batch.n_labels
        self.batch = batch.to(device)
        self.autocast = autocast_to(dtype, device)
        torch.manual_seed(0)  # every set begins with the same weights
        with torch.device(device):
            self.model = VisionLanguageModel(self.config)
        self.model.ops = choose_ops(
            wanted.kernels,
            device,
            wanted.attention,
            dtype,
            vision_attention=wanted.vision_attention,
            stream=wanted.stream,
        )
        if wanted.stream == "bfloat16":
            self.model.keep_masters()
        self.begin_anew()
        self.run_model = compiled(self.model, compile, inductor_names(wanted.inductor))

    def begin_anew(self) -> None:
        """Forget what a step that ran out of memory has left: gradients, and half of a state."""
        self.optimizers = make_optimizers(self.model, self.train)
        set_lr(self.optimizers, 0.0)  # so that later steps compute what the first one did
        drop_gradients(self.model, self.optimizers)

    def forward(self, batch: Any) -> Tensor:
        if self.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return self.run_model(batch)

    def backward(self) -> Tensor:
        """Forward and backward of one batch; returns the loss."""
        total = accumulate_gradients(
            self.forward, self.run_model, [self.batch], self.labels, self.autocast
        )
        return total / self.labels

    def step(self) -> None:
        self.backward()
        apply_gradients(self.model, self.optimizers, self.train.clip)

    def errors(self, truth: tuple[float, dict[str, Tensor]]) -> dict[str, float]:
        """Relative errors of the loss and of all gradients together."""
        loss = float(self.backward())
        grads = gradients_of(self.model)
        wanted = truth[1]
        off = sum(float((grads[n].cpu() - wanted[n]).double().square().sum()) for n in wanted)
        size = sum(float(one.double().square().sum()) for one in wanted.values())
        return {"loss": abs(loss / truth[0] - 1), "gradient": (off / size) ** 0.5}

    def truth(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients in float32, by plain PyTorch."""
        self.model.ops = choose_ops("none", self.device, "sdpa", torch.float32, "blocks")
        loss = self.model(self.batch) / self.labels
        loss.backward()
        grads = {name: one.cpu() for name, one in gradients_of(self.model).items()}
        return loss.item(), grads

    def seconds(self, steps: int) -> list[float]:
        """Seconds of each of some steps; the memory is left to others afterwards."""
        for _ in range(2):  # memory comes back, and clocks rise
            self.step()
        times = []
        for _ in range(steps):
            synchronize()
            began = time.perf_counter()
            self.step()
            synchronize()
            times.append(time.perf_counter() - began)
        torch.cuda.empty_cache()
        return times


def gradients_of(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Gradients by name in float32, taken from the model."""
    model.masters.add_gradients()
    found = {}
    for name, parameter in model.named_parameters():
        weight = model.masters.of(parameter)
        if weight.grad is not None:
            found[name] = weight.grad.float()
            weight.grad = None
    return found


def serve(args: argparse.Namespace) -> int:
    """A process of one set: says what it found, then takes as many steps as each line asks for."""
    device = make_current(pick_device(args.device))
    batch = PackedBatch(**torch.load(args.batch, weights_only=True))
    if args.serve == "truth":
        torch.save(Subject(PLAIN, args.preset, device, "none", batch).truth(), args.truth)
        return 0
    subject = when_memory_is_free(
        lambda: Subject(args.serve, args.preset, device, args.compile, batch)
    )
    truth = torch.load(args.truth, mmap=True, weights_only=True)

    def first_step() -> dict[str, Any]:
        subject.begin_anew()
        found = subject.errors(truth)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        subject.step()
        return found

    found = when_memory_is_free(first_step)
    found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.empty_cache()
    print(json.dumps(found), flush=True)
    for asked in sys.stdin:
        print(json.dumps(subject.seconds(int(asked))), flush=True)
    return 0


def when_memory_is_free(call: Callable[[], T]) -> T:
    """Call again while memory is short: others compile beside this set, and will free some."""
    for _ in range(OUT_OF_MEMORY_RETRIES):
        try:
            return call()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        # Not in the handler: until its end the traceback keeps what the call had allocated.
        # Processes that wait equally long would meet again.
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(random.uniform(0.2, 2.0))
    return call()


class Process:
    """A set that runs in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, log: Path):
        call = [sys.executable, "-m", "bench.harness.kernel_sets", "--serve", name]
        call += ["--truth", str(folder / "truth"), "--batch", str(folder / "batch")]
        call += ["--preset", args.preset, "--device", args.device, "--compile", args.compile]
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                call,
                cwd=ROOT.parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def answer(self, deadline: float) -> Any:
        """The next line, by a time of `time.monotonic`.

        Raises RuntimeError if there is none by then, or with the last line of its errors if it
        died.
        """
        assert self.process.stdout is not None
        left = max(deadline - time.monotonic(), 0.0)
        if not select.select([self.process.stdout], [], [], left)[0]:
            self.process.kill()
            raise RuntimeError("no answer in time")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.last_words())
        return json.loads(line)

    def ask(self, steps: int, deadline: float) -> list[float]:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it may be dead: then there is no answer either
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self.answer(deadline)

    def last_words(self) -> str:
        """The last line of its errors."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no reason given"

    def close(self) -> None:
        self.process.kill()
        # One that waits in a driver is not gone until the driver answers, which may be never.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_LIMIT)


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """One row per set: its error, its times, or why it has none. Yields them after each round.

    The sets are compiled within two thirds of `args.seconds`, and no round begins after them.
    `folder` holds the batch.
    """
    began = time.monotonic()
    ready = began + args.seconds * 2 / 3
    sets = args.sets.split(";")
    processes: dict[str, Process] = {}
    rows: dict[str, dict[str, Any]] = {name: {} for name in sets}
    try:
        plain = processes["truth"] = Process("truth", args, folder, folder / "truth.log")
        try:
            failed = plain.process.wait(args.seconds * 2 / 3)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("plain PyTorch in float32: no answer in time") from error
        if failed:
            raise RuntimeError(f"plain PyTorch in float32: {plain.last_words()}")

        def start(name: str) -> Process:
            log = folder / f"{sets.index(name)}.log"
            processes[name] = Process(name, args, folder, log)
            return processes[name]

        compile_all(start, rows, ready)
        judge(rows)
        yield rows
        seconds: dict[str, list[float]] = {n: [] for n in sets if "error" not in rows[n]}
        for _ in range(args.rounds):
            if time.monotonic() - began > args.seconds:
                break
            for name in [name for name in seconds if "error" not in rows[name]]:
                times = seconds[name]
                try:
                    times += processes[name].ask(args.steps, time.monotonic() + STEPS_LIMIT)
                except RuntimeError as error:
                    rows[name] = {"error": str(error)[:300]}
                else:
                    rows[name] |= {**summary(times), "seconds": times}
            yield rows
    finally:
        for process in processes.values():
            process.close()


def compile_all(
    start: Callable[[str], Process], rows: dict[str, dict[str, Any]], deadline: float
) -> None:
    """Start the sets, `AT_ONCE` of them at a time, and enter what each found once it is compiled.

    All live on. A set that dies, or gives no answer by the deadline, gets an `error`.
    """
    waiting = [*rows]
    compiling: dict[str, Process] = {}
    while waiting or compiling:
        while waiting and len(compiling) < AT_ONCE:
            name = waiting.pop(0)
            if time.monotonic() < deadline:
                compiling[name] = start(name)
            else:
                rows[name]["error"] = "no time left to compile it"
        pipes: dict[Any, str] = {one.process.stdout: name for name, one in compiling.items()}
        left = max(deadline - time.monotonic(), 0.0)
        answering = [pipes[pipe] for pipe in select.select([*pipes], [], [], left)[0]]
        for name in answering or [*compiling]:  # nobody: it is the deadline, and `answer` says so
            try:
                rows[name] |= compiling.pop(name).answer(deadline)
            except RuntimeError as error:
                rows[name]["error"] = str(error)[:300]
            print(f"{LABELS.get(name, name)}: {rows[name]}", flush=True)


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Enter an `error` where a set must not be timed."""
    allowed = ALLOWED * rows[PLAIN].get("gradient", float("nan"))
    for row in rows.values():
        if "error" not in row and not row["gradient"] <= allowed:  # NaN is not
            row["error"] = f"gradients off by {row['gradient']:.1e}, allowed {allowed:.1e}"
            if "error" in rows[PLAIN]:
                row["error"] = f"nothing to compare with: {PLAIN} failed"


def set_rows(result: dict[str, Any]) -> Rows:
    """The table: one row per set, with its share of the plain step's time."""
    rows: Rows = [("kernels, stream", "ms", "of plain", "tokens/s", "MFU", "peak GiB", "gradient")]
    variants = result["variants"]
    plain = variants[PLAIN].get("median", float("nan"))
    for name, row in variants.items():
        label = LABELS.get(name, name)
        if "median" not in row:
            rows.append((label, row.get("error", "not run"), "", "", "", "", ""))
            continue
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        rows.append(
            (
                label,
                f"{row['median'] * 1e3:.1f}",
                f"{row['median'] / plain:.3f}",
                f"{row['tokens_per_s']:,.0f}",
                mfu,
                f"{row['peak_mib'] / 1024:.1f}",
                f"{row['gradient']:.1e}",
            )
        )
    return rows


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.harness.kernel_sets", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-222m")
    parser.add_argument(
        "--sets",
        default=";".join(SETS),
        help="separated by ;, each a value of --kernels and perhaps, after commas, bfloat16 (the "
        "stream), attention=NAME, vision_attention=NAME, inductor=NAME",
    )
    modes = ("none", "default", "reduce-overhead")
    parser.add_argument("--compile", default="default", choices=modes)
    parser.add_argument("--rounds", type=Range(int, least=1, most=1000), default=5)
    parser.add_argument("--steps", type=Range(int, least=1, most=1000), default=5)
    parser.add_argument(
        "--seconds", type=Range(float, least=1, most=86400), default=540.0, help="for all of it"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="", help="of the result file; default: kernel_sets")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--truth", default="", help=argparse.SUPPRESS)
    parser.add_argument("--batch", default="", help=argparse.SUPPRESS)
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.serve:
        return serve(args)
    for name in args.sets.split(";"):
        Wanted.read(name)
    device = pick_device(args.device)
    if device.type != "cuda":
        raise ValueError("kernels run on a GPU, and there is none here: see bench.compiled_step")
    if PLAIN not in args.sets.split(";"):
        raise ValueError(f"--sets {args.sets}: {PLAIN!r} must be among them, to compare with")
    config, train = preset(args.preset)
    budget, batch = budget_and_batch(Options(args.preset), config, train)
    flops = step_flops(config, batch.n_images, batch.n_tokens, batch.n_labels, batch.n_pairs)
    peak = peak_flops(device, torch.bfloat16)
    result: dict[str, Any] = {
        "preset": args.preset,
        "compile": args.compile,
        "budget": dataclasses.asdict(budget),
        "work": {"tokens": batch.n_tokens, "images": batch.n_images, "labels": batch.n_labels},
        "flops": flops,
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(vars(batch), Path(folder, "batch"))
        for rows in measure(args, Path(folder)):
            for row in rows.values():
                if "median" in row:
                    row["tokens_per_s"] = batch.n_tokens / row["median"]
                    if peak:
                        row["mfu"] = flops / row["median"] / peak
            result["variants"] = rows
            file = write(args.name or "kernel_sets", device, result, args.out)
    print(lined_up(set_rows(result)))
    print(f"written: {file}")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
