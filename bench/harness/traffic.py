"""Bytes that two gloo processes send per training step, counted by the loopback device.

    python -m bench.harness.traffic              a table; bench.scaling puts it in its result file

This checks the formulas of bench.scaling, not speed: what a step sends does not depend on how fast
the backend is. Where `unshare -rn` is allowed, both processes run in their own network namespace
(`own` in the result), so that no other traffic is counted; elsewhere on the shared loopback. What
the barriers around a step send is measured and subtracted. The counters include the headers of TCP
and IP and the acknowledgements: about 0.3%.

A pass is what a ring's all-gather or reduce-scatter sends: (n - 1) / n of the payload per process.
All-reduce is two passes. gloo's reduce-scatter sends as much as its all-reduce, two passes where
NCCL's ring needs one. `FSDP` is therefore compared with gloo's four passes (gather, gather,
reduce-scatter), and `ring` gives what a ring needs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bench.harness.tables import Rows, lined_up
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range
from nanovlm_fast.training.warmup import full_batch

HERE = Path(__file__).resolve().parents[2]
PROCESSES = 2
MICRO_STEPS = 4
# A small batch: whatever the batch is, the payload is the gradients.
BUDGET = Budget(tokens=128, documents=4, images=2, labels=32, max_seqlen=64)
COLLECTIVE = 4 * 2**20  # bytes of the single collectives
BUCKET_MIB = 0.25  # of DDP here: the gradients of the tiny model would fit into one of 25 MiB


def own_namespace() -> list[str]:
    """The command that gives a process its own network namespace; [] where that is not allowed."""
    prefix = ["unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return prefix if allowed else []


def raise_loopback() -> None:
    """Set the loopback device up, as `ip link set lo up` does: a new namespace has it down.

    The request is SIOCSIFFLAGS with the flags IFF_UP, IFF_LOOPBACK and IFF_RUNNING.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x8 | 0x40))


def loopback_bytes() -> int:
    """Bytes sent over `lo` so far; what one process sends to another is counted once."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[8])
    raise OSError("/proc/net/dev has no loopback device")


def counted(call: Callable[[], object], repeats: int) -> float:
    """Bytes that all processes send in `call` and the barriers: the median of `repeats`."""
    sent = []
    for _ in range(repeats):
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()  # no process starts before all have read the counter
        call()
        dist.barrier()
        sent.append(loopback_bytes() - before)
    return statistics.median(sent)


def step_of(
    model: torch.nn.parallel.DistributedDataParallel,
    batch: PackedBatch,
    micro_steps: int,
    synchronised: bool,
) -> Callable[[], None]:
    """An optimizer step under DDP.

    Gradients of all micro-steps but the last stay local, unless `synchronised`.
    """

    def step() -> None:
        for i in range(micro_steps):
            local = i < micro_steps - 1 and not synchronised
            with model.no_sync() if local else contextlib.nullcontext():
                model(batch).backward()
        model.zero_grad()

    return step


def shard(model: VisionLanguageModel) -> None:
    """Apply FSDP2 with one unit per block.

    All units are gathered for the forward and again for the backward, the root too, so that the
    expected number of passes is the same for all parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


