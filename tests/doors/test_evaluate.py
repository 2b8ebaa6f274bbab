"""Evaluation: what counts as right, and what each mode asks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_fast import evaluate as module
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.sources.example import Example, Scoring, Source
from nanovlm_fast.data.sources.mmstar import MMStar
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support.pictures import cauldron, encoded, mmstar, photograph, texts
from tests.support.processes import run_python
from tests.support.runs import train
from tests.support.samples import SMALL
from tests.support.tiles import TEMPLATE, token_names, write_generation

LONG = (
    "a rather long answer of many words which no short limit on new tokens would let through to "
    "its end"
)


class Talks(list, Source):
    """A source of text-only examples."""


def source(*talks: list[tuple[str, str]]) -> Talks:
    return Talks(Example(f"talk {i}", [], turns) for i, turns in enumerate(talks))


@pytest.fixture
def setup(monkeypatch):
    """A model that looks up its replies by the last question.

    `asked` collects the prompts as text.
    """
    tokenizer = Tokenizer.train(["who? what? where? yes no blue " + LONG], 300)
    model = VisionLanguageModel(
        VLMConfig(**{**SMALL, "lm_vocab_size": 300, "lm_max_position_embeddings": 256})
    )
    replies: dict[str, str] = {}
    asked: list[str] = []

    def answer(model, images, prompts, eos_id, max_new_tokens):
        texts = [
            tokenizer.base.decode(p.input_ids.tolist(), skip_special_tokens=False) for p in prompts
        ]
        asked.extend(texts)
        said = [
            next(
                reply for question, reply in replies.items() if text.endswith(f"{question} Answer:")
            )
            for text in texts
        ]
        limited = zip(said, max_new_tokens, strict=True)
        return [tokenizer.encode(f" {reply}")[:limit] for reply, limit in limited]

    monkeypatch.setattr(module, "generate", answer)
    return model, tokenizer, replies, asked


def test_exact_match_by_kind(setup):
    model, tokenizer, replies, _ = setup
    replies |= {"who?": "blue", "what?": "yes", "where?": LONG}
    result = evaluate(
        model, tokenizer, source([("who?", "blue"), ("what?", "no")], [("where?", LONG)])
    )
    assert (result.correct, result.total) == (2, 3)
    assert dict(result.by_kind) == {"open": [2, 2], "yes/no": [0, 1]}
    assert result.as_dict()["accuracy"] == pytest.approx(2 / 3)


def test_an_answer_that_only_begins_right_is_wrong(setup):
    model, tokenizer, replies, _ = setup
    replies["who?"] = "blue yes"
    assert evaluate(model, tokenizer, source([("who?", "blue")])).correct == 0


@pytest.mark.parametrize(("mode", "questions"), [("independent", 3), ("chat", 3), ("first", 1)])
def test_modes_ask_as_they_were_trained(setup, mode, questions):
    model, tokenizer, replies, asked = setup
    replies |= {"who?": "no", "what?": "no", "where?": "no"}
    turns = [("who?", "yes"), ("what?", "blue"), ("where?", "no")]
    assert evaluate(model, tokenizer, source(turns), mode=mode).total == questions == len(asked)
    history = [text.count("Question:") for text in asked]
    assert history == {"independent": [1, 1, 1], "chat": [1, 2, 3], "first": [1]}[mode]
    if mode == "chat":
        assert "yes" in asked[1] and "blue" in asked[2]


def test_too_long_a_prompt_is_left_out_and_named(setup):
    model, tokenizer, replies, _ = setup
    replies["who?"] = "yes"
    result = evaluate(model, tokenizer, source([(LONG * 20, "no")], [("who?", "yes")]))
    assert (result.correct, result.total) == (1, 1) and "talk 0" in result.skipped[0]


def test_too_many_images_are_left_out_before_one_is_decoded(setup, tmp_path):
    model, tokenizer, replies, _ = setup
    replies["who?"] = "yes"
    gone = [tmp_path / "gone.png"] * 200  # decoding one would fail
    shown = Talks([Example("album", gone, [("who?", "yes")]), Example("b", [], [("who?", "yes")])])
    result = evaluate(model, tokenizer, shown)
    assert (result.correct, result.total, result.unreadable) == (1, 1, [])
    assert result.too_long[0].startswith("album: 200 images take ")
    assert module.answer_samples(model, tokenizer, shown) == []


@pytest.mark.parametrize("whole", [True, False])
def test_samples_show_the_first_of_several_pictures(whole):
    """Put together again: the tiles of the second, or one of the whole, are no part of it."""
    names = token_names(side=4)
    if not whole:
        del names["global_image_token"]
    config = VLMConfig(**{**SMALL, "vit_img_size": 16, "vit_patch_size": 8})
    config = replace(config, max_img_size=64, vlm_extra_tokens=names, lm_chat_template=TEMPLATE)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    tiles, grids = module.tiles_shown(
        Example("two", [Image.fromarray(one) for one in pixels], []), config
    )
    assert grids == [(2, 3)] * 2 and len(tiles) == 2 * (6 + whole)
    found = module.shown(tiles, grids[0], config)
    assert np.array_equal(found, pixels[0].transpose(2, 0, 1))


def test_one_long_question_costs_the_others_nothing(monkeypatch):
    """With the real `generate`: a question that has room for its answer only, in any batch."""
    tokenizer = Tokenizer.train(["who? what? where? yes no blue " + LONG], 300)
    torch.manual_seed(0)
    sizes = {**SMALL, "lm_vocab_size": 300, "lm_max_position_embeddings": 128}
    model = VisionLanguageModel(VLMConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    said = {}

    def judge(reply, answer):
        said.setdefault(answer, []).append(reply)
        return False

    monkeypatch.setattr(Talks, "scoring", Scoring(model.config.prompt, right=judge))
    text = module.TextProcessor(tokenizer, model.config.prompt, model.config.image_tokens)
    reply = len(tokenizer.encode(" no")) + 2
    tokens = len(text.document([("!", "")], 0)) - 1
    asked = [("!" * (128 - tokens - reply), "no"), ("who?", LONG), ("what?", "blue")]
    asked.append(("!" * 128, "never"))
    talks = source(*([turn] for turn in asked))
    for style in ("greedy", "v0.1"):
        for size in (1, 2, 4):
            result = evaluate(model, tokenizer, talks, examples_per_batch=size, style=style)
            assert result.total == 3 and result.too_long == result.skipped
            shown = result.say("questions")
            assert shown.startswith("0.0% of 3 questions; left out: 1 too long for the model, ")
            assert ", the first: talk 3: a prompt of " in shown
            assert " tokens and its answer of " in shown and shown.endswith("128 positions")
        assert set(said) == {"no", LONG, "blue"}
        assert all(len(set(replies)) == 1 for replies in said.values()), said
        assert len(tokenizer.encode(said[LONG][0])) > 20, "not cut to what the long question leaves"
        said.clear()


def test_where_nothing_could_be_asked_there_is_no_score(setup, tmp_path, capsys):
    model, tokenizer, _, _ = setup
    result = evaluate(model, tokenizer, source([(LONG * 20, "no")]))
    assert (result.accuracy, result.total) == (None, 0) and result.as_dict()["accuracy"] is None
    shown = result.say("questions")
    assert shown.startswith("none of the questions could be asked; left out: 1 too long")

    save_pretrained(tmp_path / "model", model, tokenizer)
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    lines = [json.dumps({"image": f"{i}.png", "conversations": talk}) for i in range(3)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    command = ["--checkpoint", str(tmp_path / "model"), "--data", f"jsonl:{tmp_path}"]
    command += ["--device", "cpu"]
    for options in ([], ["--json"]):
        capsys.readouterr()
        assert module.main([*command, *options]) == 1
        printed = capsys.readouterr()
        last = printed.err.strip().splitlines()[-1]
        expected = r"error: none of the questions of jsonl:.* asked; .* 3 unreadable, .*0\.png"
        assert re.match(expected, last)
        assert printed.out == ""


def test_blank_images_are_blank_and_unreadable_ones_named(monkeypatch):
    torch.manual_seed(0)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    tokenizer = Tokenizer.train(["what? yes"], 300)
    seen = []

    def answer(model, images, prompts, eos_id, max_new_tokens):
        seen.append(images)
        return [[] for _ in prompts]

    monkeypatch.setattr(module, "generate", answer)
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    examples = Talks(
        [
            Example("good", [noise], [("what?", "yes")]),
            Example("bad", ["/nowhere.png"], [("what?", "yes")]),
        ]
    )
    for blank in (False, True):
        result = evaluate(model, tokenizer, examples, blank_images=blank)
        assert result.total == 1 and "nowhere.png" in result.skipped[0]
    assert len(seen[0].unique()) > 100 and seen[1].unique().tolist() == [module.BLANK]


# ---- MMStar


MMSTAR_ROWS = [
    ("Which? A: red, B: blue", "B", "math"),
    ("How many? A: one, B: two", "A", "math"),
    ("Where? A: here, B: there", "B", "coarse perception"),
]


@pytest.fixture
def mmstar_source(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mmstar").mkdir()
    mmstar(MMSTAR_ROWS).to_parquet(tmp_path / "mmstar" / "val-00000-of-00001.parquet")
    return load_source(f"mmstar:{tmp_path / 'mmstar'}", "test")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("B", True), ("B.", True), ("The answer is (B).", True), ("(see B here)", True),
        ("B is right", True),
        ("b", False), ("AB", False), ("A", False), ("", False), ("Both", False), ("B<", True),
    ],
)  # fmt: skip
def test_a_reply_that_names_the_letter_is_right(reply, right):
    assert MMStar.scoring.right(reply, "B") is right
    assert MMStar.scoring.right(reply, "b\n") is right, (
        "the answer's case and line end do not matter"
    )


def scripted(tokenizer, replies: list[str], seen: list):
    """A stand-in for `generate` that returns the given replies in turn; <eos> ends a sequence."""

    def answer(model, images, prompts, eos_id, max_new_tokens, **options):
        seen.append((images, prompts, eos_id, max_new_tokens, options))
        tokens = []
        for reply in replies[: len(prompts)]:
            first, *rest = map(tokenizer.encode, reply.split("<eos>"))
            tokens.append(sum(([tokenizer.eos_id, *part] for part in rest), first))
        return tokens

    return answer


def test_mmstar_is_asked_and_judged_as_v01_does(mmstar_source, monkeypatch):
    tokenizer = Tokenizer.train(["A B The Question Answer only with the letter"], 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    seen: list = []
    monkeypatch.setattr(module, "generate", scripted(tokenizer, [" B", " B.", " (B)"], seen))
    result = evaluate(model, tokenizer, mmstar_source)
    ((images, prompts, eos_id, new_tokens, options),) = seen
    asked = tokenizer.base.decode(prompts[0].input_ids[model.config.image_tokens :].tolist())
    assert asked == "Question: Which? A: red, B: blue \nAnswer only with the letter! \nAnswer:"
    assert (len(images), eos_id, new_tokens, options) == (3, tokenizer.eos_id, [5] * 3, {})
    assert result.as_dict()["by_kind"] == {
        "coarse perception": {"accuracy": 1.0, "questions": 1, "chance": 0.5, "with_options": 1},
        "math": {"accuracy": 0.5, "questions": 2, "chance": 0.5, "with_options": 2},
    }
    assert result.as_dict()["chance"] == 0.5


def test_mmstar_asks_for_the_letter_in_a_conversation_too(mmstar_source, tmp_path, monkeypatch):
    write_generation(tmp_path, "230M-8k")
    model, tokenizer = load_pretrained(tmp_path / "model")
    seen: list = []
    monkeypatch.setattr(module, "generate", scripted(tokenizer, ["B"] * 3, seen))
    evaluate(model, tokenizer, mmstar_source)
    ((_, prompts, _, new_tokens, _),) = seen
    asked = tokenizer.base.decode(prompts[0].input_ids.tolist(), skip_special_tokens=True)
    question = "Question: Which? A: red, B: blue \nAnswer only with the letter! \nAnswer:"
    assert asked == f"user\n{question}\nassistant\n" and new_tokens == [5] * 3


def test_style_v01_samples_and_does_not_stop_at_the_end_of_sequence(mmstar_source, monkeypatch):
    """'A<eos>The' becomes 'AThe' and is wrong, as it was when the published number was measured."""
    tokenizer = Tokenizer.train(["A B The Question Answer only with the letter"], 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    replies, seen = [" B<eos>The", " A<eos>", " B<eos> The"], []
    monkeypatch.setattr(module, "generate", scripted(tokenizer, replies, seen))
    assert evaluate(model, tokenizer, mmstar_source).correct == 3
    assert evaluate(model, tokenizer, mmstar_source, style="v0.1").correct == 2
    _, _, eos_id, _, options = seen[1]
    assert eos_id not in range(len(tokenizer)) and options["temperature"] == 1.0
    assert len(options["generator"]) == 3, "each question has random numbers of its own"
    assert torch.default_generator not in options["generator"], "training's stay what they were"


def test_sampling_is_repeatable_and_leaves_the_training_alone(mmstar_source):
    """The real `generate` samples all tokens up to the limit.

    Replies are equal for equal random seeds only.
    """
    tokenizer = Tokenizer.train(["A B The Question Answer only with the letter"], 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    judged: list[str] = []
    mmstar_source.scoring = replace(
        MMStar.scoring, right=lambda reply, answer: judged.append(reply) or False
    )
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        assert evaluate(model, tokenizer, mmstar_source, style="v0.1", seed=seed).total == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert judged[:3] == judged[3:6] != judged[6:]


FOUR = "Options: A: a cat, B: two., C: U.S.A., D: none"


@pytest.mark.parametrize(
    ("question", "answer", "options"),
    [
        (f"Which? {FOUR}", "D", 4),
        (f"Vitamin A: which? {FOUR}", "a", 4),
        ("Which?\nChoices:\n(A) one\n(B) two\n(C) three", "(C)", 3),
        ("Which?\nA. one\nB. two\nAnswer with the letter.", "Answer: B", 2),
        ("Which? A) one B) two", "B.", 2),
        ("Which? A) one B) two", "C", 0),  # no option of it
        ("Who is in A. Smith's picture?", "A", 0),
        ("What letter is it?", "B", 0),
        (f"Which? {FOUR}", "a cat", 0),
    ],
)
def test_options_are_counted_where_a_letter_is_the_answer(question, answer, options):
    assert module.options_of(question, answer) == options


def test_chance_stands_beside_the_score(setup):
    model, tokenizer, _, _ = setup
    asked = [(f"A? {FOUR}", "A"), ("who? A: yes, B: no", "B"), ("where?", "blue")]
    tokenizer = Tokenizer.train([" ".join(sum(asked, ()))], 300)
    replies = {question: "A" for question, _ in asked}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", scripted(tokenizer, list(replies.values()), []))
        mixed = evaluate(model, tokenizer, source(asked))
        patch.setattr(module, "generate", scripted(tokenizer, ["A", "A"], []))
        letters = evaluate(model, tokenizer, source(asked[:2]))
        patch.setattr(module, "generate", scripted(tokenizer, ["A"], []))
        plain = evaluate(model, tokenizer, source(asked[2:]))
    assert letters.say("questions") == "50.0% of 2 questions, chance 37.5%"
    assert (letters.as_dict()["chance"], letters.as_dict()["with_options"]) == (0.375, 2)
    assert mixed.say("questions") == "33.3% of 3 questions, chance 37.5% on the 2 with options"
    assert plain.say("questions") == "0.0% of 1 questions" and "chance" not in plain.as_dict()


@pytest.mark.slow
def test_a_run_scores_mmstar_and_so_does_the_command(mmstar_source, tmp_path):
    """A whole run whose answers are known: it is trained on nothing but 'B', so it says B."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = texts((f"{MMSTAR_ROWS[0][0]}", "B"))
    cauldron([([encoded(photograph(place=i), "JPEG")], text) for i in range(24)]).to_parquet(
        folder / "train.parquet"
    )
    home, data = {"HF_HOME": str(tmp_path / "home")}, f"mmstar:{tmp_path / 'mmstar'}"
    options = f"--data {folder} --eval {data} --eval-every 15 --max-steps 30"
    options += " --val-samples 0 --no-final-eval"
    prompt = "--lm-max-position-embeddings 512"
    result = train(tmp_path / "run", f"{options} {prompt}", **home)
    assert result.returncode == 0, result.stderr
    scored = [line for line in read_metrics(tmp_path / "run") if "eval" in line]
    assert [line["step"] for line in scored] == [15, 30]
    last = scored[-1]["eval"]
    assert (last["questions"], last["style"], set(last["by_kind"])) == (
        3,
        "greedy",
        {"math", "coarse perception"},
    )
    assert (
        last["accuracy"] == pytest.approx(2 / 3)
        and last["by_kind"]["coarse perception"]["accuracy"] == 1
    )
    command = [
        "-m",
        "nanovlm_fast.evaluate",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        data,
        "--json",
    ]
    again = run_python(*command, "--device", "cpu", **home)
    assert again.returncode == 0, again.stderr
    printed = json.loads(again.stdout)
    assert printed["by_kind"] == last["by_kind"] and printed["style"] == "greedy"
    assert printed["chance"] == last["chance"] == 0.5
    assert result.stdout.count("66.7% of 3 questions of mmstar") == 2
    assert result.stdout.count(", chance 50.0%") == 3, "each score, and the table at the end"
