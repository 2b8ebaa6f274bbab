"""Random records, batches and bytes give a success or a clear error.

They never cause a hang, a crash, an allocation of gigabytes or the loading of a pickle.

Everything is drawn from fixed seeds, so a failure names the case that makes it fail again.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.images import MAX_PIXELS, BadImage, load_image
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import make_tokenizer, texts
from nanovlm_fast.data.sources.shards import Prepared
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget, Packer
from nanovlm_fast.presets import preset
from nanovlm_fast.reporting.metrics import MetricsLog
from nanovlm_fast.runs import load_run_config, save_run_config
from nanovlm_fast.training.checkpoint import load_checkpoint, save_checkpoint
from nanovlm_fast.training.optim import make_optimizers
from nanovlm_fast.weights.backbones import language_fields, read_tensors
from nanovlm_fast.weights.pretrained import load_model, load_pretrained
from tests.support.samples import SMALL

GIB = 2**30
CONFIG = VLMConfig(**{**SMALL, "vit_n_blocks": 1, "lm_n_blocks": 1, "lm_vocab_size": 300})
pytestmark = [pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore")]


class Hung(BaseException):
    """A case that ran out of its time. No `except Exception` takes it for damaged data."""


@contextlib.contextmanager
def at_most(seconds: float, case: Any) -> Iterator[None]:
    """Raise Hung, naming the case, if the block takes longer.

    The timer of pytest continues afterwards.
    """

    def hung(*_: Any) -> None:
        raise Hung(f"over {seconds} s: {case!r:.200}")

    handler = signal.signal(signal.SIGALRM, hung)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(autouse=True)
def no_gigabytes() -> Iterator[None]:
    """Limits the memory to 2 GiB beyond what the process has.

    The system refuses a larger allocation, and the tests of the readers do not accept that error.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_guards_guard():
    """The time limit and the memory limit stop what they should stop.

    All other tests of this file rely on them.
    """
    with pytest.raises(Hung, match="endless"), at_most(0.05, "endless"):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))
    with pytest.raises(MemoryError):
        bytearray(3 * GIB)


# ---- records

NASTY: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 1e308, float("inf"), float("nan"),
    "", " ", "\0", "\ud800", "\udfff x",
    "<image>", "<image>" * 50, "../outside.png", "/etc/passwd", "a\nb", "\x1b[2J", "\u2028",
    "x" * 5000, "日本語 🙂",
    [], {}, [[]], [None], {"from": 1}, {"from": "human"}, {"from": ["human"], "value": {}},
    "half.jpg", "text.png",
    "loop.png", " ".join(map(str, range(1000))),
    "pipe.png", "folder", "good.png/more", ["good.png"] * 3, "x" * 300 + ".png",
    "{question}", "%s", "system",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in items] + [
        place for _, inner in items for place in places(inner)
    ]


def random_record(rng: random.Random) -> bytes:
    """A line of LLaVA's format, in most cases no longer."""
    turns = []
    for i in range(rng.randint(1, 3)):
        turns += [
            {"from": "human", "value": "<image>\nWhat?" if not i else "And?"},
            {"from": "gpt", "value": "A cat"},
        ]
    record: Any = {
        "id": 7,
        "image": rng.choice(["good.png", ["good.png"], "good.jpg"]),
        "conversations": turns,
    }
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        container, key = rng.choice(places(record))
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = [container[key]] * rng.randint(1, 3)
        else:
            container[key] = rng.choice(NASTY)
        if not places(record):
            break
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        line = damaged(line, rng)
    if rng.random() < 0.01:
        line = line[:-1] + b', "deep": ' + rng.choice((b"[", b'{"a":')) * rng.choice((900, 100_000))
    if rng.random() < 0.01:
        line = line.replace(b"A cat", b"9" * 10_000)
    return line.replace(b"\n", b" ").strip() or b"{"


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated, or other bytes altogether; at times whole."""
    content, action = bytearray(whole), rng.randrange(7)
    if action == 0:
        return bytes(content[: rng.randrange(len(content) + 1)])
    if action == 1:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, len(content))))
    if action == 2:
        start = rng.randrange(len(content))
        content[start : start + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
        return bytes(content)
    reach = min(len(content), rng.choice((16, 300, len(content))))  # headers are where it hurts
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(reach)
        content[place] = rng.choice(
            (content[place] ^ 1 << rng.randrange(8), 0, 255, *b'09-.e"[]{}:,')
        )
    return bytes(content) + (whole if action == 3 else b"")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with good pictures and with all that is none."""
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    noise.save(folder / "good.png")
    noise.save(folder / "good.jpg")
    (folder / "half.jpg").write_bytes((folder / "good.jpg").read_bytes()[:400])
    (folder / "text.png").write_text("no image at all")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    prepare.os.mkfifo(folder / "pipe.png")  # whoever opens it waits for ever
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return folder


