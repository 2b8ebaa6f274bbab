"""Registers, spills and shared memory of kernels that Inductor generated, by Triton and ptxas."""

from __future__ import annotations

from typing import Any

MOST = ("registers", "stack", "local", "shared")  # the last three in bytes


def rows(sources: dict[str, str]) -> list[dict[str, Any]]:
    """Compile every configuration of every kernel for sm_90; one row each.

    A configuration is one choice of tile, warps and stages. Inductor times those of a kernel on the
    device and takes the fastest, so each of them may run. A row of one that does not compile has an
    `error`.
    """
    import torch._inductor.config as inductor
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None  # it would look for libcuda
    for launcher in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(inductor, launcher):  # they load what was compiled onto the device
            setattr(inductor, launcher, False)
    found = []
    for name, source in sources.items():
        tuner = getattr(PyCodeCache.load(source), name)
        found += [{"kernel": name, **_row(tuner, config)} for config in tuner.configs]
    return found


def _row(tuner: Any, config: Any) -> dict[str, Any]:
    from bench.codegen import resources

    tile = {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
    try:
        kernel = tuner._precompile_config(config).kernel
    except Exception as error:  # one configuration of many: Inductor leaves it out too
        return {"tile": tile, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    usage = resources(kernel.asm["cubin"])
    return {"tile": tile, "shared": kernel.metadata.shared, **usage}


def by_kernel(configurations: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kernel -> how many configurations it has and do not compile, and the most that one takes."""
    found: dict[str, dict[str, int]] = {}
    for row in configurations:
        kernel = found.setdefault(row["kernel"], dict.fromkeys(("configurations", "failed"), 0))
        kernel["configurations"] += 1
        kernel["failed"] += "error" in row
        for name in MOST:
            kernel[name] = max(kernel.get(name, 0), row.get(name, 0))
    return found


def spilled(kernel: dict[str, int]) -> bool:
    """Whether a kernel keeps values in local memory for lack of registers."""
    return kernel["stack"] > 0 or kernel["local"] > 0
