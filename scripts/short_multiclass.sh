#!/usr/bin/env bash
# The multi-class commands at a size that a CPU can carry: resnet8, EPOCHS of stage 1, MORE of stage 2, on all classes of
# the photographs in DATA_PATH ({train,test}/<class>/*), told apart from MNIST (below OOD_DATA_PATH) and from mixtures
# of their own test images.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
: "${DATA_PATH:?folder with train/<class>/ and test/<class>/}" "${OOD_DATA_PATH:?folder with MNIST/raw/*.gz}"
EPOCHS=${EPOCHS:-3} MORE=${MORE:-1} LOG_ROOT=${LOG_ROOT:-./logs}

data=(--dataset folder --data_path "$DATA_PATH" --model resnet8)
csi=(--simclr_dim 512 --shift_trans_type rot_bmix --mix_alpha 0.2)
draws=(--ood_samples 1 --resize_factor 0.54 --resize_fix)
others=(--ood_dataset mnist interp --ood_data_path "$OOD_DATA_PATH")
train=(--batch_size 128 --log_root "$LOG_ROOT")
coding=(--sr_lambda 1e-3 --sr_dict_size 512 --invert_sr_feature_norm)
run=$LOG_ROOT/folder_resnet8_unsup
stage2=${run}_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_f512_mix82_dm1_init

"$PYTHON" train.py "${data[@]}" "${train[@]}" "${csi[@]}" --mode simclr_CSI --suffix f512_mix82 --epochs "$EPOCHS"
"$PYTHON" eval.py "${data[@]}" "${csi[@]}" "${draws[@]}" "${others[@]}" --mode ood_pre_refmix --ood_score CSI knn \
    --load_path "${run}_simclr_CSI_shift_rot_bmix_f512_mix82"
"$PYTHON" train_cocsr.py "${data[@]}" "${train[@]}" "${csi[@]}" "${coding[@]}" --mode cocsr_dict --sr_lr 1e-3 \
    --resume_path "${run}_simclr_CSI_shift_rot_bmix_f512_mix82" --epoch "$((EPOCHS + MORE))" \
    --loss_lambda_sr_l1 1e-3 --loss_dict_constr_mode 1 --ini_sr_dict_train --suffix f512_mix82_dm1_init
"$PYTHON" eval.py "${data[@]}" "${csi[@]}" "${draws[@]}" "${others[@]}" "${coding[@]}" --mode ood_pre_cocsr_refmix \
    --ood_score CSI_sr --load_path "$stage2/last.cocsr_model"
