#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first, in one call of under ten minutes.
#     bash bench/gpu_all.sh [--out FOLDER] [--stages tests,kernels,...] [--device DEVICE]
#                           [--seconds N] [--quick] [--again]
# Each stage writes its result and its log under FOLDER (default bench/results) when it is done. The
# next call does not run it again on the same commit and device, unless with --again; it runs the
# stages that had no time left.
# In a copy of the tree without its git history, set NANOVLM_FAST_COMMIT to the commit.
# A stage that fails does not stop the others, and none takes the least time that the ones after it
# need. A kernel whose tests fail is not timed in the stage kernels; the others are.
# --quick --device cpu rehearses everything on any machine, under runs/gpu_all.
# The stages, their limits and their options are in bench/suites.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.harness.stages "$@"
