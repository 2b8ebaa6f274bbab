"""An H100 that is not there: enough of one for PyTorch to compile for it on any machine.

    from bench.subjects import fake_h100
    fake_h100.pretend()                      # before anything else imports torch
    with FakeTensorMode():
        x = torch.empty(4, 4, device="cuda") # a shape, a type and a device; no memory

Under `FakeTensorMode`, Dynamo, AOTAutograd and Inductor then run as they do on an H100, and Triton
compiles for sm_90. Nothing can be computed. Works with a CPU build of PyTorch, and with a CUDA
build that finds no GPU. Needs g++ once per version of PyTorch, for `fake_h100.cpp`.

`pretend` changes torch and triton for the whole process. Take a process of its own for it, and end
it with `leave`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

SOURCE = Path(__file__).with_name("fake_h100.cpp")
VISION_ATTENTION = ("flash", "cudnn")
SMS = 132
SHARED = 227 * 1024  # bytes that a block can ask for

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=SMS,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED,
    shared_memory_per_multiprocessor=228 * 1024,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=0,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    clock_rate=1980000,
)

# PyTorch holds registrations only as long as their library lives.
_kept: list[Any] = []


def pretend(vision_attention: str = "flash") -> None:
    """Make torch and triton of this process believe in an H100.

    `vision_attention` is the kernel behind `scaled_dot_product_attention`, flash or cudnn: PyTorch
    chooses it in C++ from the properties of a device, which is not there to be asked.

    Raises RuntimeError if torch was imported before (it reads its hooks once, while it is
    imported), OSError if the library cannot be built, and ValueError for an unknown attention.
    """
    if vision_attention not in VISION_ATTENTION:
        known = ", ".join(VISION_ATTENTION)
        raise ValueError(f"--vision-attention {vision_attention}: there are {known}")
    if "torch" in sys.modules:
        raise RuntimeError("fake_h100.pretend() comes too late: torch is imported already")
    library = ctypes.CDLL(str(built_library()), mode=ctypes.RTLD_GLOBAL)
    _answer_for_torch_cuda()
    _allow_fake_tensors()
    library.set_fake_guard()
    _set_triton_driver()
    _fold_constants_on_cpu()
    _register_operators(vision_attention)


def leave(status: int) -> NoReturn:
    """End a process that called `pretend`, at once, with everything written.

    Backward passes on a GPU have a thread of their own, which may still hold Python objects. If it
    drops them while the interpreter shuts down, C++ ends the process: "terminate called without an
    active exception", after all the work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def built_library() -> Path:
    """Return the shared library of `SOURCE`, built for the installed PyTorch if it is not yet.

    It is kept in the user's cache folder. Raises OSError, in one line, if it cannot be built.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise OSError("bench.compiled_step needs PyTorch: pip install torch")
    root = Path(found.origin).parent
    # Not torch.__version__: torch must not be imported yet.
    stated = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())
    version = stated.group(1) if stated else "unknown"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = _cache_folder() / f"fake_h100-{version}-{digest}.so"
    if not library.exists():
        _build(library, root)
    return library


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "nanovlm_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(library: Path, root: Path) -> None:
    # Built beside it and renamed: two processes may build at the same time.
    temporary = library.with_name(f".{library.name}.{os.getpid()}")
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(temporary)]
    command += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    command += ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        what = "bench.compiled_step builds a small library and needs g++"
        raise OSError(f"{what}: apt-get install g++") from error
    except subprocess.CalledProcessError as error:
        temporary.unlink(missing_ok=True)
        wrong = [line for line in error.stderr.splitlines() if "error" in line]
        raise OSError(
            f"g++ could not build {SOURCE.name}: {(wrong or ['no reason given'])[0]}"
        ) from error
    os.replace(temporary, library)


def _answer_for_torch_cuda() -> None:
    """Replace what torch.cuda asks a driver by what an H100 answers."""
    import torch

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "is_current_stream_capturing": False,
    }
    _replace(torch.cuda, **{name: _always(answer) for name, answer in answers.items()})
    # Dynamo saves and restores the generator's state.
    state = torch.zeros(16, dtype=torch.uint8)
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, get_rng_state=_always(state), set_rng_state=_always(None))
    # What generated code enters and asks for.
    _replace(torch.cuda, _DeviceGuard=_NoGuard)
    _replace(torch._C, _cuda_getCurrentRawStream=_always(0))
    torch.version.cuda = torch.version.cuda or "12.8"


def _replace(owner: Any, **members: Any) -> None:
    for name, member in members.items():
        setattr(owner, name, member)


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


class _NoGuard:
    """torch.cuda's guard, around nothing."""

    def __init__(self, index: int):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _allow_fake_tensors() -> None:
    """Let fake tensors be on a device that is not there, and be taken for tensors."""
    from torch._subclasses import fake_tensor
    from torch.utils import _foreach_utils

    # Or the gradient norm would go tensor by tensor, which it does not on a GPU.
    _foreach_utils._foreach_supported_types.append(fake_tensor.FakeTensor)
    # FakeTensorMode must not ask the device for memory, although torch.cuda says that it exists.
    _replace(fake_tensor.FakeTensorMode, avoid_device_init=property(lambda self: True))
    _replace(fake_tensor, init_gpu_context=_always(None))


