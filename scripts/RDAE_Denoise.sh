#!/usr/bin/env bash
# The published comparison on noisy digits: a robust, a plain and a variational autoencoder, fitted to five thousand digits
# of MNIST with 10, 100 or 250 noisy pixels each, with as many updates, and their evaluation. What is finished is not
# trained again. Further flags go to every training command.
#
#   POINTS       noisy pixels of an image (10 100 250)
#   SEEDS        each draws the noise, the weights and the order (0)
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
#
# `python -m scripts.rdae denoise` makes the table and the sheet of docs/rdae.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} DATA_PATH=${DATA_PATH:-../Data/}

recipe rdae dataset robust plain variational robust_run plain_run variational_run noise of_denoise \
    threshold_10 threshold_100 threshold_250
for seed in ${SEEDS:-0}; do
    for points in ${POINTS:-10 100 250}; do
        threshold=threshold_$points
        for method in robust plain variational; do
            command=${!method} run=${method}_run cut=() cut_name=""
            run=${!run}
            if [ "$method" = robust ]; then
                cut=(--threshold "${!threshold:?no threshold in recipes.env for $points points}") run=${run}_t${!threshold}
            fi
            "$PYTHON" $command --dataset "$dataset" --data_path "$DATA_PATH" $noise "$points" --data_seed "$seed" \
                "${cut[@]}" --seed "$seed" --log_root "$LOG_ROOT" --suffix "seed$seed" "$@"
            "$PYTHON" $of_denoise --load_path "$LOG_ROOT/${dataset}_${run}_corrupt_normal${points}_seed$seed"
        done
    done
done
