"""The command line of train.py, made from the configurations' fields."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanovlm_fast.command import one_line
from nanovlm_fast.config import (
    TrainConfig,
    VLMConfig,
)
from nanovlm_fast.paths import absolute_paths, inside
from nanovlm_fast.presets import defaults_of
from nanovlm_fast.runs import (
    RUNS,
    latest_run,
    load_run_config,
    standing,
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
    from transformers import (
        HfArgumentParser,  # `--flag`, `--flag False` and `--no-flag` all mean what they say
    )

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
            said.lower() in ("true", "t", "yes", "y", "1")
            for said in (known.resume, known.auto_resume)
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
        if (
            not resume and any(sources.values()) and not (train.dry_run and own)
        ):  # a preset has its own's sizes
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
            raise ValueError(
                f"{lost} lies in {train.out}, which --overwrite deletes: --out names another folder"
            )
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
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    train: TrainConfig,
    defaults: dict[str, Any],
) -> tuple[VLMConfig, TrainConfig]:
    """Let the weights that `train` starts from change the defaults, and hold the command line to their sizes."""
    from nanovlm_fast.weights.backbones import check_fields, check_tokenizer, pretrained_fields

    if train.start_from:  # instead of a preset's towers
        parser.set_defaults(vision="", language="")
        train = parse(parser, argv)[1].validate()
    brought, must = pretrained_fields(train, defaults)
    parser.set_defaults(**brought)
    model, train = parse(parser, argv)
    check_fields(model, must)
    trained = must.get("lm_tokenizer")
    # a preset's own pair is a published recipe; --dry-run asks nobody for a tokenizer
    if (
        trained
        and model.lm_tokenizer not in (trained, brought["lm_tokenizer"])
        and not train.dry_run
    ):
        check_tokenizer(model.lm_tokenizer, trained)
    return model, train
