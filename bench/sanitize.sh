#!/usr/bin/env bash
# compute-sanitizer over one small forward and backward of every kernel: finds out-of-bounds
# accesses and races.
#     bash bench/sanitize.sh [tool ...]        default: memcheck racecheck
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || {
    echo "error: compute-sanitizer (part of CUDA) is not on the PATH" >&2
    exit 1
}
launches=$(mktemp --suffix=.py)
trap 'rm -f "$launches"' EXIT
cat >"$launches" <<'PYTHON'
import torch

from bench.kernels import results_of
from bench.registry import KERNELS, ours

# Sizes that make more than one iteration of the pipelined loops: races appear between iterations.
LARGER = {
    "rms_norm": dict(m=4500, n=576, residual=torch.float32),
    "layer_norm": dict(m=2500, n=768, residual=torch.float32),
    "pixel_shuffle_proj": dict(batch=3, height=14, width=14, channels=192, n=576, factor=2),
    "linear_cross_entropy": dict(rows=40, vocabulary=20000, width=64),
}
for kernel in KERNELS:
    for dtype in (torch.bfloat16, torch.float32):
        sizes = LARGER.get(kernel.name, kernel.small)
        results_of(ours(kernel), kernel.module.make_inputs(**sizes, dtype=dtype, device="cuda"))
        torch.cuda.synchronize()
    print(kernel.name, "ran")
PYTHON
for tool in "${@:-memcheck racecheck}"; do
    for one in $tool; do
        echo "== $one"
        # Without PyTorch's cache every tensor is its own allocation, so that a read past its end is
        # noticed instead of landing in a neighbour.
        PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$one" --error-exitcode 1 "${PYTHON:-python3}" "$launches"
    done
done
