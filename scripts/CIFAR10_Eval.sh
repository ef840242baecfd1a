#!/usr/bin/env bash
# CIFAR-10, one class at a time: AUROC of the CSI_sr score on the test photographs.
# Classes START..END (0..9), data below DATA_PATH, run folders below LOG_ROOT; further arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA_PATH=${DATA_PATH:-../Data/} LOG_ROOT=${LOG_ROOT:-./logs}

for i in $(seq "${START:-0}" "${END:-9}"); do
    "$PYTHON" eval.py \
        --dataset cifar10 \
        --data_path "$DATA_PATH" \
        --one_class_idx "$i" \
        --model resnet18 \
        --simclr_dim 512 \
        --shift_trans_type rot_bmix \
        --mix_alpha 0.2 \
        --mode ood_pre_cocsr_refmix \
        --load_path "$LOG_ROOT/cifar10_resnet18_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_${i}_f512_mix82_dm1_init/last.cocsr_model" \
        --ood_score CSI_sr \
        --ood_samples 10 \
        --resize_factor 0.54 \
        --resize_fix \
        --sr_lambda 1e-3 \
        --sr_dict_size 512 \
        --invert_sr_feature_norm \
        --print_score \
        --save_score "$@"
done
