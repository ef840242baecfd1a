#!/usr/bin/env bash
# Every figure that takes a GPU: all benchmarks on it, then every row of the published tables for one class at the
# published length. DATA_PATH ({train,test}/<class>/*), CLASS, EPOCHS, MORE, MODEL, LOG_ROOT go to short_run.sh.
# REPEATS=0 leaves the benchmarks out. What is measured is kept in LOG_ROOT/gpu/.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
: "${DATA_PATH:?folder with train/<class>/ and test/<class>/}"
export DATA_PATH CLASS=${CLASS:-0} EPOCHS=${EPOCHS:-1000} MORE=${MORE:-300} MODEL=${MODEL:-resnet18}
export DEVICE=${DEVICE:-cuda} LOG_ROOT=${LOG_ROOT:-./logs} REPEATS=${REPEATS:-21}
out=$LOG_ROOT/gpu
mkdir -p "$out"

if [ "$REPEATS" -gt 0 ]; then
    "$PYTHON" -m benchmarks --device "$DEVICE" --repeats "$REPEATS" | tee "$out/benchmarks.md"
    "$PYTHON" -m benchmarks.floors --device "$DEVICE" --model "$MODEL" --images 512 | tee "$out/floors.md"
    "$PYTHON" -m benchmarks.growth --device "$DEVICE" | tee "$out/growth.md"
fi
bash scripts/short_run.sh | tee "$out/run.txt"
