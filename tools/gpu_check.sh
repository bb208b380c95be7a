#!/usr/bin/env bash
# The whole GPU side in one go, in under nine minutes, what matters most first:
#   first      versions; every mechanism right or wrong, in seconds; the time of each kernel in the
#              calls that a bar is set for
#   tests      capture, bit-equal repeats and offsets beyond 2^32; then every test marked gpu
#   attention  attention measured against everything that it is compared with
#   models     whole models measured
#   memory     a few tiny calls under compute-sanitizer, where it is installed
# Needs torch, triton, timm and pytest in the Python that $PYTHON names, and nothing installed of
# this repository. Each step is ended by SIGINT, so that reports are written whatever the time.
#
#     tools/gpu_check.sh [FOLDER]              # writes FOLDER/first.jsonl, *.json, report.tar.gz
#     tools/gpu_check.sh --only models         # one of the parts has all the time
#     tools/gpu_check.sh --dry-run [FOLDER]    # no GPU: tiny shapes, in Triton's interpreter
#
# GPU_CACHE names an archive of compiled kernels (`make gpu-cache`); output/gpu_cache.tar.xz is taken
# if it is there. Without one that fits, the kernels of the part `first` are compiled on all cores.
# What each step printed, and the reports of the tests, are in report.tar.gz, from step to step.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all="first tests attention models memory"
dry=()
parts=$all
budget=${GPU_CHECK_SECONDS:-520}
while [[ ${1:-} == --* ]]; do
    case $1 in
    --dry-run)
        dry=(--dry-run)
        export TRITON_INTERPRET=1
        budget=${GPU_CHECK_SECONDS:-3600} # it is not about time
        ;;
    --only)
        parts=${2:-}
        if [[ -z $parts || $parts == *" "* || " $all " != *" $parts "* ]]; then
            echo "gpu_check: --only takes one of: $all; not '$parts'" >&2
            exit 2
        fi
        shift
        ;;
    *)
        echo "gpu_check: unknown option $1; there are --only and --dry-run" >&2
        exit 2
        ;;
    esac
    shift
done
folder=${1:-output/gpu_check}
python=${PYTHON:-python3}
cache=${GPU_CACHE:-output/gpu_cache.tar.xz}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# Trying every configuration of every kernel takes longer than all else.
export VITLINEAR_AUTOTUNE=${VITLINEAR_AUTOTUNE:-0}
status=0

# Whole or as it was, whatever ends the script.
pack() {
    (cd "$work" && tar czf "$folder/.report" --exclude=triton_cache .) &&
        mv "$folder/.report" "$folder/report.tar.gz"
}
trap 'pack; rm -rf "$work"' EXIT

wanted() { [[ " $parts " == *" $1 "* ]]; }

# run NAME SECONDS COMMAND...: ends the command in time, so that it can still write its report. What
# bash starts in the background would ignore the signal, and so would Python.
run() {
    local name=$1 seconds=$2
    shift 2
    env --default-signal=INT timeout -s INT -k 10 "$seconds" "$@" >"$work/$name.txt" 2>&1
}

# Without the settings in pyproject.toml, which name plugins that need not be there.
pytest=("$python" -m pytest -c /dev/null --rootdir . -v --import-mode=importlib
    -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning -m gpu)
kernels=tests/ops/triton/test_gpu.py

# tests NAME SECONDS FILE [FLAG...]
tests() {
    local name=$1 limit=$2
    shift 2
    run "tests_$name" "$limit" "${pytest[@]}" --junit-xml "$work/tests_$name.xml" "$@"
}

