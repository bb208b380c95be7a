#!/usr/bin/env bash
# The whole GPU side in one go: the tests marked gpu, then attention and whole models measured, in
# under nine minutes. Needs torch, triton, timm and pytest in the Python that $PYTHON names, and
# nothing installed of this repository.
#
#     tools/gpu_check.sh [FOLDER]              # writes FOLDER/gpu.json, FOLDER/models.json, *.txt
#     tools/gpu_check.sh --only models         # or tests, or attention: one part has all the time
#     tools/gpu_check.sh --dry-run [FOLDER]    # no GPU: tiny shapes, in Triton's interpreter
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=()
parts="tests attention models"
while [[ ${1:-} == --* ]]; do
    case $1 in
    --dry-run)
        dry=(--dry-run)
        export TRITON_INTERPRET=1
        ;;
    --only)
        parts=${2:-}
        if [[ ! $parts =~ ^(tests|attention|models)$ ]]; then
            echo "gpu_check: --only takes tests, attention or models, not '$parts'" >&2
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
budget=${GPU_CHECK_SECONDS:-520}
mkdir -p "$folder"
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# Trying every configuration of every kernel takes longer than all else.
export VITLINEAR_AUTOTUNE=${VITLINEAR_AUTOTUNE:-0}
status=0

wanted() { [[ " $parts " == *" $1 "* ]]; }

# Without the settings in pyproject.toml, which name plugins that need not be there.
tests() {
    local name=$1 limit=$2
    shift 2
    timeout "$limit" "$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -q \
        -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning -m gpu \
        --junit-xml "$folder/tests_$name.xml" tests/ops/triton/test_gpu.py "$@" \
        >"$folder/tests_$name.txt" 2>&1
}

# Compiling takes most of the time, and as many cores as there are processes: one a mechanism.
# What needs much memory, or the device to itself, follows alone.
run_tests() {
    local alone="more_than_8_gib or workspace or measured_configurations or resolution"
    local general="compile_fullgraph or cuda_graph or export or autocast"
    local mechanism pid pids=()
    rm -f "$folder"/tests_*.xml
    for mechanism in rala mala inline nala l2 lightnet elu relu identity pola; do
        tests "$mechanism" 280 -k "([$mechanism] or -$mechanism]) and not ($alone)" &
        pids+=($!)
    done
    tests general 280 -k "$general" &
    pids+=($!)
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    tests alone 120 -k "$alone" || status=1
    tail -qn 1 "$folder"/tests_*.txt
}

# measure NAME SCRIPT SECONDS [FLAG...]: writes NAME.json and NAME.txt. Rows that there is no time
# left for say so; a row that hangs is ended, and the file holds those before it.
measure() {
    local name=$1 script=$2 seconds=$3
    shift 3
    seconds=$((seconds > 30 ? seconds : 30))
    timeout $((seconds + 15)) "$python" "benchmarks/$script" "${dry[@]}" \
        --output "$folder/$name.json" --seconds $((seconds - 15)) "$@" \
        >"$folder/$name.txt" 2>&1 || status=1
    cat "$folder/$name.txt"
}

if wanted tests; then run_tests; fi
if wanted attention; then
    left=$((budget - SECONDS))
    if wanted models; then left=$((left / 2)); fi
    recorded=("$folder"/tests_*.xml)
    if [ ! -e "${recorded[0]}" ]; then recorded=(); fi
    measure gpu gpu.py "$left" --tests "${recorded[@]}"
fi
if wanted models; then measure models gpu_models.py $((budget - SECONDS)); fi
echo "gpu_check: $SECONDS s, exit status $status"
exit "$status"
