"""The command line of train.py, made from the fields of the configurations.

Defaults are set in layers, each over the one before: the fields' own, the preset's, the data set's,
those of pretrained weights; with --resume the run's configuration in place of all of them. What the
command line gives comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovlm_fast.command import one_line
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.places import absolute_paths, inside
from nanovlm_fast.presets import defaults_of
from nanovlm_fast.runs import RUNS, latest_run, load_run_config, standing

if TYPE_CHECKING:
    from transformers import HfArgumentParser

# Options that may change when a run is resumed. All others decide what its checkpoint means: the
# shapes of weights, and the order of the data that its position refers to.
RESUMABLE = frozenset(
    "out resume data_changed overwrite dry_run device_like device dtype stream kernels attention "
    "vision_attention compile inductor tune tune_seconds recompute epochs max_steps "
    "max_bad_samples lr_projector lr_vision lr_language warmup min_lr weight_decay muon_scale "
    "beta2 clip log_every eval eval_style eval_every save_every final_eval wandb wandb_project "
    "auto_resume shard deterministic keep_checkpoints on_save_error max_skipped_steps "
    "hang_timeout".split()
)


def parse_config(argv: list[str] | None = None) -> tuple[VLMConfig, TrainConfig]:
    """Read the command line of train.py.

    Exits with status 2 and one line on an unknown option, preset or value, as argparse does.
    """
    # Read first, since these decide the defaults of the others.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=TrainConfig.preset)
    first.add_argument("--data", default="")
    first.add_argument("--out", default="")
    for flag in ("--resume", "--auto-resume"):
        first.add_argument(flag, nargs="?", const="true", default="")
    known, _ = first.parse_known_args(argv)
    parser = make_parser()
    try:
        defaults = defaults_of(known.preset, known.data)
        run = _run_to_resume(known)
        if run is not None:
            defaults = {**load_run_config(standing(run)), "out": str(run)}
        defaults |= absolute_paths(defaults)
        parser.set_defaults(**defaults)
        model, train = parse(parser, argv)
        if run is None and _needs_source_sizes(train, defaults):
            model, train = parse_again_for_pretrained(parser, argv, train, defaults)
        train.out = train.out or str(RUNS / train.preset)
        train.resume = run is not None
        if train.resume:
            _check_resumable(model, train, defaults)
        if train.overwrite and (lost := inside({**vars(model), **vars(train)}, Path(train.out))):
            raise ValueError(
                f"{lost} lies in {train.out}, which --overwrite deletes: give another --out"
            )
        return model.validate(), train.validate()
    except (OSError, ValueError) as error:
        parser.error(one_line(error))


def make_parser() -> HfArgumentParser:
    """Return the parser of all options of train.py."""
    # Imported here because it takes seconds. With this parser `--flag`, `--flag False` and
    # `--no-flag` all mean what they say.
    from transformers import HfArgumentParser

    configs: Any = (VLMConfig, TrainConfig)  # its annotation fits no dataclass
    parser = HfArgumentParser(
        configs, allow_abbrev=False, description="Train a vision-language model."
    )
    # A preset may switch on what is off by default
    for field in (field for config in configs for field in dataclasses.fields(config)):
        if field.default is False:
            names = (f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}")
            parser.add_argument(
                *names,
                action="store_false",
                dest=field.name,
                default=False,
                help=argparse.SUPPRESS,
            )
    for action in parser._actions:
        if action.dest == "tokens_per_batch":
            action.type = auto_or_number
    # An error is one line, without the usage of all options before it.
    parser.print_usage = lambda *_: None  # type: ignore[method-assign]  # of this parser alone
    return parser


def auto_or_number(text: str) -> int:
    """Read a --tokens-per-batch: "auto" is 0."""
    try:
        return 0 if text == "auto" else int(text)
    except ValueError as error:
        got = f"got {text!r:.40}"
        raise argparse.ArgumentTypeError(f"auto or a whole number is needed, {got}") from error


def parse(parser: HfArgumentParser, argv: list[str] | None) -> tuple[VLMConfig, TrainConfig]:
    """Return model and run as the command line gives them, with absolute paths of folders."""
    model, train = parser.parse_args_into_dataclasses(argv)
    for config in (model, train):
        for name, path in absolute_paths(vars(config)).items():
            setattr(config, name, path)
    return model, train


def _run_to_resume(known: argparse.Namespace) -> Path | None:
    """Return the run that --resume or --auto-resume continues, or None."""
    wanted = _is_true(known.resume)
    started = Path(known.out or RUNS / known.preset).expanduser()
    if not wanted:
        holds_run = (standing(started) / "config.json").exists()
        return started if _is_true(known.auto_resume) and holds_run else None
    run = started if known.out else latest_run()
    if not (standing(run) / "config.json").exists():
        raise FileNotFoundError(f"--resume: {run} holds no run (no config.json)")
    return run


def _is_true(text: str) -> bool:
    return text.lower() in ("true", "t", "yes", "y", "1")  # as HfArgumentParser reads them


def _needs_source_sizes(train: TrainConfig, defaults: dict[str, Any]) -> bool:
    """Return whether sizes must be read from the pretrained weights that `train` names."""
    sources = {name: getattr(train, name) for name in ("vision", "language", "start_from")}
    # A preset has the sizes of its own sources, so that --dry-run works without the hub.
    own = all(value == defaults.get(name, "") for name, value in sources.items())
    return any(sources.values()) and not (train.dry_run and own)


def _check_resumable(model: VLMConfig, train: TrainConfig, defaults: dict[str, Any]) -> None:
    """Raise ValueError if an option differs from the run's and may not."""
    # What `auto` found is the run's, and not looked for again.
    train.tokens_per_batch = train.tokens_per_batch or defaults["tokens_per_batch"]
    for name, value in {**vars(model), **vars(train)}.items():
        if name not in RESUMABLE and value != defaults.get(name, value):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {value}: the run to resume has {defaults[name]}, and its checkpoint "
                "depends on it"
            )


def parse_again_for_pretrained(
    parser: HfArgumentParser,
    argv: list[str] | None,
    train: TrainConfig,
    defaults: dict[str, Any],
) -> tuple[VLMConfig, TrainConfig]:
    """Parse again with the defaults of the pretrained weights that `train` names.

    Raises ValueError for an option that these weights rule out.
    """
    # Imported here because it imports torch, which most command lines do not need.
    from nanovlm_fast.weights.backbones import check_fields, check_tokenizer, pretrained_fields

    if train.start_from:  # the checkpoint replaces a preset's towers
        parser.set_defaults(vision="", language="")
        train = parse(parser, argv)[1].validate()
    brought, must = pretrained_fields(train, defaults)
    parser.set_defaults(**brought)
    model, train = parse(parser, argv)
    check_fields(model, must)
    trained = must.get("lm_tokenizer")
    # brought["lm_tokenizer"] may be a preset's own, and its pair of weights and tokenizer is a
    # published recipe. --dry-run loads no tokenizer, since it must work without the hub.
    if not trained or train.dry_run:
        return model, train
    if model.lm_tokenizer not in (trained, brought["lm_tokenizer"]):
        check_tokenizer(model.lm_tokenizer, trained)
    return model, train
