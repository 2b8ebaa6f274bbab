"""The adapter to huggingface/nanoVLM.

Its two interfaces are replaced by stand-ins made from this project's reference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import peer
from bench.subjects import peer_process
from bench.subjects.peer_process import NanoVLM, unused
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.reference import VisionLanguageModel
from nanovlm_fast.presets import PRESETS, preset
from nanovlm_fast.weights.folder import FIELDS_AFTER_V01

CONFIG = """
import dataclasses
from dataclasses import dataclass

@dataclass
class VLMConfig:
    {fields}
    lm_model_type: str = "nobody asks the hub for this"
"""
V01 = """
from models.config import VLMConfig
from nanovlm_fast.model import reference
from nanovlm_fast.config import VLMConfig as Ours, fields_of

class VisionLanguageModel(reference.VisionLanguageModel):
    def __init__(self, cfg):
        super().__init__(Ours(**fields_of(Ours, vars(cfg))))

    def forward(self, input_ids, image, attention_mask=None, targets=None):
        return super().forward(input_ids, image, attention_mask, targets)
"""
COLLATORS = """
import torch

class VQACollator:
    def __init__(self, tokenizer, max_length):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, batch):
        texts = [item["text_data"] + item["answer"] for item in batch]
        options = dict(
            padding="max_length", padding_side="left", return_tensors="pt", truncation=True
        )
        rows = self.tokenizer.batch_encode_plus(texts, max_length=self.max_length, **options)
        labels = rows["input_ids"].roll(-1, 1)
        labels[:, -1] = -100
        for item, row, mask in zip(batch, labels, rows["attention_mask"]):
            asked = len(self.tokenizer.encode(item["text_data"], add_special_tokens=False))
            row[: int(mask.argmax()) + asked - 1] = -100
        images = torch.stack([item["image"] for item in batch])
        return {"image": images, **rows, "labels": labels}
"""
MAIN = """
from models.config import VLMConfig
from data.processors import get_tokenizer
from nanovlm_fast.model import reference
from nanovlm_fast.config import VLMConfig as Ours, fields_of

class VisionLanguageModel(reference.VisionLanguageModel):
    def __init__(self, cfg, load_backbone=True):
        assert not load_backbone and cfg.mp_image_token_length == 4
        self.tokenizer_ = get_tokenizer("the hub")
        super().__init__(Ours(**fields_of(Ours, vars(cfg))))

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        x = self.decoder.token_embedding(input_ids).clone()
        mask = input_ids == self.tokenizer_.image_token_id
        x[mask] = self.MP(self.vision_encoder(images)).flatten(0, 1)
        logits = self.decoder.head(self.decoder(x, attention_mask.bool()))
        loss = reference.F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss
"""
HUB = "def get_tokenizer(*names):\n    raise OSError('no network')\n"
OPTIONS = [
    "--preset",
    "tiny",
    "--layers",
    "1",
    "--samples",
    "3",
    "--repeats",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _longer_texts(monkeypatch) -> None:
    """The tiny preset cuts every text of the stream to the same few tokens."""
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], "lm_max_length": 40})


@pytest.fixture
def own_modules(monkeypatch):
    """Undo the imports of a checkout in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("models", "data"):
            del sys.modules[name]


def checkout_of(folder: Path, model: str) -> Path:
    fields = {
        name: type(value).__name__
        for name, value in vars(VLMConfig()).items()
        if name not in ("init", "prompt", *FIELDS_AFTER_V01)
    }
    fields |= {"mp_image_token_length": "int", "max_img_size": "int"} if "images" in model else {}
    lines = [f"{name}: {kind} = None" for name, kind in fields.items()]
    for file, text in (
        ("models/config.py", CONFIG.format(fields="\n    ".join(lines))),
        ("models/vision_language_model.py", model),
        ("data/processors.py", HUB),
        ("data/collators.py", COLLATORS),
    ):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("model", "questions"), [(V01, 3), (MAIN, 1)], ids=["v0.1", "main"])
