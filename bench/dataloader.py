"""The data path: samples/s of every stage, and of the whole loader: on the fly against prepared.

    python -m bench.dataloader

The data is made here: JPEG photographs of 640 x 480 with one question each, in Parquet with The
Cauldron's schema. The stages run alone in this process. The loader yields whole packed batches,
copied to the device, with 0, 1, ... worker processes. Decoding on the fly and reading prepared
shards take turns; no decoded image is kept between epochs, and the files are in the page cache for
both. No time is reported unless both give the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import interleave
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import loader
from nanovlm_fast.device import make_current, pick_device
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range

WIDTH = 640
HEIGHT = 480
RATE = 2320.0  # samples/s at which an H100 should train nanovlm-222m
TOKENS = 8 * 324  # per batch: 32 samples of the recipe's 81 tokens


def make_photographs(folder: Path, count: int) -> float:
    """Write `count` rows of JPEG photographs; return the mean bytes of a JPEG.

    They are random crops of matplotlib's portrait with sensor noise: the noise gives files of the
    size of real photographs, which a smooth picture would not.
    """
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageFeature
    from matplotlib import get_data_path

    with Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg") as file:
        portrait = file.convert("RGB")
    rng = np.random.default_rng(0)
    files: list[dict[str, Any]] = []
    for _ in range(count):
        left = rng.integers(0, portrait.width - 400)
        top = rng.integers(0, portrait.height - 300)
        cut = portrait.crop((left, top, left + 400, top + 300))
        cut = cut.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noisy = np.asarray(cut) + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        files.append({"bytes": buffer.getvalue(), "path": None})
    asked = "What does photograph number {} of this collection show, and who is in it?"
    texts = [
        [{"user": asked.format(i), "assistant": "A naval officer.", "source": "made"}]
        for i in range(count)
    ]
    text = {name: Value("string") for name in ("user", "assistant", "source")}
    features = Features({"images": Sequence(ImageFeature()), "texts": [text]})
    columns = {"images": [[file] for file in files], "texts": texts}
    rows = Dataset.from_dict(columns, features=features)
    rows.to_parquet(folder / "train.parquet")
    return statistics.mean(len(file["bytes"]) for file in files)


def configs(args: argparse.Namespace) -> tuple[VLMConfig, TrainConfig]:
    """The recipe's sizes, with a small tokenizer that is trained here, without a download."""
    model, train = preset("nanovlm-222m")
    model = dataclasses.replace(
        model, vit_img_size=args.image_size, lm_tokenizer="train", lm_vocab_size=1024
    )
    room = 8 * (model.image_tokens + 79)  # eight samples fit, however large the images are
    tokens = max(TOKENS, room)
    return model, dataclasses.replace(
        train, max_steps=1, tokens_per_batch=tokens, max_seqlen=room // 8
    )


def sample_loader(data: str, model: VLMConfig, train: TrainConfig, workers: int) -> SampleLoader:
    """The loader of a data set, without its cache of decoded images."""
    source = load_source(data, "train")
    tokenizer = make_tokenizer(model, source)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, train.turns)
    load = SampleLoader(source, model, dataclasses.replace(train, data=data, workers=workers), text)
    load.cache_room = 0
    return load


def same_batches(loads: list[SampleLoader], budget: Budget, count: int = 4) -> bool:
    """Whether all loaders give the same first `count` batches."""
    streams = [PackedStream(load, budget, initial_states(1)) for load in loads]
    first = (itertools.islice(stream, count) for stream in streams)
    return all(same_batch(a.packed, b.packed) for a, b in zip(*first, strict=True))


def same_batch(a: PackedBatch, b: PackedBatch) -> bool:
    """Whether two batches hold the same samples, pixels, tokens and labels."""
    fields = ("images", "input_ids", "labels")
    return a.names == b.names and all(torch.equal(getattr(a, n), getattr(b, n)) for n in fields)


