"""Names of weights and of configuration fields: nanoVLM's, SigLIP's and Llama's.

`backbones.py` reads pretrained weights by these tables, and `to_transformers.py` writes by them.
"""

from __future__ import annotations

# VLMConfig's fields -> those of transformers' SiglipVisionConfig
VISION_FIELDS = {
    "vit_img_size": "image_size",
    "vit_patch_size": "patch_size",
    "vit_hidden_dim": "hidden_size",
    "vit_inter_dim": "intermediate_size",
    "vit_n_heads": "num_attention_heads",
    "vit_n_blocks": "num_hidden_layers",
    "vit_ln_eps": "layer_norm_eps",
}
# VLMConfig's fields -> those of transformers' LlamaConfig. The rotary base is not here: LlamaConfig
# has it inside `rope_parameters`.
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
    """Map our names under `vision_encoder.` to SigLIP's under `vision_model.`.

    A tuple of several names means that ours is their concatenation, as for q, k and v.
    """
    names: dict[str, tuple[str, ...]] = {
        "patch_embedding.position_embedding": ("embeddings.position_embedding.weight",)
    }
    modules = {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        names[f"patch_embedding.conv.{kind}"] = (f"embeddings.patch_embedding.{kind}",)
        names[f"layer_norm.{kind}"] = (f"post_layernorm.{kind}",)
        for i in range(n_blocks):
            layer = f"encoder.layers.{i}"
            names[f"blocks.{i}.attn.qkv_proj.{kind}"] = tuple(
                f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"
            )
            for ours, theirs in modules.items():
                names[f"blocks.{i}.{ours}.{kind}"] = (f"{layer}.{theirs}.{kind}",)
    return names


def language_names(n_blocks: int) -> dict[str, str]:
    """Map our names under `decoder.` to Llama's under `model.`.

    Without the head: Llama has it beside `model.`, as `lm_head`, and only if it is not tied.
    """
    names = {"token_embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
    modules = {
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.out_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }
    for i in range(n_blocks):
        for ours, theirs in modules.items():
            names[f"blocks.{i}.{ours}.weight"] = f"layers.{i}.{theirs}.weight"
    return names
