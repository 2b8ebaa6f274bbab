"""bench.train_step: the drawn work is as documented, and every variant is the same step.

A variant that computes something else gets no time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import train_step
from bench.pages import figures, readme
from bench.pages import rows as rows_module
from bench.subjects.variants import Judge, Packed, Padded, Recipe, Workbench, ablation, packed_batch
from bench.subjects.workload import Work, cauldron_like, draw_lengths, load_work
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pad
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.training.optim import make_optimizers, set_lr
from tests.support.samples import SMALL, random_sample
from train import Trainer

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
CONFIG = VLMConfig(**SMALL, lm_max_length=24)
QUICK = "--data synthetic --samples 3 --layers 1 --repeats 2 --device cpu --threads 1".split()


def shared_work() -> Work:
    """Samples of images with several questions each, of different lengths."""
    rng = np.random.default_rng(0)
    return Work(CONFIG, [random_sample(rng, CONFIG, 1, n) for n in (3, 1, 2)])


def bench_of(work: Work, dtype: torch.dtype = torch.float32) -> Workbench:
    return Workbench(work, CPU, dtype)


# ---- the work


def test_lengths_are_drawn_as_documented():
    prompt, answer = draw_lengths(np.random.default_rng(0), 50_000, longest=79)
    real = 49 + prompt + answer
    assert 1 - real.mean() / 128 == pytest.approx(0.39, abs=0.01)
    assert (real.mean(), answer.mean()) == (pytest.approx(78, abs=0.5), pytest.approx(12, abs=0.5))
    assert prompt.min() == 6 and answer.min() == 2 and (prompt + answer).max() == 79
    assert (np.median(prompt), np.median(answer)) == (16, pytest.approx(7.5, abs=0.5))


def test_work_is_the_same_every_time_and_says_what_it_wastes():
    config = dataclasses.replace(CONFIG, lm_max_length=79)
    one, other = (cauldron_like(config, 40, seed=3) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.images, b.images) and np.array_equal(
            a.documents[0].labels, b.documents[0].labels
        )
    assert any(
        len(a.documents[0]) != len(b.documents[0])
        for a, b in zip(one, cauldron_like(config, 40), strict=True)
    )
    work = Work(config, one)
    padded = pad(one, work.text_length)
    positions = 40 * config.image_tokens + int(padded.attention_mask.sum())
    assert work.row_length == config.image_tokens + 79
    assert work.waste == pytest.approx(1 - positions / (40 * work.row_length))


def test_a_batch_of_nanovlms_recipe_wastes_about_two_fifths():
    work = load_work("nanovlm-222m", samples=256, layers=1)
    assert (
        work.config.vit_n_blocks == work.config.lm_n_blocks == 1
        and work.config.lm_hidden_dim == 576
    )
    assert (work.row_length, work.counts["images"]) == (128, 256) and 0.37 < work.waste < 0.43
    assert 77 <= work.counts["tokens"] / 256 <= 81 and 10 < work.counts["labels"] / 256 < 14
    ids, rows = work.documents[0].input_ids, work.documents[0].image_rows
    assert (
        (rows[:49] == np.arange(49)).all()
        and (rows[49:] == -1).all()
        and ids.max() < work.config.lm_vocab_size
    )


def test_work_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="--layers"):
        load_work("nanovlm-222m", layers=-1)
    with pytest.raises(ValueError, match="unknown preset"):
        load_work("huge")


# ---- what is counted


def test_rates_and_mfu_count_real_tokens_however_much_a_variant_pads():
    work = shared_work()
    tokens = sum(len(document) for sample in work.samples for document in sample.documents)
    labels = sum(int((d.labels >= 0).sum()) for d in work.documents)
    pairs = sum(len(d) * (len(d) + 1) // 2 for d in work.documents)
    padded = packed_batch(work, Recipe(packing=False, compile="default"))
    assert len(padded.input_ids) >= 6 * work.row_length > tokens, "the variant must pad"
    rates = work.rates(0.5, peak=1e9)
    assert rates == {
        "tokens_per_s": tokens / 0.5,
        "labels_per_s": labels / 0.5,
        "images_per_s": 3 / 0.5,
        "questions_per_s": 6 / 0.5,
        "tflops_per_s": step_flops(CONFIG, 3, tokens, labels, pairs) / 0.5 / 1e12,
        "mfu": step_flops(CONFIG, 3, tokens, labels, pairs) / 0.5 / 1e9,
    }
    assert "mfu" not in work.rates(0.5, peak=None)


# ---- the variants


def every_recipe(bench: Workbench, recipe: Recipe) -> dict[str, Recipe]:
    """The ablation, and what a CPU leaves out of it."""
    return {
        "ours": recipe,
        "prefetch": dataclasses.replace(recipe, prefetch=False),
        **ablation(recipe, bench)[0],
    }


@pytest.mark.parametrize("compile", ["none", "default"])
def test_every_variant_takes_the_same_step(compile, monkeypatch):
    """Also with the static shapes that a compiler needs; the compiler itself is left out."""
    dynamo = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda model, mode=None, **options: dynamo(model, **options)
    )
    bench = bench_of(
        Work(dataclasses.replace(CONFIG, vit_n_blocks=1, lm_n_blocks=2), shared_work().samples)
    )
    judge = Judge(Padded(bench), torch.float32, tolerance=1e-5)
    recipes = every_recipe(bench, Recipe(compile=compile))
    assert {
        "packing",
        "labelled_head",
        "shared_images",
        "fused_optimizer",
        "recompute:blocks",
    } <= recipes.keys()
    assert ("compile" in recipes) == (compile == "default")
    assert (
        judge(Padded(bench))["passed"]
        and judge(Padded(bench, compiled=compile == "default"))["passed"]
    )
    before = [p.clone() for p in bench.packed.parameters()]
    for name, recipe in recipes.items():
        step = Packed(bench, recipe)
        for _ in range(2):
            verdict = judge(step)
            assert verdict["passed"] and verdict["gradient"] < 1e-5, (name, verdict)
            step()
    assert all(torch.equal(p, b) for p, b in zip(bench.packed.parameters(), before, strict=True)), (
        "rates are 0"
    )


aot_compile = functools.partial(torch.compile, backend="aot_eager")


def test_each_kernel_is_switched_off_alone():
    without, why = ablation(Recipe(kernels="rms_norm,swiglu"), bench_of(shared_work()))
    assert (without["kernel:rms_norm"].kernels, without["kernel:swiglu"].kernels) == (
        "swiglu",
        "rms_norm",
    )
    assert "kernels" not in why and "kernels" in ablation(Recipe(), bench_of(shared_work()))[1]


def test_recipes_change_what_they_say():
    work = shared_work()
    ours, tokens = packed_batch(work, Recipe()).trimmed(), work.counts["tokens"]
    assert (
        len(ours.input_ids) == tokens
        and len(ours.labels) == work.counts["labels"]
        and len(ours.images) == 3
    )
    in_rows = packed_batch(work, Recipe(packing=False)).trimmed()
    assert len(in_rows.input_ids) == 6 * work.row_length
    assert len(packed_batch(work, Recipe(shared_images=False)).trimmed().images) == 6
    everywhere = packed_batch(work, Recipe(labelled_head=False)).trimmed()
    assert (
        len(everywhere.labels) == tokens and (everywhere.labels >= 0).sum() == work.counts["labels"]
    )
    assert len(packed_batch(work, Recipe(compile="default")).input_ids) % 128 == 0
    bench = bench_of(work)
    assert isinstance(Packed(bench, Recipe(fused_optimizer=False)).optimizers[0], torch.optim.AdamW)
    unfused, (fused,) = Packed(bench, Recipe(fused_optimizer=False)).optimizers[0], bench.optimizers
    assert fused.defaults["fused"] and not unfused.defaults["fused"]
    assert Packed(bench, Recipe(prefetch=False)).floats.images.dtype == torch.float32
    assert bench.forward_of(Recipe(packing=False))[1] is bench.forward_of(Recipe())[1]
    assert bench.forward_of(Recipe(recompute="blocks"))[0].ops.recompute == "blocks"


def trainer_of(bench: Workbench, model: VisionLanguageModel) -> SimpleNamespace:
    """What `Trainer.optimizer_step` needs, with a model and optimizers of its own."""
    optimizers = make_optimizers(model, bench.work.train)
    return SimpleNamespace(
        **{"model": model, "step_model": model, "forward": model, "optimizers": optimizers},
        **{"autocast": bench.autocast, "config": bench.work.train, "keep_gradients": False},
        scaler=None,
        world=SimpleNamespace(size=1),
        stats=SimpleNamespace(add=lambda *_: None),
        state=SimpleNamespace(step=0),
        journal=SimpleNamespace(remember_samples=lambda *_: None),
    )


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_three_steps_are_training_s_to_the_bit(clip):
    """`train.Trainer.optimizer_step` itself, on the batch that the feed gives."""
    train = TrainConfig(clip=clip, lr_projector=1e-2, lr_vision=1e-2, lr_language=1e-2)
    bench = bench_of(dataclasses.replace(shared_work(), train=train))
    trainer = trainer_of(bench, copy.deepcopy(bench.packed))
    batch = packed_batch(bench.work, Recipe()).trimmed()
    step = Packed(bench, Recipe())
    set_lr(bench.optimizers, 0.5)
    for _ in range(3):
        step()
        Trainer.optimizer_step(trainer, [batch], bench.work.counts["labels"], 0.5)
    ours, theirs = bench.packed.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh = bench_of(bench.work).packed.state_dict()
    assert not torch.equal(ours["MP.proj.weight"], fresh["MP.proj.weight"]), "nothing was trained"


def test_compiled_code_gets_the_sizes_that_training_measures():
    """With the slack of a budget: padding images, labels and documents are computed too."""
    work = Work(CONFIG, cauldron_like(CONFIG, 100))
    tokens = -(-work.counts["tokens"] // 128) * 128
    budget = Budget.measure(work.samples, tokens)
    assert budget.images > 100 and budget.labels > work.counts["labels"]
    step = Packed(bench_of(work), Recipe(compile="default"))
    batch = step.next_batch()
    found = (batch.input_ids, batch.cu_seqlens[1:], batch.images, batch.labels)
    sizes = (budget.tokens, budget.documents, budget.images, budget.labels)
    assert tuple(map(len, found)) == sizes and batch.max_seqlen == budget.max_seqlen
    trimmed = Packed(bench_of(work), Recipe()).next_batch()
    assert len(trimmed.images) == 100 and len(trimmed.input_ids) == work.counts["tokens"]


def test_nanovlms_model_puts_every_position_through_the_head(monkeypatch):
    work, heads = shared_work(), []
    bench = bench_of(work)
    bench.padded.decoder.head.register_forward_hook(
        lambda module, given, out: heads.append(out.shape[:2])
    )
    Padded(bench).backward()
    assert heads == [(6, work.row_length)]


def test_in_bfloat16_the_reference_sets_the_tolerance():
    bench = bench_of(shared_work(), torch.bfloat16)
    judge = Judge(Padded(bench), torch.bfloat16, tolerance=0.0)
    verdict = judge(Packed(bench, Recipe()))
    assert verdict["passed"] and 1e-4 < verdict["gradient"] < 0.1
    with torch.no_grad():
        bench.packed.decoder.norm.weight.mul_(1.05)
    assert not judge(Packed(bench, Recipe()))["passed"]


def test_bright_pictures_are_as_exact_in_bfloat16_as_the_references():
    """Folding the mean into the patches' bias had four times the error of the reference."""
    work = shared_work()
    for sample in work.samples:
        sample.images[sample.images > 40] = 255
    bright = Work(dataclasses.replace(CONFIG, image_mean=0.875, image_std=0.25), work.samples)
    bench = bench_of(bright, torch.bfloat16)
    verdict = Judge(Padded(bench), torch.bfloat16, tolerance=0.0)(Packed(bench, Recipe()))
    assert verdict["passed"], verdict


