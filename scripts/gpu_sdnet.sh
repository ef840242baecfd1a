#!/usr/bin/env bash
# CIFAR-10 by an SDNet-18 on a GPU, in MINUTES of training: as many of the 220 published epochs as fit, with the cosine
# ending there, in bf16; then accuracy and noise x lambda, which take some minutes more. The speed that decides is that
# of two epochs of their own. Started again it goes on. Further flags go to training.
#
#   MINUTES      of training, for each network (20)
#   MODELS       networks (sdnet18); of several all get the length of the slowest
#   DATASET      cifar10, or folder for photographs in DATA_PATH (cifar10)
#   SEEDS, NOISE_FLAGS, DATA_PATH, LOG_ROOT, PYTHON: see sdnet_sweep.sh; without PYTHON, .venv is made and used
set -euo pipefail
[ -n "${PYTHON:-}" ] || source "$(dirname "$0")/setup.sh" requirements.txt
cd "$(dirname "$0")/.."
source scripts/recipes.sh
source scripts/once.sh

recipe sdnet epochs supervised supervised_run batch
export PYTHON LOG_ROOT=${LOG_ROOT:-./logs} MODELS=${MODELS:-sdnet18}
DATASET=${DATASET:-cifar10}
logs=$(expanded "$LOG_ROOT") probes=()
for model in $MODELS; do
    "$PYTHON" $supervised --dataset "$DATASET" --data_path "${DATA_PATH:-../Data/}" --model "$model" $batch --epochs 2 \
        --log_root "${LOG_ROOT}_speed" --amp bf16 "$@"
    probes+=("${logs}_speed/${DATASET}_${model}_$supervised_run")
done
EPOCHS=$("$PYTHON" -m scripts.length "${probes[@]}" --minutes "${MINUTES:-20}" --most "$epochs")
echo "-- $EPOCHS of $epochs epochs fit ${MINUTES:-20} minutes"
export EPOCHS
bash scripts/sdnet_sweep.sh sdnet "$DATASET" --amp bf16 "$@"
"$PYTHON" -m scripts.sdnet "$LOG_ROOT"