def test_both_interfaces_are_compared_with_ours(tmp_path, capsys, monkeypatch, model, questions):
    if model == MAIN:  # once is enough, since starting a process takes seconds
        monkeypatch.setattr(peer, "in_a_process", lambda call, *args: call(*args))
    checkout = checkout_of(tmp_path / "nanoVLM", model)
    options = [
        "--nanovlm",
        str(checkout),
        *OPTIONS,
        "--questions",
        str(questions),
        "--samples",
        "6",
    ]
    assert peer.main([*options, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("*/peer_tiny_1layer.json")
    cases = json.loads(file.read_text())["cases"]
    plain, name = cases
    assert plain == "1 question per image, no padding" and name == str(peer.Case(questions))
    for case in cases.values():
        assert case["parity"]["passed"] and 0 < case["parity"]["gradient"] < 1e-4
        rows = case["variants"]
        assert rows.keys() == {"nanovlm", "ours"} and all(
            row["peak_mib"] > 0 for row in rows.values()
        )
        # the stand-ins count positions as we do, so even the padded losses agree; nanoVLM's do not
        assert rows["nanovlm"]["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-5)
        assert case["speedup"] == pytest.approx(rows["nanovlm"]["median"] / rows["ours"]["median"])
    assert cases[plain]["work"]["padded_waste"] == 0 and cases[plain]["work"]["images"] == 6
    work = cases[name]["work"]
    assert work["padded_waste"] > 0 and (work["images"], work["questions"]) == (6 // questions, 6)
    assert f"{plain}: ours is" in capsys.readouterr().out


def test_v01s_collator_makes_of_the_samples_what_they_are(tmp_path, own_modules):
    """Ids, labels and padding go through text and back."""
    checkout_of(tmp_path, V01)
    sys.path.insert(0, str(tmp_path))
    work = peer.Case(2).work(peer.parse(["--nanovlm", str(tmp_path), *OPTIONS]))
    rows = {
        name: torch.from_numpy(array)
        for name, array in peer.rows_of(work, work.text_length).items()
    }
    found = peer_process.collated(peer_process.load("data.collators").VQACollator, **rows)
    assert list(found) == ["input_ids", "image", "attention_mask", "targets"]
    assert torch.equal(found["image"], rows["pixels"])
    for name in ("attention_mask", "targets"):
        assert torch.equal(found[name], rows[name]), name
    assert torch.equal(
        found["input_ids"] * rows["attention_mask"], rows["input_ids"] * rows["attention_mask"]
    )


def test_v02_is_refused_by_name(tmp_path, capsys):
    """v0.2 fits neither of the layouts that are compared.

    Its forward takes v0.1's arguments, but its rows contain image tokens. With either layout, the
    benchmark would not measure what v0.2 trains.
    """
    checkout = checkout_of(tmp_path / "nanoVLM", V01)
    config = checkout / "models" / "config.py"
    config.write_text(config.read_text() + "    mp_image_token_length: int = 64\n")
    assert peer.main(["--nanovlm", str(checkout), *OPTIONS, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "is v0.2" in error
        and "only v0.1 and main are compared" in error
        and "git checkout v0.1" in error
    )


@pytest.mark.parametrize("questions", ["", "ten", "0", "1,-2", "1.5"])
def test_numbers_of_questions_that_are_none_are_named(tmp_path, capsys, questions):
    checkout = checkout_of(tmp_path, V01)
    assert peer.main(["--nanovlm", str(checkout), *OPTIONS, "--questions", questions]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--questions {questions}" in error


def test_no_time_without_parity(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        peer, "in_a_process", lambda call, *args: call(*args)
    )  # starting a process takes seconds
    wrong = V01.replace(
        "input_ids, image, attention_mask, targets)\n", "input_ids, image * 1.1, None, targets)\n"
    )
    checkout = checkout_of(tmp_path / "nanoVLM", wrong)
    assert (
        wrong != V01
        and peer.main(["--nanovlm", str(checkout), *OPTIONS, "--out", str(tmp_path)]) == 1
    )
    assert (
        not list(tmp_path.rglob("peer*.json")) and "no time is reported" in capsys.readouterr().err
    )


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    assert peer.main(["--nanovlm", str(tmp_path), *OPTIONS]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"{tmp_path} has no models/config.py" in error
        and "git clone" in error
    )


def test_what_breaks_in_the_other_process_is_one_line_here(tmp_path, capsys):
    checkout = checkout_of(tmp_path / "nanoVLM", "import a_package_nobody_has")
    assert peer.main(["--nanovlm", str(checkout), *OPTIONS, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a_package_nobody_has" in error and "README" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("image, attention_mask=None", "pictures, attention_mask=None"), "only v0.1 and main"),
        (("class VisionLanguageModel", "class Model"), "VisionLanguageModel"),
    ],
)
def test_other_interfaces_are_refused(tmp_path, own_modules, change, message):
    config, _ = preset("tiny")
    state = VisionLanguageModel(config).state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "weights")
    checkout = checkout_of(tmp_path, V01.replace(*change))
    options = dict(
        config=vars(config), image_tokens=4, device="cpu", dtype=torch.float32, threads=1
    )
    with pytest.raises((ValueError, AttributeError), match=message):
        NanoVLM(str(checkout), weights=str(tmp_path / "weights"), **options)


def test_parity_is_taken_without_padding():
    work = peer.load_work("tiny", "cauldron_like", 4)
    even = peer.of_one_length(work)
    lengths = {len(sample.documents[0]) for sample in even.samples}
    assert len(lengths) == 1 and len({len(document) for document in work.documents}) > 1
    rows = peer.rows_of(even, lengths.pop() - work.config.image_tokens)
    assert rows["attention_mask"].all() and (rows["targets"] >= 0).any(axis=1).all()
    assert unused(torch.tensor([[0, 1], [3, 1]]), 5) == 2
    with pytest.raises(ValueError, match="fewer --samples"):
        unused(torch.arange(5), 5)
