#!/usr/bin/env bash
# The published commands: `bash scripts/sweep.sh FAMILY STAGE [flag ...]`, one command for each class; further flags
# go to every command. FAMILY is a family of recipes.env, where the flags stand, with _multi for all classes in one run;
# STAGE is Stage1, Stage2, Eval or TSNE.
#
#   START, END   first and last class (default: all of them); no effect on the *_multi families
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs); Stage2 starts from what Stage1 left there, and so on
#   PYTHON       interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh

refuse() {
    echo "error: $1" >&2
    exit 2
}
[ $# -ge 2 ] || refuse "usage: sweep.sh FAMILY STAGE [flag ...]"
family=${1%_multi} stage=$2
case "$1" in
    cifar10 | cifar100 | imagenet)
        recipe "$family" classes
        first=${START:-0} last=${END:-$((classes - 1))}
        classes=$(seq "$first" "$last")
        [ -n "$classes" ] || refuse "no class from START $first to END $last"
        ;;
    cifar10_multi | imagenet_multi)
        classes=all
        [ -z "${START:-}${END:-}" ] || echo "note: START and END have no effect on $1" >&2
        ;;
    *) refuse "FAMILY is cifar10, cifar10_multi, cifar100, imagenet or imagenet_multi, not '$1'" ;;
esac
case "$stage" in
    Stage1) row=csi ;;
    Stage2) row=cocsr ;;
    Eval) row=of_cocsr ;;
    TSNE) row=tsne ;;
    *) refuse "STAGE is Stage1, Stage2, Eval or TSNE, not '$stage'" ;;
esac
shift 2
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs}

recipe "$family" "$row" dataset model suffix stage2_suffix csi_run cocsr_run epochs more
command=${!row}

# run CLASS [flag ...]: one command of the stage; CLASS is an index or "all".
run() {
    local data=(--dataset "$dataset" --data_path "${DATA_PATH:-../Data/}" --model "$model") class=""
    if [ "$1" != all ]; then
        class=_one_class_$1
        data+=(--one_class_idx "$1")
    fi
    local stage1=$LOG_ROOT/${dataset}_${model}_unsup_${csi_run}${class}_$suffix
    local stage2=$LOG_ROOT/${dataset}_${model}_unsup_${cocsr_run}${class}_$stage2_suffix
    shift
    case "$stage" in
        Stage1)
            "$PYTHON" $command "${data[@]}" --log_root "$LOG_ROOT" --suffix "$suffix" "$@"
            ;;
        Stage2)
            "$PYTHON" $command "${data[@]}" --log_root "$LOG_ROOT" --suffix "$stage2_suffix" \
                --resume_path "$stage1" --epoch "$((epochs + more))" "$@"
            ;;
        Eval)
            "$PYTHON" $command "${data[@]}" --ood_score CSI_sr --load_path "$stage2/last.cocsr_model" --print_score \
                --save_score "$@"
            ;;
        TSNE)
            "$PYTHON" $command "${data[@]}" --ood_score CSI_sr --load_path "$stage2/last.cocsr_model" "$@"
            ;;
    esac
}

for i in $classes; do
    run "$i" "$@"
done