def loader_of(source: JsonLines) -> SampleLoader:
    model, train = preset("tiny")
    model.vit_img_size, model.mp_pixel_shuffle_factor, model.lm_vocab_size = 16, 2, 300
    train.workers, train.epochs, train.curriculum, train.look_ahead = 0, 1.0, "", 64
    text = TextProcessor(
        make_tokenizer(model, source), model.prompt, model.image_tokens, train.turns
    )
    return SampleLoader(source, model, train, text)


def test_10000_random_records_are_read_or_refused_by_name(pictures):
    rng = random.Random(0)
    records = [random_record(rng) for _ in range(10_000)]
    (pictures / "train.jsonl").write_bytes(b"\n".join(records))
    source = JsonLines("train", pictures)
    assert len(source) == 10_000
    load = loader_of(source)  # which trains a tokenizer on what can be read
    refused = {}
    for i, line in enumerate(records):
        with at_most(5, line):
            try:
                load.load(i)
            except ValueError as error:
                refused[i] = str(error)
                assert refused[i].startswith(f"{source.file}:{i + 1}: "), (refused[i], line)
                assert refused[i].isprintable() and len(refused[i]) < 2000, refused[i]
    assert 3000 < len(refused) < 8000, "the records are all alike"
    budget = Budget(tokens=600, documents=80, images=40, labels=300, max_seqlen=200)
    seen, bad, too_long = [], {}, 0
    for batch in loader(PackedStream(load, budget, initial_states(1))):
        check_sizes(batch.packed, budget)
        seen += batch.packed.names
        bad |= batch.bad
        too_long += len(batch.too_long)
    assert bad == refused
    assert len(seen) == len(set(seen)) == 10_000 - len(bad) - too_long and 0 < too_long < 500


# ---- batches


