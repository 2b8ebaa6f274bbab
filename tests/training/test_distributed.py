"""Several processes train as one does, whatever their number.

They are real processes, which use gloo on a CPU.
"""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bench.reliability import SMALL, losses, start
from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.stream import PackedStream, deal, initial_states, undeal
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.model.compiling import compile_options
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranks import _store_of_this_start
from nanovlm_fast.training.parallel import shard_model
from tests.model.test_parity import batch_of, mixed_samples
from tests.support import forks

STEPS = 20


def run(out: Path, processes: int, options: str, code: int = 0, torchrun: bool = False) -> Path:
    """Run SMALL with that many processes until it ends, with exit code `code`."""
    arguments = [*SMALL, *options.split()]
    with out.with_suffix(".log").open("ab") as log:
        if torchrun:
            found = start(out, processes, arguments).wait(280)
        elif processes == 1:
            found = forks.start(["train.py", "--out", str(out), *arguments], log, log).wait(280)
        else:
            found = forks.run_ranks(["train.py", "--out", str(out), *arguments], processes, log)
    assert found == code, f"{found}\n{out.with_suffix('.log').read_text()[-3000:]}"
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def distance(run: Path, other: Path) -> float:
    """The norm of the difference of all weights, relative to the norm of theirs.

    Single weights are not compared. AdamW moves a weight that gets hardly any gradient by the
    gradient's sign alone. The biases of the keys, for example, get only rounding errors.
    """
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    difference = sum(
        (tensor - theirs[name]).double().square().sum() for name, tensor in ours.items()
    )
    size = sum(tensor.double().square().sum() for tensor in theirs.values())
    return float((difference / size).sqrt())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(micro_batches) -> the run of one process with so many micro-batches per step.

    The micro-batches come from as many shards.
    """
    folder, runs = tmp_path_factory.mktemp("alone"), {}

    def get(micro_batches: int) -> Path:
        if micro_batches not in runs:
            options = (
                f"--optimizer adamw --max-steps {STEPS} --accumulate {micro_batches} "
                f"--workers {micro_batches}"
            )
            runs[micro_batches] = run(folder / str(micro_batches), 1, options)
        return runs[micro_batches]

    return get


@pytest.mark.parametrize(
    ("processes", "options", "micro_batches"),
    [
        (2, "--workers 1", 2),
        (4, "--workers 1", 4),
        (2, "--workers 1 --shard", 2),
        (2, "--workers 2 --accumulate 2 --shard", 4),
    ],
)
def test_ranks_train_the_same_parameters_as_one_process(
    tmp_path, alone, processes, options, micro_batches
):
    ours = run(tmp_path / "run", processes, f"--optimizer adamw --max-steps {STEPS} {options}")
    theirs = alone(micro_batches)
    assert distance(ours, theirs) < 1e-6
    assert list(losses(ours)) == list(range(1, STEPS + 1))
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    state, single = (json.loads((r / "last" / "state.json").read_text()) for r in (ours, theirs))
    assert state["stream"] == single["stream"] and state["examples"] == single["examples"]
    assert losses(ours)[STEPS] < losses(ours)[1] - 1, "nothing was learnt, so nothing could differ"


@pytest.mark.slow
def test_muon_replicated_follows_one_process(tmp_path):
    """The runs agree up to rounding.

    The gradients are summed in another order here, and Muon's iteration amplifies the rounding
    errors of the sum a few times.
    """
    ours = run(tmp_path / "two", 2, f"--max-steps {STEPS} --workers 1", torchrun=True)
    theirs = run(tmp_path / "one", 1, f"--max-steps {STEPS} --workers 2 --accumulate 2")
    assert distance(ours, theirs) < 5e-6


def test_a_mean_of_ranks_means_would_be_seen(alone):
    """The ranks' label counts differ, so that weighting by them is tested at all."""
    _, config = parse_config([*SMALL, "--max-steps", "9", "--workers", "2"])
    stream = stream_of([*SMALL, "--max-steps", "9"], shards=2)
    assert config.workers == 2
    batches = [batch.packed.n_labels for batch, _ in zip(stream, range(8), strict=False)]
    assert len({a - b for a, b in zip(batches[::2], batches[1::2], strict=True)}) > 1, batches


def stream_of(argv: list[str], shards: int, states: list[dict] | None = None) -> PackedStream:
    model, config = parse_config(argv)
    source = load_source(config.data, "train")
    tokenizer = Tokenizer.train(["what color is the square?"] * 4, model.lm_vocab_size)
    load = SampleLoader(
        source, model, config, TextProcessor(tokenizer, model.prompt, model.image_tokens)
    )
    return PackedStream(load, measure_budget(load, config), states or initial_states(shards))


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (4, 1), (4, 2)])
def test_the_ranks_shares_are_disjoint_and_complete(ranks, workers):
    states = initial_states(ranks * workers)
    shares = [deal(states, rank, ranks) for rank in range(ranks)]
    assert undeal(shares) == states
    seen = [
        name
        for share in shares
        for batch in loader(stream_of([*SMALL, "--epochs", "1", "--workers", "0"], 0, share))
        for name in batch.packed.names
    ]
    assert sorted(seen) == sorted(f"synthetic/train/{i}" for i in range(256))


