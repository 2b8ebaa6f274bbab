"""huggingface/nanoVLM's own code and ours, interleaved: the same weights, samples and device.

    git clone --branch v0.1 https://github.com/huggingface/nanoVLM
    python -m bench.peer --nanovlm nanoVLM --questions 1,10    v0.1 or main

Two things make ours faster than padded rows: rows without padding, and one encoding per image for
any number of questions. Three cases are therefore measured: one question per image with texts of
one length, where neither helps; one question per image in rows of 79 text tokens, as v0.1 trains;
and ten questions per image. v0.1's own collator lays out its rows. A CPU gets two layers per tower.

A checkout with tiles is first compared on whole conversations (bench/peers), and `--conversations`
does nothing else. With a preset that cuts images into tiles, its rows are a pack as main makes it:
documents see each other, and each question of an image brings the image again.

None of nanoVLM's code is here. A separate process imports it from the checkout;
bench/peer_process.py says what it needs there. Two details of v0.1 differ from ours on padded rows:
it counts positions through the padding, and masks the padding only where its attention kernel does.
The loss and every gradient are therefore compared in float32 on samples cut to one length, which
have no padding. Times and peaks are taken on padded rows of uncut samples, as it trains. Its step
is that of its train.py: rows and float images are copied, AdamW is unfused, the loss is read. No
time is reported without parity.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from bench.harness.processes import in_a_process, peak_of
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import Difference, difference, interleave, summary
from bench.peers import conversations
from bench.subjects.peer_process import NEEDED, serve
from bench.subjects.variants import Packed, Recipe, Workbench
from bench.subjects.workload import Work, cauldron_like, finevision_like, load_work
from nanovlm_fast.command import Parser, keeping_interrupts, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import make_current, pick_device, pick_dtype
from nanovlm_fast.model import reference
from nanovlm_fast.model.flops import peak_flops
from nanovlm_fast.packing.batch import pad
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range

PARITY_QUESTIONS = 4  # few, because float32 needs more memory than the timed steps


@dataclass(frozen=True)
class Case:
    """What both train on. `even`: all texts and rows have one length, so there is no padding."""

    questions: int  # per image
    even: bool = False

    def __str__(self) -> str:
        name = f"{self.questions} question{'s' * (self.questions > 1)} per image"
        return f"{name}, no padding" if self.even else name

    def work(self, args: argparse.Namespace) -> Work:
        config = load_work(args.preset, "cauldron_like", 1, args.layers).config
        images = max(1, round(args.samples / self.questions))
        if config.max_img_size:
            return Work(config, finevision_like(config, images, questions=self.questions))
        samples = cauldron_like(config, images, questions=self.questions, even=self.even)
        if self.even:
            text = len(samples[0].documents[0]) - config.image_tokens
            config = dataclasses.replace(config, lm_max_length=text)
        return Work(config, samples)


class Peer:
    """nanoVLM in its own process. An error that it answers with raises ValueError, in one line."""

    def __init__(
        self,
        checkout: Path,
        config: VLMConfig,
        weights: Path,
        device: torch.device,
        dtype: torch.dtype,
    ):
        # spawn: it imports modules named `models` and `data`, which must not reach this process.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        options = {
            "config": vars(config),
            "image_tokens": config.image_tokens,
            "device": str(device),
            "dtype": dtype,
            "checkout": str(checkout),
            "weights": str(weights),
            "threads": torch.get_num_threads(),
        }
        self.process = context.Process(target=serve, args=(theirs, options), daemon=True)
        with keeping_interrupts():
            self.process.start()
        theirs.close()  # the process holds the only other end, so its death ends the stream
        self.interface = self.answer()

    def ask(self, command: str, *args: object) -> Any:
        self.connection.send((command, args))
        return self.answer()

    def answer(self) -> Any:
        try:
            result, error = self.connection.recv()
        except EOFError:
            self.process.join()
            ended = f"nanoVLM's process ended with exit code {self.process.exitcode}"
            raise ValueError(ended) from None
        if error:
            raise ValueError(error)
        return result

    def close(self) -> None:
        self.connection.close()  # ends the loop of the process
        self.process.join()


def check_checkout(checkout: Path) -> None:
    """Raise ValueError unless the folder has the files that the process imports."""
    if missing := [file for file in NEEDED if not (checkout / file).is_file()]:
        how = "it must be a checkout: git clone https://github.com/huggingface/nanoVLM"
        raise ValueError(f"--nanovlm {checkout} has no {' and no '.join(missing)}; {how}")


def commit_of(checkout: Path) -> str:
    """The checkout's tag or commit; 'unknown' if it is not a git repository."""
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--tags"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows_of(work: Work, length: int) -> dict[str, np.ndarray]:
    """Left-padded rows of `length` text tokens, with float images; with tiles, a pack."""
    if work.interleaved:
        return pack_of(work)
    batch = pad(work.samples, length)
    config = work.config
    pixels = reference.normalise(batch.images[:, 0], config)
    rows = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "targets": batch.targets,
        "pixels": pixels,
    }
    return {name: tensor.numpy() for name, tensor in rows.items()}


