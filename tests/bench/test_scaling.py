"""The model of many GPUs agrees with arithmetic by hand.

The bytes that it predicts are those that two real processes send.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench import scaling
from bench.harness import traffic
from bench.pages import sections
from bench.pages.figures import figures
from bench.scaling import (
    INFINIBAND,
    LAUNCH,
    NVLINK,
    Compute,
    Mode,
    buckets,
    collective_seconds,
    sent_bytes,
)
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.training.warmup import full_batch

NANOVLM = preset("nanovlm-222m")[0]
MIB = 2**20
MODES = {mode.name: mode for mode in scaling.modes()}


@pytest.fixture(scope="module")
def order() -> list[tuple[str, int]]:
    return scaling.gradients(NANOVLM)


@pytest.fixture(scope="module")
def floor() -> Compute:
    return scaling.floor_of(NANOVLM, 256)


# ---- gradients and buckets


def test_every_gradient_of_the_model_once_and_the_table_before_the_vision_tower(order):
    assert len(dict(order)) == len(order) and sum(elements for _, elements in order) == 222_081_600
    names = [name for name, _ in order]
    assert names[0] == "decoder.norm.weight" and names[-1].startswith(
        "vision_encoder.patch_embedding"
    )
    blocks = [i for i, name in enumerate(names) if name.startswith("decoder.blocks")]
    assert (
        max(blocks) < names.index(scaling.TABLE) < names.index("vision_encoder.layer_norm.weight")
    )


def test_the_order_is_that_of_a_backward_that_computes(small_config):
    made = []
    model = VisionLanguageModel(small_config)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: made.append((name, p.numel()))
        )
    model(full_batch(Budget(600, 40, 6, 200, 64), small_config)).backward()
    assert scaling.gradients(small_config) == made


def test_buckets_by_hand():
    assert buckets([MIB, 10 * MIB, 14 * MIB, 2 * MIB, 200 * MIB, 1]) == [[0], [1, 2, 3], [4], [5]]
    assert buckets([MIB - 1, 1, 5, 5], cap=10) == [[0, 1], [2, 3]] and buckets([]) == []


def test_gradients_are_ready_when_their_part_is(order, floor):
    times = dict(
        zip((name for name, _ in order), scaling.ready_times(order, floor.backward), strict=True)
    )
    language, whole = floor.backward["language"], sum(floor.backward.values())
    assert times[scaling.TABLE] == pytest.approx(language) and max(times.values()) == pytest.approx(
        whole
    )
    assert times["decoder.blocks.15.norm1.weight"] == pytest.approx(language / 2, rel=0.05)
    assert times["MP.proj.weight"] == pytest.approx(language + floor.backward["projector"])


# ---- collectives


def test_collectives_by_hand():
    payload = 8e6
    assert sent_bytes(payload, 8, 2) == 14e6 and sent_bytes(payload, 2, 3) == 12e6
    inside = 7 * NVLINK.hop + 7e6 / NVLINK.bandwidth
    assert collective_seconds(payload, 8, 2) == pytest.approx(LAUNCH + 2 * inside)
    ring, tree = (
        3 * INFINIBAND.hop + 0.75e6 / INFINIBAND.bandwidth,
        2 * INFINIBAND.hop + 1e6 / INFINIBAND.bandwidth,
    )
    assert tree < ring
    assert collective_seconds(payload, 32, 2) == pytest.approx(LAUNCH + 2 * (inside + ring))
    assert collective_seconds(payload, 32, 2, tree=True) == pytest.approx(
        LAUNCH + 2 * (inside + tree)
    )
    assert collective_seconds(1e9, 32, 2, tree=True) == collective_seconds(
        1e9, 32, 2
    )  # a ring moves less
    assert collective_seconds(payload, 1, 2) == collective_seconds(0, 8, 2) == 0


def test_nodes_and_their_gpus_together_send_what_one_ring_would():
    for nodes in (2, 16, 128):
        inside, between = sent_bytes(1.0, 8, 2), sent_bytes(1 / 8, nodes, 2)
        assert inside + between == pytest.approx(sent_bytes(1.0, 8 * nodes, 2))


# ---- steps


def test_what_is_exposed_by_hand():
    """The gradients are sent in three buckets.

    The links keep up with the first two. The last is ready when the backward pass has ended.
    """
    million = 2**18  # elements of a MiB
    order = [
        ("decoder.a", million),
        ("decoder.b", 25 * million),
        ("vision_encoder.c", 10 * million),
    ]
    backward = {"language": 1.0, "projector": 0.0, "vision": 0.5}
    compute = Compute({"language": 1.0}, backward, 0.25, 1, "", False)
    parts = [collective_seconds(size * MIB, 8, 2) for size in (1, 25, 10)]
    mode = MODES["DDP float32, overlapped, ring"]
    assert scaling.ddp_seconds(compute, order, 8, mode) == pytest.approx(2.75 + parts[2])
    late = dataclasses.replace(mode, overlap=False)
    assert scaling.ddp_seconds(compute, order, 8, late) == pytest.approx(2.75 + sum(parts))
    fast = compute.scaled(1e-9)  # there is nothing to hide it behind
    assert scaling.ddp_seconds(fast, order, 8, mode) == pytest.approx(sum(parts), rel=1e-3)
    halves = [collective_seconds(size * MIB / 2, 8, 2) for size in (1, 25, 10)]
    assert scaling.ddp_seconds(
        compute, order, 8, dataclasses.replace(late, element=2)
    ) == pytest.approx(2.75 + sum(halves))


def test_sharding_by_hand(order, floor):
    mode = MODES["FSDP2 float32, no overlap"]
    root, blocks = scaling.units(order, floor)
    assert len(blocks) == 12 + 30 and root + sum(size for size, *_ in blocks) == 222_081_600
    times = [sum(getattr(floor, direction).values()) for direction in ("forward", "backward")]
    assert [sum(block[i] for block in blocks) for i in (1, 2)] == pytest.approx(times)
    collectives = 3 * sum(
        collective_seconds(4 * size, 16, 1) for size in (root, *(size for size, *_ in blocks))
    )
    whole = sum(times) + collectives + floor.update / 16
    assert scaling.fsdp_seconds(floor, order, 16, mode) == pytest.approx(whole)
    overlapped = scaling.fsdp_seconds(floor, order, 16, dataclasses.replace(mode, overlap=True))
    first_and_last = 3 * collective_seconds(
        4 * root, 16, 1
    )  # gathered before each pass, reduced at the end
    assert (
        sum(times) + first_and_last < overlapped < sum(times) + first_and_last + 0.2 * collectives
    )
    slow = floor.scaled(1e-9)
    assert scaling.fsdp_seconds(
        slow, order, 16, dataclasses.replace(mode, overlap=True)
    ) == pytest.approx(collectives, rel=1e-3)


@pytest.mark.parametrize("name", MODES)
def test_weak_scaling(order, floor, name):
    mode = MODES[name]
    rows = scaling.weak(floor, order, mode)
    one, most = rows["1"], rows["1024"]
    assert one == {
        "seconds": pytest.approx(floor.seconds),
        "exposed": pytest.approx(0),
        "efficiency": 1,
        "sent": 0,
    }
    exposed = [row["exposed"] for row in rows.values()]
    assert exposed == sorted(exposed) and exposed[1] > 0
    assert most["sent"] == pytest.approx(
        mode.element * 222_081_600 * (3 if mode.shard else 2), rel=1e-2
    )
    hidden = MODES[name.replace("no overlap", "overlapped")]
    assert scaling.weak(floor, order, hidden)["1024"]["seconds"] <= most["seconds"]


def test_where_efficiency_falls(order, floor):
    assert scaling.falls_below({"1": {"efficiency": 1.0}, "2": {"efficiency": 0.9}}) is None
    assert scaling.falls_below({"1": {"efficiency": 1.0}, "8": {"efficiency": 0.899}}) == 8
    slow = scaling.weak(floor.scaled(4), order, MODES["DDP float32, no overlap, ring"])
    fast = scaling.weak(floor, order, MODES["DDP float32, no overlap, ring"])
    assert scaling.falls_below(slow) > scaling.falls_below(fast)  # a slower step is easier to scale


def test_a_fixed_number_of_samples(order, floor):
    rows = scaling.strong(
        scaling.shares(NANOVLM, floor), order, MODES["DDP float32, overlapped, ring or tree"]
    )
    assert [row["samples"] for row in rows.values()] == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert all(row["efficiency"] <= row["links_free"] <= 1.0 + 1e-9 for row in rows.values())
    assert rows["8"]["seconds"] < rows["1"]["seconds"] / 4 and rows["256"]["links_free"] < 0.5


def test_a_measured_step_is_taken_and_nothing_else(tmp_path):
    def put(place: str, **more: object) -> None:
        facts = dict(
            date="1", commit="abcdef123", command="c", torch="2", python="3", preset="nanovlm-222m"
        )
        facts |= dict(variants={"ours": {"median": 0.2}}, work={"images": 128}, layers=0)
        (tmp_path / place).mkdir()
        (tmp_path / place / "train_step_nanovlm-222m.json").write_text(
            json.dumps({**facts, **more})
        )

    gpu = dict(device="NVIDIA H100", driver="1", triton="3")
    put("cpu", device="x")
    put("cut", **gpu | {"layers": 2})
    put("other", **gpu | {"preset": "tiny"})
    estimate = scaling.compute_of(NANOVLM, "nanovlm-222m", 256, tmp_path)
    assert (
        not estimate.measured
        and "not measured" in estimate.source
        and estimate == scaling.floor_of(NANOVLM, 256)
    )
    put("gpu", **gpu)
    put("newer", **gpu | {"date": "2", "variants": {"ours": {"median": 0.125}}})
    compute = scaling.compute_of(NANOVLM, "nanovlm-222m", 256, tmp_path)
    assert compute.measured and compute.samples == 128 and compute.seconds == pytest.approx(0.125)
    assert compute.source == "bench.train_step on NVIDIA H100, abcdef1"
    floor = scaling.floor_of(NANOVLM, 128)
    assert compute.update / compute.seconds == pytest.approx(floor.update / floor.seconds)


# ---- what is really sent


@pytest.fixture(scope="module")
def counted() -> dict:
    return traffic.measure(repeats=3)


def test_two_processes_send_what_the_formulas_say(counted):
    rows = counted["rows"]
    assert all(abs(row["ratio"] - 1) < 0.05 for row in rows.values()), traffic.table(counted)
    parameters = sum(elements for _, elements in scaling.gradients(preset("tiny")[0]))
    assert rows["DDP"]["expected"] == sent_bytes(4 * parameters, 2, 2)
    assert rows["FSDP"]["ring"] == sent_bytes(4 * parameters, 2, 3)


def test_accumulation_sends_no_more(counted):
    """And the counters would see it if it did."""
    one, accumulated, reduced = (
        counted["rows"][name]["sent"]
        for name in ("DDP", "DDP, 4 micro-steps", "DDP, 4 micro-steps, all reduced")
    )
    assert accumulated == pytest.approx(one, rel=0.05) and reduced == pytest.approx(
        4 * one, rel=0.05
    )


def test_ddps_own_buckets_are_these(counted):
    sizes = [4 * elements for _, elements in scaling.gradients(preset("tiny")[0])]
    cap = int(traffic.BUCKET_MIB * MIB)
    found = [sum(sizes[i] for i in bucket) for bucket in buckets(sizes, cap, first=cap)]
    assert found == counted["ddp_buckets"] and len(found) > 5


# ---- the command


def test_the_command_its_table_and_its_picture(tmp_path, capsys, counted, monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda steps: counted)
    assert scaling.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed or "bench.train_step on" in printed
    assert "links free" in printed and "gloo processes" in printed
    (file,) = tmp_path.glob("*/scaling.json")
    result = json.loads(file.read_text())
    assert (
        sum(result["bucket_bytes"]) == 4 * result["parameters"]
        and result["modes"].keys() == MODES.keys()
    )
    assert {"commit", "command"} <= result.keys()
    page = sections.suites_page(tmp_path)
    assert (
        "### scaling" in page
        and "CPU timings" not in page
        and "| 2 gloo processes, counted: DDP | 1.6" in page
    )
    (drawn,) = figures(file.parent)
    assert drawn.stem.name == "scaling" and drawn.alt in page and drawn.stale()
    drawn.write()
    assert not drawn.stale()


def test_wrong_arguments_are_a_line(tmp_path, capsys):
    assert scaling.main(["--samples", "0"]) == 2 and "--samples" in capsys.readouterr().err
    assert scaling.main(["--preset", "nano", "--steps", "0", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_the_modes_differ():
    assert (
        len(MODES) == 12 and len({dataclasses.astuple(mode)[1:] for mode in MODES.values()}) == 12
    )
    assert MODES["FSDP2 bfloat16, no overlap"] == Mode("FSDP2 bfloat16, no overlap", True, 2, False)
