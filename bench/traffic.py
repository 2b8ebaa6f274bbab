"""Bytes that two gloo processes send a training step, counted by the kernel's loopback device, against the formulas.

    python -m bench.traffic                      a table; bench.scaling keeps it in its result file

A check of the accounting, not of speed: what a step sends does not depend on the backend being slow. Both processes run
in a network namespace of their own where `unshare -rn` is allowed (`own` in the result), so that nobody else's traffic
counts; else on the shared loopback. What the barriers around a step send is measured and taken off. The counters hold
the headers of TCP and IP and the acknowledgements too: some 0.3%.

A pass is what a ring's all-gather or reduce-scatter sends: (n - 1) / n of the payload a process. All-reduce is two.
gloo's reduce-scatter sends as much as its all-reduce: two passes where NCCL's ring makes one, so `FSDP` is held against
gloo's four passes (gather, gather, reduce-scatter), and `ring` says what a ring needs.
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

from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import preset
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.packing import Budget
from nanovlm_fast.ranges import Range
from nanovlm_fast.warmup import full_batch

HERE = Path(__file__).resolve().parent.parent
PROCESSES, MICRO_STEPS = 2, 4
BUDGET = Budget(
    tokens=128, documents=4, images=2, labels=32, max_seqlen=64
)  # the payload is the gradients whatever it is
COLLECTIVE = 4 * 2**20  # bytes of the single collectives
BUCKET_MIB = 0.25  # of DDP here: the tiny model's gradients would fit one of 25 MiB


def own_namespace() -> list[str]:
    """The command that gives a process a network of its own, or nothing where that is not allowed."""
    prefix = ["unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return prefix if allowed else []


def raise_loopback() -> None:
    """What `ip link set lo up` does, which a new namespace needs: SIOCSIFFLAGS with IFF_UP, LOOPBACK, RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x8 | 0x40))


def loopback_bytes() -> int:
    """Sent over `lo` since it is up; what one process sends another is counted once."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[8])
    raise OSError("/proc/net/dev has no loopback device")


def counted(call: Callable[[], object], repeats: int) -> float:
    """Bytes that all processes send in `call`, the median of `repeats`; the barriers' with it."""
    sent = []
    for _ in range(repeats):
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()  # nobody begins before everybody has read
        call()
        dist.barrier()
        sent.append(loopback_bytes() - before)
    return statistics.median(sent)


def step_of(model: torch.nn.Module, batch, micro_steps: int, synchronised: bool) -> Callable[[], None]:
    """An optimizer step of DDP; gradients of its micro-steps but the last stay local unless `synchronised`."""

    def step() -> None:
        for i in range(micro_steps):
            local = i < micro_steps - 1 and not synchronised
            with model.no_sync() if local else contextlib.nullcontext():
                model(batch).backward()
        model.zero_grad()

    return step


def shard(model: VisionLanguageModel) -> None:
    """FSDP2 with a unit a block; all are gathered for the forward and again for the backward, the root too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def process(rank: int, folder: str, repeats: int) -> None:
    """One of the processes; the first writes rows.json: what was sent, and by how many passes over which payload."""
    warnings.simplefilter("ignore", FutureWarning)  # names that torch 2.11 needs are on their way out
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    config, _ = preset("tiny")
    batch, rows = full_batch(BUDGET, config), {}
    idle = counted(lambda: None, repeats)

    def count(name: str, call: Callable[[], object], payload: int, ring: int, passes: int) -> None:
        sent = (counted(call, repeats) - idle) / PROCESSES
        one = payload * (PROCESSES - 1) / PROCESSES
        rows[name] = dict(payload=payload, sent=sent, ring=ring * one, expected=passes * one)
        rows[name]["ratio"] = sent / rows[name]["expected"]

    whole = torch.zeros(COLLECTIVE // 4)
    part = torch.zeros(COLLECTIVE // 4 // PROCESSES)
    count("all-reduce", lambda: dist.all_reduce(whole), COLLECTIVE, 2, 2)
    count("all-gather", lambda: dist.all_gather_into_tensor(whole, part), COLLECTIVE, 1, 1)
    count("reduce-scatter", lambda: dist.reduce_scatter_tensor(part, whole), COLLECTIVE, 1, 2)

    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    # the rotary tables are the same everywhere: nothing to send before each forward
    options = dict(static_graph=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MIB)
    ddp = torch.nn.parallel.DistributedDataParallel(model, **options)
    step_of(ddp, batch, 1, True)()  # a static graph must be seen before no_sync; buckets are rebuilt after it
    count("DDP", step_of(ddp, batch, 1, True), gradients, 2, 2)
    accumulating = f"DDP, {MICRO_STEPS} micro-steps"
    count(accumulating, step_of(ddp, batch, MICRO_STEPS, False), gradients, 2, 2)
    passes = 2 * MICRO_STEPS
    count(f"{accumulating}, all reduced", step_of(ddp, batch, MICRO_STEPS, True), gradients, passes, passes)
    sizes = [int(size) for size in ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]

    fsdp = VisionLanguageModel(config)
    shard(fsdp)
    count("FSDP", lambda: (fsdp(batch).backward(), fsdp.zero_grad()), gradients, 3, 4)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps({"rows": rows, "ddp_buckets": sizes}))
    dist.barrier()
    dist.destroy_process_group()


def measure(repeats: int) -> dict:
    """{own, processes, rows: {name: payload, sent, ring, expected (bytes a process and step), ratio}, ddp_buckets}.

    Raises RuntimeError with the last line of what went wrong.
    """
    prefix = own_namespace()
    with tempfile.TemporaryDirectory() as folder:
        call = [*prefix, sys.executable, "-m", "bench.traffic", "--folder", folder, "--repeats", str(repeats)]
        done = subprocess.run([*call, *["--own"] * bool(prefix)], cwd=HERE, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        found = json.loads(Path(folder, "rows.json").read_text())
    return {"own": bool(prefix), "processes": PROCESSES, "repeats": repeats, **found}


def table(traffic: dict) -> str:
    where = "a network of their own" if traffic["own"] else "the shared loopback"
    lines = [f"{traffic['processes']} gloo processes in {where}; MB a process and step"]
    lines.append(f"{'':32} {'payload':>9} {'ring':>9} {'expected':>9} {'sent':>9} {'ratio':>7}")
    for name, row in traffic["rows"].items():
        numbers = " ".join(f"{row[part] / 1e6:>9.3f}" for part in ("payload", "ring", "expected", "sent"))
        lines.append(f"{name:32} {numbers} {row['ratio']:>7.3f}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=Range(int, least=1), default=5, help="steps of which the median counts")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the process that starts the two
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
