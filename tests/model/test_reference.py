"""The reference against nanoVLM's published sizes, and transformers with the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.init import sincos_positions
from nanovlm_fast.model.packed import VisionLanguageModel as PackedModel
from nanovlm_fast.model.reference import VisionLanguageModel
from nanovlm_fast.presets import preset


def test_the_222m_preset_is_nanovlm():
    config, _ = preset("nanovlm-222m")
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    parts = {"vision_encoder": 85_797_120, "decoder": 134_515_008, "MP": 1_769_472}
    for name, size in parts.items():
        assert sum(p.numel() for p in getattr(model, name).parameters()) == size
    assert sum(p.numel() for p in model.parameters()) == 222_081_600
    keys = set(model.state_dict())
    assert len(keys) == 424
    last = "decoder.blocks.29."
    assert {
        "vision_encoder.patch_embedding.conv.weight",
        "vision_encoder.patch_embedding.position_embedding",
        "vision_encoder.blocks.11.attn.qkv_proj.bias",
        "vision_encoder.layer_norm.bias",
        "decoder.rotary_embd.inv_freq",
        "decoder.head.weight",
        "MP.proj.weight",
        *(f"{last}attn.{name}_proj.weight" for name in ("q", "k", "v", "out")),
        *(f"{last}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        f"{last}norm1.weight",
    } <= keys


def test_the_packed_model_has_the_references_keys():
    config, _ = preset("nanovlm-222m")
    with torch.device("meta"):
        ours, theirs = (
            PackedModel(config).reference_state_dict(),
            VisionLanguageModel(config).state_dict(),
        )
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_padding_changes_nothing(small_config):
    model = VisionLanguageModel(small_config)
    ids, images = torch.randint(1, 97, (3, 7)), torch.rand(3, 3, 32, 32)
    targets = torch.randint(0, 97, (3, 7))
    alone, _ = model(ids, images)
    _, loss = model(ids, images, targets=targets)
    pad = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], 1)
    logits, padded_loss = model(
        torch.cat([pad, ids], 1), images, mask, torch.cat([pad - 100, targets], 1)
    )
    torch.testing.assert_close(logits[:, 5:], alone)
    torch.testing.assert_close(padded_loss, loss)
    assert logits.isfinite().all()


def test_the_future_is_not_seen(small_config):
    model = VisionLanguageModel(small_config)
    ids, images = torch.randint(1, 97, (1, 9)), torch.rand(1, 3, 32, 32)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 97
    before, after = model(ids, images)[0], model(changed, images)[0]
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("sizes", [(32, 8, 48, 3, 2), (40, 4, 36, 2, 1)])
def test_vision_tower_equals_transformers_siglip(small_config, sizes):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    image, patch, width, heads, layers = sizes
    config = dataclasses.replace(
        small_config,
        vit_img_size=image,
        vit_patch_size=patch,
        vit_hidden_dim=width,
        vit_n_heads=heads,
        vit_n_blocks=layers,
    )
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=image,
            patch_size=patch,
            hidden_size=width,
            intermediate_size=config.vit_inter_dim,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=config.vit_ln_eps,
            vision_use_head=False,
        )
    ).eval()
    ours = VisionLanguageModel(config).vision_encoder
    tensors = {
        name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()
    }
    state = {
        "patch_embedding.conv.weight": tensors["embeddings.patch_embedding.weight"],
        "patch_embedding.conv.bias": tensors["embeddings.patch_embedding.bias"],
        "patch_embedding.position_embedding": tensors["embeddings.position_embedding.weight"][None],
        "layer_norm.weight": tensors["post_layernorm.weight"],
        "layer_norm.bias": tensors["post_layernorm.bias"],
    }
    for i in range(layers):
        source = f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"blocks.{i}.attn.qkv_proj.{kind}"] = torch.cat(qkv)
            state[f"blocks.{i}.attn.out_proj.{kind}"] = tensors[
                f"{source}self_attn.out_proj.{kind}"
            ]
            for name, other in (
                ("ln1", "layer_norm1"),
                ("ln2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[f"blocks.{i}.{name}.{kind}"] = tensors[f"{source}{other}.{kind}"]
    ours.load_state_dict(state)
    images = torch.randn(2, 3, image, image)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images), theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(6, 2, True), (4, 4, False), (3, 1, True)])
def test_language_model_equals_transformers_llama(small_config, heads, kv_heads, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dataclasses.replace(
        small_config, lm_n_heads=heads, lm_n_kv_heads=kv_heads, lm_tie_weights=tied
    )
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.lm_vocab_size,
            hidden_size=config.lm_hidden_dim,
            intermediate_size=config.lm_inter_dim,
            num_hidden_layers=config.lm_n_blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=config.lm_rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.lm_re_base},
            max_position_embeddings=512,
            tie_word_embeddings=tied,
        )
    ).eval()
    names = {
        "model.embed_tokens": "token_embedding",
        "model.layers": "blocks",
        "model.norm": "norm",
        "lm_head": "head",
        "self_attn.o_proj": "attn.out_proj",
        "self_attn": "attn",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours = VisionLanguageModel(config)
    state["rotary_embd.inv_freq"] = ours.decoder.rotary_embd.inv_freq
    ours.decoder.load_state_dict(state)
    ids = torch.randint(0, config.lm_vocab_size, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, None)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_scratch_init_keeps_residual_branches_shut(small_config):
    config = dataclasses.replace(small_config, init="scratch")
    model = VisionLanguageModel(config)
    for block in model.vision_encoder.blocks:
        assert not block.attn.out_proj.weight.any() and not block.mlp.fc2.weight.any()
    positions = sincos_positions(config)[0]
    assert positions.shape == (16, 48) and len(positions.unique(dim=0)) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit_img_size": 30}, "vit_img_size"),
        ({"lm_n_heads": 5}, "lm_hidden_dim"),
        ({"lm_n_kv_heads": 4}, "lm_n_heads"),
        ({"mp_pixel_shuffle_factor": 3}, "mp_pixel_shuffle_factor"),
        ({"lm_n_heads": 16, "lm_n_kv_heads": 2}, "even"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_sizes_that_do_not_fit_are_named(small_config, change, message):
    with pytest.raises(ValueError, match=message):
        VLMConfig(**{**vars(small_config), **change}).validate()
