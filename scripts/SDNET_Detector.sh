#!/usr/bin/env bash
# An SDNet as backbone of the detector: CSI with rotations on one class, by resnet8 and by sdnet8, and AUROC on clean images
# and under Gaussian noise; of sdnet8 with lambda as trained and with lambda predicted for each image. Further flags go to
# training. What is finished is not done again.
#
#   DATASET      cifar10, or folder for photographs in DATA_PATH (cifar10)
#   CLASS        the normal class (8)
#   MODELS       networks (resnet8 sdnet8)
#   EPOCHS       length of training (24)
#   LEVELS       standard deviations of the noise (0.04 0.08 0.1)
#   SEEDS        each draws the weights, the order, the views and the noise (0)
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
#
# `python -m scripts.sdnet LOG_ROOT` makes the table of docs/sdnet.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
source scripts/once.sh

recipe sdnet_detector networks epochs levels csi csi_run calibrate of_simclr
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} DATASET=${DATASET:-cifar10} CLASS=${CLASS:-8}
logs=$(expanded "$LOG_ROOT")

for seed in ${SEEDS:-0}; do
    for model in ${MODELS:-$networks}; do
        run=$logs/${DATASET}_${model}_unsup_${csi_run}_one_class_${CLASS}_s$seed
        weights=$run/last.model lambdas=trained
        "$PYTHON" $csi --dataset "$DATASET" --data_path "${DATA_PATH:-../Data/}" --model "$model" \
            --one_class_idx "$CLASS" --epochs "${EPOCHS:-$epochs}" --seed "$seed" --log_root "$LOG_ROOT" \
            --suffix "s$seed" "$@"
        if [[ $model = sdnet* ]]; then
            lambdas="trained auto"
            once "$run/lambda_line.json" "$weights" -- "$PYTHON" $calibrate --load_path "$weights" --seed "$seed"
        fi
        for lambda in $lambdas; do
            inputs=("$weights")
            [ "$lambda" = trained ] || inputs+=("$run/lambda_line.json")
            for level in clean ${LEVELS:-$levels}; do
                out=$run/detector/${lambda}_$level under=() stem=()
                [ "$level" = clean ] || under=(--test_noise gaussian --test_noise_level "$level")
                [ "$lambda" = trained ] || stem=(--stem_lambda "$lambda")
                once "$out/result_ood_pre_CSI.json" "${inputs[@]}" -- \
                    "$PYTHON" $of_simclr --load_path "$weights" --ood_score CSI --seed "$seed" --out "$out" \
                    "${under[@]}" "${stem[@]}"
            done
        done
    done
done
