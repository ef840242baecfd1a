#!/usr/bin/env bash
# Every figure that takes a GPU: all benchmarks on it, then one class at the published length: CSI, with AUROC against
# epochs every EVERY minutes, stage 2 on it, and the other rows of the published tables. DATA_PATH
# ({train,test}/<class>/*), CLASS, EPOCHS, MORE, MODEL, LOG_ROOT go to short_run.sh. REPEATS=0 leaves the benchmarks out.
# What is measured is kept in LOG_ROOT/gpu/; images/s, seconds and peak memory of training and evaluation are in the run
# folders' metrics.jsonl and result_*.json. Started again it goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
[ -n "${DATA_PATH:-}" ] || { echo "error: DATA_PATH: give a folder with train/<class>/ and test/<class>/" >&2; exit 2; }
export DATA_PATH CLASS=${CLASS:-0} EPOCHS=${EPOCHS:-1000} MORE=${MORE:-300} MODEL=${MODEL:-resnet18}
export DEVICE=${DEVICE:-cuda} LOG_ROOT=${LOG_ROOT:-./logs} REPEATS=${REPEATS:-21} EVERY=${EVERY:-5}
out=${LOG_ROOT/#\~\//$HOME/}/gpu # commands expand ~ themselves
mkdir -p "$out"

measure() { # a benchmark that fails is told, and the next one measured
    "$PYTHON" -m "benchmarks$2" --device "$DEVICE" "${@:3}" | tee "$out/$1.md" || echo "== benchmarks$2 failed"
}
if [ "$REPEATS" -gt 0 ]; then
    measure benchmarks "" --repeats "$REPEATS"
    measure floors .floors --model "$MODEL" --images 512
    measure growth .growth
    measure conditioning .conditioning
    measure sdnet .sdnet --amp bf16 --repeats "$REPEATS"
fi
bash scripts/short_run.sh | tee "$out/run.txt"
