#!/usr/bin/env bash
# The multi-class commands at a size that a CPU can carry: resnet8, EPOCHS of stage 1, MORE of stage 2, on all classes of
# the photographs in DATA_PATH ({train,test}/<class>/*), told apart from MNIST (below OOD_DATA_PATH) and from mixtures
# of their own test images. The flags stand in recipes.env.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
source scripts/recipes.sh
[ -n "${DATA_PATH:-}" ] || { echo "error: DATA_PATH: give a folder with train/<class>/ and test/<class>/" >&2; exit 2; }
[ -n "${OOD_DATA_PATH:-}" ] || { echo "error: OOD_DATA_PATH: give a folder with MNIST/raw/*.gz" >&2; exit 2; }
EPOCHS=${EPOCHS:-3} MORE=${MORE:-1} LOG_ROOT=${LOG_ROOT:-./logs}

recipe short_multi csi of_csi cocsr of_cocsr suffix stage2_suffix csi_run cocsr_run
data=(--dataset folder --data_path "$DATA_PATH" --model resnet8)
others=(--ood_dataset mnist interp --ood_data_path "$OOD_DATA_PATH")
stage1=$LOG_ROOT/folder_resnet8_unsup_${csi_run}_$suffix
stage2=$LOG_ROOT/folder_resnet8_unsup_${cocsr_run}_$stage2_suffix

"$PYTHON" $csi "${data[@]}" --log_root "$LOG_ROOT" --suffix "$suffix" --epochs "$EPOCHS"
"$PYTHON" $of_csi "${data[@]}" "${others[@]}" --ood_score CSI knn --load_path "$stage1"
"$PYTHON" $cocsr "${data[@]}" --log_root "$LOG_ROOT" --suffix "$stage2_suffix" --resume_path "$stage1" \
    --epoch "$((EPOCHS + MORE))"
"$PYTHON" $of_cocsr "${data[@]}" "${others[@]}" --ood_score CSI_sr --load_path "$stage2/last.cocsr_model"
