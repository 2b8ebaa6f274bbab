"""huggingface/nanoVLM's own code beside ours: the same weights, samples and device, in turn.

    git clone --branch v0.1 https://github.com/huggingface/nanoVLM
    python -m bench.peer --nanovlm nanoVLM --questions 1,10     v0.1 or main; on a CPU two layers per tower

Two things make ours faster than padded rows: rows without padding, and one encoding per image however many questions it
has. So three cases are measured: one question per image with texts of one length, where there is neither gain; one
question per image, in rows of 79 text tokens, as v0.1 trains; and ten. v0.1's own collator lays out its rows.

None of its code is here: a process of its own imports it from the checkout (bench/peer_process.py says what it needs
there). Two details of v0.1 differ from ours on padded rows: it counts positions through the padding, and masks it only
where its attention kernel does. So the loss and every gradient are compared in float32 on samples cut to one length,
where there is no padding, and the times and peaks are taken on padded rows of uncut samples, as it trains. It gets the
step of its train.py: rows and float images copied, AdamW unfused, the loss read. No time is reported without parity.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from bench.memory import in_a_process, peak_of
from bench.peer_process import NEEDED, serve
from bench.results import write
from bench.timing import Difference, difference, interleave, summary
from bench.variants import Packed, Recipe, Workbench
from bench.workload import Work, cauldron_like, load_work
from nanovlm_fast.command import Parser, keeping_interrupts, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import pick_device, pick_dtype
from nanovlm_fast.metrics import peak_flops
from nanovlm_fast.packing import Document, pad
from nanovlm_fast.ranges import Range

PARITY_QUESTIONS = 4


@dataclass(frozen=True)
class Case:
    """What both train on. `even`: all texts are equally long and no row is longer, so that nothing is padding."""

    questions: int  # per image
    even: bool = False

    def __str__(self) -> str:
        name = f"{self.questions} question{'s' * (self.questions > 1)} per image"
        return f"{name}, no padding" if self.even else name

    def work(self, args: argparse.Namespace) -> Work:
        config = load_work(args.preset, "cauldron_like", 1, args.layers).config
        images = max(1, round(args.samples / self.questions))
        samples = cauldron_like(config, images, questions=self.questions, even=self.even)
        if self.even:
            text = len(samples[0].documents[0]) - config.image_tokens
            config = dataclasses.replace(config, lm_max_length=text)
        return Work(config, samples)


class Peer:
    """nanoVLM in its own process. Everything it answers with an error raises ValueError, in one line."""

    def __init__(
        self,
        checkout: Path,
        config: VLMConfig,
        weights: Path,
        device: torch.device,
        dtype: torch.dtype,
    ):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        options = dict(
            config=vars(config), image_tokens=config.image_tokens, device=str(device), dtype=dtype
        )
        options |= dict(
            checkout=str(checkout), weights=str(weights), threads=torch.get_num_threads()
        )
        self.process = context.Process(target=serve, args=(theirs, options), daemon=True)
        with keeping_interrupts():
            self.process.start()
        theirs.close()
        self.interface = self.answer()

    def ask(self, command: str, *args: object) -> Any:
        self.connection.send((command, args))
        return self.answer()

    def answer(self) -> Any:
        try:
            result, error = self.connection.recv()
        except EOFError:
            self.process.join()
            raise ValueError(
                f"nanoVLM's process ended with exit code {self.process.exitcode}"
            ) from None
        if error:
            raise ValueError(error)
        return result

    def close(self) -> None:
        self.connection.close()  # ends its loop
        self.process.join()


def check_checkout(checkout: Path) -> None:
    """Raise ValueError unless the folder has the files that the other process imports."""
    if missing := [file for file in NEEDED if not (checkout / file).is_file()]:
        how = "it must be a checkout: git clone https://github.com/huggingface/nanoVLM"
        raise ValueError(f"--nanovlm {checkout} has no {' and no '.join(missing)}; {how}")


def commit_of(checkout: Path) -> str:
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--tags"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows_of(work: Work, length: int) -> dict[str, np.ndarray]:
    """Left-padded rows of `length` text tokens, with float images."""
    batch, config = pad(work.samples, length), work.config
    pixels = (batch.images[:, 0].float() / 255 - config.image_mean) / config.image_std
    rows = dict(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        targets=batch.targets,
        pixels=pixels,
    )
    return {name: tensor.numpy() for name, tensor in rows.items()}


def of_one_length(work: Work) -> Work:
    """The first samples, their texts cut in front to the length of the shortest."""
    shown, samples = work.config.image_tokens, []
    while sum(len(sample.documents) for sample in samples) < PARITY_QUESTIONS and len(
        samples
    ) < len(work.samples):
        samples.append(work.samples[len(samples)])
    text = min(len(document) for sample in samples for document in sample.documents) - shown

    def cut(document: Document) -> Document:
        arrays = (document.input_ids, document.image_rows, document.labels)
        return Document(
            *(np.concatenate([array[:shown], array[len(array) - text :]]) for array in arrays)
        )

    even = [
        dataclasses.replace(sample, documents=[cut(d) for d in sample.documents])
        for sample in samples
    ]
    return dataclasses.replace(work, samples=even)


def parity(
    peer: Peer, work: Work, device: torch.device, folder: Path, tolerance: float
) -> dict[str, float | bool]:
    """Relative differences of loss and worst gradient on samples of one length, in float32.

    Raises ValueError where they are not small.
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
    worst = max(
        ((grads[n] - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in theirs.items()
    )
    off = abs(loss - expected) / abs(expected)
    if not max(off, worst) <= tolerance:
        found = f"loss {off:.1e}, worst gradient {worst:.1e}, relative"
        raise ValueError(
            f"nanoVLM and ours do not compute the same step ({found}); no time is reported"
        )
    return {"loss": off, "gradient": worst, "passed": True}


def make_ours(args: argparse.Namespace, case: Case) -> tuple[Workbench, Packed]:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bench = Workbench(case.work(args), device, pick_dtype(args.dtype, device))
    bench.padded = None  # nanoVLM's own takes its place
    return bench, Packed(bench, Recipe(compile=args.compile))


def peak_of_ours(args: argparse.Namespace, case: Case) -> float:
    return peak_of(make_ours(args, case)[1])


def compare(args: argparse.Namespace) -> dict:
    """All cases, parity of each before its times."""
    result = {"preset": args.preset, "layers": args.layers, "dtype": "", "compile": args.compile}
    result |= {"nanovlm": {}, "cases": {}}
    with tqdm(total=4 * len(args.cases), leave=False) as bar:
        for case in args.cases:
            found = measure(
                args,
                case,
                lambda what, case=case: (bar.set_description(f"{case}: {what}"), bar.update()),
            )
            result["nanovlm"], result["dtype"] = found.pop("nanovlm"), found.pop("dtype")
            result["cases"][str(case)] = found
    return result


def measure(args: argparse.Namespace, case: Case, progress: Callable[[str], object]) -> dict:
    """Peaks, parity, then times of both in turn."""
    progress("load")
    bench, ours = make_ours(args, case)
    work, on_gpu = bench.work, bench.device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = {
            n: t.detach().cpu().contiguous().clone()
            for n, t in ours.model.reference_state_dict().items()
        }
        save_file(state, folder / "weights.safetensors")
        peer = Peer(
            args.nanovlm, work.config, folder / "weights.safetensors", bench.device, bench.dtype
        )
        try:
            progress("memory")
            peaks = {"nanovlm": peer.ask("peak", rows_of(work, work.text_length))}
            peaks["ours"] = peak_of(ours) if on_gpu else in_a_process(peak_of_ours, args, case)
            progress("parity")
            agreement = parity(peer, work, bench.device, folder, args.tolerance)
            progress("steps")
            seconds = interleave(
                {"nanovlm": lambda: peer.ask("step"), "ours": ours}, args.repeats, warmup=2
            )
            losses = {"nanovlm": peer.ask("step"), "ours": ours.loss().item()}
        finally:
            peer.close()
    variants = {}
    for variant, times in seconds.items():
        median = summary(times)
        row = {
            **median,
            "seconds": times,
            **work.rates(median["median"], peak_flops(bench.device, bench.dtype)),
        }
        variants[variant] = {**row, "peak_mib": peaks[variant], "loss": losses[variant]}
    return {
        "nanovlm": {"commit": commit_of(args.nanovlm), "interface": peer.interface},
        "dtype": str(bench.dtype)[6:],
        "work": work.summary(),
        "parity": agreement,
        "variants": variants,
        "speedup": gain_of(variants).ratio,
    }


def table(result: dict) -> str:
    lines = ["nanoVLM {commit}, forward({interface})".format(**result["nanovlm"])]
    columns = ("step ms", "questions/s", "tokens/s", "peak MiB", "loss, padded")
    lines.append(f"{'':10}" + "".join(f"{column:>14}" for column in columns))
    for name, case in result["cases"].items():
        work, agreement = case["work"], case["parity"]
        lines.append(
            f"{name}: {work['questions']} questions, {work['padded_waste']:.0%} of nanoVLM's rows is padding"
        )
        for who, row in case["variants"].items():
            values = f"{row['median'] * 1e3:>14,.1f}{row['questions_per_s']:>14,.1f}{row['tokens_per_s']:>14,.0f}"
            lines.append(f"{who:10}{values}{row['peak_mib']:>14,.0f}{row['loss']:>14.4f}")
        worst = f"worst gradient {agreement['gradient']:.1e}"
        lines.append(
            f"{'':10}without padding, in float32: loss {agreement['loss']:.1e}, {worst} (relative)"
        )
    for name, case in result["cases"].items():
        gain = gain_of(case["variants"])
        lines.append(
            f"{name}: ours is {gain.ratio:.2f} times as fast ({gain.low:.2f}-{gain.high:.2f})"
        )
    return "\n".join(lines)


def gain_of(variants: dict[str, dict]) -> Difference:
    """Questions/s of ours over theirs."""
    return difference(variants["ours"]["seconds"], variants["nanovlm"]["seconds"])


def result_name(args: argparse.Namespace) -> str:
    layers = f"_{args.layers}layer{'s' * (args.layers > 1)}" if args.layers else ""
    return f"peer_{args.preset}{layers}"


def read_cases(questions: str) -> list[Case]:
    """The plain case, then one for each number. Raises ValueError unless they are positive whole numbers."""
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
        help="per image, a case each; one without padding always comes first",
    )
    parser.add_argument(
        "--samples",
        type=Range(int),
        default=0,
        help="questions per step, or nearly; 0: 128 on a GPU, which both processes share, 10 on a CPU",
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
    result = compare(args)
    print(table(result))
    print(f"written: {write(result_name(args), torch.device(args.device), result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
