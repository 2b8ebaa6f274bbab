"""Configuration: the model (`VLMConfig`), the run (`TrainConfig`), the presets, and the command line made from them.

`VLMConfig` keeps the field names of huggingface/nanoVLM, so its checkpoints' `config.json` reads here.
Every field is an option of `train.py`; its help text is the field's own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from nanovlm_fast.ranges import SEED, Range, check_fields

Size = Annotated[int, Range(int, least=1)]
Workers = Annotated[int, Range(int, least=0, most=1024)]
LookAhead = Annotated[int, Range(int, least=1, most=2**16)]  # all of them lie in memory
Positive = Annotated[float, Range(float, above=0)]
Share = Annotated[float, Range(float, least=0, most=1)]
ShareBelowOne = Annotated[float, Range(float, least=0, below=1)]


def option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class VLMConfig:
    """Sizes of the model; the defaults are nanoVLM v0.1's 222M model."""

    vit_img_size: Size = option(224, "side of the square image, in pixels")
    vit_patch_size: Size = option(16, "side of a patch, in pixels")
    vit_hidden_dim: Size = option(768, "width of the vision tower")
    vit_inter_dim: Size = option(3072, "width of the vision MLP")
    vit_n_heads: Size = option(12, "vision attention heads")
    vit_n_blocks: Size = option(12, "vision layers")
    vit_ln_eps: float = option(1e-6, "epsilon of the vision LayerNorms")
    lm_hidden_dim: Size = option(576, "width of the language model")
    lm_inter_dim: Size = option(1536, "width of the language MLP")
    lm_n_heads: Size = option(9, "query heads")
    lm_n_kv_heads: Size = option(3, "key and value heads")
    lm_n_blocks: Size = option(30, "language layers")
    lm_rms_eps: float = option(1e-5, "epsilon of the RMSNorms")
    lm_re_base: Positive = option(100000.0, "base of the rotary frequencies")
    # a table that no weights hold to its length
    lm_max_position_embeddings: Annotated[int, Range(int, least=1, most=2**21)] = option(
        8192, "longest document the rotary embedding is used for"
    )
    lm_vocab_size: Size = option(49152, "rows of the token embedding")
    lm_tie_weights: bool = option(True, "share the token embedding with the head")
    lm_max_length: Size = option(79, "text tokens a padded batch is padded to (the reference only)")
    lm_tokenizer: str = option(
        "HuggingFaceTB/cosmo2-tokenizer",
        "Hugging Face tokenizer: hub name or folder; 'train' makes one from the data",
    )
    mp_pixel_shuffle_factor: Size = option(
        2, "pixel shuffle: a factor x factor square of patches makes one image token"
    )
    image_mean: Annotated[float, Range(float, least=-1000, most=1000)] = option(
        0.0,
        "subtracted from pixels in [0, 1]",
    )
    image_std: Positive = option(
        1.0, "divides what is left (nanoVLM trains on plain [0, 1]; SigLIP's own are 0.5, 0.5)"
    )
    init: Literal["seed", "scratch"] = option(
        "seed",
        "weights to start from: nanoVLM's N(0, 0.02), or what a small model learns faster from (reference.py)",
    )
    prompt: str = option("Question: {question} Answer:", "how a question becomes the prompt")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.vit_img_size // self.vit_patch_size

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the language model."""
        return (self.grid // self.mp_pixel_shuffle_factor) ** 2

    @property
    def head_dim(self) -> int:
        return self.lm_hidden_dim // self.lm_n_heads

    def validate(self) -> VLMConfig:
        """Raise ValueError naming the first field whose size does not fit the others; returns self."""
        check_fields(self, option=False)
        checks = [
            ("vit_img_size", self.vit_img_size, "vit_patch_size", self.vit_patch_size),
            ("vit_hidden_dim", self.vit_hidden_dim, "vit_n_heads", self.vit_n_heads),
            ("lm_hidden_dim", self.lm_hidden_dim, "lm_n_heads", self.lm_n_heads),
            ("lm_n_heads", self.lm_n_heads, "lm_n_kv_heads", self.lm_n_kv_heads),
            (
                "patches per side",
                self.grid,
                "mp_pixel_shuffle_factor",
                self.mp_pixel_shuffle_factor,
            ),
        ]
        for name, size, by, factor in checks:
            if factor < 1 or size < 1 or size % factor:
                raise ValueError(f"{name} = {size} must be a positive multiple of {by} = {factor}")
        if self.head_dim % 2:
            raise ValueError(
                f"lm_hidden_dim / lm_n_heads = {self.head_dim} must be even for the rotary embedding"
            )
        try:
            fits = b"?!" in self.prompt.format(question="?!").encode()
        except (KeyError, IndexError, ValueError):
            fits = False
        if not fits:
            rule = "must contain {question} and no other braces, in UTF-8"
            raise ValueError(f"prompt {rule}, got {self.prompt!r}")
        return self


@dataclass
class TrainConfig:
    """One run. Sizes are per micro-batch; 0 where the text says 'measured' takes the size from the data."""

    preset: str = option("tiny", "named set of defaults for everything below and for the model")
    data: str = option(
        "easy_vqa",
        "easy_vqa | synthetic | jsonl:FOLDER (train.jsonl, test.jsonl and the images) | "
        "HuggingFaceM4/the_cauldron:all45, or any hub name or folder of its schema, of some :CONFIG,CONFIG | "
        "prepared:FOLDER",
    )
    turns: Literal["first", "independent", "chat"] = option(
        "independent",
        "first image and question only (nanoVLM's recipe), every question a document on one shared image, or one "
        "conversation",
    )
    questions_per_image: int = option(
        0, "questions drawn anew for each pass over an image; 0 takes all"
    )
    curriculum: str = option(
        "", "for the first --curriculum-share of the run ask only questions that contain this"
    )
    curriculum_share: ShareBelowOne = option(0.2, "share of the run that --curriculum lasts")
    augment: Literal["none", "shift", "dihedral"] = option(
        "none",
        "per image and pass: nothing, shift inside plain margins and mirror, or flips and transposes; only where "
        "they leave the answers true",
    )
    vision: str = option(
        "", "SigLIP vision tower to start from: hub name or folder; none: from scratch"
    )
    language: str = option(
        "", "language model (SmolLM2, Llama) to start from: hub name or folder; none: from scratch"
    )
    start_from: str = option(
        "", "checkpoint to start a new run from: run, folder, or hub name in nanoVLM's layout"
    )
    val_samples: int = option(100, "images held out, with all their examples, to evaluate on")
    out: str = option("", "run folder; default runs/PRESET")
    resume: bool = option(
        False, "continue the run in --out (or the latest run) from its newest checkpoint"
    )
    data_changed: bool = option(
        False,
        "with --resume: go on although --data is not what the checkpoint was trained on; pictures "
        "that were held out stay so where they are found again, by their content",
    )
    auto_resume: bool = option(
        False,
        "--resume if --out holds a run already, else start it: the same command before and after a crash",
    )
    overwrite: bool = option(
        False,
        "start again in place of the run that --out holds, which is deleted at the first checkpoint",
    )
    dry_run: bool = option(
        False, "only print what the run would be: model, data, steps, tokens, FLOPs, hours"
    )
    seed: Annotated[int, SEED] = option(
        0,
        "seed of weights, data order and augmentation",
    )
    device: str = option("auto", "auto | cpu | cuda | cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; weights stay float32; auto is bfloat16 on a GPU that has it"
    )
    kernels: str = option(
        "auto", "Triton kernels: auto (what won on this device) | none | all | name,name"
    )
    attention: str = option(
        "auto",
        "auto (the fastest that runs here) | flash_attn | torch | torch_fa3 | torch_fa4 | sdpa",
    )
    compile: Literal["none", "default", "reduce-overhead"] = option(
        "none",
        "torch.compile the model: one graph of static shapes; reduce-overhead replays it as CUDA graphs",
    )
    recompute: Literal["none", "norms_and_activations", "blocks"] = option(
        "none", "compute again in the backward instead of keeping: less memory, more time"
    )
    shard: bool = option(
        False,
        "with several processes, each holds a part of weights, gradients and optimizer state (FSDP2)",
    )
    deterministic: bool = option(
        False, "bit for bit the same result again on the same device, more slowly"
    )
    epochs: float = option(5.0, "passes over the training split; the schedule is sized to them")
    max_steps: int = option(
        0, "stop after so many optimizer steps, the schedule sized to them; 0: --epochs decides"
    )
    accumulate: Size = option(
        1,
        "micro-batches per optimizer step; the loss is weighted by labelled tokens",
    )
    tokens_per_batch: Size = option(20736, "token budget of a packed micro-batch")
    images_per_batch: int = option(0, "image budget; 0: measured")
    documents_per_batch: int = option(0, "document budget; 0: measured")
    labels_per_batch: int = option(0, "labelled-token budget; 0: measured")
    max_seqlen: int = option(0, "longest document; 0: measured")
    look_ahead: LookAhead = option(256, "samples the packer chooses from")
    workers: Workers = option(1, "processes that decode, tokenise and pack; 0: in the main process")
    max_bad_samples: int = option(100, "stop with an error after so many unreadable samples")
    lr_projector: float = option(2e-3, "peak learning rate of the projector; 0 freezes it")
    lr_vision: float = option(1e-4, "peak learning rate of the vision tower; 0 freezes it")
    lr_language: float = option(1e-4, "peak learning rate of the language model; 0 freezes it")
    warmup: ShareBelowOne = option(0.03, "share of the run in which the learning rate rises")
    min_lr: Share = option(0.1, "learning rate at the end of the cosine, as a share of the peak")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW for everything, or Muon for the matrices and AdamW else"
    )
    muon_scale: Positive = option(
        10.0,
        "learning rate of Muon's matrices, as a multiple of their part's",
    )
    beta2: ShareBelowOne = option(0.999, "AdamW's second momentum")
    weight_decay: float = option(
        0.01, "AdamW's weight decay, on everything as in the seed's recipe"
    )
    clip: float = option(0.0, "clip the gradient norm; 0: off")
    log_every: Size = option(10, "steps between lines in metrics.jsonl")
    eval_every: int = option(
        500, "steps between evaluations on the held-out images; 0: only at the end"
    )
    eval: str = option(
        "",
        "at every --eval-every score this too: mmstar | mmstar:FOLDER | another data set's test split",
    )
    eval_style: Literal["greedy", "v0.1"] = option(
        "greedy",
        "how --eval decodes: greedy, cut at the end of sequence; or sampled and not cut, as nanoVLM published",
    )
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: Size = option(1, "newest checkpoints to keep, besides the best")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "what a checkpoint that cannot be written (a full disk) does to the run"
    )
    max_skipped_steps: Size = option(
        10, "a step whose gradients are not finite is skipped; after so many in a row the run stops"
    )
    # the most that the interpreter's clocks, which count nanoseconds, wait for
    hang_timeout: Annotated[float, Range(float, most=1e9)] = option(
        1800.0,
        "seconds without a step after which a process reports where it hangs and exits with 70; 0: never",
    )
    final_eval: bool = option(
        True, "evaluate the test split at the end, seeing and blind, and draw samples.png"
    )
    wandb: bool = option(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = option("nanovlm_fast", "its project")

    def validate(self) -> TrainConfig:
        """Raise ValueError naming the first option that makes no sense; returns self."""
        check_fields(self, option=True)
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError("--epochs or --max-steps must be positive")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues a run and --overwrite deletes it: give one of them"
            )
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "--shard splits the matrices that Muon needs whole: take --optimizer adamw"
            )
        if self.start_from and (self.vision or self.language):
            raise ValueError("--start-from brings both towers: leave out --vision and --language")
        return self


def fields_of(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of the dataclass `config_class`."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


def check_types(config_class: type, values: dict[str, Any]) -> None:
    """Raise ValueError naming the first entry of `values`, as a file had it, that its field cannot hold."""
    kinds = get_type_hints(config_class)
    for name, value in values.items():
        kind, choices = kinds[name], get_args(kinds[name])
        right = (
            value in choices
            if choices
            else type(value) in ((int, float) if kind is float else (kind,))
        )
        if not right or (kind is float and not math.isfinite(value)):
            wanted = f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
            raise ValueError(f"{name} must be {wanted}, got {repr(value)[:80]}")
