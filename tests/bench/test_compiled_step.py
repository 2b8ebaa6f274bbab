"""The step, compiled for an H100 that is not there: what it launches and moves, held by hand."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch

from bench import compare, compiled_step, roofline
from bench.compiled_step import (
    Options,
    budgeted,
    budgeted_costs,
    changes,
    kept_variants,
    label_of,
    run,
)
from bench.harness.results import read
from bench.pages.readme import predictions
from bench.subjects.launches import (
    Recorder,
    pointers_of,
    traffic_of,
)
from bench.subjects.lowered import moves_only, spilled
from bench.subjects.masked_loads import loads_of
from bench.subjects.one_gpu import compute_of, floor_of
from bench.subjects.operators import ALL
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.presets import preset
from nanovlm_fast.reporting import plan
from tests.support.processes import run_python

# The slices are compiled in the first test that needs them, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)
CONFIG, TRAIN = preset(Options.preset)


# ---- a slice of the model, through the whole compiler


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """1 + 1 layers, 2 + 1, 1 + 2, in plain PyTorch; then with all kernels and narrow streams."""
    return run(*budgeted(Options(machine_code=True)))


@pytest.mark.slow
def test_one_graph_each_way_and_no_kernel_spills(measured):
    for step in measured:
        assert (step["graphs"], step["graph_breaks"]) == (2, 0)
    kernels = measured[0]["machine_code"]
    assert len(kernels) > 40
    assert not [name for name, row in kernels.items() if spilled(row) or row["failed"]]
    assert max(row["registers"] for row in kernels.values()) > 32, "ptxas was not read"
    assert "kernel" not in measured[0]["by_kind"]["all"]
    assert measured[3]["by_kind"]["all"]["kernel"]["launches"] > 20


@pytest.mark.slow
def test_the_flops_are_the_models(measured):
    """With padding; without what is computed twice, and with what the last block leaves out."""
    for step in measured:
        work = step["computed"]
        forward = step["by_kind"]["forward"]
        backward = step["by_kind"]["backward"]
        products = sum(
            kinds[kind]["tflop"]
            for kinds in (forward, backward)
            for kind in ("product", "kernel")
            if kind in kinds
        )
        # The backward of attention computes the scores again: 5 products. The model counts 4.
        attention = forward["attention"]["tflop"]
        assert backward["attention"]["tflop"] == pytest.approx(2.5 * attention, rel=1e-9)
        # Rows without a label pass neither the last output projection nor the last MLP.
        width = CONFIG.lm_hidden_dim
        left_out = (work["tokens"] - work["labels"]) * width * (width + 3 * CONFIG.lm_inter_dim)
        # The loss's kernel takes the gradients in the forward; their sum is the same.
        wanted = (work["flops"] - 6 * left_out) / 1e12
        assert products + 3 * attention == pytest.approx(wanted, rel=1e-9)


@pytest.mark.slow
def test_templates_compute_the_same_products_and_fuse_more(measured):
    options = Options(vision_layers=1, language_layers=1, templates=True)
    (templates,) = run(options)
    plain = measured[0]
    assert templates["tflop"] == pytest.approx(plain["tflop"], rel=1e-9)
    assert templates["launches"] < plain["launches"]
    assert templates["floor_ms"] < plain["floor_ms"]
    for direction in ("forward", "backward"):
        products = (step["by_kind"][direction]["product"] for step in (templates, plain))
        ours, theirs = (row["launches"] for row in products)
        assert ours == theirs


@pytest.mark.slow
def test_one_vision_block_by_hand(measured):
    """Bytes of one more block of nanovlm-222m's vision tower, in multiples of its stream's rows."""
    one, two = measured[0]["by_kind"], measured[1]["by_kind"]
    budget = measured[0]["budget"]
    rows = budget["images"] * CONFIG.grid**2
    c = CONFIG.vit_hidden_dim
    x = rows * c  # elements of the stream
    weights = 12 * c * c
    # Each product reads two matrices and writes one; each is bfloat16, gradients of weights too.
    # Rows of 1, 3 and 4 c: qkv 1 -> 3, out 1 -> 1, fc1 1 -> 4, fc2 4 -> 1.
    wide = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)
    products = {
        "forward": 2 * (wide * x + weights),
        "backward": 2 * (2 * wide * x + 2 * weights),
    }
    norms = 2 * 15 * x  # stream and branches in; stream, normed in both types out
    gelu = 2 * 2 * 4 * x
    casts = 2 * (4 + 2) * x  # the stream's gradient, before each branch
    bias_sums = 2 * 2 * x
    norm_gradients = 2 * (2 + 4 + 4 + 4) * x  # dy, normed, the stream's gradient; that again
    gelu_gradient = 3 * 2 * 4 * x + 2 * 4 * x  # and its bias sum, which computes it again
    gathered = 2 * (3 + 3) * x + 2 * 3 * x  # dq, dk, dv into one, and again for the bias sum
    generated = {
        "forward": norms + gelu,
        "backward": casts + bias_sums + norm_gradients + gelu_gradient + gathered,
    }
    # Weights are cast from float32, their gradients back to it.
    for direction in ("forward", "backward"):
        for kind, by_hand in (("product", products), ("generated", generated)):
            counted = added(one, two, direction, kind)
            extra = (4 + 2) * weights if kind == "generated" else 0
            assert counted == pytest.approx(by_hand[direction] + extra, rel=2e-3), (direction, kind)
    # q, k, v in and the output out; backward also the output and its gradient in, three out.
    softmax = 4 * rows * CONFIG.vit_n_heads
    assert added(one, two, "forward", "attention") == pytest.approx(8 * x + softmax, rel=1e-3)
    assert added(one, two, "backward", "attention") == pytest.approx(16 * x + softmax, rel=1e-3)


def added(one: dict, two: dict, direction: str, kind: str) -> float:
    """Bytes that `two` moves more than `one`."""
    before, after = (sums[direction][kind] for sums in (one, two))
    return 1e9 * sum(after[side] - before[side] for side in ("read_gb", "written_gb"))


@pytest.mark.slow
def test_the_update_by_hand(measured):
    """AdamW reads 16 bytes and writes 12 for a parameter; the norm reads its gradient, 4."""
    one, two = (step["by_kind"]["update"]["other"] for step in measured[:2])
    more = 1e9 * sum(two[side] - one[side] for side in ("read_gb", "written_gb"))
    c = CONFIG.vit_hidden_dim
    block = 12 * c * c + (3 + 1 + 4 + 1) * c + 4 * c  # weights, biases, two norms
    assert more == pytest.approx(32 * block, rel=1e-3)


@pytest.mark.slow
def test_a_block_keeps_to_its_budget(measured):
    """A change may lower it. What raises it says so: --raise-budget."""
    budget = json.loads(compiled_step.BUDGET.read_text())
    if not torch.__version__.startswith(budget["torch"] + "."):
        pytest.skip(f"the budget is of PyTorch {budget['torch']}; another version fuses otherwise")
    risen, fell = changes(budgeted_costs(measured), budget)
    assert not risen, "over the budget (python -m bench.compiled_step --budget --raise-budget)"
    assert not fell, "lower the budget: run python -m bench.compiled_step --budget"


def test_a_budget_notices_both_ways():
    budget = {"rest": {"launches": 100, "mb": 5000.0}}
    assert changes({"rest": {"launches": 100, "mb": 5001.0}}, budget) == ([], False)
    risen, fell = changes({"rest": {"launches": 101, "mb": 4000.0}}, budget)
    assert risen == ["rest: 101.0 launches, the budget is 100.0"] and fell


# ---- bytes


def test_every_pointer_of_our_kernels_is_read_or_written():
    for kernel in ALL:
        found = [value for name, value in vars(kernel.module).items() if name.endswith("_kernel")]
        assert found, kernel.name
        for jitted in found:
            names = inspect.signature(jitted.fn).parameters
            pointers = {name for name in names if name.endswith("_ptr")}
            uses = pointers_of(jitted)
            assert pointers <= uses["load"] | uses["store"], jitted.fn.__name__


def test_our_kernels_move_what_their_cost_says():
    """RMSNorm with a float32 stream at the model's width, forward."""
    from nanovlm_fast.kernels import rms_norm

    m, n = 4096, 576

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, y = (empty(m, n, dtype=torch.bfloat16) for _ in range(2))
    stream, h = (empty(m, n, dtype=torch.float32) for _ in range(2))
    values = dict(x_ptr=x, residual_ptr=stream, y_ptr=y, h_ptr=h, M=m)
    values |= dict(weight_ptr=empty(n, dtype=torch.float32), rstd_ptr=empty(m, dtype=torch.float32))
    uses = pointers_of(rms_norm._rms_norm_fwd_kernel)
    read, written = traffic_of("_rms_norm_fwd_kernel", uses, values)
    moved, _ = rms_norm.cost(m, n, torch.bfloat16, torch.float32)["forward"]
    assert read + written == moved + 4 * n  # cost leaves out the weight


