#!/usr/bin/env bash
# CIFAR-10, one class at a time: stage 1, contrastive features (CSI), 1000 epochs.
# Classes START..END (0..9), data below DATA_PATH, run folders below LOG_ROOT; further arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA_PATH=${DATA_PATH:-../Data/} LOG_ROOT=${LOG_ROOT:-./logs}

for i in $(seq "${START:-0}" "${END:-9}"); do
    "$PYTHON" train.py \
        --dataset cifar10 \
        --data_path "$DATA_PATH" \
        --one_class_idx "$i" \
        --model resnet18 \
        --simclr_dim 512 \
        --shift_trans_type rot_bmix \
        --mix_alpha 0.2 \
        --log_root "$LOG_ROOT" \
        --mode simclr_CSI \
        --batch_size 128 \
        --suffix f512_mix82 "$@"
done
