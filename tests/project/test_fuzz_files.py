"""Random bytes in files give a success or a clear error.

They never cause a hang, a crash, an allocation of gigabytes or the loading of a pickle. Everything
is drawn from fixed seeds, so a failure names the case that makes it fail again.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.images import MAX_PIXELS, BadImage, load_image
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import texts
from nanovlm_fast.data.sources.shards import Prepared
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import MetricsLog
from nanovlm_fast.runs import load_run_config, save_run_config
from nanovlm_fast.training.checkpoint import load_checkpoint, save_checkpoint
from nanovlm_fast.training.optim import make_optimizers
from nanovlm_fast.weights.backbones import language_fields, read_tensors
from nanovlm_fast.weights.pretrained import load_model, load_pretrained
from tests.support.fuzz import at_most, damaged, no_gigabytes
from tests.support.samples import SMALL

CONFIG = VLMConfig(**{**SMALL, "vit_n_blocks": 1, "lm_n_blocks": 1, "lm_vocab_size": 300})
pytestmark = [pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with no_gigabytes():
        yield


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
        )  # a new file, so that a memory map of the last one stays as it was
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


HUGE = {  # files that declare much and hold nothing
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
    "an image of 10^9 pixels per side": ("config.json", {"vit_img_size": 8 * 10**8}),
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


# ---- pickles


class Payload:
    """An object that makes the file `marker` when it is unpickled."""

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