def pack_of(work: Work) -> dict[str, np.ndarray]:
    """One row of all documents as main packs them: a pad token behind each, and its own images."""
    ids: list[int] = []
    mask: list[int] = []
    targets: list[int] = []
    pixels = []
    for sample in work.samples:
        for document in sample.documents:
            ids += [*document.input_ids.tolist(), 0]
            mask += [1] * len(document) + [0]
            targets += [*document.labels.tolist(), IGNORE]
            pixels.append(torch.from_numpy(sample.images))
    image_token = work.config.lm_vocab_size - len(work.config.vlm_extra_tokens)
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.array([mask]),
        "targets": np.array([targets]),
        "pixels": reference.normalise(torch.cat(pixels), work.config).numpy(),
        "image_token": np.array(image_token),
    }


def of_one_length(work: Work) -> Work:
    """The first samples, with the fronts of their texts cut to the length of the shortest.

    Of conversations with tiles the first document alone: in a pack theirs see each other.
    """
    if work.interleaved:
        first = work.samples[0]
        alone = dataclasses.replace(first, documents=first.documents[:1])
        return dataclasses.replace(work, samples=[alone])
    shown = work.config.image_tokens
    samples: list[Sample] = []
    for sample in work.samples:
        if sum(len(taken.documents) for taken in samples) >= PARITY_QUESTIONS:
            break
        samples.append(sample)
    text = min(len(document) for sample in samples for document in sample.documents) - shown

    def cut(array: np.ndarray) -> np.ndarray:
        # The image tokens, and the end of the text, which holds the labels.
        return np.concatenate([array[:shown], array[len(array) - text :]])

    def shortened(document: Document) -> Document:
        return Document(cut(document.input_ids), cut(document.image_rows), cut(document.labels))

    even = [
        dataclasses.replace(sample, documents=[shortened(d) for d in sample.documents])
        for sample in samples
    ]
    return dataclasses.replace(work, samples=even)


def parity(
    peer: Peer, work: Work, device: torch.device, folder: Path, tolerance: float
) -> dict[str, float | bool]:
    """Relative differences of loss and worst gradient on samples of one length, in float32.

    Raises ValueError if one exceeds the tolerance.
    """
    even = of_one_length(work)
    expected, grads = Packed(Workbench(even, device, torch.float32), Recipe()).gradients()
    file = folder / "gradients.safetensors"
    rows = rows_of(even, len(even.documents[0]) - work.config.image_tokens)
    loss = peer.ask("gradients", rows, str(file))
    theirs = load_file(file, str(device))
    if theirs.keys() != grads.keys():
        names = sorted(theirs.keys() ^ grads.keys())
        raise ValueError(f"nanoVLM's gradients are not of the same weights: {', '.join(names[:4])}")
    errors = ((grads[n] - g).norm() / g.norm().clamp(min=1e-12) for n, g in theirs.items())
    worst = max(error.item() for error in errors)
    off = abs(loss - expected) / abs(expected)
    if not max(off, worst) <= tolerance:  # not `>`, which is False for NaN
        found = f"loss {off:.1e}, worst gradient {worst:.1e}, relative"
        raise ValueError(
            f"nanoVLM and ours do not compute the same step ({found}); no time is reported"
        )
    return {"loss": off, "gradient": worst, "passed": True}