def test_a_gradient_that_is_not_a_number_does_not_pass():
    bench = bench_of(shared_work())
    judge, step = Judge(Padded(bench), torch.float32, 1e-4), Packed(bench, Recipe())
    with torch.no_grad():
        bench.packed.MP.proj.weight[0, 0] = float("nan")
    assert not judge(step)["passed"]


# ---- the command


@pytest.mark.slow
def test_it_compares_and_writes(tmp_path, capsys):
    names = "packing,recompute:blocks"
    assert train_step.main([*QUICK, "--variants", names, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/train_step_1layer.json")
    result, rows = json.loads(file.read_text()), json.loads(file.read_text())["variants"]
    assert list(rows) == ["ours", "reference", "packing", "recompute:blocks"]
    assert result["parity"]["passed"] and result["parity"]["gradient"] < 1e-4
    assert {"device", "commit", "command", "torch", "date", "threads"} <= set(result)
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["peak_mib"] > 0 and row["parity"]["passed"]
        assert row["tokens_per_s"] == pytest.approx(result["work"]["tokens"] / row["median"])
    assert result["speedup"] == rows["reference"]["times_base"]
    assert (
        rows["reference"]["base_seconds"]
        == rows["ours"]["seconds"]
        != rows["packing"]["base_seconds"]
    )
    assert all(rows_module.over_base(result, name) for name in rows if name != "ours")
    assert result["work"]["questions"] > result["work"]["images"] == 3
    assert {"graphs", "prefetch", "attention", "kernels"} <= result["not_applicable"].keys()
    assert [figure.stem.name for figure in figures.figures(file.parent)] == [file.stem]
    assert "times as many questions" in capsys.readouterr().out
    assert "cut to 1 layer per tower" in readme.step_row(result)[0]


@pytest.fixture
def no_memory(monkeypatch):
    """Rows run in this process, not each in one of its own."""
    monkeypatch.setattr(train_step, "peak_of_process", lambda *arguments: None)


def test_a_broken_variant_gets_no_time_and_the_others_do(tmp_path, monkeypatch, no_memory):
    forward = Packed.forward
    monkeypatch.setattr(
        Packed,
        "forward",
        lambda self, batch: forward(self, batch) * (1 if self.recipe.packing else 1.01),
    )
    assert (
        train_step.main([*QUICK, "--variants", "packing,labelled_head", "--out", str(tmp_path)])
        == 0
    )
    (file,) = tmp_path.glob("*/*.json")
    rows = json.loads(file.read_text())["variants"]
    assert "median" in rows["labelled_head"] and not {"median", "seconds"} & rows["packing"].keys()
    assert "not the reference's step" in rows["packing"]["error"]


def test_when_ours_is_broken_nothing_is_written(tmp_path, monkeypatch, no_memory, capsys):
    forward = Packed.forward
    monkeypatch.setattr(Packed, "forward", lambda self, batch: forward(self, batch) * 1.01)
    assert train_step.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.rglob("*.json")) and "ours gets no time" in capsys.readouterr().err


def test_a_row_that_cannot_run_says_why_and_ours_is_timed_all_the_same(
    tmp_path, monkeypatch, no_memory
):
    def fail(*arguments, **options):
        raise RuntimeError("backend='inductor' raised:\nno C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(Padded, "__call__", fail)
    assert (
        train_step.main([*QUICK, "--variants", "reference_compiled", "--out", str(tmp_path)]) == 0
    )
    (file,) = tmp_path.glob("*/*.json")
    result = json.loads(file.read_text())
    rows = result["variants"]
    assert (
        rows["reference_compiled"]["error"]
        == "RuntimeError: backend='inductor' raised: no C++ compiler"
    )
    assert "error" in rows["reference"] and "median" in rows["ours"] and "speedup" not in result
    assert "against -" in readme.step_row(result)[1]


def comparison_of(monkeypatch, **options) -> train_step.Comparison:
    """A comparison as on a GPU.

    There, ours is timed with CUDA graphs, and everything else is compared to ours without them.
    """
    args = train_step.parse([*QUICK, "--no-ablation"])
    args = argparse.Namespace(
        **{**vars(args), "compile": "reduce-overhead", "variants": ("all",), **options}
    )
    monkeypatch.setattr(
        torch, "compile", lambda model, mode=None, **options: aot_compile(model, **options)
    )
    return train_step.Comparison(args)


def test_ours_with_graphs_is_timed_against_ours_without(tmp_path, monkeypatch, no_memory):
    variants_wanted = ("fused_optimizer", "packing")
    result = comparison_of(monkeypatch, out=tmp_path, variants=variants_wanted, budget_s=1e-3).run()
    rows = result["variants"]
    assert list(rows) == ["graphs", "reference", "ours", "fused_optimizer"]
    assert (
        "median" in rows["ours"]
        and rows["ours"]["times_base"] > 0
        and "times_base" not in rows["graphs"]
    )
    assert result["speedup"] == rows["reference"]["times_base"] / rows["ours"]["times_base"]
    assert list(result["not_run"]) == ["packing"], "it compiles anew, and the time is spent"


def test_without_graphs_ours_falls_back_and_says_why(tmp_path, monkeypatch, no_memory):
    def no_graphs():
        raise RuntimeError("cannot be recorded")

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", no_graphs)
    result = comparison_of(monkeypatch, out=tmp_path, variants=("ours",)).run()
    ours = result["variants"]["ours"]
    assert ours["fell_back"] == "RuntimeError: cannot be recorded" and "error" not in ours
    assert ours["median"] == result["variants"]["graphs"]["median"] and result["speedup"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--variants speed", "there are all, reference"),
        ("--compile reduce-overhead --device cpu", "needs a GPU"),
        ("--data nothing", "nothing"),
        ("--samples -1", "--samples"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert train_step.main([*QUICK, *options.split()]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(550)
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_gpu_every_row_is_timed(tmp_path, dtype):
    arguments = (
        f"--preset nanovlm-222m --layers 1 --samples 32 --repeats 3 --budget-s 500 --dtype {dtype}"
    ).split()
    assert train_step.main([*arguments, "--tolerance", "1e-3", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/*.json")
    result = json.loads(file.read_text())
    assert not [
        name
        for name, row in result["variants"].items()
        if "median" not in row or "fell_back" in row
    ]
    assert (
        not result["not_run"]
        and {"graphs", "ours", "compile", "prefetch"} <= result["variants"].keys()
    )
    assert all(row["peak_mib"] > 0 for row in result["variants"].values())


# ---- the plot


def test_bars_start_where_the_technique_was_cut_from():
    times = {
        "graphs": 0.1,
        "reference": 0.5,
        "ours": 0.09,
        "packing": 0.15,
        "prefetch": 0.16,
        "recompute:blocks": 0.2,
    }
    rows = {name: {"median": 7.0, "times_base": time / 0.1} for name, time in times.items()}
    rows["graphs"] = {"median": 0.1}
    rows["attention"] = {"error": "no time"}
    bars = figures.bars({"variants": rows})
    assert [name for name, _, _ in bars] == ["reference", "ours", "graphs", "prefetch", "packing"]
    expected = [(0, 500), (0, 90), (90, 100), (100, 160), (100, 150)]
    assert [bar[1:] for bar in bars] == [pytest.approx(bar) for bar in expected]
    assert figures.label_of("kernel:rms_norm") == "without kernel rms_norm"
    assert (figures.number(10712.4), figures.number(3.14, "+")) == ("10,712", "+3.1")


def test_bars_of_older_files_are_their_own_medians():
    rows = {"reference": {"median": 0.5}, "packed": {"median": 0.1}}
    assert figures.bars({"variants": rows}) == [("reference", 0.0, 500.0), ("packed", 0.0, 100.0)]