def test_what_an_operator_calls_is_counted_by_what_it_launches():
    """Inside operators PyTorch hands on whole what autograd would have taken apart."""
    recorder = Recorder([])
    x = torch.empty(4, 4)
    aten = torch.ops.aten
    for function, *arguments in (
        (aten.to.dtype, torch.float32),  # its type already: no launch
        (aten.to.dtype, torch.bfloat16),
        (aten.new_zeros.default, [8]),  # of x it takes the type alone
        (aten.linear.default, x),  # a product
    ):
        recorder.__torch_dispatch__(function, (), (x, *arguments))
    entered = [(la.name, la.kind, la.read, la.written, la.flops) for la in recorder.launches]
    assert entered == [
        ("_to_copy", "other", 64, 32, 0),
        ("new_zeros", "other", 0, 32, 0),
        ("mm 4x4x4", "product", 128, 64, 128),
    ]


CONCATENATION = """
@triton.jit
def triton_poi_fused_cat_0(in_ptr0, in_ptr1, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 40960
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    x0 = (xindex % 4)
    tmp0 = tl.load(in_ptr0 + (xindex), x0 < 3, eviction_policy='evict_last', other=0.0)
    tmp1 = tl.load(in_ptr1 + (xindex), x0 >= 3, other=0.0).to(tl.float32)
    tl.store(out_ptr0 + (xindex), tl.where(x0 < 3, tmp0, tmp1), None)
"""