def make_ours(args: argparse.Namespace, case: Case) -> tuple[Workbench, Packed]:
    torch.set_num_threads(args.threads)
    device = make_current(torch.device(args.device))
    bench = Workbench(case.work(args), device, pick_dtype(args.dtype, device))
    bench.padded = None  # nanoVLM's own model takes its place in memory
    return bench, Packed(bench, Recipe(compile=args.compile))


def peak_of_ours(args: argparse.Namespace, case: Case) -> float:
    return peak_of(make_ours(args, case)[1])


def compare(args: argparse.Namespace) -> dict:
    """Measure all cases; return the content of the result file."""
    cases: dict[str, dict] = {}
    result: dict[str, Any] = {
        "preset": args.preset,
        "layers": args.layers,
        "dtype": "",
        "compile": args.compile,
        "nanovlm": {},
        "cases": cases,
    }
    if conversations.has_conversations(args.nanovlm):
        result["conversations"] = conversations.compare(args.nanovlm)
    with tqdm(total=4 * len(args.cases), leave=False) as bar:

        def progress(case: Case, what: str) -> None:
            bar.set_description(f"{case}: {what}")
            bar.update()

        for case in args.cases:
            found = measure(args, case, functools.partial(progress, case))
            result["nanovlm"] = found.pop("nanovlm")
            result["dtype"] = found.pop("dtype")
            cases[str(case)] = found
    return result


def measure(args: argparse.Namespace, case: Case, progress: Callable[[str], object]) -> dict:
    """One case: peaks, then parity, then interleaved times of both."""
    progress("load")
    bench, ours = make_ours(args, case)
    work = bench.work
    on_gpu = bench.device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        state = ours.packed.reference_state_dict()
        # Cloned: safetensors refuses tensors that share memory, as a tied table and head do.
        state = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
        save_file(state, weights)
        peer = Peer(args.nanovlm, work.config, weights, bench.device, bench.dtype)
        try:
            progress("memory")
            peaks = {"nanovlm": peer.ask("peak", rows_of(work, work.text_length))}
            # On a CPU a peak is that of a whole process, so ours needs a fresh one.
            peaks["ours"] = peak_of(ours) if on_gpu else in_a_process(peak_of_ours, args, case)
            progress("parity")
            agreement = parity(peer, work, bench.device, folder, args.tolerance)
            progress("steps")
            calls: dict[str, Callable[[], object]] = {
                "nanovlm": lambda: peer.ask("step"),
                "ours": ours,
            }
            seconds = interleave(calls, args.repeats, warmup=2)
            losses = {"nanovlm": peer.ask("step"), "ours": ours.gradients()[0]}
        finally:
            peer.close()
    variants = {}
    for variant, times in seconds.items():
        quartiles = summary(times)
        variants[variant] = {
            **quartiles,
            "seconds": times,
            **work.rates(quartiles["median"], peak_flops(bench.device, bench.dtype)),
            "peak_mib": peaks[variant],
            "loss": losses[variant],
        }
    tiles = {"tiles": work.counts["images"]} if work.interleaved else {}
    return {
        **tiles,
        "nanovlm": {"commit": commit_of(args.nanovlm), "interface": peer.interface},
        "dtype": str(bench.dtype).removeprefix("torch."),
        "work": work.as_result(),
        "parity": agreement,
        "variants": variants,
        "speedup": gain_of(variants).ratio,
    }