class TrafficCounter:
    """Counts what calls send, beside what the formulas expect; the result file gets `rows`."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.rows: dict[str, dict[str, float]] = {}
        self.idle = counted(lambda: None, repeats)  # what the barriers alone send

    def count(
        self, name: str, call: Callable[[], object], payload: int, ring: int, passes: int
    ) -> None:
        """Enter a row: `passes` are expected over the payload, and a ring would need `ring`."""
        sent = (counted(call, self.repeats) - self.idle) / PROCESSES
        one = payload * (PROCESSES - 1) / PROCESSES
        row = dict(payload=payload, sent=sent, ring=ring * one, expected=passes * one)
        self.rows[name] = {**row, "ratio": sent / row["expected"]}


def count_collectives(counter: TrafficCounter) -> None:
    whole = torch.zeros(COLLECTIVE // 4)
    part = torch.zeros(COLLECTIVE // 4 // PROCESSES)
    counter.count("all-reduce", lambda: dist.all_reduce(whole), COLLECTIVE, 2, 2)
    counter.count("all-gather", lambda: dist.all_gather_into_tensor(whole, part), COLLECTIVE, 1, 1)
    # gloo's reduce-scatter makes two passes.
    counter.count(
        "reduce-scatter", lambda: dist.reduce_scatter_tensor(part, whole), COLLECTIVE, 1, 2
    )


def count_ddp(counter: TrafficCounter, config: VLMConfig, batch: PackedBatch) -> list[int]:
    """Count steps under DDP; return the bytes of its buckets."""
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    # Buffers are not broadcast: the rotary tables are the same in all processes.
    ddp = torch.nn.parallel.DistributedDataParallel(
        model, static_graph=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MIB
    )
    # An uncounted step: no_sync needs a static graph that was seen once, and DDP rebuilds its
    # buckets after the first step.
    step_of(ddp, batch, 1, True)()
    counter.count("DDP", step_of(ddp, batch, 1, True), gradients, 2, 2)
    accumulating = f"DDP, {MICRO_STEPS} micro-steps"
    counter.count(accumulating, step_of(ddp, batch, MICRO_STEPS, False), gradients, 2, 2)
    passes = 2 * MICRO_STEPS
    all_reduced = step_of(ddp, batch, MICRO_STEPS, True)
    counter.count(f"{accumulating}, all reduced", all_reduced, gradients, passes, passes)
    sizes = ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return [int(size) for size in sizes.split(",")]


def count_fsdp(counter: TrafficCounter, config: VLMConfig, batch: PackedBatch) -> None:
    fsdp = VisionLanguageModel(config)
    payload = sum(p.numel() * p.element_size() for p in fsdp.parameters())
    shard(fsdp)

    def step() -> None:
        fsdp(batch).backward()
        fsdp.zero_grad()

    counter.count("FSDP", step, payload, 3, 4)


def process(rank: int, folder: str, repeats: int) -> None:
    """One of the processes; the first writes rows.json with what was sent and what is expected."""
    # torch 2.11 is called by names that later versions deprecate.
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    config, _ = preset("tiny")
    batch = full_batch(BUDGET, config)
    counter = TrafficCounter(repeats)
    count_collectives(counter)
    sizes = count_ddp(counter, config, batch)
    count_fsdp(counter, config, batch)
    if rank == 0:
        found = {"rows": counter.rows, "ddp_buckets": sizes}
        Path(folder, "rows.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(repeats: int) -> dict:
    """Count in two new processes; return the content of the result file.

    {own, processes, repeats, rows: {name: {payload, sent, ring, expected, ratio}}, ddp_buckets},
    where the bytes are per process and step. Raises RuntimeError with the last line of an error.
    """
    prefix = own_namespace()
    with tempfile.TemporaryDirectory() as folder:
        call = [*prefix, sys.executable, "-m", "bench.harness.traffic", "--folder", folder]
        call += ["--repeats", str(repeats)]
        if prefix:
            call.append("--own")
        done = subprocess.run(call, cwd=HERE, capture_output=True, text=True, timeout=240)
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise RuntimeError(said.splitlines()[-1])
        found = json.loads(Path(folder, "rows.json").read_text())
    return {"own": bool(prefix), "processes": PROCESSES, "repeats": repeats, **found}


def table(traffic: dict) -> str:
    where = "a network of their own" if traffic["own"] else "the shared loopback"
    about = f"{traffic['processes']} gloo processes in {where}; MB per process and step"
    columns = ("payload", "ring", "expected", "sent")
    rows: Rows = [("what", *columns, "ratio")]
    for name, row in traffic["rows"].items():
        numbers = (f"{row[part] / 1e6:.3f}" for part in columns)
        rows.append((name, *numbers, f"{row['ratio']:.3f}"))
    return f"{about}\n{lined_up(rows)}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.harness.traffic", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=Range(int, least=1), default=5, help="steps, of which the median counts"
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # set when this command calls itself
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.folder:
        print(table(measure(args.repeats)))
        return 0
    if args.own:
        raise_loopback()
    torch.multiprocessing.spawn(process, (args.folder, args.repeats), nprocs=PROCESSES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
