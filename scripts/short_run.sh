#!/usr/bin/env bash
# Every row of the published tables, by default at a size that a CPU can carry: MODEL, EPOCHS of stage 1, MORE of stage 2,
# on the photographs in DATA_PATH ({train,test}/<class>/*) with class CLASS as the normal one. The commands are those of
# CIFAR10_*.sh but for data set, paths, epochs and model. What is finished is not trained again. EVERY: also draw AUROC
# against epochs, evaluated every so many minutes.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
: "${DATA_PATH:?folder with train/<class>/ and test/<class>/}"
CLASS=${CLASS:-8} EPOCHS=${EPOCHS:-24} MORE=${MORE:-20} MODEL=${MODEL:-resnet8} DEVICE=${DEVICE:-auto}
LOG_ROOT=${LOG_ROOT:-./logs}

data=(--dataset folder --data_path "$DATA_PATH" --model "$MODEL" --one_class_idx "$CLASS" --device "$DEVICE")
train=(--batch_size 128 --log_root "$LOG_ROOT")
csi=(--simclr_dim 512 --shift_trans_type rot_bmix --mix_alpha 0.2)
draws=(--ood_samples 10 --resize_factor 0.54 --resize_fix)
coding=(--sr_lambda 1e-3 --sr_dict_size 512 --invert_sr_feature_norm)
run=$LOG_ROOT/folder_${MODEL}_unsup
class=one_class_${CLASS}_f512
stage1=${run}_simclr_CSI_shift_rot_bmix_${class}_mix82
stage2=${run}_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_${class}_mix82_dm1_init

timed() {
    local begun=$SECONDS
    "$PYTHON" "$@"
    echo "== $((SECONDS - begun)) s: $*"
}
echo "-- CSI, and simpler methods on its features"
own=(--mode simclr_CSI --suffix f512_mix82 --epochs "$EPOCHS")
if [ -n "${EVERY:-}" ]; then
    timed -m scripts.curve --every "$EVERY" --train "${own[*]}" \
        --evaluate "--mode ood_pre_refmix --ood_score CSI ${draws[*]}" -- "${data[@]}" "${train[@]}" "${csi[@]}"
else
    timed train.py "${data[@]}" "${train[@]}" "${csi[@]}" "${own[@]}"
fi
timed eval.py "${data[@]}" "${csi[@]}" "${draws[@]}" --mode ood_pre_refmix --ood_score CSI knn ocsvm \
    --load_path "$stage1"
echo "-- ADMM-SRNet: stage 2, as trained and as k-means left it"
timed train_cocsr.py "${data[@]}" "${train[@]}" "${csi[@]}" "${coding[@]}" --mode cocsr_dict --sr_lr 1e-3 \
    --resume_path "$stage1" --epoch "$((EPOCHS + MORE))" --loss_lambda_sr_l1 1e-3 --loss_dict_constr_mode 1 \
    --ini_sr_dict_train --suffix f512_mix82_dm1_init
for weights in last start; do
    timed eval.py "${data[@]}" "${csi[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_cocsr_refmix \
        --ood_score CSI_sr --load_path "$stage2/$weights.cocsr_model"
done
timed tsne.py "${data[@]}" "${csi[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_tsne_dict_refmix \
    --load_path "$stage2/last.cocsr_model" --ood_layer penultimate
echo "-- ICS 2020: dictionaries fitted to those features after the fact"
timed eval.py "${data[@]}" "${csi[@]}" "${draws[@]}" "${coding[@]}" --mode ood_pre_multi_sr_refmix \
    --load_path "$stage1"
echo "-- SimCLR"
timed train.py "${data[@]}" "${train[@]}" --mode simclr --simclr_dim 512 --suffix f512 --epochs "$EPOCHS"
timed eval.py "${data[@]}" "${draws[@]}" --mode ood_pre --ood_score simclr --load_path "${run}_simclr_${class}"
echo "-- Rot+Trans"
timed train.py "${data[@]}" "${train[@]}" --mode rot_trans --suffix f512 --epochs "$EPOCHS"
timed eval.py "${data[@]}" --mode rot_trans --load_path "${run}_rot_trans_${class}"
echo "-- plain pixels"
timed -m scripts.pixel_baseline --dataset folder --data_path "$DATA_PATH" --one_class_idx "$CLASS" \
    --log_root "$LOG_ROOT"
"$PYTHON" -m scripts.results "$LOG_ROOT"
