#!/usr/bin/env bash
# SDNets and the network that they are compared with: `bash scripts/sdnet_sweep.sh FAMILY DATASET [flag ...]` trains each
# with labels, tests the last and the best epoch on clean images, and tests the SDNets under noise x lambda, with the
# other network beside them. FAMILY is a family of recipes.env: sdnet, sdnet_imagenet or sdnet_short. Further flags go to
# training. What is finished is not done again; remove a result from its run folder, and it is made anew.
#
#   MODELS       networks (those of the family)
#   SEEDS        each draws the weights, the order and the noise (0)
#   EPOCHS       length of training (that of the family)
#   NOISE_FLAGS  further flags of noise_lambda, `--cifar10c DIR` say
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
#
# `python -m scripts.sdnet LOG_ROOT` makes the tables of docs/sdnet.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
source scripts/once.sh

[ $# -ge 2 ] || refuse "usage: sdnet_sweep.sh FAMILY DATASET [flag ...]"
family=$1 dataset=$2
case "$family" in
    sdnet | sdnet_imagenet | sdnet_short) ;;
    *) refuse "FAMILY is sdnet, sdnet_imagenet or sdnet_short, not '$family'" ;;
esac
shift 2
recipe "$family" networks control epochs supervised supervised_run batch coding_batch of_supervised noise_lambda
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} MODELS=${MODELS:-$networks}
logs=$(expanded "$LOG_ROOT")

for seed in ${SEEDS:-0}; do
    for model in $MODELS; do
        run=$logs/${dataset}_${model}_${supervised_run}_s$seed size=$batch
        [[ $model != *_all* ]] || size=$coding_batch
        "$PYTHON" $supervised --dataset "$dataset" --data_path "${DATA_PATH:-../Data/}" --model "$model" $size \
            --epochs "${EPOCHS:-$epochs}" --seed "$seed" --log_root "$LOG_ROOT" --suffix "s$seed" "$@"
        # In a folder of their own, so that no other evaluation of the run is taken for them.
        once "$run/clean/accuracy_test_acc.json" "$run/last.model" -- \
            "$PYTHON" $of_supervised --load_path "$run/last.model" --seed "$seed" --out "$run/clean"
        # Without held-out images no epoch is selected.
        if [ -f "$run/best.model" ] || [ ! -f "$run/last.model" ]; then
            once "$run/clean/accuracy_test_acc_best.json" "$run/best.model" -- \
                "$PYTHON" $of_supervised --load_path "$run/best.model" --seed "$seed" --out "$run/clean"
        fi
    done
    other=$logs/${dataset}_${control}_${supervised_run}_s$seed/last.model beside=()
    if [[ " $MODELS " = *" $control "* ]] || [ -f "$other" ]; then
        beside=(--control_path "$other")
    fi
    for model in $MODELS; do
        [[ $model = sdnet* ]] || continue
        run=$logs/${dataset}_${model}_${supervised_run}_s$seed
        if [ ! -f "$run/best.model" ] && [ -f "$run/last.model" ]; then
            echo "$run: no images were held out, by which lambda is calibrated; no noise x lambda"
            continue
        fi
        once "$run/result_noise_lambda.json" "$run/last.model" "${beside[@]:1}" -- \
            "$PYTHON" $noise_lambda --load_path "$run/last.model" "${beside[@]}" --seed "$seed" ${NOISE_FLAGS:-}
    done
done
