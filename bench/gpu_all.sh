#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first, in one call of under ten minutes.
#     bash bench/gpu_all.sh [--out FOLDER] [--stages tests,kernels,...] [--device DEVICE]
#                           [--seconds N] [--quick] [--again]
# Each stage writes its result and its log under FOLDER (default bench/results) when it is done. The
# next call does not run it again, unless with --again; it runs the stages that had no time left.
# A stage that fails does not stop the others. A kernel whose tests fail is not timed in the stage
# kernels; the others are. --quick --device cpu rehearses everything on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
all=facts,tests,kernels,attention,train_step,memory,generate,profile,roofline,dataloader,sanitize,race
out=bench/results
device=cuda
budget=570 # seconds: the whole call stays below ten minutes
left=570
quick=""
again=""
python=${PYTHON:-python3}
stages=$all
while [ $# -gt 0 ]; do
    case $1 in
        --out | --stages | --device | --seconds)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in
                --out) out=$2 ;;
                --stages) stages=$2 ;;
                --device) device=$2 ;;
                --seconds) budget=$2 ;;
            esac
            shift ;;
        --quick) quick=--quick ;;
        --again) again=yes ;;
        *) echo "error: unknown option $1; see the top of $0" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out/logs" || exit 1

# Set `run` to the command of a stage, `limit` to the seconds it may take, and `least` to the
# seconds without which it is not worth starting.
command_of() {
    limit=240 least=20
    run=("$python" -m bench --only "$1" --device "$device" --out "$out" $quick)
    case $1 in
        facts | kernels | attention | memory | generate | profile | roofline | dataloader) ;;
        train_step) limit=420 ;;
        tests)
            limit=280
            # Stopped half a minute earlier by itself, so that it can still write what it has found.
            local seconds=$((left < limit ? left - 30 : limit - 30))
            run=("$python" -m bench.checks --limit "$seconds" --device "$device" --out "$out" --)
            # Six workers compile hundreds of kernel variants at once; more threads each would only
            # compete for the cores.
            export TORCHINDUCTOR_COMPILE_THREADS=2
            if [ -n "$quick" ]; then run+=(tests/model/test_attention.py)
            elif "$python" -c "import xdist" 2>/dev/null; then run+=(-n 6); fi ;;
        sanitize)
            limit=120
            run=(bash bench/sanitize.sh memcheck)
            [ -n "$quick" ] && run=(true) ;;
        race)
            # Its state is saved, so the next call continues a race that found no time to finish.
            limit=$budget least=120
            run=("$python" -m bench.race --preset nanovlm-222m --wall-s "$((left - 30))")
            [ -n "$quick" ] && run=("$python" -m bench.race --preset tiny --quick) least=20
            run+=(--device "$device" --out "$out") ;;
        *) echo "error: no stage $1; there are ${all//,/, }" >&2
            exit 2 ;;
    esac
}

# Once for all stages before the first one runs: a misspelt name must not be noticed minutes later.
for stage in ${stages//,/ }; do command_of "$stage"; done
failed=() unfinished=()
for stage in ${stages//,/ }; do
    log="$out/logs/$stage"
    [ -z "$again" ] && [ -e "$log.done" ] && { echo "== $stage: done before"; continue; }
    left=$((budget - SECONDS))
    command_of "$stage"
    if [ "$left" -lt "$least" ]; then
        echo "== $stage: no time left"
        unfinished+=("$stage")
        continue
    fi
    echo "== $stage: ${run[*]}"
    start=$SECONDS
    # SIGINT first: Python can then write what it has. A process on a hung device needs SIGKILL.
    timeout -s INT -k 15 "$((limit < left ? limit : left))" "${run[@]}" >"$log.log" 2>&1
    code=$?
    said="$((SECONDS - start)) s: $(tail -n 1 "$log.log")"
    case $code in
        0) touch "$log.done"; echo "   ok, $said" ;;
        75) # EX_TEMPFAIL: its own time was up
            unfinished+=("$stage"); echo "   continues in the next call, $said" ;;
        *) failed+=("$stage"); echo "   FAILED after $said (see $log.log)" ;;
    esac
done
[ ${#unfinished[@]} -eq 0 ] || echo "not finished, the next call continues: ${unfinished[*]}" >&2
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}" >&2
[ ${#failed[@]} -eq 0 ] && [ ${#unfinished[@]} -eq 0 ]
