#!/usr/bin/env bash
# CIFAR-10, one class at a time: stage 2, sparse dictionaries on stage 1, epochs 1001 to 1300.
# Classes START..END (0..9), data below DATA_PATH, run folders below LOG_ROOT; further arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA_PATH=${DATA_PATH:-../Data/} LOG_ROOT=${LOG_ROOT:-./logs}

for i in $(seq "${START:-0}" "${END:-9}"); do
    "$PYTHON" train_cocsr.py \
        --dataset cifar10 \
        --data_path "$DATA_PATH" \
        --one_class_idx "$i" \
        --model resnet18 \
        --simclr_dim 512 \
        --shift_trans_type rot_bmix \
        --mix_alpha 0.2 \
        --log_root "$LOG_ROOT" \
        --mode cocsr_dict \
        --batch_size 128 \
        --sr_lr 1e-3 \
        --resume_path "$LOG_ROOT/cifar10_resnet18_unsup_simclr_CSI_shift_rot_bmix_one_class_${i}_f512_mix82" \
        --epoch 1300 \
        --sr_dict_size 512 \
        --sr_lambda 1e-3 \
        --loss_lambda_sr_l1 1e-3 \
        --invert_sr_feature_norm \
        --loss_dict_constr_mode 1 \
        --ini_sr_dict_train \
        --suffix f512_mix82_dm1_init "$@"
done
