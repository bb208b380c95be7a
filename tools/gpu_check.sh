#!/usr/bin/env bash
# The whole GPU side in one go: the tests marked gpu, then the benchmark, in under nine minutes.
# Needs torch, triton, timm and pytest in the Python that $PYTHON names, and nothing installed of
# this repository.
#
#     tools/gpu_check.sh [FOLDER]              # writes FOLDER/gpu.json and FOLDER/gpu.txt
#     tools/gpu_check.sh --dry-run [FOLDER]    # no GPU: tiny shapes, in Triton's interpreter
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=()
if [ "${1:-}" = --dry-run ]; then
    dry=(--dry-run)
    export TRITON_INTERPRET=1
    shift
fi
folder=${1:-output/gpu_check}
python=${PYTHON:-python3}
budget=${GPU_CHECK_SECONDS:-520}
mkdir -p "$folder"
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# Trying every configuration of every kernel takes longer than all else.
export VITLINEAR_AUTOTUNE=${VITLINEAR_AUTOTUNE:-0}

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
rm -f "$folder"/tests_*.xml
alone="more_than_8_gib or workspace or measured_configurations or resolution"
mechanisms="rala mala inline nala l2 lightnet elu relu"
pids=()
for mechanism in $mechanisms; do
    tests "$mechanism" 280 -k "([$mechanism] or -$mechanism]) and not ($alone)" &
    pids+=($!)
done
general="compile_fullgraph or cuda_graph or export or autocast"
tests general 280 -k "$general" &
pids+=($!)
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
tests alone 120 -k "$alone" || status=1
tail -qn 1 "$folder"/tests_*.txt

# Rows that there is no time left for say so; a row that hangs is ended, and the file holds the rest.
left=$((budget - SECONDS > 30 ? budget - SECONDS : 30))
timeout $((left + 15)) "$python" benchmarks/gpu.py "${dry[@]}" --output "$folder/gpu.json" \
    --seconds $((left - 15)) \
    --tests "$folder"/tests_*.xml >"$folder/gpu.txt" 2>&1 || status=1
cat "$folder/gpu.txt"
echo "gpu_check: $SECONDS s, exit status $status"
exit "$status"
