#!/usr/bin/env bash
# compute-sanitizer over one small forward and backward of every kernel: out-of-bounds accesses and races.
#     bash bench/sanitize.sh [tool ...]        default: memcheck racecheck
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "error: compute-sanitizer (part of CUDA) is not on the PATH" >&2; exit 1; }
launches=$(mktemp --suffix=.py)
trap 'rm -f "$launches"' EXIT
cat >"$launches" <<'PYTHON'
import torch

from bench.kernels import results_of
from bench.registry import KERNELS, ours

for kernel in KERNELS:
    for dtype in (torch.bfloat16, torch.float32):
        results_of(ours(kernel), kernel.module.make_inputs(**kernel.small, dtype=dtype, device="cuda"))
        torch.cuda.synchronize()
    print(kernel.name, "ran")
PYTHON
for tool in "${@:-memcheck racecheck}"; do
    for one in $tool; do
        echo "== $one"
        PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$one" --error-exitcode 1 python "$launches"
    done
done
