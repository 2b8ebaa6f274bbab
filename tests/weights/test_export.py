"""Exports: transformers gives our logits and answers; nanoVLM's layout is read and written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMForConditionalGeneration

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.export import export, main
from nanovlm_fast.generate import generate
from nanovlm_fast.model import reference
from nanovlm_fast.presets import preset
from nanovlm_fast.runs import save_run_config
from nanovlm_fast.training.checkpoint import save_checkpoint
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.hub import push_to_hub
from nanovlm_fast.weights.pretrained import load_pretrained
from nanovlm_fast.weights.to_nanovlm import to_nanovlm
from nanovlm_fast.weights.to_transformers import to_transformers
from tests.support import forks
from tests.support.processes import ROOT, run_python
from tests.support.samples import SMALL

QUESTION = "what color is the shape?"
easy_vqa = pytest.importorskip("easy_vqa")
SHAPE = easy_vqa.get_test_image_paths()[0]  # 64 x 64
PICTURE = next(ROOT.glob("bench/results/*/train_tiny_samples.png"))  # wide, RGBA
PROPORTIONS = dict(vit_n_blocks=2, lm_n_blocks=2, lm_vocab_size=320, lm_max_position_embeddings=512)
CONFIGS = {
    "tiny": dataclasses.replace(preset("tiny")[0], lm_vocab_size=384),
    "nanovlm-222m, two layers": dataclasses.replace(preset("nanovlm-222m")[0], **PROPORTIONS),
    "untied, normalised, full vocabulary": VLMConfig(
        **{**SMALL, "lm_vocab_size": 281, "lm_tie_weights": False, "prompt": "Q: {question}\nA:"}
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """281 entries: fewer than some of the models have rows, as many as one has."""
    text = ["Question: what color is the shape? Answer:", " a red circle", " blue"] * 9
    made = Tokenizer.train(text, 281)
    assert len(made) == 281
    return made


def random_model(config: VLMConfig) -> VisionLanguageModel:
    """Weights far from uniform answers: an error of place, order or scale changes the argmax."""
    model = VisionLanguageModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln" in name), std=0.2)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)
    return model


def ask(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: list,
    question: str = QUESTION,
    n: int = 12,
):
    """(reply, prompt ids, pixels (n, 3, H, W) uint8) of our own generate."""
    config = model.config
    pixels = torch.from_numpy(
        np.stack([load_image(image, config.vit_img_size) for image in images])
    )
    prompt = TextProcessor(tokenizer, config.prompt, config.image_tokens).document(
        [(question, "")], len(images)
    )
    (reply,) = generate(model, pixels, [prompt], -1, max_new_tokens=n)
    return reply, prompt, pixels


def reference_logits(model: VisionLanguageModel, prompt, pixels: torch.Tensor) -> torch.Tensor:
    """(S, V) of the text positions, from the padded reference."""
    config = model.config
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    ids = torch.from_numpy(prompt.input_ids[prompt.image_rows < 0])[None]
    with torch.no_grad():
        return plain(ids, ((pixels.float() / 255 - config.image_mean) / config.image_std)[None])[0][
            0
        ]


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


@pytest.fixture
def saved(tmp_path, tokenizer) -> Path:
    config = dataclasses.replace(
        CONFIGS["untied, normalised, full vocabulary"], lm_vocab_size=290
    )  # room for an entry more
    save_pretrained(tmp_path / "model", random_model(config), tokenizer)
    return tmp_path / "model"


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
    saved, tmp_path, tokenizer, change, said
):
    other = Tokenizer.load(saved)
    change(other)
    other.save(saved)
    with pytest.raises(ValueError, match=said):
        export(saved, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_grid_whose_positions_transformers_mixes_up_is_refused(tmp_path, tokenizer):
    config = dataclasses.replace(
        CONFIGS["tiny"], vit_img_size=38, vit_patch_size=2, mp_pixel_shuffle_factor=1
    )
    with pytest.raises(ValueError, match="positions of 19 x 19 patches"):
        to_transformers(tmp_path, random_model(config), tokenizer)


def test_the_command_says_what_it_did_or_one_clear_line(saved, tmp_path, capsys):
    arguments = ["--checkpoint", str(saved), "--to", "nanovlm", "--out", str(tmp_path / "out")]
    done = forks.run("-m", "nanovlm_fast.export", *arguments)
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'out'}\n"), done.stderr
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not empty" in error
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# ---- nanoVLM's layout

# The fields of VLMConfig in nanoVLM v0.1 (models/config.py); its constructor takes no others.
V01 = (
    "vit_hidden_dim vit_inter_dim vit_patch_size vit_img_size vit_n_heads vit_dropout "
    "vit_n_blocks vit_ln_eps vit_cls_flag vit_model_type lm_hidden_dim lm_inter_dim lm_rms_eps "
    "lm_re_base lm_max_position_embeddings lm_vocab_size lm_n_heads lm_n_kv_heads lm_dropout "
    "lm_n_blocks lm_attn_scaling lm_max_length lm_use_tokens lm_tie_weights lm_model_type "
    "lm_tokenizer lm_eos_token_id mp_pixel_shuffle_factor vlm_load_backbone_weights "
    "vlm_checkpoint_path"
).split()
NanoVLMConfig = dataclasses.make_dataclass("VLMConfig", [(name, object, None) for name in V01])
V01_EXTRA = dict(  # what v0.1 itself writes beyond the fields that are ours too
    vit_dropout=0.0,
    vit_cls_flag=False,
    vit_model_type="google/siglip-base-patch16-224",
    lm_dropout=0.0,
    lm_attn_scaling=1.0,
    lm_eos_token_id=0,
    lm_use_tokens=False,
    lm_model_type="HuggingFaceTB/SmolLM2-135M",
    vlm_load_backbone_weights=True,
    vlm_checkpoint_path="checkpoints/nanoVLM-222M",
)


@pytest.mark.parametrize("name", ["tiny", "untied, normalised, full vocabulary"])
@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_nanovlm_loads_what_is_written_for_it(tmp_path, tokenizer, name):
    """Load as its from_pretrained does: fields as keywords, strict load_model, plain pixels."""
    config = CONFIGS[name]
    model = random_model(config)
    to_nanovlm(tmp_path, model, tokenizer)
    theirs = NanoVLMConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert (theirs.vit_hidden_dim, theirs.lm_n_kv_heads) == (
        config.vit_hidden_dim,
        config.lm_n_kv_heads,
    )
    plain = reference.VisionLanguageModel(
        config
    )  # its keys and semantics are v0.1's (test_reference.py)
    safetensors.torch.load_model(plain, tmp_path / "model.safetensors", strict=True)
    _, prompt, pixels = ask(model, tokenizer, [SHAPE])
    ids = torch.from_numpy(prompt.input_ids[prompt.image_rows < 0])[None]
    with torch.no_grad():
        logits = plain(ids, pixels.float()[None] / 255)[0][0]
    torch.testing.assert_close(
        logits, reference_logits(model, prompt, pixels), rtol=1e-4, atol=1e-4
    )


def test_another_prompt_than_nanovlms_is_pointed_out(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="nanoVLM's prompt"):
        to_nanovlm(
            tmp_path, random_model(CONFIGS["untied, normalised, full vocabulary"]), tokenizer
        )


@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_a_model_saves_itself_in_nanovlms_layout(tmp_path, tokenizer):
    model = random_model(CONFIGS["untied, normalised, full vocabulary"])
    model.save_pretrained(tmp_path / "new" / "folder", layout="nanovlm", tokenizer=tokenizer)
    to_nanovlm(tmp_path / "expected", model, tokenizer)
    files = {
        place: {file.name: file.read_bytes() for file in place.iterdir()}
        for place in (tmp_path / "new" / "folder", tmp_path / "expected")
    }
    written, expected = files.values()
    assert written == expected and "tokenizer.json" in written
    again = VisionLanguageModel.from_pretrained(tmp_path / "new" / "folder")
    _, prompt, pixels = ask(model, tokenizer, [SHAPE])
    logits = reference_logits(again, prompt, pixels)
    torch.testing.assert_close(
        logits, reference_logits(model, prompt, pixels), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def nanovlm(tmp_path) -> tuple[Path, reference.VisionLanguageModel]:
    """A folder as nanoVLM v0.1's save_pretrained writes it: save_model, and no tokenizer."""
    config = VLMConfig(**{**SMALL, "lm_vocab_size": 281, "image_mean": 0.0, "image_std": 1.0})
    plain = reference.VisionLanguageModel(config)
    folder = tmp_path / "nanovlm"
    folder.mkdir()
    safetensors.torch.save_model(plain, str(folder / "model.safetensors"))
    values = {name: value for name, value in vars(config).items() if name in V01}
    (folder / "config.json").write_text(json.dumps({**values, **V01_EXTRA}, indent=4))
    return folder, plain


