#!/usr/bin/env bash
# CIFAR-10, one class at a time: t-SNE pictures of features and dictionary atoms.
# START and END choose the classes; further arguments go to every command.
set -euo pipefail
source "$(dirname "$0")/CIFAR10_common.sh"

for i in $(seq "$START" "$END"); do
    "$PYTHON" tsne.py "${shared[@]}" --one_class_idx "$i" --mode ood_pre_tsne_dict_refmix \
        --load_path "$(stage2_run "$i")/last.cocsr_model" "${looks[@]}" --ood_layer penultimate "$@"
done
