"""The scores of a run on its way, and what it leaves when it is done.

At its end a run leaves curves.png, the test split scored with and without images, result.json,
samples.png, and a table on the terminal.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.samples import say_dropped
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.evaluate import Evaluation, answer_samples, evaluate, say_chance
from nanovlm_fast.files import write_whole
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import summary_table
from nanovlm_fast.reporting.pictures import plot_curves, plot_samples
from nanovlm_fast.runs import RunState

# What result.json takes from the state.
REPORTED = ("step", "seconds", "examples", "tokens", "capacity", "filled", "too_long", "bad")


def score(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    held_out: Source,
    benchmark: Source | None,
    config: TrainConfig,
    state: RunState,
    alive: Callable[[], object],
) -> dict[str, Any]:
    """Score the held-out images and --eval; return a part of a line of metrics.jsonl.

    That is 'accuracy' and 'eval', as far as there is something to score. Notes in `state` the best
    step, unreadable held-out images, and the last score of --eval. A failure is reported and costs
    that score, not the run. `alive` is called before every batch.
    """
    step = state.step
    scores: dict[str, Any] = {}
    with convenience(f"step {step}: the held-out images are not scored"):
        if len(held_out):
            result = evaluate(model, tokenizer, held_out, mode=config.turns, alive=alive)
            if result.accuracy is not None:
                scores["accuracy"] = result.accuracy
                if result.accuracy > state.best_accuracy:
                    state.best_accuracy = result.accuracy
                    state.best_step = step
            tqdm.write(f"step {step}: {result.say('held-out questions')}")
            # By reason: a held-out example has no index among the training examples.
            for reason in result.unreadable:
                if reason not in state.bad:
                    state.bad[reason] = reason
                    tqdm.write(f"skipped, held out: {reason}")
    with convenience(f"step {step}: {config.eval} is not scored"):
        if benchmark:
            style = config.eval_style
            result = evaluate(
                model, tokenizer, benchmark, style=style, seed=config.seed, alive=alive
            )
            state.eval = {"data": config.eval, "style": style, **result.as_dict()}
            scores["eval"] = state.eval
            tqdm.write(f"step {step}: {result.say(f'questions of {config.eval} ({style})')}")
    return scores


@dataclass
class FinalScores:
    """The model's score at the end of a run, with its images and with blank ones."""

    split: str
    source: Source
    seeing: Evaluation
    blind: Evaluation


def summarise(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    held_out: Source,
    config: TrainConfig,
    state: RunState,
    alive: Callable[[], object],
) -> dict[str, float]:
    """Write the files and print the table; return the accuracies 'sees' and 'blind', if measured.

    Training is done, so a failure is reported in a line, and the rest continues. At the end, raises
    OSError for a file that could not be written, unless --on-save-error is continue. `alive` is
    called before every batch. The model computes under the autocast of the caller.
    """
    unwritten: list[OSError] = []
    with convenience("no curves.png", unwritten):
        plot_curves(run)
    rows = outline(run, model, config, state)
    final: FinalScores | None = None
    if config.final_eval:
        with convenience("the run is not scored at its end"):
            final = final_scores(model, tokenizer, held_out, config, alive)
    result: dict[str, Any] = {"eval": state.eval}  # --eval's last
    result |= {name: getattr(state, name) for name in REPORTED}
    if state.loss_scale:
        result["loss_scale"] = state.loss_scale
    accuracies: dict[str, float] = {}
    if final:
        seeing, blind = final.seeing, final.blind
        result["split"] = final.split
        result["seeing"] = seeing.as_dict()
        result["blind"] = blind.as_dict()
        rows |= score_rows(final)
        if seeing.accuracy is not None and blind.accuracy is not None:
            accuracies = {"sees": seeing.accuracy, "blind": blind.accuracy}
    if scored := state.eval:
        accuracy = scored["accuracy"]
        said = "none could be asked" if accuracy is None else f"{accuracy:.1%}"
        said += say_chance(scored, scored["questions"])
        rows[str(config.eval)] = f"{said} ({scored['style']})"
    # Results before pictures: a picture that fails must not cost the scores.
    if final or state.eval:
        with convenience("no result.json", unwritten):
            write_whole(run / "result.json", json.dumps(result, indent=2) + "\n")
    if final:
        with convenience("no samples.png", unwritten):
            if samples := answer_samples(model, tokenizer, final.source, mode=config.turns):
                plot_samples(run / "samples.png", samples)
    print(summary_table(rows))
    if unwritten and config.on_save_error == "stop":
        raise unwritten[0]
    return accuracies