# Versions and correctness take seconds with a cache of compiled kernels, so they have no limit of
# their own; the bars follow.
run_first() {
    local seconds=$((budget < 150 ? budget : 150))
    if [[ ${#dry[@]} == 0 ]]; then
        export TRITON_CACHE_DIR=$work/triton_cache
        if ! [[ -e $cache ]] || ! "$python" tools/gpu_cache.py unpack "$cache" "$TRITON_CACHE_DIR"; then
            run compile 120 "$python" tools/gpu_cache.py compile "$TRITON_CACHE_DIR" --only first
            tail -n 1 "$work/compile.txt"
        fi
    fi
    run first "$seconds" "$python" benchmarks/first_contact.py "${dry[@]}" \
        --output "$folder/first.jsonl" --seconds $((seconds - 15)) || status=1
    cat "$work/first.txt"
}

# Compiling takes most of the time, and as many cores as there are processes: one a mechanism.
# What needs much memory, or the device to itself, goes alone.
run_tests() {
    local contract="cuda_graph more_than_8_gib bit_equal"
    local alone="workspace or resolution"
    local general="compile_fullgraph or export or autocast or states_of_vittt"
    local left name mechanism mechanisms pid pids=()
    for name in $contract; do
        tests "$name" $((budget < 520 ? 30 : budget / 16)) "$kernels" -k "$name" || status=1
        tail -n 1 "$work/tests_$name.txt"
    done
    contract="measured_configurations or ${contract// / or }"
    if [[ ${#dry[@]} != 0 ]]; then return; fi # all of them would be skipped, as these were
    left=$((budget - SECONDS))
    if wanted attention; then left=$((left / 2)); fi
    left=$(((left > 100 ? left : 100) / 5)) # three fifths side by side, and two steps alone
    mechanisms=$("$python" -c "from vitlinear import ops; print(*ops.MECHANISMS)") || exit 1
    for mechanism in $mechanisms; do
        tests "$mechanism" $((3 * left)) "$kernels" \
            -k "([$mechanism] or -$mechanism] or [$mechanism-) and not ($alone or $contract)" &
        pids+=($!)
    done
    tests general $((3 * left)) "$kernels" -k "$general" &
    pids+=($!)
    tests train $((3 * left)) tests/train/test_run.py tests/train/test_progress.py &
    pids+=($!)
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    tests alone "$left" "$kernels" -k "$alone" || status=1
    tests configurations "$left" "$kernels" -k measured_configurations || status=1
    tail -qn 1 "$work"/tests_*.txt
}

# measure NAME SCRIPT SECONDS [FLAG...]: writes NAME.json and NAME.txt. Rows that there is no time
# left for say so; a row that hangs is ended, and the file holds those before it.
measure() {
    local name=$1 script=$2 seconds=$3
    shift 3
    seconds=$((seconds > 30 ? seconds : 30))
    run "$name" $((seconds + 15)) "$python" "benchmarks/$script" "${dry[@]}" \
        --output "$folder/$name.json" --seconds $((seconds - 15)) "$@" || status=1
    cat "$work/$name.txt"
}

# A program under it is many times slower: a few tests of tiny sizes. PyTorch's allocator would hide
# what one tensor does to the next.
run_memory() {
    local seconds=$((budget - SECONDS))
    if ! command -v compute-sanitizer >/dev/null; then
        echo "gpu_check: no compute-sanitizer, memory is not checked"
    elif ((seconds < 60)); then
        echo "gpu_check: no time left to check memory"
    else
        local tool
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" $((seconds / 2)) \
                compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "${pytest[@]}" "$kernels" -k "head_sizes and [8-" || status=1
            tail -n 3 "$work/$tool.txt"
        done
    fi
}

if wanted first; then
    run_first
    pack
fi
if wanted tests; then
    run_tests
    pack
fi
if wanted attention; then
    left=$((budget - SECONDS))
    if wanted models; then left=$((left / 2)); fi
    recorded=("$work"/tests_*.xml)
    if [ ! -e "${recorded[0]}" ]; then recorded=(); fi
    measure gpu gpu.py "$left" --tests "${recorded[@]}"
    pack
fi
if wanted models; then measure models gpu_models.py $((budget - SECONDS)); fi
if wanted memory && [[ ${#dry[@]} == 0 ]]; then run_memory; fi
echo "gpu_check: $SECONDS s, exit status $status"
exit "$status"