def random_budget(rng: np.random.Generator) -> Budget:
    tokens, longest = int(rng.integers(1, 200)), int(rng.integers(1, 60))
    documents = -(-tokens // longest) + int(rng.integers(0, 12))
    return Budget(tokens, documents, int(rng.integers(0, 5)), int(rng.integers(0, 60)), longest)


def random_sample(rng: np.random.Generator, key: int) -> Sample:
    """Documents of any length, on up to three images of one token each, labelled anywhere."""
    n_images, documents = int(rng.integers(0, 3)), []
    for _ in range(int(rng.integers(1, 6))):
        text = int(rng.choice((0, 1, rng.integers(1, 12), rng.integers(1, 70))))
        rows = rng.permutation(np.concatenate([np.arange(n_images), np.full(text, -1)])).astype(
            np.int32
        )
        labels = np.where(rng.random(len(rows)) < 0.3, rng.integers(0, 99, len(rows)), IGNORE)
        documents.append(Document(rng.integers(0, 99, len(rows)), rows, labels))
    images = rng.integers(0, 256, (n_images, 3, 2, 2)).astype(np.uint8)
    return Sample(f"sample-{key}", images, documents, key)


def check_sizes(packed: PackedBatch, budget: Budget) -> None:
    """Checks the sizes, positions and padding of a batch.

    The shapes are static. The documents cover all positions, and none is too long. Positions start
    at 0 in each document, and padding has no effect.
    """
    starts = packed.cu_seqlens.numpy()
    assert len(starts) == budget.documents + 1 and starts[0] == 0 and starts[-1] == budget.tokens
    lengths = np.diff(starts)
    assert (lengths >= 0).all() and lengths.max() <= budget.max_seqlen == packed.max_seqlen
    positions = np.arange(budget.tokens) - np.repeat(starts[:-1], lengths)
    assert (packed.position_ids.numpy() == positions).all()
    assert (
        len(packed.images) == budget.images
        and len(packed.labels) == len(packed.label_index) == budget.labels
    )
    assert len(packed.input_ids) == len(packed.image_rows) == budget.tokens
    assert starts[packed.n_documents] == packed.n_tokens
    assert (packed.image_rows[packed.n_tokens :] == -1).all() and (
        packed.labels[packed.n_labels :] == IGNORE
    ).all()
    assert (packed.labels[: packed.n_labels] != IGNORE).all() and not packed.images[
        packed.n_images :
    ].any()


def check_content(packed: PackedBatch, samples: list[Sample]) -> None:
    """Ids, pixels behind every row, and labels are the samples', in their order."""
    documents = [(sample, document) for sample in samples for document in sample.documents]
    ids = np.concatenate([document.input_ids for _, document in documents])
    assert packed.n_tokens == len(ids) and (packed.input_ids.numpy()[: len(ids)] == ids).all()
    targets = np.full(len(packed.input_ids), IGNORE)
    targets[packed.label_index[: packed.n_labels].numpy()] = packed.labels[
        : packed.n_labels
    ].numpy()
    assert (
        targets[: len(ids)] == np.concatenate([document.labels for _, document in documents])
    ).all()
    assert (targets[len(ids) :] == IGNORE).all() and packed.n_documents == len(documents)
    assert packed.n_images == sum(
        len(sample.images) for sample in samples
    ) and packed.n_samples == len(samples)
    images, rows, starts = (
        packed.images.numpy(),
        packed.image_rows.numpy(),
        packed.cu_seqlens.numpy(),
    )
    for (sample, document), start in zip(documents, starts, strict=False):
        got, shown = rows[start : start + len(document)], document.image_rows >= 0
        assert ((got >= 0) == shown).all()
        assert (images[got[shown]] == sample.images[document.image_rows[shown]]).all()


def test_10000_random_batches_keep_every_sample_and_every_budget():
    rng, batches, refusals = np.random.default_rng(0), 0, 0
    pool = [random_sample(rng, 0) for _ in range(3000)]
    while batches < 10_000:
        drawn = rng.integers(0, len(pool), int(rng.integers(1, 40)))
        budget, samples = (
            random_budget(rng),
            [replace(pool[i], key=key) for key, i in enumerate(drawn)],
        )
        with at_most(20, (budget, batches)):
            packer = Packer(budget)
            seen = [sample.key for sample in samples if packer.add(sample)]
            refusals += len(seen)
            while packer.buffer:
                if rng.random() < 0.1:  # a resume
                    keys, packer = json.loads(json.dumps(packer.state_dict())), Packer(budget)
                    packer.load_state_dict(keys, samples.__getitem__)
                chosen = packer.next()
                assert chosen, f"{budget} refuses {packer.buffer[0].sizes}, which it said would fit"
                packed = pack(chosen, budget, 1, 2)
                check_sizes(packed, budget)
                check_content(packed, chosen)
                seen += [sample.key for sample in chosen]
                batches += 1
            assert sorted(seen) == list(range(len(samples))), budget
    assert refusals > 1000


# ---- files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with a checkpoint, prepared shards and pictures.

    It also holds a language model in the layout of transformers.
    """
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = Tokenizer.train(texts(Synthetic("train"), CONFIG.prompt), CONFIG.lm_vocab_size)
    model, run = VisionLanguageModel(CONFIG), folder / "run"
    optimizers = make_optimizers(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    saved = save_checkpoint(
        run, model, tokenizer, optimizers, {"step": 5, "best_step": None, "bad": {}}
    )
    shutil.copytree(saved, folder / "checkpoint")
    save_run_config(run, CONFIG, TrainConfig())
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5, "skipped": "a"}\n'
    )
    arguments = (
        f"--data synthetic:32 --out {folder}/prepared --workers 0 --shard-samples 128 "
        "--vit-img-size 16"
    )
    assert prepare.main([*arguments.split(), "--mp-pixel-shuffle-factor", "1"]) == 0
    noise = Image.effect_noise((24, 20), 90).convert("RGB")
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp", "a.jp2", "a.ppm"):
        noise.save(folder / name)
    sharded = folder / "llama"
    sharded.mkdir()
    sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    sizes |= dict(num_hidden_layers=1, vocab_size=300, hidden_act="silu", tie_word_embeddings=True)
    (sharded / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    shutil.copy(saved / "model.safetensors", sharded / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(("a", "b"), "model-00001.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def resumed(folder: Path) -> None:
    model = VisionLanguageModel(CONFIG)
    load_checkpoint(folder, model, make_optimizers(model, TrainConfig()))


def all_prepared(folder: Path) -> None:
    source = Prepared(folder)
    for i in range(len(source)):
        example = source[i]
        for document in example.documents:
            assert len(document.input_ids) == len(document.image_rows) == len(document.labels)
            assert document.image_rows.max(initial=-1) < 16 * len(example.images)
    prepare.verify(folder)


FILES: dict[
    str, tuple[Callable[[Path], Any], int]
] = {  # file -> (what reads its folder or the file, cases)
    "checkpoint/model.safetensors": (load_model, 400),
    "checkpoint/config.json": (load_model, 400),
    "checkpoint/tokenizer.json": (
        lambda folder: Tokenizer.load(folder).encode("what is it? 🙂"),
        300,
    ),
    "checkpoint/tokenizer_config.json": (Tokenizer.load, 200),
    "checkpoint/optimizer.safetensors": (resumed, 300),
    "checkpoint/state.json": (resumed, 200),
    "run/config.json": (load_run_config, 1000),
    "prepared/manifest.json": (all_prepared, 150),
    "prepared/shard-00001.arrow": (all_prepared, 250),
    "llama/config.json": (lambda folder: language_fields(str(folder)), 150),
    "llama/model.safetensors.index.json": (
        lambda folder: read_tensors(str(folder), lambda name: True),
        200,
    ),
    **{
        f"a.{form}": (lambda file: load_image(file, 16), 400)
        for form in ("png", "jpg", "webp", "gif")
    },
    **{
        f"a.{form}": (lambda file: load_image(file, 16), 200)
        for form in ("tiff", "bmp", "jp2", "ppm")
    },
}


def place_of(name: str, whole: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a copy of the file, what to give to its reader), in a folder of the test's own."""
    if "/" in name:
        shutil.copytree(whole / Path(name).parent, tmp_path / Path(name).parent, symlinks=True)
        return tmp_path / name, tmp_path / Path(name).parent
    return Path(shutil.copy(whole / name, tmp_path)), tmp_path / name


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused_by_name(whole, tmp_path, name):
    read, cases = FILES[name]
    file, given = place_of(name, whole, tmp_path)
    content, rng, refused = file.read_bytes(), random.Random(name), 0
    read(given)
    for case in range(cases):
        file.unlink()
        file.write_bytes(
            damaged(content, rng)
        )  # a new file: a memory map of the last one stays what it was
        with at_most(20, (name, case)):
            try:
                read(given)
            except (OSError, ValueError) as error:
                refused += 1
                assert file.name in str(error) or str(given) in str(error), (case, str(error))
                assert len(str(error)) < 4000
            except Exception as error:
                raise AssertionError(f"{name}, case {case}: {error!r}") from error
    assert refused > cases // 10, "the damage does none"


def test_damaged_metrics_are_read_up_to_the_damage_or_refused_by_name(whole, tmp_path):
    file, run = place_of("run/metrics.jsonl", whole, tmp_path)
    content, rng = file.read_bytes(), random.Random(0)
    for case in range(500):
        file.write_bytes(b"[" * 100_000 if case == 7 else damaged(content, rng))
        with at_most(20, case):
            try:
                MetricsLog(run, 2).file.close()
            except (OSError, ValueError) as error:
                assert str(file) in str(error), case


def header(shape: list[int], end: int, length: int | None = None) -> bytes:
    """A safetensors file that declares a tensor of `shape` and has no data."""
    entry = json.dumps(
        {"decoder.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
    ).encode()
    return struct.pack("<Q", len(entry) if length is None else length) + entry


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + crc
        + struct.pack(">I", 2**31 - 1)
        + b"IDAT"
    )


HUGE = {  # what declares much and holds nothing
    "a tensor of terabytes": ("model.safetensors", header([2**40], 2**42)),
    "a tensor of more elements than there are numbers": (
        "model.safetensors",
        header([2**62, 2**62], 2**63),
    ),
    "a header of exabytes": ("model.safetensors", header([1], 4, length=2**60)),
    "a header of 90 MB": ("model.safetensors", header([1], 4, length=90_000_000)),
    "an optimizer of terabytes": ("optimizer.safetensors", header([2**40], 2**42)),
    "a billion layers": ("config.json", {"lm_n_blocks": 10**9}),
    "a vocabulary of 10^12": ("config.json", {"lm_vocab_size": 10**12}),
    "a vocabulary of 10^9": ("config.json", {"lm_vocab_size": 10**9}),
    "an image of 10^9 pixels a side": ("config.json", {"vit_img_size": 8 * 10**8}),
    "a document of 10^9 tokens": ("config.json", {"lm_max_position_embeddings": 10**9}),
    "a width with more digits than an int": ("config.json", {"lm_inter_dim": 10**400}),
    "brackets": ("config.json", b"[" * 10**6),
    "a state of brackets": ("state.json", b'{"a":' * 10**6),
    "a tokenizer of brackets": ("tokenizer.json", b'{"a":' * 10**5),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_declares_much_takes_no_memory(whole, tmp_path, what):
    name, content = HUGE[what]
    file, folder = place_of(f"checkpoint/{name}", whole, tmp_path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content}).encode()
    file.write_bytes(content)
    read = resumed if name in ("optimizer.safetensors", "state.json") else load_pretrained
    with at_most(10, what), pytest.raises(ValueError, match=re.escape(str(folder))):
        read(folder)


@pytest.mark.parametrize(
    "size", [(10_000, 10_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1), (13_000, 13_000)]
)
def test_a_decompression_bomb_is_a_bad_image_and_no_warning(tmp_path, size):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(*size))
    with warnings.catch_warnings(), at_most(5, size):
        warnings.simplefilter("error")
        for source in (file, file.read_bytes()):
            with pytest.raises(BadImage, match=r"pixels|bomb"):
                load_image(source, 16)