def table(result: dict) -> str:
    lines = ["nanoVLM {commit}, forward({interface})".format(**result["nanovlm"])]
    head = ("case", "who", "step ms", "questions/s", "tokens/s", "peak MiB", "loss, padded")
    rows: Rows = [head]
    for name, case in result["cases"].items():
        for who, row in case["variants"].items():
            rates = (f"{row['questions_per_s']:,.1f}", f"{row['tokens_per_s']:,.0f}")
            step = f"{row['median'] * 1e3:,.1f}"
            rows.append((name, who, step, *rates, f"{row['peak_mib']:,.0f}", f"{row['loss']:.4f}"))
    lines.append(lined_up(rows, left=(0, 1)))
    for name, case in result["cases"].items():
        work = case["work"]
        agreement = case["parity"]
        gain = gain_of(case["variants"])
        interval = f"({gain.low:.2f}-{gain.high:.2f})"
        lines.append(f"{name}: ours is {gain.ratio:.2f} times as fast {interval}")
        waste = f"{work['padded_waste']:.0%} of nanoVLM's rows are padding"
        if "tiles" in case:
            waste = f"{case['tiles']} tiles, one pack"
        errors = f"loss {agreement['loss']:.1e}, worst gradient {agreement['gradient']:.1e}"
        lines.append(f"  {work['questions']} questions, {waste}; off by {errors} (relative, in")
        lines[-1] += " float32, without padding)"
    if "conversations" in result:
        lines.append(conversations.table(result["conversations"]))
    return "\n".join(lines)


def gain_of(variants: dict[str, dict]) -> Difference:
    """How many times as many questions/s ours answers as theirs."""
    return difference(variants["ours"]["seconds"], variants["nanovlm"]["seconds"])


def result_name(args: argparse.Namespace) -> str:
    layers = f"_{args.layers}layer{'s' * (args.layers > 1)}" if args.layers else ""
    return f"peer_{args.preset}{layers}"


def read_cases(questions: str) -> list[Case]:
    """The case without padding, then one for each number of questions.

    Raises ValueError unless the numbers are positive whole numbers.
    """
    try:
        numbers = [int(number) for number in questions.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"--questions {questions}: numbers of questions per image, as 1,10")
    return [Case(1, even=True), *(Case(number) for number in dict.fromkeys(numbers))]


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.peer", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nanovlm",
        type=Path,
        required=True,
        help="a checkout of huggingface/nanoVLM, v0.1 or main",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few samples and repeats; on a CPU preset tiny"
    )
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="only compare conversations with tiles, which takes no times; main",
    )
    parser.add_argument("--preset", default="", help="default: nanovlm-222m")
    parser.add_argument(
        "--layers",
        type=Range(int, least=-1),
        default=-1,
        help="of each tower; 0: the preset's, as on a GPU; CPU: 2",
    )
    parser.add_argument(
        "--questions",
        default="1,10",
        help="per image, one case each, after the case without padding",
    )
    parser.add_argument(
        "--samples",
        type=Range(int),
        default=0,
        help="questions per step, rounded to whole images; 0: 128 on a GPU, 10 on a CPU",
    )
    parser.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "none", "default"),
        help="ours; auto: on a GPU",
    )
    parser.add_argument("--repeats", type=Range(int), default=0, help="0: 15, with --quick 3")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--tolerance",
        type=Range(float),
        default=1e-4,
        help="relative, on the loss and every gradient",
    )
    parser.add_argument(
        "--threads", type=Range(int), default=0, help="CPU threads; 0: PyTorch's choice"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    check_checkout(args.nanovlm)
    args.cases = read_cases(args.questions)
    args.device = str(pick_device(args.device))
    on_gpu = args.device.startswith("cuda")
    args.preset = args.preset or ("tiny" if args.quick and not on_gpu else "nanovlm-222m")
    if preset(args.preset)[0].max_img_size:
        args.cases = [case for case in args.cases if not case.even]  # lengths are as drawn
    args.layers = args.layers if args.layers >= 0 else 0 if on_gpu else 2
    args.samples = args.samples or ((16 if on_gpu else 4) if args.quick else 128 if on_gpu else 10)
    args.repeats = args.repeats or (3 if args.quick else 15)
    if args.compile == "auto":
        args.compile = "default" if on_gpu else "none"
    args.threads = args.threads or torch.get_num_threads()
    return args


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.conversations:
        if not conversations.has_conversations(args.nanovlm):
            raise ValueError(f"--conversations: {args.nanovlm} is of a release without tiles")
        print(conversations.table(conversations.compare(args.nanovlm)))
        return 0
    result = compare(args)
    print(table(result))
    print(f"written: {write(result_name(args), torch.device(args.device), result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
