"""Configuration: the model (`VLMConfig`), the run (`TrainConfig`), the presets, and the command line made from them.

`VLMConfig` keeps the field names of huggingface/nanoVLM, so its checkpoints' `config.json` reads here.
Every field is an option of `train.py`; its help text is the field's own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from nanovlm_fast.command import one_line
from nanovlm_fast.paths import absolute_paths, inside
from nanovlm_fast.ranges import SEED, Range, check_fields
from nanovlm_fast.runs import is_empty, is_stub, standing

RUNS = Path("runs")

Size = Annotated[int, Range(int, least=1)]
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
        "HuggingFaceTB/cosmo2-tokenizer", "Hugging Face tokenizer: hub name or folder; 'train' makes one from the data"
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
        "seed", "weights to start from: nanoVLM's N(0, 0.02), or what a small model learns faster from (reference.py)"
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
            ("patches per side", self.grid, "mp_pixel_shuffle_factor", self.mp_pixel_shuffle_factor),
        ]
        for name, size, by, factor in checks:
            if factor < 1 or size < 1 or size % factor:
                raise ValueError(f"{name} = {size} must be a positive multiple of {by} = {factor}")
        if self.head_dim % 2:
            raise ValueError(f"lm_hidden_dim / lm_n_heads = {self.head_dim} must be even for the rotary embedding")
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
    questions_per_image: int = option(0, "questions drawn anew for each pass over an image; 0 takes all")
    curriculum: str = option("", "for the first --curriculum-share of the run ask only questions that contain this")
    curriculum_share: ShareBelowOne = option(0.2, "share of the run that --curriculum lasts")
    augment: Literal["none", "shift", "dihedral"] = option(
        "none",
        "per image and pass: nothing, shift inside plain margins and mirror, or flips and transposes; only where "
        "they leave the answers true",
    )
    vision: str = option("", "SigLIP vision tower to start from: hub name or folder; none: from scratch")
    language: str = option("", "language model (SmolLM2, Llama) to start from: hub name or folder; none: from scratch")
    start_from: str = option("", "checkpoint to start a new run from: run, folder, or hub name in nanoVLM's layout")
    val_samples: int = option(100, "images held out, with all their examples, to evaluate on")
    out: str = option("", "run folder; default runs/PRESET")
    resume: bool = option(False, "continue the run in --out (or the latest run) from its newest checkpoint")
    data_changed: bool = option(
        False,
        "with --resume: go on although --data is not what the checkpoint was trained on; pictures "
        "that were held out stay so where they are found again, by their content",
    )
    auto_resume: bool = option(
        False, "--resume if --out holds a run already, else start it: the same command before and after a crash"
    )
    overwrite: bool = option(
        False, "start again in place of the run that --out holds, which is deleted at the first checkpoint"
    )
    dry_run: bool = option(False, "only print what the run would be: model, data, steps, tokens, FLOPs, hours")
    seed: Annotated[int, SEED] = option(
        0,
        "seed of weights, data order and augmentation",
    )
    device: str = option("auto", "auto | cpu | cuda | cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; weights stay float32; auto is bfloat16 on a GPU that has it"
    )
    kernels: str = option("auto", "Triton kernels: auto (what won on this device) | none | all | name,name")
    attention: str = option(
        "auto", "auto (the fastest that runs here) | flash_attn | torch | torch_fa3 | torch_fa4 | sdpa"
    )
    compile: Literal["none", "default", "reduce-overhead"] = option(
        "none", "torch.compile the model: one graph of static shapes; reduce-overhead replays it as CUDA graphs"
    )
    recompute: Literal["none", "norms_and_activations", "blocks"] = option(
        "none", "compute again in the backward instead of keeping: less memory, more time"
    )
    shard: bool = option(
        False, "with several processes, each holds a part of weights, gradients and optimizer state (FSDP2)"
    )
    deterministic: bool = option(False, "bit for bit the same result again on the same device, more slowly")
    epochs: float = option(5.0, "passes over the training split; the schedule is sized to them")
    max_steps: int = option(0, "stop after so many optimizer steps, the schedule sized to them; 0: --epochs decides")
    accumulate: Size = option(
        1,
        "micro-batches per optimizer step; the loss is weighted by labelled tokens",
    )
    tokens_per_batch: Size = option(20736, "token budget of a packed micro-batch")
    images_per_batch: int = option(0, "image budget; 0: measured")
    documents_per_batch: int = option(0, "document budget; 0: measured")
    labels_per_batch: int = option(0, "labelled-token budget; 0: measured")
    max_seqlen: int = option(0, "longest document; 0: measured")
    look_ahead: Size = option(256, "samples the packer chooses from")
    workers: int = option(1, "processes that decode, tokenise and pack; 0: in the main process")
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
    weight_decay: float = option(0.01, "AdamW's weight decay, on everything as in the seed's recipe")
    clip: float = option(0.0, "clip the gradient norm; 0: off")
    log_every: Size = option(10, "steps between lines in metrics.jsonl")
    eval_every: int = option(500, "steps between evaluations on the held-out images; 0: only at the end")
    eval: str = option(
        "", "at every --eval-every score this too: mmstar | mmstar:FOLDER | another data set's test split"
    )
    eval_style: Literal["greedy", "v0.1"] = option(
        "greedy", "how --eval decodes: greedy, cut at the end of sequence; or sampled and not cut, as nanoVLM published"
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
        1800.0, "seconds without a step after which a process reports where it hangs and exits with 70; 0: never"
    )
    final_eval: bool = option(True, "evaluate the test split at the end, seeing and blind, and draw samples.png")
    wandb: bool = option(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = option("nanovlm_fast", "its project")

    def validate(self) -> TrainConfig:
        """Raise ValueError naming the first option that makes no sense; returns self."""
        check_fields(self, option=True)
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError("--epochs or --max-steps must be positive")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite deletes it: give one of them")
        if self.shard and self.optimizer == "muon":
            raise ValueError("--shard splits the matrices that Muon needs whole: take --optimizer adamw")
        if self.start_from and (self.vision or self.language):
            raise ValueError("--start-from brings both towers: leave out --vision and --language")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vit_img_size=64, vit_patch_size=8, vit_hidden_dim=64, vit_inter_dim=256, vit_n_heads=4, vit_n_blocks=4,
        lm_hidden_dim=64, lm_inter_dim=192, lm_n_heads=4, lm_n_kv_heads=4, lm_n_blocks=2, lm_vocab_size=384,
        lm_re_base=10000.0, lm_max_position_embeddings=512, lm_max_length=16, lm_tokenizer="train",
        mp_pixel_shuffle_factor=4, image_mean=0.875, image_std=0.25, init="scratch",
        epochs=10.0,
        tokens_per_batch=5120, optimizer="muon", lr_projector=2e-3, lr_vision=2e-3, lr_language=2e-3,
        beta2=0.98, min_lr=0.0, warmup=0.04, clip=1.0, eval_every=250, save_every=250,
    ),
    # nanoVLM v0.1's recipe. Its 256 samples a step are 20,736 packed tokens; samples of over 128 positions lose their
    # labels there and are left out here. Nothing is held out: MMStar is what tells.
    "nanovlm-222m": dict(
        vision="google/siglip-base-patch16-224", language="HuggingFaceTB/SmolLM2-135M",
        lm_tokenizer="HuggingFaceTB/cosmo2-tokenizer", image_mean=0.0, image_std=1.0,
        data="HuggingFaceM4/the_cauldron:all45", turns="first", max_seqlen=128, val_samples=0, eval="mmstar",
        compile="default",
    ),
}  # fmt: skip


# What an epoch of a data set holds, so that --dry-run need not read it: examples, and of each with `--turns first` the
# images, tokens (49 of an image) and labelled tokens, of which nanoVLM's recipe sees
COUNTS: dict[str, tuple[int, float, float, float]] = {
    "HuggingFaceM4/the_cauldron:all45": (1_670_000, 1.0, 81.0, 12.0),
}


# What a data set needs, whoever learns it. easy-VQA: once colours are learnt, which takes seconds, a small model stays
# at "colour, not shape" (84%) for a long time; asked for the shape alone first, it learns both.
RECIPES: dict[str, dict[str, Any]] = {
    "easy_vqa": dict(curriculum="what shape", augment="shift"),
}


def defaults_of(name: str, data: str = "") -> dict[str, Any]:
    """Option values of a preset on a data set (default: the preset's). Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    values = {**PRESETS[name], "preset": name}
    return {**values, **RECIPES.get(data or values.get("data", TrainConfig.data), {})}


def fields_of(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of the dataclass `config_class`."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


def check_types(config_class: type, values: dict[str, Any]) -> None:
    """Raise ValueError naming the first entry of `values`, as a file had it, that its field cannot hold."""
    kinds = get_type_hints(config_class)
    for name, value in values.items():
        kind, choices = kinds[name], get_args(kinds[name])
        right = value in choices if choices else type(value) in ((int, float) if kind is float else (kind,))
        if not right or (kind is float and not math.isfinite(value)):
            wanted = f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
            raise ValueError(f"{name} must be {wanted}, got {repr(value)[:80]}")


def write_whole(file: Path, text: str) -> None:
    """Write the file so that whoever is killed on the way leaves the old one, or none."""
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise naming(error, file) from error


def naming(error: OSError, file: Path) -> OSError:
    """The same error with the file in its message: one of writing, unlike one of opening, does not say where."""
    return OSError(error.errno, error.strerror or str(error), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError naming the file if it holds none, and OSError if it cannot be read.

    The only reader of JSON files here: whatever bytes are in one, no other error comes out.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the second: brackets nested deeper than the parser goes
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return values


def preset(name: str) -> tuple[VLMConfig, TrainConfig]:
    """Model and run of a preset. Raises ValueError for an unknown name."""
    values = defaults_of(name)
    return VLMConfig(**fields_of(VLMConfig, values)), TrainConfig(**fields_of(TrainConfig, values))


def load_run_config(run: Path) -> dict[str, Any]:
    """What `save_run_config` wrote, as one flat dict of option names and values. Raises ValueError if it is damaged."""
    values = read_json(run / "config.json")
    try:
        for config_class in (VLMConfig, TrainConfig):
            check_types(config_class, fields_of(config_class, values))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{run / 'config.json'} is damaged: {error}") from error
    return {**fields_of(VLMConfig, values), **fields_of(TrainConfig, values)}


def save_run_config(run: Path, model: VLMConfig, train: TrainConfig) -> None:
    values = {**dataclasses.asdict(model), **dataclasses.asdict(train)}
    once = ("resume", "data_changed", "auto_resume", "overwrite", "dry_run")
    values |= dict.fromkeys(once, False)
    write_whole(run / "config.json", json.dumps(values, indent=2) + "\n")


def holds_run(folder: Path) -> bool:
    """Whether the folder is one that train.py wrote."""
    return (folder / "config.json").exists() and "preset" in load_run_config(folder)


def check_run_folder(run: Path, config: TrainConfig) -> None:
    """Raise ValueError unless `run` is new or empty, or a run that may be resumed or overwritten. Changes nothing.

    What a start leaves that ended before its first logged step is as good as nothing.
    """
    if holds_run(run):
        if not (config.resume or config.overwrite or is_stub(run)):
            raise ValueError(f"{run} holds a run: --resume continues it, --overwrite deletes it, --out names another")
    elif not is_empty(run):
        raise ValueError(f"{run} holds files that are no run: --out names another folder")


def latest_run(runs: Path = RUNS) -> Path:
    """The run folder under `runs` that was written to last. Raises FileNotFoundError if there is none."""
    found = [run for run in runs.glob("*") if (standing(run) / "config.json").exists()]
    if not found:
        raise FileNotFoundError(f"no run under {runs}/; train one with: python train.py")
    return max(
        found, key=lambda run: (run / "metrics.jsonl" if (run / "metrics.jsonl").exists() else run).stat().st_mtime
    )


# What a resumed run may change. All else decides what its checkpoint means: weights and places in the data.
RESUMABLE = frozenset(
    "out resume data_changed overwrite dry_run device dtype kernels attention compile recompute "
    "epochs max_steps max_bad_samples lr_projector lr_vision lr_language warmup min_lr "
    "weight_decay muon_scale beta2 clip log_every eval eval_style eval_every save_every "
    "final_eval wandb wandb_project auto_resume shard deterministic keep_checkpoints "
    "on_save_error max_skipped_steps hang_timeout".split()
)


def parse_config(argv: list[str] | None = None) -> tuple[VLMConfig, TrainConfig]:
    """Read the command line. A preset changes the defaults, then the sizes of pretrained weights that it names do.

    With --resume the run's own configuration does, and nothing else is looked at.

    Exits with status 2 and one line on an unknown option, preset or value, as argparse does.
    """
    from transformers import HfArgumentParser  # `--flag`, `--flag False` and `--no-flag` all mean what they say

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=TrainConfig.preset)
    first.add_argument("--data", default="")
    first.add_argument("--out", default="")
    for flag in ("--resume", "--auto-resume"):
        first.add_argument(flag, nargs="?", const="true", default="")
    known, _ = first.parse_known_args(argv)
    parser = HfArgumentParser(
        (VLMConfig, TrainConfig), allow_abbrev=False, description="Train a vision-language model."
    )
    parser.print_usage = lambda *_: None  # an error is one line
    try:
        defaults = defaults_of(known.preset, known.data)
        wanted, automatic = (
            said.lower() in ("true", "t", "yes", "y", "1") for said in (known.resume, known.auto_resume)
        )
        started = Path(known.out or RUNS / known.preset).expanduser()
        resume = wanted or (automatic and (standing(started) / "config.json").exists())
        if resume:
            run = started if known.out or not wanted else latest_run()
            if not (standing(run) / "config.json").exists():
                raise FileNotFoundError(f"--resume: {run} holds no run (no config.json)")
            defaults = {**load_run_config(standing(run)), "out": str(run)}
        defaults |= absolute_paths(defaults)
        parser.set_defaults(**defaults)
        model, train = parse(parser, argv)
        sources = {name: getattr(train, name) for name in ("vision", "language", "start_from")}
        own = all(value == defaults.get(name, "") for name, value in sources.items())
        if not resume and any(sources.values()) and not (train.dry_run and own):  # a preset has its own's sizes
            model, train = parse_again_for_pretrained(parser, argv, train, defaults)
        train.out = train.out or str(RUNS / train.preset)
        train.resume = resume
        for name, value in {**vars(model), **vars(train)}.items():
            if train.resume and name not in RESUMABLE and value != defaults.get(name, value):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} {value}: the run to resume has {defaults[name]}, and its checkpoint rests on it"
                )
        if train.overwrite and (lost := inside({**vars(model), **vars(train)}, Path(train.out))):
            raise ValueError(f"{lost} lies in {train.out}, which --overwrite deletes: --out names another folder")
        return model.validate(), train.validate()
    except (OSError, ValueError) as error:
        parser.error(one_line(error))


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[VLMConfig, TrainConfig]:
    """Model and run as the command line has them, folders from the root of the file system."""
    model, train = parser.parse_args_into_dataclasses(argv)
    for config in (model, train):
        for name, path in absolute_paths(vars(config)).items():
            setattr(config, name, path)
    return model, train


def parse_again_for_pretrained(
    parser: argparse.ArgumentParser, argv: list[str] | None, train: TrainConfig, defaults: dict[str, Any]
) -> tuple[VLMConfig, TrainConfig]:
    """Let the weights that `train` starts from change the defaults, and hold the command line to their sizes."""
    from nanovlm_fast.backbones import check_fields, check_tokenizer, pretrained_fields

    if train.start_from:  # instead of a preset's towers
        parser.set_defaults(vision="", language="")
        train = parse(parser, argv)[1].validate()
    brought, must = pretrained_fields(train, defaults)
    parser.set_defaults(**brought)
    model, train = parse(parser, argv)
    check_fields(model, must)
    trained = must.get("lm_tokenizer")
    # a preset's own pair is a published recipe; --dry-run asks nobody for a tokenizer
    if trained and model.lm_tokenizer not in (trained, brought["lm_tokenizer"]) and not train.dry_run:
        check_tokenizer(model.lm_tokenizer, trained)
    return model, train