def _set_triton_driver() -> None:
    """Give Triton a driver that can name its target and nothing else."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    facts = {
        "max_shared_mem": SHARED,
        "max_num_regs": PROPERTIES.regs_per_multiprocessor,
        "multiprocessor_count": SMS,
        "warpSize": PROPERTIES.warp_size,
        "sm_clock_rate": PROPERTIES.clock_rate,
        "mem_clock_rate": PROPERTIES.memory_clock_rate,
        "mem_bus_width": PROPERTIES.memory_bus_width,
    }
    driver = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=_always(facts)),
        get_current_target=_always(GPUTarget("cuda", 90, PROPERTIES.warp_size)),
        get_current_device=_always(0),
        get_active_torch_device=_always(torch.device("cuda", 0)),
        get_current_stream=_always(0),
        set_current_device=_always(None),
        get_device_interface=_always(torch.cuda),
    )
    triton.runtime.driver.set_active(driver)


def _fold_constants_on_cpu() -> None:
    """Have Inductor compute constants on the CPU: it folds them with real tensors."""
    import torch
    import torch.utils._pytree as pytree
    from torch._inductor.fx_passes import joint_graph
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            moved = pytree.tree_map_only(
                torch.device, lambda _: torch.device("cpu"), (args, kwargs or {})
            )
            return func(*moved[0], **moved[1])

    folder = joint_graph.UniformValueConstantFolder
    run = folder.run

    def run_on_cpu(self: Any) -> Any:
        with OnCPU():
            return run(self)

    _replace(folder, run=run_on_cpu)


def _register_operators(vision_attention: str) -> None:
    """Register what a CPU build lacks, so that the graph is the one that a CUDA build traces."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)

    def attention(  # noqa: PLR0913  # the operator's own signature
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if attn_mask is not None or enable_gqa:
            raise ValueError("flash and cuDNN attention take neither a mask nor grouped heads here")
        aten = torch.ops.aten
        if vision_attention == "cudnn":
            with_lse = torch.is_grad_enabled()
            return aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, with_lse, dropout_p, is_causal, False, scale=scale
            )[0]
        return aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]

    library.impl("scaled_dot_product_attention", attention, "AutogradCUDA")
    # These are one operator each where they have a CUDA kernel. Without one they fall apart into
    # their parts before Inductor sees them. They are never called, so that nothing is a kernel too.
    for name in ("_fused_rms_norm", "silu_backward", "mish_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, _always(None), "CUDA")
