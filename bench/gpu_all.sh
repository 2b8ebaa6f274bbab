#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first, in one call of under ten minutes.
#     bash bench/gpu_all.sh [--out FOLDER] [--stages tests,kernels,...] [--device DEVICE] [--seconds N] [--quick] [--again]
# Each stage writes its result and its log under FOLDER (default bench/results) as soon as it is done; a stage that is
# done is not run again by the next call, unless with --again: what has found no time left is what the next call does.
# A stage that fails stops no other; a kernel whose tests fail gets no time in the stage kernels, the others do.
# --quick --device cpu rehearses all of it anywhere.
set -uo pipefail
cd "$(dirname "$0")/.."
all=facts,tests,kernels,attention,train_step,memory,generate,profile,roofline,dataloader,sanitize,race
out=bench/results device=cuda budget=570 left=570 quick="" again="" python=${PYTHON:-python3} stages=$all
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

command_of() { # the command of a stage, the seconds it may take, and those it should not begin without
    limit=240 least=20
    run=("$python" -m bench --only "$1" --device "$device" --out "$out" $quick)
    case $1 in
        facts | kernels | attention | memory | generate | profile | roofline | dataloader) ;;
        train_step) limit=420 ;;
        tests) limit=280 # what a pytest that is stopped at its limit had found is written
            run=("$python" -m bench.checks --limit "$((left < limit ? left - 30 : limit - 30))" --device "$device" --out "$out" --)
            # compiling a few hundred variants of kernels is work for all cores
            export TORCHINDUCTOR_COMPILE_THREADS=2
            if [ -n "$quick" ]; then run+=(tests/test_attention.py)
            elif "$python" -c "import xdist" 2>/dev/null; then run+=(-n 6); fi ;;
        sanitize) limit=120; run=(bash bench/sanitize.sh memcheck)
            [ -n "$quick" ] && run=(true) ;;
        race) limit=$budget least=120 # its state is kept: what found no time goes on in the next call
            run=("$python" -m bench.race --preset nanovlm-222m --wall-s "$((left - 30))" --device "$device" --out "$out")
            [ -n "$quick" ] && run=("$python" -m bench.race --preset tiny --quick --device "$device" --out "$out") least=20 ;;
        *) echo "error: no stage $1; there are ${all//,/, }" >&2
            exit 2 ;;
    esac
}

for stage in ${stages//,/ }; do command_of "$stage"; done # a misspelt stage stops everything before it starts
failed=() unfinished=()
for stage in ${stages//,/ }; do
    log="$out/logs/$stage"
    [ -z "$again" ] && [ -e "$log.done" ] && { echo "== $stage: done before"; continue; }
    left=$((budget - SECONDS))
    command_of "$stage"
    [ "$left" -lt "$least" ] && { echo "== $stage: no time left"; unfinished+=("$stage"); continue; }
    echo "== $stage: ${run[*]}"
    start=$SECONDS
    timeout -s INT -k 15 "$((limit < left ? limit : left))" "${run[@]}" >"$log.log" 2>&1
    code=$?
    said="$((SECONDS - start)) s: $(tail -n 1 "$log.log")"
    case $code in
        0) touch "$log.done"; echo "   ok, $said" ;;
        75) unfinished+=("$stage"); echo "   goes on in the next call, $said" ;;
        *) failed+=("$stage"); echo "   FAILED after $said (see $log.log)" ;;
    esac
done
[ ${#unfinished[@]} -eq 0 ] || echo "not finished, the next call goes on: ${unfinished[*]}" >&2
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}" >&2
[ ${#failed[@]} -eq 0 ] && [ ${#unfinished[@]} -eq 0 ]
