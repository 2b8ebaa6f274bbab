"""Which Triton kernels a GPU can run, by its compute capability.

The figures are those of `python -m bench.codegen --unfit --dtype float16`, with --target sm_80 and
sm_75, for the sizes of nanovlm-222m. `tests/kernels/test_codegen_sm90.py` compares one with the
compiler's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# KB of shared memory that a program of a kernel takes where there is no `wgmma`: before 9.0, and on
# 12.x. They are the kernels that multiply matrices; the others take at most 20 KB.
SHARED_KB = {
    "document_attention": 48,
    "image_attention": 104,
    "gelu_mlp": 144,
    "swiglu_mlp": 144,
    "pixel_shuffle_proj": 156,
}
# KB that a program may take there, from NVIDIA's CUDA programming guide. GPUs that are not listed
# have 227, which is enough for all, with `wgmma` too.
LIMIT_KB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (12, 0): 99, (12, 1): 99}
# Before it, Triton has no product on tensor cores: it multiplies number by number, with up to 15 KB
# of each thread's sums in memory, as the registers do not suffice.
PRODUCTS_FROM = (8, 0)


def unfit_kernels(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Of these kernels, those that the device cannot run, and why, for people."""
    if device.type != "cuda":
        return {}
    return unfit_for(names, torch.cuda.get_device_capability(device))


def unfit_for(names: Iterable[str], capability: tuple[int, int]) -> dict[str, str]:
    """`unfit_kernels` of a GPU of this compute capability."""
    limit = LIMIT_KB.get(capability)
    unfit = {}
    for name in names:
        needed = SHARED_KB.get(name, 0)
        if needed and capability < PRODUCTS_FROM:
            unfit[name] = "Triton multiplies on tensor cores from compute capability 8.0 on"
        elif limit is not None and needed > limit:
            unfit[name] = f"it takes {needed} KB of shared memory, and there are {limit} KB"
    return unfit
