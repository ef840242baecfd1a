#!/usr/bin/env bash
# CIFAR-10, one class at a time: AUROC of the CSI_sr score on the test photographs.
# START and END choose the classes; further arguments go to every command.
set -euo pipefail
source "$(dirname "$0")/CIFAR10_common.sh"

for i in $(seq "$START" "$END"); do
    "$PYTHON" eval.py "${shared[@]}" --one_class_idx "$i" --mode ood_pre_cocsr_refmix \
        --load_path "$(stage2_run "$i")/last.cocsr_model" "${looks[@]}" --print_score --save_score "$@"
done