def outline(
    run: Path, model: VisionLanguageModel, config: TrainConfig, state: RunState
) -> dict[str, Any]:
    """The first rows of the table: where, how long, how full, what was skipped."""
    filled = "-"
    if state.capacity:
        filled = f"{state.tokens / state.capacity:.1%} of the token budget"
        counts = state.filled or {}
        for name in ("image", "label"):
            if room := counts.get(f"{name}_room", 0):
                filled += f", {counts[f'{name}s'] / room:.1%} of {name}s"
    device = next(model.parameters()).device
    return {
        "run": run,
        "steps": f"{state.step:,} in {state.seconds / 60:.1f} min on {device}",
        "packing": f"{filled} (curriculum aside)" if config.curriculum else filled,
        "skipped": f"{len(state.bad)} unreadable, {state.too_long} too long"
        + say_dropped(state.dropped or {}),
        **overflows(state),
    }


def overflows(state: RunState) -> dict[str, str]:
    """The row on loss scaling, of a run that has computed in float16."""
    if not state.loss_scale:
        return {}
    count = int(state.loss_scale["counts"][0])
    scale = state.loss_scale["scale"]
    return {"float16": f"loss scale {scale:g}, steps skipped as gradients overflowed: {count:,}"}


def final_scores(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    held_out: Source,
    config: TrainConfig,
    alive: Callable[[], object],
) -> FinalScores | None:
    """Score the test split, or the held-out images of data without one; None without either.

    What a model answers to blank images is what it has learned from the questions alone.
    """
    split = "test split"
    # A stream has no copy here, and to make one of its test split is not asked for.
    source = None if config.streaming else test_split(config.data)
    # Also for a test split without examples.
    if not source:
        split = "held-out images"
        source = held_out
    if not len(source):
        return None
    ask = functools.partial(
        evaluate, model, tokenizer, source, mode=config.turns, progress=True, alive=alive
    )
    return FinalScores(split, source, seeing=ask(), blind=ask(blank_images=True))


def score_rows(final: FinalScores) -> dict[str, str]:
    """The rows of the table with the final scores."""
    seeing = final.seeing
    rows = {}
    for kind, (correct, total) in sorted(seeing.by_kind.items()):
        chance = say_chance(seeing.chance(kind), total)
        rows[f"  {kind}"] = f"{correct / total:.1%} of {total:,} questions{chance}"
    if seeing.skipped:
        rows["  left out"] = seeing.left_out
    rows[final.split] = "none of its questions could be asked"
    if seeing.total:
        chance = say_chance(seeing.chance(), seeing.total, before=" · ")
        blind = final.blind.accuracy
        rows[final.split] = f"sees: {seeing.accuracy:.1%} · blind: {blind:.1%}{chance}"
    return rows


@contextlib.contextmanager
def convenience(what: str, unwritten: list[OSError] | None = None) -> Iterator[None]:
    """Let the block fail: a warning gives `what` and the reason, in one line.

    For what is not part of the training. An OSError, as of a full disk, is appended to `unwritten`:
    --on-save-error decides later whether it ends the command.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"warning: {what}: {printable(reason)}")
        if isinstance(error, OSError) and unwritten is not None:
            unwritten.append(error)


def test_split(data: str) -> Source | None:
    """The data set's test split, or None where it has none."""
    with contextlib.suppress(FileNotFoundError):
        return load_source(data, "test")
    return None
