"""Where to compute (`--device`), and in which type (`--dtype`)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from nanovlm_fast.threads import WAITING, cores_of, others_since_begin, threads_beside


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a --device option. "auto" is a CUDA GPU if there is one, else the CPU.

    MPS, the GPU of Apple's processors, has to be asked for: nothing here has run on one yet. Raises
    ValueError if the device does not exist or is of another kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: only cpu, cuda and mps are supported")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no GPU of Apple's")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees {count} CUDA devices")
    return device


def make_current(device: torch.device) -> torch.device:
    """Make a numbered GPU the current one, and return it.

    Triton launches its kernels there, and CUDA events are recorded there, whatever device the
    tensors are on. "cuda" without a number is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return a name such as "NVIDIA H100 80GB HBM3", or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "MPS"
    model = "CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    return f"{model} ({torch.get_num_threads()} threads)"


def describe(device: torch.device) -> str:
    """Return "cuda:0"; for a CPU also its threads and how they wait, as the log shows it."""
    if device.type != "cpu":
        return str(device)
    waiting = "".join(f", {name}={os.environ[name]}" for name in WAITING if name in os.environ)
    return f"{device} ({torch.get_num_threads()} threads{waiting})"


def leave_busy_cores(device: torch.device) -> str:
    """Compute with fewer threads on a CPU whose cores other processes keep busy.

    Returns what was found, for people; empty where nothing changes.
    """
    others = others_since_begin() if device.type == "cpu" else None
    if others is None:
        return ""
    before = torch.get_num_threads()
    threads = threads_beside(others, before, cores_of())
    if threads == before:
        return ""
    torch.set_num_threads(threads)
    return (
        f"other processes keep {others:.1f} cores busy: computing with {threads} of {before} "
        "threads (OMP_NUM_THREADS sets their number)"
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in.

    "auto" is bfloat16 on a GPU that supports it, float16 on another GPU, float32 elsewhere. On a
    CPU the tuner may replace float32 by bfloat16 later, where it has measured that.

    Raises ValueError for bfloat16 on a GPU that can only emulate it, and for 16 bits on MPS.
    """
    if device.type == "mps" and name not in ("auto", "float32"):
        raise ValueError(f"--dtype {name}: on MPS only float32 is supported")
    if name == "float16":
        return torch.float16
    if name == "float32" or (name == "auto" and device.type != "cuda"):
        return torch.float32
    # Without `including_emulation` PyTorch says yes on GPUs that compute bfloat16 in float32, more
    # slowly than float32 itself.
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if name == "bfloat16":
            gpu = torch.cuda.get_device_name(device)
            raise ValueError(f"--dtype bfloat16: {gpu} can only emulate it, use --dtype float16")
        return torch.float16
    return torch.bfloat16


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself (AMX or AVX512-BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type for sums that must not round: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def be_deterministic() -> None:
    """Use only algorithms that give the same bits each time on this device.

    An operation that does not have one raises.
    """
    # cuBLAS reads this when it starts, and is not deterministic without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The benchmark may pick another algorithm in each run.
    torch.backends.cudnn.benchmark = False


def autocast_to(dtype: torch.dtype, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that makes the context to compute in.

    A function, because an autocast context holds casts of weights for as long as it is open: each
    forward needs a new one. The section "Precision" of nanovlm_fast/model/README.md lists what
    computes in which type.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)
