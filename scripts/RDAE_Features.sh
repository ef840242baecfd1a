#!/usr/bin/env bash
# Corrupted features: the same pixels of every digit of MNIST are noise, and the columns of S find them; the picture
# shows which. What is finished is not trained again. Further flags go to the training command.
#
#   POINTS       how many pixels (10)
#   SEEDS        each draws the pixels and the noise, the weights and the order (0)
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} DATA_PATH=${DATA_PATH:-../Data/}

recipe rdae dataset features features_run fixed_noise of_features
for seed in ${SEEDS:-0}; do
    for points in ${POINTS:-10}; do
        "$PYTHON" $features --dataset "$dataset" --data_path "$DATA_PATH" $fixed_noise "$points" --data_seed "$seed" \
            --seed "$seed" --log_root "$LOG_ROOT" --suffix "seed$seed" "$@"
        "$PYTHON" $of_features --load_path "$LOG_ROOT/${dataset}_${features_run}_corrupt_normal${points}_seed$seed"
    done
done
