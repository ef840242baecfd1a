#!/usr/bin/env bash
# The CIFAR-10 commands at a size that a CPU can carry: resnet8, EPOCHS of stage 1, MORE of stage 2, on the photographs
# in DATA_PATH ({train,test}/<class>/*) with class CLASS as the normal one; then SimCLR and plain pixels for comparison.
# The commands are those of CIFAR10_*.sh but for data set, paths, epochs and model.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
: "${DATA_PATH:?folder with train/<class>/ and test/<class>/}"
CLASS=${CLASS:-8} EPOCHS=${EPOCHS:-48} MORE=${MORE:-20} LOG_ROOT=${LOG_ROOT:-./logs}

data=(--dataset folder --data_path "$DATA_PATH" --model resnet8 --one_class_idx "$CLASS" --simclr_dim 512)
shift=(--shift_trans_type rot_bmix --mix_alpha 0.2)
draws=(--ood_samples 10 --resize_factor 0.54 --resize_fix)
coding=(--sr_lambda 1e-3 --sr_dict_size 512 --invert_sr_feature_norm)
simclr=$LOG_ROOT/folder_resnet8_unsup_simclr_one_class_${CLASS}_f512
stage1=$LOG_ROOT/folder_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_${CLASS}_f512_mix82
name=folder_resnet8_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_${CLASS}_f512_mix82_dm1_init
stage2=$LOG_ROOT/$name

timed() {
    local begun=$SECONDS
    "$PYTHON" "$@"
    echo "== $((SECONDS - begun)) s: $1 $2 $3"
}
timed train.py "${data[@]}" "${shift[@]}" --mode simclr_CSI --batch_size 128 --suffix f512_mix82 \
    --epochs "$EPOCHS" --log_root "$LOG_ROOT"
timed train_cocsr.py "${data[@]}" "${shift[@]}" "${coding[@]}" --mode cocsr_dict --batch_size 128 --sr_lr 1e-3 \
    --resume_path "$stage1" --epoch "$((EPOCHS + MORE))" --loss_lambda_sr_l1 1e-3 --loss_dict_constr_mode 1 \
    --ini_sr_dict_train --suffix f512_mix82_dm1_init --log_root "$LOG_ROOT"
timed eval.py "${data[@]}" "${shift[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_cocsr_refmix \
    --load_path "$stage2/last.cocsr_model" --ood_score CSI_sr --print_score --save_score
timed eval.py "${data[@]}" "${shift[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_cocsr_refmix \
    --load_path "$stage2/start.cocsr_model" --ood_score CSI_sr
timed eval.py "${data[@]}" "${shift[@]}" "${draws[@]}" --mode ood_pre_refmix --load_path "$stage1/last.model" \
    --ood_score CSI
timed train.py "${data[@]}" --mode simclr --batch_size 128 --suffix f512 --epochs "$EPOCHS" --log_root "$LOG_ROOT"
timed eval.py "${data[@]}" "${draws[@]}" --mode ood_pre --load_path "$simclr/last.model" --ood_score simclr
timed -m scripts.pixel_baseline --dataset folder --data_path "$DATA_PATH" --one_class_idx "$CLASS" --log_root "$LOG_ROOT"
timed tsne.py "${data[@]}" "${shift[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_tsne_dict_refmix \
    --load_path "$stage2/last.cocsr_model" --ood_layer penultimate --ood_score CSI_sr
"$PYTHON" -m scripts.results "$LOG_ROOT"