def test_a_nanovlm_checkpoint_loads_and_goes_back_as_it_was(tmp_path, tokenizer, nanovlm):
    folder, plain = nanovlm
    tokenizer.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all its fields are known
        model, _ = load_pretrained(folder)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.reference_state_dict()[name], tensor), name
    reply, _, _ = ask(model.eval(), tokenizer, [SHAPE], n=4)
    assert len(reply) == 4
    (tmp_path / "back").mkdir()
    to_nanovlm(tmp_path / "back", model, tokenizer)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    before, after = (
        safetensors.torch.load_file(place / "model.safetensors")
        for place in (folder, tmp_path / "back")
    )
    embedding = {
        "decoder.head.weight",
        "decoder.token_embedding.weight",
    }  # one of the two names in either file
    assert before.keys() - embedding == after.keys() - embedding
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - embedding)
    save_pretrained(tmp_path / "ours", model, tokenizer)
    assert load_pretrained(tmp_path / "ours")[0].extra_config == V01_EXTRA, (
        "kept in our own layout too"
    )


def test_a_nanovlm_checkpoint_generates_and_trains_on_by_its_hub_name(tmp_path, tokenizer, nanovlm):
    """From the cache in the hub's own layout, without a network."""
    tokenizer.save(nanovlm[0])
    repository = tmp_path / "home" / "hub" / "models--lusxvr--nanoVLM-222M"
    shutil.copytree(nanovlm[0], repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    env = dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = "-m nanovlm_fast.generate --checkpoint lusxvr/nanoVLM-222M --prompt what?"
    command += " --max-new-tokens 3"
    result = run_python(*command.split(), **env)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    options = "--data synthetic:32 --device cpu --max-steps 2 --tokens-per-batch 512"
    options += " --look-ahead 16 --no-final-eval"
    out = tmp_path / "run"
    command = f"train.py --start-from lusxvr/nanoVLM-222M {options} --out {out}"
    result = run_python(*command.split(), **env)
    assert result.returncode == 0, result.stderr
    assert (
        "UserWarning" not in result.stderr and load_pretrained(out)[0].config.vit_hidden_dim == 48
    )


# ---- the model card


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run of seven steps whose best checkpoint is an earlier one."""
    model = random_model(CONFIGS["untied, normalised, full vocabulary"])
    folder = tmp_path / "a-run"
    for step in (3, 7):
        save_checkpoint(folder, model, tokenizer, [], {"step": step, "best_step": 3})
    save_run_config(
        folder, model.config, TrainConfig(data="jsonl:/home/me/cats", out="/home/me/runs/a")
    )
    score = {"questions": 1234, "correct": 0, "by_kind": {}, "skipped": []}
    result = {"seeing": {**score, "accuracy": 0.876}, "blind": {**score, "accuracy": 0.432}}
    (folder / "result.json").write_text(
        json.dumps({**result, "split": "test split", "step": 7, "seconds": 600.0})
    )
    return folder


@pytest.mark.parametrize("target", ["transformers", "nanovlm"])
@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_the_card_carries_what_the_run_measured(run, tmp_path, target):
    card = (export(run, target, tmp_path / "out", "someone/cats-vlm") / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["library_name"], head["pipeline_tag"]) == (target, "image-text-to-text")
    (entry,) = head["model-index"]
    (measure,) = entry["results"]
    assert (entry["name"], measure["dataset"]["type"], measure["metrics"][0]["value"]) == (
        "cats-vlm",
        "jsonl:cats",
        0.876,
    )
    assert "| with the images | 87.6% of 1,234 questions |" in text
    assert "| every image painted grey | 43.2% of 1,234 questions |" in text
    assert "7 optimizer steps, 10.0 minutes" in text and '"vit_hidden_dim": 48' in text
    assert '"tokens_per_batch"' in text and 'from_pretrained("someone/cats-vlm")' in text
    assert "/home/me" not in card, "no path of the machine it was trained on"


@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_other_weights_than_the_measured_ones_carry_no_numbers(run, tmp_path):
    card = (export(run / "best", "nanovlm", tmp_path / "out") / "README.md").read_text()
    assert "87.6%" not in card and "model-index" not in card and "trained with" in card


# ---- the upload


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_what_is_pushed_is_the_folder_that_was_written(
    saved, tmp_path, monkeypatch, capsys, private
):
    """The stand-in for HfApi takes only calls that the real one takes."""
    api = create_autospec(HfApi, instance=True)
    uploaded = {}

    def upload(**arguments):
        uploaded.update(
            {file.name: file.read_bytes() for file in Path(arguments["folder_path"]).iterdir()}
        )
        return "https://huggingface.co/someone/cats"

    api.create_repo.return_value.repo_id = "someone/cats"
    api.upload_folder.side_effect = upload
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    command = [
        "--checkpoint",
        str(saved),
        "--to",
        "nanovlm",
        "--out",
        str(tmp_path / "out"),
        "--push",
        "someone/cats",
    ]
    assert main([*command, "--private"] if private else command) == 0
    api.create_repo.assert_called_once_with("someone/cats", private=private, exist_ok=True)
    assert api.upload_folder.call_args.kwargs["repo_id"] == "someone/cats"
    assert uploaded == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= uploaded.keys()
    assert capsys.readouterr().out.endswith("uploaded: https://huggingface.co/someone/cats\n")


class Unauthorized(BaseHTTPRequestHandler):
    """The hub, to somebody without a token."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("network", "said"), [(True, "401"), (False, "refused")])
def test_a_push_that_fails_is_one_line_and_the_folder_stays(tmp_path, monkeypatch, network, said):
    """The real HfApi against a server on this machine that wants a token, and one that is gone."""
    (tmp_path / "config.json").write_text("{}")
    server = HTTPServer(("127.0.0.1", 0), Unauthorized)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    if network:
        thread.start()
    else:
        server.server_close()
    try:
        with pytest.raises(OSError, match=said) as raised:
            push_to_hub(tmp_path, "someone/cats")
    finally:
        if network:
            server.shutdown()
            server.server_close()
            thread.join()
    assert (
        "\n" not in str(raised.value)
        and "hf auth login" in str(raised.value)
        and "someone/cats" in str(raised.value)
    )
    assert (tmp_path / "config.json").exists()
