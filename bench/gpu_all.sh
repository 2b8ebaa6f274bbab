#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first, in one call of under ten minutes.
#     bash bench/gpu_all.sh [--out FOLDER] [--stages tests,kernels,...] [--device DEVICE] [--seconds N] [--quick] [--again]
# Each stage writes its result and its log under FOLDER (default bench/results) as soon as it is done; a stage that is
# done is not run again by the next call, unless with --again: what has found no time left is what the next call does.
# --quick --device cpu rehearses all of it anywhere.
set -uo pipefail
cd "$(dirname "$0")/.."
out=bench/results device=cuda budget=570 quick="" again="" python=${PYTHON:-python3}
stages=roofline,tests,kernels,train_step,attention,memory,generate,dataloader,sanitize
while [ $# -gt 0 ]; do
    case $1 in
        --out | --stages | --device | --seconds)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in --out) out=$2 ;; --stages) stages=$2 ;; --device) device=$2 ;; --seconds) budget=$2 ;; esac
            shift ;;
        --quick) quick=--quick ;;
        --again) again=yes ;;
        *) echo "error: unknown option $1; see the top of $0" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out/logs" || exit 1

command_of() { # the command of a stage, and the seconds it may take
    case $1 in
        # compiling a few hundred variants of kernels is work for all cores
        tests) limit=280; run=("$python" -m pytest -v -m "gpu and not slow" --timeout 120 --continue-on-collection-errors)
            export TORCHINDUCTOR_COMPILE_THREADS=2
            [ -n "$quick" ] && run+=(tests/test_attention.py)
            "$python" -c "import xdist" 2>/dev/null && [ -z "$quick" ] && run+=(-n 6) ;;
        sanitize) limit=120; run=(bash bench/sanitize.sh memcheck)
            [ -n "$quick" ] && run=(true) ;;
        train_step) limit=420; run=("$python" -m bench --only "$1" --device "$device" --out "$out" $quick) ;;
        roofline | kernels | attention | memory | generate | dataloader)
            limit=240; run=("$python" -m bench --only "$1" --device "$device" --out "$out" $quick) ;;
        *) echo "error: no stage $1; there are roofline, tests, kernels, train_step, attention, memory, generate, dataloader, sanitize" >&2
            exit 2 ;;
    esac
}

for stage in ${stages//,/ }; do command_of "$stage"; done # a misspelt stage stops everything before it starts
failed=()
for stage in ${stages//,/ }; do
    log="$out/logs/$stage"
    [ -z "$again" ] && [ -e "$log.done" ] && { echo "== $stage: done before"; continue; }
    command_of "$stage"
    left=$((budget - SECONDS))
    [ "$left" -lt 20 ] && { echo "== $stage: no time left"; failed+=("$stage"); continue; }
    echo "== $stage: ${run[*]}"
    start=$SECONDS
    if timeout -s INT -k 15 "$((limit < left ? limit : left))" "${run[@]}" >"$log.log" 2>&1; then
        touch "$log.done"
        echo "   ok, $((SECONDS - start)) s: $(tail -n 1 "$log.log")"
    else
        failed+=("$stage")
        echo "   FAILED after $((SECONDS - start)) s, see $log.log: $(tail -n 1 "$log.log")"
    fi
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
