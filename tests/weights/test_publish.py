"""The model card of an export, and its upload to the hub."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import yaml
from huggingface_hub import HfApi

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.export import export, main
from nanovlm_fast.runs import save_run_config
from nanovlm_fast.training.checkpoint import save_checkpoint
from nanovlm_fast.weights.hub import push_to_hub
from tests.support.exports import (
    CONFIGS,
    random_model,
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
    saved_model, tmp_path, monkeypatch, capsys, private
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
        str(saved_model),
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
