#!/usr/bin/env bash
# Every row of the published tables, by default at a size that a CPU can carry: MODEL, EPOCHS of stage 1, MORE of stage 2,
# on the photographs in DATA_PATH ({train,test}/<class>/*) with class CLASS as the normal one. The flags are those of
# recipes.env but for data set, paths, epochs and model. What is finished is not trained again. EVERY: also draw AUROC
# against epochs, evaluated every so many minutes.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
source scripts/recipes.sh
[ -n "${DATA_PATH:-}" ] || { echo "error: DATA_PATH: give a folder with train/<class>/ and test/<class>/" >&2; exit 2; }
CLASS=${CLASS:-8} EPOCHS=${EPOCHS:-24} MORE=${MORE:-20} MODEL=${MODEL:-resnet8} DEVICE=${DEVICE:-auto}
LOG_ROOT=${LOG_ROOT:-./logs}

recipe short simclr rot_trans csi cocsr of_rot_trans of_csi fitted_to_csi of_cocsr tsne \
    training net shift draws suffix stage2_suffix csi_run cocsr_run
data=(--dataset folder --data_path "$DATA_PATH" --model "$MODEL" --one_class_idx "$CLASS" --device "$DEVICE")
logs=(--log_root "$LOG_ROOT")
run=$LOG_ROOT/folder_${MODEL}_unsup
stage1=${run}_${csi_run}_one_class_${CLASS}_$suffix
stage2=${run}_${cocsr_run}_one_class_${CLASS}_$stage2_suffix
plain=f512 # the suffix of the modes without mixed images

timed() {
    local begun=$SECONDS
    "$PYTHON" "$@"
    echo "== $((SECONDS - begun)) s: $*"
}
echo "-- CSI, and simpler methods on its features"
if [ -n "${EVERY:-}" ]; then
    timed -m scripts.curve --every "$EVERY" --train "--mode simclr_CSI --suffix $suffix --epochs $EPOCHS" \
        --evaluate "--mode ood_pre_refmix --ood_score CSI $draws" -- "${data[@]}" "${logs[@]}" $training $net $shift
else
    timed $csi "${data[@]}" "${logs[@]}" --suffix "$suffix" --epochs "$EPOCHS"
fi
timed $of_csi "${data[@]}" --ood_score CSI knn ocsvm --load_path "$stage1"
echo "-- ADMM-SRNet: stage 2, as trained and as k-means left it"
timed $cocsr "${data[@]}" "${logs[@]}" --suffix "$stage2_suffix" --resume_path "$stage1" --epoch "$((EPOCHS + MORE))"
for weights in last start; do
    timed $of_cocsr "${data[@]}" --ood_score CSI_sr --load_path "$stage2/$weights.cocsr_model"
done
timed $tsne "${data[@]}" --load_path "$stage2/last.cocsr_model"
echo "-- ICS 2020: dictionaries fitted to those features after the fact"
timed $fitted_to_csi "${data[@]}" --load_path "$stage1"
echo "-- SimCLR"
timed $simclr "${data[@]}" "${logs[@]}" --suffix "$plain" --epochs "$EPOCHS"
timed eval.py --mode ood_pre $draws "${data[@]}" --ood_score simclr \
    --load_path "${run}_simclr_one_class_${CLASS}_$plain"
echo "-- Rot+Trans"
timed $rot_trans "${data[@]}" "${logs[@]}" --suffix "$plain" --epochs "$EPOCHS"
timed $of_rot_trans "${data[@]}" --load_path "${run}_rot_trans_one_class_${CLASS}_$plain"
echo "-- plain pixels"
timed -m scripts.pixel_baseline --dataset folder --data_path "$DATA_PATH" --one_class_idx "$CLASS" "${logs[@]}"
"$PYTHON" -m scripts.results "$LOG_ROOT"