def test_a_masked_load_counts_by_how_often_its_mask_holds():
    loads = loads_of(CONCATENATION.replace("@triton.jit\n", ""), "triton_poi_fused_cat_0")
    assert loads == {"in_ptr0": pytest.approx(30720, 0.01), "in_ptr1": pytest.approx(10240, 0.01)}
    reduction = CONCATENATION.replace("xnumel = 40960", "xnumel = 40960\n    r0_numel = 64")
    assert loads_of(reduction, "triton_poi_fused_cat_0") == {}


def test_what_only_moves():
    assert moves_only({"convert_element_type", "view"})
    assert moves_only({"select_scatter", "add", "full"})
    assert not moves_only({"add", "view"}) and not moves_only(set())


# ---- the command


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--kernels", "rms"], "--kernels rms: there are none, all, rms_norm"),
        (["--preset", "big"], "unknown preset 'big'"),
        (["--inductor", "combo_kernels"], "expected NAME=VALUE"),
        (["--inductor", "combo_kernels=yes"], "the value is no literal"),
        (["--layers", "-1"], "--layers"),
        (["--inductor", "triton.none=1"], "torch._inductor.config has no such option"),
    ],
)
def test_bad_input_is_one_line(options, line, tmp_path, capsys):
    assert compiled_step.main([*options, "--out", str(tmp_path)]) in (1, 2)
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_without_a_compiler_the_line_says_what_to_install(tmp_path):
    result = run_python(
        "-m", "bench.compiled_step", "--quick", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "apt-get install g++" in result.stderr


def test_labels_say_what_differs_from_training():
    assert label_of(Options()) == "kernels none"
    other = Options(kernels="all", stream="bfloat16", inductor={"combo_kernels": True})
    assert label_of(other) == "kernels all, stream bfloat16, combo_kernels=True"
    labels = [label_of(options) for options in compiled_step.variants_of(Options())]
    # none, all, each alone; none and all again with a bfloat16 stream, by itself and in two ways
    assert len(labels) == len(set(labels)) == 4 + len(ALL) + 4
    assert labels[-1] == "kernels all, stream bfloat16, templates"


def test_another_size_of_the_batch_is_another_file():
    files = {
        compiled_step.result_file(Options(tokens_per_batch=t, images_per_batch=i)).name
        for t in (0, 20736)
        for i in (0, 256)
    }
    assert len(files) == 4 and "compiled_step_20736tokens_256images.json" in files


# ---- the result file


def test_the_committed_table_is_of_the_preset_as_it_is():
    result = read(compiled_step.result_file(Options()))
    assert result["budget"]["tokens"] == TRAIN.tokens_per_batch
    assert result["clean"]
    labels = {label_of(options) for options in compiled_step.variants_of(Options())}
    assert labels <= result["variants"].keys(), "run python -m bench.compiled_step --variants"


def test_variants_are_reused_only_from_the_same_clean_tree(tmp_path):
    file = made_up(tmp_path)
    result = read(file) | {"clean": True}
    file.write_text(json.dumps(result))
    about = {name: result[name] for name in ("commit", "torch", "clean")}
    assert kept_variants(file, about).keys() == {"kernels none"}
    for other in (dict(commit="1"), dict(torch="3"), dict(clean=False)):
        assert kept_variants(file, about | other) == {}
    file.write_text(json.dumps(result | {"clean": False}))
    assert kept_variants(file, about) == {}


def test_one_variant_does_not_replace_the_table(tmp_path, capsys):
    file = made_up(tmp_path)
    result = read(file)
    result["variants"]["kernels all"] = result["variants"]["kernels none"]
    file.write_text(json.dumps(result))
    assert compiled_step.main(["--out", str(tmp_path / "a")]) == 1
    error = capsys.readouterr().err
    assert "would lose 1 of its variants" in error and "--variants" in error
    assert len(error.splitlines()) == 1 and read(file) == result


def test_a_commit_made_meanwhile_keeps_the_variants(tmp_path, monkeypatch, capsys):
    committed = read(compiled_step.result_file(Options()))
    row = committed["variants"]["kernels none"]
    work = {name: committed[name] for name in ("layers", "budget", "work")}

    def compiled(options: Options) -> list[dict[str, Any]]:
        monkeypatch.setenv("NANOVLM_FAST_COMMIT", f"with {label_of(options)}")
        return [row | work | {"options": dataclasses.asdict(options)}]

    monkeypatch.setattr(compiled_step, "run", compiled)  # minutes for each
    monkeypatch.setenv("NANOVLM_FAST_COMMIT", "before")
    assert compiled_step.main(["--variants", "--out", str(tmp_path)]) == 0
    result = read(compiled_step.result_file(Options(), tmp_path))
    assert result["commit"] == "before" and len(result["variants"]) == len(
        [*compiled_step.variants_of(Options())]
    )
    assert "measured before" not in capsys.readouterr().out


# ---- who takes the step from it


def made_up(tmp_path, name: str = "a", slower: float = 1.0) -> Any:
    """A result file of the whole preset, with the content that others read."""
    kinds = {
        direction: {"product": {"expected_ms": slower * ms}}
        for direction, ms in (("forward", 40.0), ("backward", 80.0), ("update", 3.0))
    }
    variant = {
        "launches": 1000,
        "read_gb": 100.0,
        "written_gb": 100.0,
        "floor_ms": 90.0,
        "expected_ms": slower * 123.0,
        "by_kind": kinds,
        "predicted": {"tokens_per_s": 150000.0 / slower, "mfu": 0.3, "step_ms": 123.0},
    }
    result = {
        "suite": "compiled_step",
        "device": compiled_step.DEVICE,
        "date": "2026-01-01",
        "commit": "0123456789",
        "command": "python -m bench.compiled_step",
        "python": "3",
        "torch": "2",
        "preset": Options.preset,
        "small": False,
        "work": {"images": 256, "tokens": 20736},
        "variants": {"kernels none": variant},
    }
    file = compiled_step.result_file(Options(), tmp_path / name)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    return file


def test_the_readme_leaves_out_what_is_missing(tmp_path):
    file = made_up(tmp_path)
    assert "| `--kernels none` | 123 predicted |" in predictions(tmp_path / "a")
    result = read(file)
    result["variants"]["kernels all"] = result["variants"].pop("kernels none")
    file.write_text(json.dumps(result))
    page = predictions(tmp_path / "a")
    assert "| `--kernels all` | 123 predicted |" in page and "none" not in page


def test_compare_finds_a_slower_step(tmp_path, capsys):
    files = [str(made_up(tmp_path, name, slower)) for name, slower in (("a", 1.0), ("b", 1.2))]
    assert compare.main([files[0], files[0]]) == 0
    assert compare.main(files) == 1
    assert "kernels none.predicted" in capsys.readouterr().err


def test_scaling_takes_the_predicted_step(tmp_path):
    made_up(tmp_path)
    step = compute_of(CONFIG, Options.preset, 256, tmp_path / "a")
    assert step.seconds == pytest.approx(0.123)
    assert sum(step.forward.values()) == pytest.approx(0.040)
    assert step.source.startswith("predicted, not measured: bench.compiled_step, 0123456")
    assert not step.measured
    # Half the samples: half the work, but the same update.
    half = compute_of(CONFIG, Options.preset, 128, tmp_path / "a")
    assert half.seconds == pytest.approx(0.003 + 0.5 * 0.12, rel=0.02)
    empty = compute_of(CONFIG, Options.preset, 256, tmp_path / "none")
    assert empty == floor_of(CONFIG, 256) and empty.source.startswith("estimate, not measured")


def test_roofline_prints_the_compiled_step_or_that_it_is_unknown(tmp_path):
    made_up(tmp_path)
    line = roofline.compiled_line(Options.preset, tmp_path / "a")
    assert "floor 90.0 ms, 123.0 ms predicted, not measured" in line and "0123456" in line
    unknown = roofline.compiled_line("tiny", tmp_path / "a")
    assert unknown == (
        "compiled for an H100: unknown (python -m bench.compiled_step --preset tiny)"
    )


def test_the_plan_calls_it_a_prediction(tmp_path, monkeypatch):
    rates = tmp_path / "rates.json"
    entry = dict(preset="nanovlm-222m", tokens_per_s=150000.0, source="x.json", device="H100")
    rates.write_text(json.dumps({"runs": [], "steps": [], "predicted": [entry]}))
    monkeypatch.setattr(plan, "RATES", rates)
    row = plan.plan(CONFIG, TRAIN)["on an H100"]
    step = 1e3 * TRAIN.tokens_per_batch / 150000
    # Five epochs of 1.67 million examples of 81 tokens.
    assert row.startswith(f"{step:,.0f} ms a step, 1.25 h") and "a prediction, not measured" in row
    unknown = plan.compiled_for_h100(TrainConfig(preset="tiny"), 5120, 1e6)
    assert unknown == "unknown: tiny was not compiled for one"
