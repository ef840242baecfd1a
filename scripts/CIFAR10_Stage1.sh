#!/usr/bin/env bash
# CIFAR-10, one class at a time: stage 1, contrastive features (CSI), 1000 epochs.
# START and END choose the classes; further arguments go to every command.
set -euo pipefail
source "$(dirname "$0")/CIFAR10_common.sh"

for i in $(seq "$START" "$END"); do
    "$PYTHON" train.py "${shared[@]}" --one_class_idx "$i" --mode simclr_CSI --batch_size 128 --suffix f512_mix82 "$@"
done
