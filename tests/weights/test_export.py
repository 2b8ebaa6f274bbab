"""Exports to transformers, which gives our logits and answers; and what it cannot express."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMForConditionalGeneration

from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.export import export, main
from nanovlm_fast.weights.to_transformers import to_transformers
from tests.support import forks
from tests.support.exports import (
    CONFIGS,
    PICTURE,
    QUESTION,
    SHAPE,
    ask,
    random_model,
    reference_logits,
)

# ---- transformers


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tmp_path_factory, tokenizer):
    """(our model, theirs, their processor) of one configuration."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("exported")
    model = random_model(CONFIGS[request.param])
    to_transformers(folder, model, tokenizer)
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(theirs) is SmolVLMForConditionalGeneration and theirs.dtype == torch.float32
    return model, theirs, AutoProcessor.from_pretrained(folder)


def longest_reply(theirs, inputs, n: int = 12) -> list[int]:
    theirs.generation_config.eos_token_id = None  # go on to the end, as ours is told to
    ids = theirs.generate(**inputs, max_new_tokens=n, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("image", [SHAPE, PICTURE], ids=["easy-VQA", "wide"])
def test_transformers_gives_our_logits_and_our_answer(exported, tokenizer, image):
    model, theirs, processor = exported
    config = model.config
    reply, prompt, pixels = ask(model, tokenizer, [image])
    text = "<image>" + config.prompt.format(question=QUESTION)
    inputs = processor(text=text, images=Image.open(image), return_tensors="pt")
    ours = (pixels.float() / 255 - config.image_mean) / config.image_std
    torch.testing.assert_close(inputs["pixel_values"][0], ours, rtol=1e-5, atol=1e-5)
    expected = reference_logits(model, prompt, pixels)
    with torch.no_grad():
        logits = theirs(**inputs).logits[0, config.image_tokens :, : config.lm_vocab_size]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert longest_reply(theirs, inputs) == reply
    assert len(set(reply)) > 2, "an answer that shows something"
    blind = reference_logits(model, prompt, torch.zeros_like(pixels))
    assert (blind - expected).abs().max() > 0.1, "the picture matters"


def test_two_images_and_batches(exported, tokenizer):
    model, theirs, processor = exported
    reply, _, _ = ask(model, tokenizer, [SHAPE, PICTURE])
    images = [Image.open(SHAPE), Image.open(PICTURE)]
    text = model.config.prompt.format(question=QUESTION)
    inputs = processor(text="<image><image>" + text, images=images, return_tensors="pt")
    assert longest_reply(theirs, inputs) == reply
    texts = [f"<image>{text}", f"<image>{model.config.prompt.format(question='red?')}"]
    inputs = processor(
        text=texts, images=[[image] for image in images], return_tensors="pt", padding=True
    )
    start = inputs["input_ids"].shape[1]
    batch = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[:, start:].tolist()
    assert batch == [
        ask(model, tokenizer, [SHAPE], n=6)[0],
        ask(model, tokenizer, [PICTURE], "red?", n=6)[0],
    ]


def test_the_chat_template_writes_what_the_model_is_trained_on(exported, tokenizer):
    model, _, processor = exported
    turns = [(QUESTION, "red"), ('is it "big"?', "yes"), ("blue?", "")]
    document = TextProcessor(tokenizer, model.config.prompt, model.config.image_tokens).document(
        turns, 1
    )
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    ]
    for question, answer in zip(turns[1:], turns[:-1], strict=True):
        messages += [{"role": "assistant", "content": [{"type": "text", "text": answer[1]}]}]
        messages += [{"role": "user", "content": question[0]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.open(SHAPE), return_tensors="pt")
    ours = document.input_ids.copy()
    ours[document.image_rows >= 0] = processor.image_token_id
    assert inputs["input_ids"][0].tolist() == ours.tolist()
    with pytest.raises(Exception, match="only user and assistant"):
        processor.apply_chat_template([{"role": "system", "content": "x"}])


def test_the_image_token_is_never_said(exported):
    model, theirs, processor = exported
    assert theirs.generation_config.suppress_tokens == [processor.image_token_id]
    assert theirs.config.text_config.vocab_size == max(model.config.lm_vocab_size, 282)
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert tied == model.config.lm_tie_weights


# ---- what cannot be expressed


def with_image_entry(tokenizer: Tokenizer) -> None:
    tokenizer.base.add_special_tokens(["<image>"])


def with_first_token(tokenizer: Tokenizer) -> None:
    eos = (tokenizer.eos, tokenizer.eos_id)
    tokenizer.base.post_processor = processors.TemplateProcessing(
        single=f"{eos[0]} $A", special_tokens=[eos]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [(with_image_entry, "entry <image> already"), (with_first_token, "adds tokens")],
)
def test_tokenizers_that_transformers_would_use_otherwise_are_refused(
    saved_model, tmp_path, tokenizer, change, said
):
    other = Tokenizer.load(saved_model)
    change(other)
    other.save(saved_model)
    with pytest.raises(ValueError, match=said):
        export(saved_model, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_grid_whose_positions_transformers_mixes_up_is_refused(tmp_path, tokenizer):
    config = dataclasses.replace(
        CONFIGS["tiny"], vit_img_size=38, vit_patch_size=2, mp_pixel_shuffle_factor=1
    )
    with pytest.raises(ValueError, match="positions of 19 x 19 patches"):
        to_transformers(tmp_path, random_model(config), tokenizer)


def test_the_command_says_what_it_did_or_one_clear_line(saved_model, tmp_path, capsys):
    arguments = [
        "--checkpoint",
        str(saved_model),
        "--to",
        "nanovlm",
        "--out",
        str(tmp_path / "out"),
    ]
    done = forks.run("-m", "nanovlm_fast.export", *arguments)
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'out'}\n"), done.stderr
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not empty" in error
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
