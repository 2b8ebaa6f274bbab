"""Configuration: the fields of the model (`VLMConfig`) and of a run (`TrainConfig`).

`VLMConfig` has the field names of huggingface/nanoVLM, so the `config.json` of its checkpoints
can be read. Every field of both classes is an option of `train.py`, and carries its help text and
its range of values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nanovlm_fast.ranges import SEED, Range, TokenNames, check_fields

Size = Annotated[int, Range(int, least=1)]
Workers = Annotated[int, Range(int, least=-1, most=1024)]
LookAhead = Annotated[int, Range(int, least=1, most=2**16)]  # all of them lie in memory
MAX_TILES_PER_SIDE = 8  # the position tokens of nanoVLM's models reach that far
Rating = Annotated[int, Range(int, most=5)]
Positive = Annotated[float, Range(float, above=0)]
Share = Annotated[float, Range(float, least=0, most=1)]
ShareBelowOne = Annotated[float, Range(float, least=0, below=1)]


def option(default: Any, help: str) -> Any:
    """Declare a field with its default and the help text of its option."""
    return dataclasses.field(default=default, metadata={"help": help})


# The one conversation format there is: nanoVLM's, without a system prompt. See data/chat.py
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


@dataclass
class VLMConfig:
    """The model: sizes, pixels, prompt. The defaults are those of nanoVLM v0.1's 222M model."""

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
    # No weight has this length, so that nothing else would limit the rotary tables' memory.
    lm_max_position_embeddings: Annotated[int, Range(int, least=1, most=2**21)] = option(
        8192, "positions of the rotary embedding: the longest document"
    )
    lm_vocab_size: Size = option(49152, "rows of the token embedding")
    lm_tie_weights: bool = option(True, "share the token embedding with the head")
    lm_max_length: Size = option(79, "text tokens that a padded row has (reference model only)")
    lm_tokenizer: str = option(
        "HuggingFaceTB/cosmo2-tokenizer",
        "tokenizer: hub name or folder; 'train' makes one from the data",
    )
    mp_pixel_shuffle_factor: Size = option(
        2, "pixel shuffle: factor x factor patches become one image token"
    )
    # The following four came after nanoVLM v0.1, with the names that they have there.
    max_img_size: Annotated[int, Range(int, most=2**16)] = option(
        0,
        "cut images into tiles of vit_img_size after a resize to at most this side; 0: one square "
        "per image",
    )
    resize_to_max_side_len: bool = option(
        False, "with max_img_size: enlarge smaller images to that side too"
    )
    vlm_extra_tokens: TokenNames = dataclasses.field(
        default_factory=TokenNames,
        metadata={
            "help": "JSON object: image_token, global_image_token, r1c1, ... and their text, in "
            "the order of their ids, which follow the tokenizer's own"
        },
    )
    lm_chat_template: str = option(
        "", "Jinja template of a conversation, in place of --prompt; empty: none"
    )
    image_mean: Annotated[float, Range(float, least=-1000, most=1000)] = option(
        0.0,
        "subtracted from pixels in [0, 1]",
    )
    image_std: Positive = option(
        1.0,
        "divides the pixels after image_mean is subtracted (nanoVLM trains on plain [0, 1]: mean "
        "0, std 1; SigLIP was trained with 0.5 and 0.5)",
    )
    init: Literal["seed", "scratch"] = option(
        "seed",
        "initial weights: 'seed' is nanoVLM's, N(0, 0.02); 'scratch' is one that small models "
        "learn faster from (model/init.py)",
    )
    prompt: str = option("Question: {question} Answer:", "the prompt; {question} is replaced")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.vit_img_size // self.vit_patch_size

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the language model."""
        return (self.grid // self.mp_pixel_shuffle_factor) ** 2

    @property
    def tiles_per_side(self) -> int:
        """The most tiles along the longer side of an image, 1 if images are not cut."""
        return max(1, self.max_img_size // self.vit_img_size)

    @property
    def has_global_tile(self) -> bool:
        """Whether an image that is cut into tiles is shown as a whole before them."""
        return "global_image_token" in self.vlm_extra_tokens

    @property
    def head_dim(self) -> int:
        """Channels of one attention head of the language model."""
        return self.lm_hidden_dim // self.lm_n_heads

    def validate(self) -> VLMConfig:
        """Raise ValueError naming the first field that does not fit the others; return self."""
        check_fields(self, option=False)
        for name, factor_name in (
            ("vit_img_size", "vit_patch_size"),
            ("vit_hidden_dim", "vit_n_heads"),
            ("lm_hidden_dim", "lm_n_heads"),
            ("lm_n_heads", "lm_n_kv_heads"),
        ):
            _check_multiple(name, getattr(self, name), factor_name, getattr(self, factor_name))
        # Last: the grid is only right once the image size is a multiple of the patch size.
        factor = self.mp_pixel_shuffle_factor
        _check_multiple("patches per side", self.grid, "mp_pixel_shuffle_factor", factor)
        if self.head_dim % 2:
            raise ValueError(
                f"lm_hidden_dim / lm_n_heads = {self.head_dim} must be even for the rotary "
                "embedding"
            )
        self._check_tiles()
        # Tried with a question: counting braces would get "{{question}}" wrong.
        try:
            fits = b"?!" in self.prompt.format(question="?!").encode()
        except (KeyError, IndexError, ValueError):
            fits = False
        if not fits:
            rule = "must contain {question} and no other braces, in UTF-8"
            raise ValueError(f"prompt {rule}, got {self.prompt!r}")
        return self

    def _check_tiles(self) -> None:
        """Raise ValueError if images cannot be cut as the fields say, or tiles have no token."""
        if not self.max_img_size:
            if self.resize_to_max_side_len:
                raise ValueError("resize_to_max_side_len needs a max_img_size")
            return
        if not self.lm_chat_template:
            raise ValueError(
                f"max_img_size = {self.max_img_size} needs an lm_chat_template: the plain prompt "
                "has no place for tiles"
            )
        _check_multiple("max_img_size", self.max_img_size, "vit_img_size", self.vit_img_size)
        side = self.tiles_per_side
        if side > MAX_TILES_PER_SIDE:
            raise ValueError(
                f"max_img_size = {self.max_img_size} makes {side} x {side} tiles of vit_img_size "
                f"= {self.vit_img_size}: at most {MAX_TILES_PER_SIDE} x {MAX_TILES_PER_SIDE}"
            )
        numbers = range(1, side + 1)
        needed = ["image_token", *(f"r{row}c{column}" for row in numbers for column in numbers)]
        for name in needed:
            if not self.vlm_extra_tokens.get(name):
                raise ValueError(
                    f"max_img_size = {self.max_img_size} needs a token for {name} in "
                    "vlm_extra_tokens"
                )


def _check_multiple(name: str, size: int, factor_name: str, factor: int) -> None:
    if factor < 1 or size < 1 or size % factor:
        raise ValueError(f"{name} = {size} must be a positive multiple of {factor_name} = {factor}")


@dataclass
class TrainConfig:
    """A run. Sizes are per micro-batch. Where the help says "measured", 0 takes the data's."""

    preset: str = option("tiny", "named defaults for the model and for all options below")
    data: str = option(
        "easy_vqa",
        "easy_vqa | easy_vqa_canvas | emoji | synthetic | jsonl:FOLDER (train.jsonl, test.jsonl "
        "and the images) | finevision, or finevision: and a hub name or folder of its schema | "
        "HuggingFaceM4/the_cauldron:all45, or any hub name or folder of its schema, with "
        ":CONFIG,CONFIG for parts of it | prepared:FOLDER",
    )
    turns: Literal["first", "independent", "chat"] = option(
        "independent",
        "first: only the first image and question (nanoVLM's recipe); independent: every question "
        "is a document of its own on the shared image; chat: one conversation",
    )
    streaming: bool = option(
        False,
        "read --data in order as it arrives, storing no copy; with --max-steps, as its length is "
        "not known; rows are shuffled as --shuffle-buffer says",
    )
    shuffle_buffer: LookAhead = option(
        256, "with --streaming: rows that each worker holds, to shuffle them"
    )
    max_images: int = option(0, "leave out examples of more images than this; 0: any number")
    min_rating_relevance: Rating = option(1, "drop turns that FineVision rates below this")
    min_rating_image_correspondence: Rating = option(1, "the same for the image correspondence")
    min_rating_visual_dependency: Rating = option(1, "the same for the visual dependency")
    min_rating_formatting: Rating = option(1, "the same for the formatting")
    questions_per_image: int = option(0, "questions drawn per image, again in each epoch; 0: all")
    curriculum: str = option(
        "", "train only on questions with this text for --curriculum-share of the run"
    )
    curriculum_share: ShareBelowOne = option(
        0.2, "share of the run, from its start, that --curriculum lasts"
    )
    augment: Literal["none", "shift", "dihedral"] = option(
        "none",
        "per image and epoch: none; shift: shift inside plain margins, and mirror; dihedral: flips "
        "and transposes. Use only what leaves the answers true",
    )
    vision: str = option("", "SigLIP vision tower to start from: hub name or folder; default: none")
    language: str = option(
        "", "language model (SmolLM2, Llama) to start from: hub name or folder; default: none"
    )
    start_from: str = option(
        "", "checkpoint to start a new run from: run, folder, or hub name in nanoVLM's layout"
    )
    val_samples: int = option(100, "images held out with all their questions, to evaluate on")
    out: str = option("", "run folder; default runs/PRESET")
    resume: bool = option(
        False, "continue the run in --out (or the latest run) from its newest checkpoint"
    )
    data_changed: bool = option(
        False,
        "with --resume: continue although --data has changed since the checkpoint; pictures that "
        "were held out stay held out, recognised by their content",
    )
    auto_resume: bool = option(
        False,
        "--resume if --out already holds a run, otherwise start it",
    )
    overwrite: bool = option(
        False,
        "replace the run in --out, which is deleted at the first checkpoint",
    )
    dry_run: bool = option(False, "only print the plan: model, data, steps, tokens, FLOPs, hours")
    device_like: Literal["none", "t4", "h100"] = option(
        "none", "with --dry-run: also the token budget that fits such a GPU's memory"
    )
    seed: Annotated[int, SEED] = option(
        0,
        "random seed of weights, data order and augmentation",
    )
    device: str = option("auto", "auto (a CUDA GPU, else the CPU) | cpu | cuda | cuda:1 ... | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "type to compute in; weights stay float32; float16: with a scaled loss; auto: bfloat16 on "
        "a GPU that supports it, float16 on one that does not, and on a CPU with AMX or "
        "AVX512-BF16 bfloat16 where --tune has measured it faster; else float32",
    )
    stream: Literal["float32", "bfloat16"] = option(
        "float32",
        "type of the residual streams; bfloat16: also of the weights of linear layers, beside "
        "float32 masters that are updated and saved (needs --dtype bfloat16)",
    )
    kernels: str = option(
        "auto", "Triton kernels: auto (what --tune finds fastest here) | none | all | name,name"
    )
    attention: str = option(
        "auto",
        "auto (the fastest that runs here) | flash_attn | torch | torch_fa3 | torch_fa4 | "
        "efficient | sdpa",
    )
    vision_attention: Literal["auto", "flash", "cudnn"] = option(
        "auto",
        "attention of the vision tower: auto (flash on a GPU that has it, else PyTorch's own) | "
        "flash | cudnn",
    )
    compile: Literal["none", "auto", "default", "reduce-overhead"] = option(
        "none",
        "torch.compile the model into one graph of static shapes; reduce-overhead: replay it as "
        "CUDA graphs; auto: what --tune finds fastest, else default on a GPU and none on a CPU",
    )
    inductor: str = option(
        "auto",
        "options of the compiler: auto (what --tune finds fastest) | none | name,name of "
        "combo_kernels, dependent_launch, coordinate_descent, max_autotune",
    )
    tune: Literal["auto", "off", "again"] = option(
        "auto",
        "who decides what is auto: auto (what was measured on this device before; on a GPU it is "
        "measured now if nothing was) | off (plain PyTorch) | again (measure anew, on a CPU too)",
    )
    tune_seconds: Annotated[float, Range(float, above=0, most=1e6)] = option(
        75.0, "seconds after which --tune begins no further measurement"
    )
    recompute: Literal["none", "norms_and_activations", "blocks"] = option(
        "none", "recompute activations in the backward pass: less memory, more time"
    )
    shard: bool = option(
        False,
        "split weights, gradients and optimizer state among the processes (FSDP2)",
    )
    deterministic: bool = option(
        False, "give the same bits each time on the same device, more slowly"
    )
    epochs: float = option(
        5.0, "passes over the training split; they set the learning rate schedule"
    )
    max_steps: int = option(
        0, "optimizer steps of the run, and of its schedule; 0: --epochs decides"
    )
    accumulate: Size = option(
        1,
        "micro-batches per optimizer step, weighted by their labelled tokens",
    )
    tokens_per_batch: Annotated[int, Range(int)] = option(
        20736,
        "token budget of a packed micro-batch; auto (0): the largest that leaves a tenth of the "
        "GPU's memory free, found by trial steps; on a CPU the preset's",
    )
    images_per_batch: int = option(0, "image budget; 0: measured")
    documents_per_batch: int = option(0, "document budget; 0: measured")
    labels_per_batch: int = option(0, "labelled-token budget; 0: measured")
    max_seqlen: int = option(0, "longest document; 0: measured")
    look_ahead: LookAhead = option(256, "samples the packer chooses from")
    workers: Workers = option(
        -1,
        "processes that decode, tokenise and pack, for each GPU; 0: in the main process; -1: on a "
        "GPU as many as the cores allow (its share of them less 2, at most 16), on a CPU 1",
    )
    max_bad_samples: int = option(100, "stop with an error after this many unreadable samples")
    lr_projector: float = option(2e-3, "peak learning rate of the projector; 0 freezes it")
    lr_vision: float = option(1e-4, "peak learning rate of the vision tower; 0 freezes it")
    lr_language: float = option(1e-4, "peak learning rate of the language model; 0 freezes it")
    lora_rank: Annotated[int, Range(int, most=65536)] = option(
        0,
        "rank of LoRA adapters (by peft), trained at the rate --lr-language in place of the "
        "pretrained language model's own weights; checkpoints hold them without the base; 0: none",
    )
    lora_alpha: Annotated[float, Range(float, most=1e6)] = option(
        0.0, "adapters are scaled by this / --lora-rank; 0: twice the rank"
    )
    warmup: ShareBelowOne = option(
        0.03, "share of the run, from its start, in which the learning rate rises"
    )
    min_lr: Share = option(0.1, "learning rate at the end of the cosine, as a share of the peak")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW, or Muon for the matrices and AdamW for the rest"
    )
    muon_scale: Positive = option(
        10.0,
        "learning rate of Muon, as a multiple of the part's rate",
    )
    beta2: ShareBelowOne = option(0.999, "AdamW's second momentum")
    weight_decay: float = option(
        0.01, "AdamW's weight decay, on all weights as in nanoVLM's recipe"
    )
    clip: float = option(0.0, "clip the gradient norm; 0: off")
    log_every: Size = option(10, "steps between lines in metrics.jsonl")
    eval_every: int = option(
        500, "steps between evaluations on the held-out images; 0: only at the end"
    )
    eval: str = option(
        "",
        "also score this at every --eval-every: mmstar | mmstar:FOLDER | another data set, whose "
        "test split is used",
    )
    eval_style: Literal["greedy", "v0.1"] = option(
        "greedy",
        "how --eval decodes: greedy and cut at the end of sequence, or v0.1: sampled and not cut, "
        "as nanoVLM v0.1 was scored",
    )
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: Size = option(1, "number of newest checkpoints to keep, besides the best")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "what to do when a checkpoint cannot be written, as on a full disk"
    )
    max_skipped_steps: Size = option(
        10,
        "steps with gradients that are not finite are skipped; stop after this many in a row, and "
        "in float16 after as many with a loss scale below 1",
    )
    # The interpreter's clocks count nanoseconds in 64 bits: a longer wait overflows.
    hang_timeout: Annotated[float, Range(float, most=1e9)] = option(
        1800.0,
        "seconds without a step after which a process prints where it hangs and exits with 70; 0: "
        "never",
    )
    final_eval: bool = option(
        True, "at the end score the test split, with images and without, and draw samples.png"
    )
    wandb: bool = option(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = option("nanovlm_fast", "project of --wandb")

    def validate(self) -> TrainConfig:
        """Raise ValueError naming the first option that makes no sense; return self."""
        check_fields(self, option=True)
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError("--epochs or --max-steps must be positive")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues a run and --overwrite deletes it: give only one of them"
            )
        if self.device_like != "none" and not self.dry_run:
            raise ValueError("--device-like is a part of the plan: give --dry-run too")
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "--shard splits the matrices that Muon needs whole: use --optimizer adamw"
            )
        if self.shard and self.stream == "bfloat16":
            raise ValueError(
                "--shard splits float32 weights and keeps no masters beside them: use --stream "
                "float32"
            )
        if self.shard and "adamw" in self.kernels.replace(" ", "").split(","):
            raise ValueError(
                "--shard: shards are updated by PyTorch's AdamW, take adamw out of --kernels"
            )
        self._check_streaming()
        self._check_lora()
        if self.start_from and (self.vision or self.language):
            raise ValueError("--start-from has both towers: leave out --vision and --language")
        return self

    def _check_streaming(self) -> None:
        """Raise ValueError for options that need to know all of the data."""
        if self.streaming and not self.max_steps:
            raise ValueError("--streaming: how many rows there are is not known, give --max-steps")
        if self.streaming and self.curriculum:
            raise ValueError("--streaming reads every row as it comes: give no --curriculum")

    def _check_lora(self) -> None:
        """Raise ValueError for options that adapters cannot be trained with."""
        if not self.lora_rank:
            if self.lora_alpha:
                raise ValueError("--lora-alpha scales adapters: give --lora-rank too")
            return
        if not (self.language or self.start_from):
            raise ValueError(
                "--lora-rank adapts pretrained weights: name them by --language or --start-from"
            )
        if self.lr_language <= 0:
            raise ValueError("--lora-rank trains adapters at --lr-language, which must be above 0")
        if "swiglu_mlp" in [name.strip() for name in self.kernels.split(",")]:
            raise ValueError(
                "--kernels swiglu_mlp computes with the MLP's own matrices and would leave out the "
                "adapters of --lora-rank: take swiglu"
            )


def fields_of(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `values` that are fields of the dataclass `config_class`."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}