def test_a_true_bomb_is_not_decoded(tmp_path):
    """400 million pixels in 50 KB."""
    with warnings.catch_warnings():
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 10**5
    with pytest.raises(BadImage, match=r"bomb\.png.*bomb"):
        load_image(tmp_path / "bomb.png", 16)


def test_a_record_of_twenty_thousand_images_is_refused_before_one_is_decoded(pictures):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
    (pictures / "train.jsonl").write_text(
        json.dumps({"image": ["good.png"] * 20_000, "conversations": talk})
    )
    load = loader_of(JsonLines("train", pictures))
    with at_most(30, "images"), pytest.raises(ValueError, match=r"train\.jsonl:1: 20000 images"):
        load.load(0)
    assert not load.cache


# ---- pickles


class Payload:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def payloads(marker: Path) -> list[bytes]:
    """The forms in which pickles travel: plain, and in the zip file that torch.save writes."""
    found = [pickle.dumps(Payload(marker), protocol) for protocol in (0, 2, 5)]
    archive = io.BytesIO()
    torch.save({"model": Payload(marker)}, archive)
    return [*found, archive.getvalue()]


def test_the_payload_goes_off_when_it_is_unpickled(tmp_path):
    for i, payload in enumerate(payloads(tmp_path / "marker")[:3]):
        pickle.loads(payload)
        assert (tmp_path / "marker").exists(), i
        (tmp_path / "marker").unlink()


