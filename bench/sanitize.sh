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
[ $# -gt 0 ] || set -- memcheck racecheck
for tool in "$@"; do
    echo "== $tool"
    # Without PyTorch's cache every tensor is its own allocation, so that a read past its end is
    # noticed instead of landing in a neighbour.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "${PYTHON:-python3}" -m bench.subjects.small_launches --device cuda
done
