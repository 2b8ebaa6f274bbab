"""What a run scores on its way, and what it leaves when it is done.

That is curves.png, the test split scored seeing and blind, result.json, samples.png and a table.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.evaluate import answer_samples, evaluate
from nanovlm_fast.files import write_whole
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import summary_table
from nanovlm_fast.reporting.pictures import plot_curves, plot_samples
from nanovlm_fast.runs import RunState

KEPT = ("step", "seconds", "examples", "tokens", "capacity", "too_long", "bad")


def score(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    held_out: Source,
    benchmark: Source | None,
    config: TrainConfig,
    state: RunState,
    alive: Callable[[], object],
) -> dict[str, Any]:
    """What metrics.jsonl keeps: 'accuracy' on the held-out images and 'eval' on --eval, where there are such.

    Notes in `state` the best step, unreadable held-out images, and the last score of --eval. What
    fails is named and costs that score, not the run. `alive` is called before every batch.
    """
    step, scores = state.step, {}
    with convenience(f"step {step}: the held-out images are not scored"):
        if len(held_out):
            result = evaluate(model, tokenizer, held_out, config.turns, alive=alive)
            if result.accuracy is not None:
                scores["accuracy"] = result.accuracy
                if result.accuracy > state.best_accuracy:
                    state.best_accuracy, state.best_step = result.accuracy, step
            tqdm.write(f"step {step}: {result.say('held-out questions')}")
            for reason in result.unreadable:
                if reason not in state.bad:
                    state.bad[reason] = reason
                    tqdm.write(f"skipped, held out: {reason}")
    with convenience(f"step {step}: {config.eval} is not scored"):
        if benchmark:
            data, style = config.eval, config.eval_style
            options = dict(style=style, seed=config.seed, alive=alive)
            result = evaluate(model, tokenizer, benchmark, **options)
            scores["eval"] = state.eval = {"data": data, "style": style, **result.as_dict()}
            tqdm.write(f"step {step}: {result.say(f'questions of {data} ({style})')}")
    return scores


def summarise(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    held_out: Source,
    config: TrainConfig,
    state: RunState,
    autocast: Callable[[], AbstractContextManager],
    alive: Callable[[], object],
) -> dict[str, float]:
    """Write the files and print the table; returns the accuracies {'sees', 'blind'}, empty where none was measured.

    The training is done: what fails here is named in a line, and the rest goes on. Raises OSError
    in the end for a file that could not be written, unless --on-save-error says continue. `alive`
    is called before every batch.
    """
    unwritten: list[OSError] = []
    with convenience("no curves.png", unwritten):
        plot_curves(run)
    device = next(model.parameters()).device
    filled = f"{state.tokens / state.capacity:.1%} of the token budget" if state.capacity else "-"
    rows = {
        "run": run,
        "steps": f"{state.step:,} in {state.seconds / 60:.1f} min on {device}",
        "packing": f"{filled} (curriculum aside)" if config.curriculum else filled,
        "skipped": f"{len(state.bad)} unreadable, {state.too_long} too long",
    }
    result = {"eval": state.eval, **{name: getattr(state, name) for name in KEPT}}  # --eval's last
    sees = None
    if config.final_eval:
        with convenience("the run is not scored at its end"), autocast():
            test = test_split(config.data)
            name, source = ("test split", test) if test else ("held-out images", held_out)
            if len(source):
                asked = model, tokenizer, source, config.turns
                ask = functools.partial(evaluate, *asked, progress=True, alive=alive)
                sees, blind = ask(), ask(blank_images=True)
    accuracies = {}
    if sees:
        result |= {"split": name, "seeing": sees.as_dict(), "blind": blind.as_dict()}
        for kind, (correct, total) in sorted(sees.by_kind.items()):
            rows[f"  {kind}"] = f"{correct / total:.1%} of {total:,} questions"
        if sees.skipped:
            rows["  left out"] = sees.left_out
        rows[name] = "none of its questions could be asked"
        if sees.total:
            rows[name] = f"sees: {sees.accuracy:.1%} · blind: {blind.accuracy:.1%}"
            accuracies = {"sees": sees.accuracy, "blind": blind.accuracy}
    if scored := result["eval"]:
        accuracy = scored["accuracy"]
        said = "none could be asked" if accuracy is None else f"{accuracy:.1%}"
        rows[config.eval] = f"{said} ({scored['style']})"
    if sees or scored:  # before the pictures: nothing may cost the scores
        with convenience("no result.json", unwritten):
            write_whole(run / "result.json", json.dumps(result, indent=2) + "\n")
    if sees:
        with convenience("no samples.png", unwritten), autocast():
            if samples := answer_samples(model, tokenizer, source, mode=config.turns):
                plot_samples(run / "samples.png", samples)
    print(summary_table(rows))
    if unwritten and config.on_save_error == "stop":
        raise unwritten[0]
    return accuracies


@contextlib.contextmanager
def convenience(what: str, unwritten: list[OSError] | None = None) -> Iterator[None]:
    """What is no part of the training may fail: a warning says `what` and why, in one line.

    `unwritten` takes the error of a file that could not be written (a full disk), which
    --on-save-error judges.
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
