#!/usr/bin/env bash
# The published commands: `bash scripts/sweep.sh FAMILY STAGE [flag ...]`, one command for each class; further flags
# go to every command. FAMILY is a row of the table below, STAGE is Stage1, Stage2, Eval or TSNE.
#
#   START, END   first and last class (default: all of them); the *_multi families take all classes in one run
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs); Stage2 starts from what Stage1 left there, and so on
#   PYTHON       interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "error: $1" >&2
    exit 2
}
[ $# -ge 2 ] || refuse "usage: sweep.sh FAMILY STAGE [flag ...]"
family=$1 stage=$2
shift 2

case "$family" in
    cifar10)        dataset=cifar10  model=resnet18          jitter=1 suffix=f512_mix82    last=9   ;;
    cifar10_multi)  dataset=cifar10  model=resnet18          jitter=1 suffix=f512_mix82    last=all ;;
    cifar100)       dataset=cifar100 model=resnet18          jitter=1 suffix=f512_mix82    last=19  ;;
    imagenet)       dataset=imagenet model=resnet18_imagenet jitter=2 suffix=f512_j2_mix82 last=29  ;;
    imagenet_multi) dataset=imagenet model=resnet18_imagenet jitter=2 suffix=f512_j2_mix82 last=all ;;
    *) refuse "FAMILY is cifar10, cifar10_multi, cifar100, imagenet or imagenet_multi, not '$family'" ;;
esac

if [ "$last" = all ]; then
    classes=all
    [ -z "${START:-}${END:-}" ] || echo "note: START and END have no effect on $family" >&2
else
    classes=$(seq "${START:-0}" "${END:-$last}")
    [ -n "$classes" ] || refuse "no class from START ${START:-0} to END ${END:-$last}"
fi
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs}

shared=(--dataset "$dataset" --data_path "${DATA_PATH:-../Data/}" --model "$model" --simclr_dim 512
    --shift_trans_type rot_bmix --mix_alpha 0.2)
training=(--batch_size 128 --log_root "$LOG_ROOT")
# Stronger colour jitter is for training only: the published evaluation of ImageNet leaves it at 1. To see the other,
# give `--color_jitter_strength 2` to Eval.
[ "$jitter" = 1 ] || training+=(--color_jitter_strength "$jitter")
coding=(--sr_dict_size 512 --sr_lambda 1e-3 --invert_sr_feature_norm)
draws=(--ood_score CSI_sr --ood_samples 10 --resize_factor 0.54 --resize_fix)

# run CLASS [flag ...]: one command of the stage; CLASS is an index or "all".
run() {
    local flags=("${shared[@]}") class="" name=${dataset}_${model}_unsup
    if [ "$1" != all ]; then
        class=_one_class_$1
        flags+=(--one_class_idx "$1")
    fi
    local stage1=$LOG_ROOT/${name}_simclr_CSI_shift_rot_bmix${class}_${suffix}
    local stage2=$LOG_ROOT/${name}_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf${class}_${suffix}_dm1_init
    shift
    case "$stage" in
        Stage1)
            "$PYTHON" train.py "${flags[@]}" "${training[@]}" --mode simclr_CSI --suffix "$suffix" "$@"
            ;;
        Stage2)
            "$PYTHON" train_cocsr.py "${flags[@]}" "${training[@]}" "${coding[@]}" --mode cocsr_dict \
                --resume_path "$stage1" --epoch 1300 --sr_lr 1e-3 --loss_lambda_sr_l1 1e-3 \
                --loss_dict_constr_mode 1 --ini_sr_dict_train --suffix "${suffix}_dm1_init" "$@"
            ;;
        Eval)
            "$PYTHON" eval.py "${flags[@]}" "${coding[@]}" "${draws[@]}" --mode ood_pre_cocsr_refmix \
                --load_path "$stage2/last.cocsr_model" --print_score --save_score "$@"
            ;;
        TSNE)
            "$PYTHON" tsne.py "${flags[@]}" "${coding[@]}" "${draws[@]}" --mode ood_pre_tsne_dict_refmix \
                --load_path "$stage2/last.cocsr_model" --ood_layer penultimate "$@"
            ;;
        *) refuse "STAGE is Stage1, Stage2, Eval or TSNE, not '$stage'" ;;
    esac
}

for i in $classes; do
    run "$i" "$@"
done