def stages(
    fly: SampleLoader,
    prepared: SampleLoader,
    budget: Budget,
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Median samples/s of each stage alone."""
    indices = range(min(len(fly.source), 128))
    examples = [fly.source[i] for i in indices]
    samples = [fly.load(i) for i in indices][: budget.tokens // max(fly.load(0).tokens, 1)]
    model = fly.model
    size = model.vit_img_size
    packed = pack(samples, budget, model.image_tokens, size)
    if device.type == "cuda":
        packed = packed.pin_memory()  # as the loader does, so that the copy is asynchronous

    def tokenise() -> None:
        fly.text.seen.clear()  # tokenised texts are cached; every repeat must do the work
        for example in examples:
            fly.text.documents(example.turns, 1)

    def decode() -> None:
        for example in examples:
            load_image(example.images[0], size)

    timed: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (len(examples), lambda: [fly.source[i] for i in indices]),
        "decode and resize": (len(examples), decode),
        "tokenise": (len(examples), tokenise),
        "read prepared": (len(examples), lambda: [prepared.load(i) for i in indices]),
        "pack": (len(samples), lambda: pack(samples, budget, model.image_tokens, size)),
    }
    if device.type == "cuda":
        timed["copy to device"] = (len(samples), lambda: packed.to(device))
    seconds = interleave({name: call for name, (_, call) in timed.items()}, args.repeats)
    return {name: count / statistics.median(seconds[name]) for name, (count, _) in timed.items()}


def loader_rate(load: SampleLoader, budget: Budget, device: torch.device, seconds: float) -> float:
    """Samples/s of the whole loader in its steady state."""
    workers = load.train.workers
    stream = PackedStream(load, budget, initial_states(max(workers, 1)))
    batches = iter(loader(stream, device.type == "cuda"))
    # Skip what the workers' queues held before the clock starts: those batches cost no time now.
    for _ in range(6 * workers + 2):
        next(batches)
    start = time.perf_counter()
    samples = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        packed = next(batches).packed
        packed.to(device)
        samples += packed.n_samples
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return samples / elapsed


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The content of the result file; raises ValueError if the two ways differ in a batch."""
    (folder / "data").mkdir()
    mean_bytes = make_photographs(folder / "data", args.pictures)
    model, train = configs(args)
    options = ["--preset", "nanovlm-222m", "--workers", "1", "--shard-samples", "64"]
    options += ["--data", str(folder / "data"), "--out", str(folder / "shards")]
    options += ["--vision=", "--language="]  # no weights are needed
    options += ["--vit-img-size", str(args.image_size)]
    options += ["--lm-tokenizer", "train", "--lm-vocab-size", str(model.lm_vocab_size)]
    if prepare.main(options):
        raise ValueError("the data could not be prepared")
    names = {"on the fly": str(folder / "data"), "prepared": f"prepared:{folder / 'shards'}"}
    loads = {name: sample_loader(data, model, train, 0) for name, data in names.items()}
    budget = measure_budget(loads["on the fly"], train)
    # A speed-up is only reported for a loader that gives the same data.
    if not same_batches(list(loads.values()), budget):
        raise ValueError("the two ways do not give the same batches; no time is reported")
    result: dict[str, Any] = {
        "data": {
            "pictures": args.pictures,
            "width": WIDTH,
            "height": HEIGHT,
            "mean_jpeg_bytes": mean_bytes,
        },
        "image_size": args.image_size,
        "samples_per_batch": budget.tokens // loads["on the fly"].load(0).tokens,
        "stages": stages(loads["on the fly"], loads["prepared"], budget, device, args),
        "loader": {name: {str(n): [] for n in args.workers} for name in names},
    }
    # Interleaved, so that drift of the machine affects all combinations alike.
    turns = list(itertools.product(range(args.repeats), args.workers, names))
    for _, workers, name in tqdm(turns, desc="loader", leave=False):
        load = sample_loader(names[name], model, train, workers)
        result["loader"][name][str(workers)].append(loader_rate(load, budget, device, args.seconds))
    medians = {
        name: {n: statistics.median(rates) for n, rates in by.items()}
        for name, by in result["loader"].items()
    }
    result["samples_per_s"] = medians
    result["rate"] = args.rate
    result["workers_for_rate"] = workers_for(medians, args.rate)
    result["speedup"] = {
        n: medians["prepared"][n] / medians["on the fly"][n] for n in map(str, args.workers)
    }
    return result


def workers_for(samples_per_s: dict[str, dict[str, float]], rate: float) -> dict[str, int]:
    """Worker processes that feed `rate` samples/s, each way, if all are as fast as one alone.

    Empty for a way that was not measured with one worker.
    """
    return {
        way: math.ceil(rate / rates["1"]) for way, rates in samples_per_s.items() if "1" in rates
    }


def table(result: dict[str, Any]) -> str:
    stages: Rows = [("stage", "samples/s")]
    stages += [(name, f"{rate:,.0f}") for name, rate in result["stages"].items()]
    rows: Rows = [("workers", "on the fly", "prepared", "times")]
    for workers, gain in result["speedup"].items():
        ways = (result["samples_per_s"][way][workers] for way in ("on the fly", "prepared"))
        rows.append((workers, *(f"{rate:,.0f}" for rate in ways), f"{gain:.1f}"))
    lines = [lined_up(stages), lined_up(rows)]
    if needed := result["workers_for_rate"]:
        each = ", ".join(f"{count} {way}" for way, count in needed.items())
        lines.append(f"workers for {result['rate']:,.0f} samples/s, at the rate of one: {each}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.dataloader", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Range(int, least=1), default=512)
    parser.add_argument(
        "--image-size",
        type=Range(int, least=1),
        default=224,
        help="side of the model's square images",
    )
    parser.add_argument(
        "--workers", type=Range(int), nargs="+", default=[0, 1, 2], help="processes to measure with"
    )
    parser.add_argument(
        "--seconds",
        type=Range(float, above=0, most=1e9),
        default=5.0,
        help="per measurement of the loader",
    )
    parser.add_argument("--repeats", type=Range(int, least=1), default=5)
    parser.add_argument(
        "--rate",
        type=Range(float, above=0),
        default=RATE,
        help="samples/s for which to compute the number of workers",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, device, Path(folder))
    print(table(result))
    print(f"written: {write('dataloader', device, result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
