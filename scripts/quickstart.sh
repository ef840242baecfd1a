#!/usr/bin/env bash
# From nothing to a table of AUROC per class and t-SNE pictures, on scikit-learn's handwritten digits (no download).
# START and END choose the classes; the flags are the family `digits` of recipes.env. Needs Python 3.11 to 3.13; about
# 3 minutes on 2 CPU cores after the set-up.
set -euo pipefail
START=${START:-0} END=${END:-2}
source "$(dirname "$0")/setup.sh" requirements.txt
source scripts/recipes.sh

LOGS=logs/quickstart
begun=$SECONDS
recipe digits csi cocsr of_csi dataset model images shift draws inversion csi_run cocsr_run epochs more
look="$images $shift $draws $inversion" # the weights record the other settings of the coding
for i in $(seq "$START" "$END"); do
    data="--dataset $dataset --model $model --one_class_idx $i"
    stage1=$LOGS/${dataset}_${model}_unsup_${csi_run}_one_class_$i
    stage2=$LOGS/${dataset}_${model}_unsup_${cocsr_run}_one_class_$i
    echo "== class $i: stage 1, contrastive training"
    "$PYTHON" $csi $data --epochs "$epochs" --log_root "$LOGS"
    echo "== class $i: stage 2, sparse dictionaries"
    "$PYTHON" $cocsr $data --epochs "$((epochs + more))" --log_root "$LOGS" --resume_path "$stage1"
    echo "== class $i: evaluation and t-SNE"
    "$PYTHON" $of_csi $data --load_path "$stage2" --ood_score CSI >"$stage2/eval_CSI.txt"
    "$PYTHON" eval.py --mode ood_pre_cocsr_refmix $look $data --load_path "$stage2" --ood_score CSI_sr
    "$PYTHON" tsne.py --mode ood_pre_tsne_dict_refmix $look $data --load_path "$stage2"
done
echo
"$PYTHON" -m scripts.results "$LOGS"
echo "$((SECONDS - begun)) s; run folders with checkpoints, curves, scores and pictures are in $LOGS"