@pytest.mark.parametrize("name", [*FILES, "checkpoint/pytorch_model.bin", "jsonl/train.jsonl"])
def test_no_pickle_is_read_wherever_it_lies(whole, tmp_path, name):
    marker, read = tmp_path / "marker", FILES.get(name, (None, 0))[0]
    if name == "jsonl/train.jsonl":
        (tmp_path / "jsonl").mkdir()
        file, given = tmp_path / name, tmp_path / "jsonl"
        read = lambda folder: [JsonLines("train", folder)[0]]  # noqa: E731
    elif name.endswith(".bin"):
        file, given = place_of("checkpoint/model.safetensors", whole, tmp_path)
        file.unlink()
        file, read = given / "pytorch_model.bin", load_pretrained
    else:
        file, given = place_of(name, whole, tmp_path)
        file.unlink()
    for payload in payloads(marker):
        file.write_bytes(payload)
        with pytest.raises((OSError, ValueError)):
            read(given)
        assert not marker.exists()


def test_an_index_that_names_a_pickle_reads_none(whole, tmp_path):
    index, folder = place_of("llama/model.safetensors.index.json", whole, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    for payload in payloads(tmp_path / "marker"):
        (folder / "pytorch_model.bin").write_bytes(payload)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            read_tensors(str(folder), lambda name: True)
    assert not (tmp_path / "marker").exists()
