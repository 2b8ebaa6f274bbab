"""The adapter for lmms-eval, with a stand-in for its base class, manifest and requests."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import make_dataclass
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.generate import main as ask
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import save_pretrained
from tests.support.processes import ROOT, run_python
from tests.support.samples import SMALL
from tests.support.tiles import write_generation


@pytest.fixture
def adapter(monkeypatch):
    """nanovlm_fast.lmms_eval, imported as lmms-eval does."""

    class Base:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

    names = [
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    ]
    modules = {name: ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = Base
    manifest = make_dataclass(
        "ModelManifest", ["model_id", ("simple_class_path", str, None)], frozen=True
    )
    modules["lmms_eval.models.registry_v2"].ModelManifest = manifest
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nanovlm_fast.lmms_eval", raising=False)
    yield importlib.import_module("nanovlm_fast.lmms_eval")
    sys.modules.pop("nanovlm_fast.lmms_eval", None)


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = Tokenizer.train(
        ["Question: what is it? Answer:", " a red cat", " two cats"] * 9, 300
    )
    save_pretrained(
        tmp_path / "model",
        VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300})),
        tokenizer,
    )
    return tmp_path / "model"


DOCS = [{"images": ["red"]}, {"images": []}, {"images": ["blue", "green"]}, {"images": ["white"]}]
QUESTIONS = ["what is it?", "is it?", "<image>two cats?", "red?"]


def requests(settings: list[dict]) -> list[SimpleNamespace]:
    def visuals(doc):
        return [Image.new("RGB", (40, 30), colour) for colour in doc["images"]]

    rows = enumerate(zip(QUESTIONS, settings, strict=True))
    return [
        SimpleNamespace(args=(question, given, visuals, i, "task", "test"))
        for i, (question, given) in rows
    ]


def test_replies_are_what_generate_says_in_the_order_asked(adapter, checkpoint, tmp_path, capsys):
    model = adapter.NanoVLMFast(
        checkpoint=str(checkpoint), device="cpu", batch_size="2", max_batch_size=None
    )
    model.task_dict = {"task": {"test": DOCS}}
    short, long = (
        dict(max_new_tokens=5, until=["\n\n"]),
        dict(max_new_tokens=9, temperature=0, do_sample=False),
    )
    settings = [short, short, short, long]
    replies = model.generate_until(requests(settings))
    for doc, question, given, reply in zip(DOCS, QUESTIONS, settings, replies, strict=True):
        command = [
            "--checkpoint",
            str(checkpoint),
            "--prompt",
            question.replace("<image>", ""),
            "--device",
            "cpu",
        ]
        for colour in doc["images"]:
            Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
            command += ["--image", str(tmp_path / f"{colour}.png")]
        assert ask([*command, "--max-new-tokens", str(given["max_new_tokens"])]) == 0
        assert capsys.readouterr().out.strip() == reply
    assert len(set(replies)) > 1 and all(replies), "answers that show something"


def test_more_tokens_than_the_model_has_positions_are_cut(adapter, checkpoint):
    model = adapter.NanoVLMFast(checkpoint=str(checkpoint), device="cpu")
    model.task_dict = {"task": {"test": DOCS}}
    assert len(model.generate_until(requests([dict(max_new_tokens=10**6)] * 4))) == 4


def test_too_long_a_prompt_is_named_and_costs_the_others_nothing(adapter, checkpoint, capsys):
    """A prompt without room gets no reply, and one with room for two tokens gets two.

    The rest get what they get alone.
    """
    sampled = dict(max_new_tokens=12, do_sample=True, temperature=1.5)
    model = adapter.NanoVLMFast(checkpoint=str(checkpoint), device="cpu")
    model.task_dict = {"task": {"test": DOCS}}
    positions = model.model.config.lm_max_position_embeddings
    for settings in (dict(max_new_tokens=12), sampled):
        asked = requests([settings] * 4)
        alone = adapter.NanoVLMFast(checkpoint=str(checkpoint), device="cpu", batch_size=1)
        alone.task_dict = model.task_dict
        expected = alone.generate_until(asked)
        no_room, little = requests([settings] * 4)[2:4]
        no_room.args = ("what is it? " * positions, *no_room.args[1:])
        marks = positions - 1 - len(model.text.document([("!", "")], 1))  # no entry has two of them
        little.args = ("!" * marks, *little.args[1:])
        assert len(model.text.document([("!" * marks, "")], 1)) == positions - 2
        asked[2:4] = no_room, little
        replies = model.generate_until(asked)
        assert replies[:2] == expected[:2] and replies[2] == ""
        assert 0 < len(replies[3]) < len(replies[0])
        assert "no reply to task 2: a prompt of" in capsys.readouterr().err


def test_replies_end_before_a_stop(adapter):
    assert adapter.cut(" a cat\nQuestion", ["\n"]) == "a cat"
    assert adapter.cut("a cat. No. Yes", ["Yes", "."]) == "a cat"
    assert adapter.cut("\n\na cat", "\n\n") == "a cat" and adapter.cut("a cat", [""]) == "a cat"


# (task, what lmms-eval asks, what the user says, how the reply begins), as nanoVLM writes them
ASKED = [
    ("task", "red?", "red?", ""),
    ("mme", "Is it red?", "Is it red?\nGive a very brief answer.", ""),
    ("chartqa", "red?", "red?", ""),
    (
        "ai2d",
        "What?\nA. red\nB. cat\nAnswer with the option's letter from the given choices directly.",
        "What?\nChoices:\nA. red\nB. cat\nAnswer with the letter directly.",
        "Answer:",
    ),
    (
        "mmmu_val",
        "Question: what?\nA. red\nB. cat",
        " what?\nChoices:\nA. red\nB. cat",
        "Answer:",
    ),
    (
        "docvqa_val",
        "red?",
        "Give a short and terse answer to the following question. Do not paraphrase or reformat "
        "the text you see in the image. Do not include any full stops. Just give the answer "
        "without additional explanation. Question: red?",
        "",
    ),
]


def test_questions_are_put_as_nanovlm_does_for_each_task(adapter, tmp_path, monkeypatch):
    write_generation(tmp_path, "230M-8k")
    model = adapter.NanoVLMFast(str(tmp_path / "model"), "cpu", prompts="nanovlm")
    asked = []
    for number, (task, context, _, _) in enumerate(ASKED):
        visuals = [Image.new("RGB", (40, 30), "red")]
        args = (context, dict(max_new_tokens=3), lambda _, v=visuals: v, number, task, "test")
        asked.append(SimpleNamespace(args=args))
        model.task_dict[task] = {"test": [None] * len(ASKED)}
    prompts = []
    generate = adapter.generate

    def recorded(of, pixels, documents, *more, **settings):
        prompts.extend(documents)
        return generate(of, pixels, documents, *more, **settings)

    monkeypatch.setattr(adapter, "generate", recorded)
    assert len(model.generate_until(asked)) == len(ASKED)
    for prompt, (_, _, question, begun) in zip(prompts, ASKED, strict=True):
        text = model.tokenizer.base.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
        shown, said = text.split("<|image|>")[0], text.split("<|image|>")[-1]
        assert shown == "<|im_start|>user\n<|global_image|>"
        assert said == f"{question}<|im_end|>\n<|im_start|>assistant\n{begun}"
        assert len(prompt) == len(prompt.image_rows) == len(prompt.labels)


def test_tasks_are_asked_as_they_come_unless_told_otherwise(adapter, checkpoint, tmp_path):
    write_generation(tmp_path / "chat", "450M")
    model = adapter.NanoVLMFast(str(tmp_path / "chat" / "model"), "cpu")
    plain = model.text.document([("is it?", "")], [])
    assert model.prompt("mme", "is it?", []).input_ids.tolist() == plain.input_ids.tolist()
    with pytest.raises(ValueError, match="prompts=nanovlm: for models of conversations"):
        adapter.NanoVLMFast(str(checkpoint), "cpu", prompts="nanovlm")
    with pytest.raises(ValueError, match="prompts=x: there are task, nanovlm"):
        adapter.NanoVLMFast(str(checkpoint), "cpu", prompts="x")


def test_what_is_not_there_is_said(adapter, checkpoint):
    with pytest.raises(ValueError, match="--model_args colour: there are checkpoint"):
        adapter.NanoVLMFast(checkpoint=str(checkpoint), colour="red")
    model = adapter.NanoVLMFast(checkpoint=str(checkpoint), device="cpu")
    assert adapter.NanoVLMFast(str(checkpoint), "cpu", lm_tokenizer=str(checkpoint)).tokenizer.eos
    with pytest.raises(FileNotFoundError, match="--lm-tokenizer /gone: no such folder"):
        adapter.NanoVLMFast(checkpoint=str(checkpoint), lm_tokenizer="/gone")
    for missing in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            missing([])


def test_the_entry_point_names_the_class(adapter):
    group = (
        (ROOT / "pyproject.toml")
        .read_text()
        .split('[project.entry-points."lmms_eval.models"]\n')[1]
    )
    module, function = re.match(r'nanovlm_fast = "([\w.]+):(\w+)"\n', group).groups()
    made = getattr(sys.modules[module], function)()
    assert made.model_id == "nanovlm_fast"
    module, name = made.simple_class_path.rsplit(".", 1)
    assert issubclass(getattr(sys.modules[module], name), sys.modules["lmms_eval.api.model"].lmms)


def test_nothing_else_needs_lmms_eval():
    result = run_python(
        "-c",
        "import sys, nanovlm_fast.evaluate, nanovlm_fast.export; print('lmms_eval' in sys.modules)",
    )
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
