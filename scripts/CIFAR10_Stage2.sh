#!/usr/bin/env bash
# CIFAR-10, one class at a time: stage 2, sparse dictionaries on stage 1, epochs 1001 to 1300.
# START and END choose the classes; further arguments go to every command.
set -euo pipefail
source "$(dirname "$0")/CIFAR10_common.sh"

for i in $(seq "$START" "$END"); do
    "$PYTHON" train_cocsr.py "${shared[@]}" --one_class_idx "$i" --mode cocsr_dict --batch_size 128 \
        --resume_path "$(stage1_run "$i")" --epoch 1300 --sr_lr 1e-3 --sr_dict_size 512 --sr_lambda 1e-3 \
        --loss_lambda_sr_l1 1e-3 --invert_sr_feature_norm --loss_dict_constr_mode 1 --ini_sr_dict_train \
        --suffix f512_mix82_dm1_init "$@"
done
