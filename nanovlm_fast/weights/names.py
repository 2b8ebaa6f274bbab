"""Names of weights and of configuration fields: nanoVLM's, SigLIP's, Llama's."""

from __future__ import annotations

# our fields -> those of transformers' SiglipVisionConfig and LlamaConfig
VISION_FIELDS = {
    "vit_img_size": "image_size",
    "vit_patch_size": "patch_size",
    "vit_hidden_dim": "hidden_size",
    "vit_inter_dim": "intermediate_size",
    "vit_n_heads": "num_attention_heads",
    "vit_n_blocks": "num_hidden_layers",
    "vit_ln_eps": "layer_norm_eps",
}
LANGUAGE_FIELDS = {
    "lm_hidden_dim": "hidden_size",
    "lm_inter_dim": "intermediate_size",
    "lm_n_heads": "num_attention_heads",
    "lm_n_kv_heads": "num_key_value_heads",
    "lm_n_blocks": "num_hidden_layers",
    "lm_rms_eps": "rms_norm_eps",
    "lm_max_position_embeddings": "max_position_embeddings",
    "lm_vocab_size": "vocab_size",
    "lm_tie_weights": "tie_word_embeddings",
}


def vision_names(n_blocks: int) -> dict[str, tuple[str, ...]]:
    """Our names under `vision_encoder.` -> SigLIP's under `vision_model.`; several are concatenated."""
    names = {
        f"patch_embedding.conv.{kind}": (f"embeddings.patch_embedding.{kind}",)
        for kind in ("weight", "bias")
    }
    names["patch_embedding.position_embedding"] = ("embeddings.position_embedding.weight",)
    modules = {"ln1": "layer_norm1", "ln2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    modules |= {name: name for name in ("mlp.fc1", "mlp.fc2")}
    for kind in ("weight", "bias"):
        for i in range(n_blocks):
            theirs = f"encoder.layers.{i}."
            names[f"blocks.{i}.attn.qkv_proj.{kind}"] = tuple(
                f"{theirs}self_attn.{n}_proj.{kind}" for n in "qkv"
            )
            names |= {
                f"blocks.{i}.{ours}.{kind}": (f"{theirs}{name}.{kind}",)
                for ours, name in modules.items()
            }
        names[f"layer_norm.{kind}"] = (f"post_layernorm.{kind}",)
    return names


def language_names(n_blocks: int) -> dict[str, str]:
    """Our names under `decoder.` -> Llama's under `model.` (the head, which lies beside it, is left out)."""
    names = {"token_embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
    modules = {f"attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"} | {
        "attn.out_proj": "self_attn.o_proj"
    }
    modules |= {f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    modules |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    for i in range(n_blocks):
        names |= {
            f"blocks.{i}.{ours}.weight": f"layers.{i}.{name}.weight"
            for ours, name in modules.items()
        }
    return names