def test_shards_that_cannot_be_dealt_evenly_are_refused():
    with pytest.raises(ValueError, match=r"4 shards .*: 3 processes cannot share them evenly"):
        deal(initial_states(4), 0, 3)


def write_uneven(folder: Path) -> None:
    """Write a data set of text alone, with long examples for one rank and short ones for the other.

    The ranks run out of examples after very different numbers of steps.
    """
    folder.mkdir()
    lines = []
    for i in range(64):
        turns = [("human", f"what is {i}?"), ("gpt", "word " * (30 if i % 2 else 1))]
        lines.append(
            json.dumps({"conversations": [{"from": who, "value": text} for who, text in turns]})
        )
    (folder / "train.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("options", ["", "--shard --optimizer adamw --accumulate 2"])
def test_ranks_that_run_out_of_data_wait_for_nobody(tmp_path, options):
    write_uneven(tmp_path / "data")
    out = run(
        tmp_path / "run",
        2,
        f"--data jsonl:{tmp_path}/data --epochs 2 --tokens-per-batch 256 --workers 1 {options}",
    )
    state = json.loads((out / "last" / "state.json").read_text())
    assert state["examples"] == 128, "every example of both epochs, once"
    assert losses(out)[state["step"]] < losses(out)[1]


def test_a_checkpoint_loads_on_another_number_of_ranks(tmp_path):
    """Two ranks, then one, then four that shard, then two.

    There are four micro-batches per step throughout.
    """
    options = "--optimizer adamw --workers 2 --accumulate 2 --warmup 0 --min-lr 1"
    still = run(tmp_path / "still", 2, f"{options} --max-steps {STEPS}")
    moved = run(tmp_path / "moved", 2, f"{options} --max-steps 5")
    for processes, end, more in ((1, 10, ""), (4, 15, "--shard"), (2, STEPS, "--shard False")):
        run(moved, processes, f"{options} --max-steps {end} --resume {more}")
    assert losses(moved) == pytest.approx(losses(still), rel=1e-6)
    assert distance(moved, still) < 1e-6
    assert losses(moved)[STEPS] < losses(moved)[1] - 1


def test_a_number_of_processes_that_does_not_fit_the_run_is_one_clear_error(tmp_path):
    out = run(tmp_path / "run", 2, "--max-steps 2 --workers 1")
    run(out, 3, "--max-steps 4 --workers 1 --resume", code=1)
    log = out.with_suffix(".log").read_text()
    assert "error: the run reads its data in 2 shards" in log and "3 processes" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", ["", "--shard --optimizer adamw", "--recompute blocks"])
def test_compiled_ranks_learn_what_eager_ranks_learn(tmp_path, options):
    common = f"--max-steps 6 --workers 1 --accumulate 2 {options}"
    eager = run(tmp_path / "eager", 2, common)
    compiled = run(tmp_path / "compiled", 2, f"{common} --compile default")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--optimizer=muon", "--shard splits the matrices"),
        ("--optimizer=adamw --kernels=rms_norm,adamw", "shards are updated by PyTorch's AdamW"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, option, why):
    result = forks.run(
        "train.py", *SMALL, "--out", str(tmp_path / "run"), "--shard", *option.split()
    )
    assert result.returncode == 2 and why in result.stderr


def test_sharded_blocks_leave_no_bias_to_the_next(small_config):
    """A norm that is a kernel adds the bias before it, which a sharded block has freed by then.

    The table of two uses is freed after both.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = VisionLanguageModel(small_config, choose_ops("layer_norm,embed_splice"))
        assert whole.ops.bias_in_norm
        sharded = copy.deepcopy(whole)
        shard_model(sharded, compiling=None)
        batch = batch_of(mixed_samples(small_config, 4, np.random.default_rng(1)), small_config)
        for model in (whole, sharded):
            model(batch).backward()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        dist.destroy_process_group()


def test_sharded_blocks_are_compiled_with_the_runs_options(small_config, monkeypatch):
    asked: list[dict] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = VisionLanguageModel(small_config, choose_ops())
        shard_model(model, compile_options("default", ("combo_kernels",)))
    finally:
        dist.destroy_process_group()
    assert len(asked) == small_config.vit_n_blocks + small_config.lm_n_blocks
    assert all(how["fullgraph"] and how["options"]["combo_kernels"] for how in asked)


def test_a_restart_does_not_meet_what_dead_ranks_left(monkeypatch):
    """torchrun's store outlives its restarts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(server.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for life in range(3):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(lambda rank: _store_of_this_start(rank, 3), range(3)))
        assert not any(store.check(["address"]) for store in stores)
        stores[life].set("address", str(life))
        assert {store.get("address") for store in stores} == {str(life).encode()}
