#!/usr/bin/env bash
# From nothing to a table of AUROC per class and t-SNE pictures, on scikit-learn's handwritten digits (no download).
# START and END choose the classes. Needs Python 3.11 to 3.13; about 3 minutes on 2 CPU cores after the set-up.
set -euo pipefail
START=${START:-0} END=${END:-2}
source "$(dirname "$0")/setup.sh" requirements.txt

LOGS=logs/quickstart
begun=$SECONDS
# The flags of the CIFAR-10 recipe, scaled down: small pictures, few atoms, Adam since 240 steps are too few for LARS.
common="--dataset digits --image_size 16 --model resnet8 --shift_trans_type rot_bmix --mix_alpha 0.2"
views="--ood_samples 4 --resize_factor 0.54 --resize_fix"
for i in $(seq "$START" "$END"); do
    stage1=digits_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_${i}
    stage2=digits_resnet8_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_${i}
    echo "== class $i: stage 1, contrastive training"
    "$PYTHON" train.py $common --mode simclr_CSI --one_class_idx "$i" --batch_size 32 --epochs 60 \
        --log_root "$LOGS" --optimizer adam --lr_init 3e-4 --warmup 2
    echo "== class $i: stage 2, sparse dictionaries"
    "$PYTHON" train_cocsr.py $common --mode cocsr_dict --one_class_idx "$i" --batch_size 32 --epochs 80 \
        --log_root "$LOGS" --resume_path "$LOGS/$stage1" --ini_sr_dict_train --sr_dict_size 64 --sr_lambda 1e-3 --sr_lr 1e-3 \
        --loss_lambda_sr_l1 1e-3 --invert_sr_feature_norm --loss_dict_constr_mode 1
    echo "== class $i: evaluation and t-SNE"
    "$PYTHON" eval.py $common $views --mode ood_pre_refmix --one_class_idx "$i" --load_path "$LOGS/$stage2" \
        --ood_score CSI >"$LOGS/$stage2/eval_CSI.txt"
    "$PYTHON" eval.py $common $views --mode ood_pre_cocsr_refmix --one_class_idx "$i" --load_path "$LOGS/$stage2" \
        --ood_score CSI_sr --invert_sr_feature_norm
    "$PYTHON" tsne.py $common $views --mode ood_pre_tsne_dict_refmix --one_class_idx "$i" \
        --load_path "$LOGS/$stage2" --invert_sr_feature_norm
done
echo
"$PYTHON" -m scripts.results "$LOGS"
echo "$((SECONDS - begun)) s; run folders with checkpoints, curves, scores and pictures are in $LOGS"
