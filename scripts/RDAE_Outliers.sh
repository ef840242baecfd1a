#!/usr/bin/env bash
# The published sweep of the threshold: 4859 fours and 265 other digits of MNIST, one run and its evaluation for each
# threshold and seed. Further flags go to every training command. What is finished is not trained again.
#
#   THRESHOLDS   FIRST:LAST:STEP ... (2:7:0.075, then 4.5:5:0.075)
#   SEEDS        each draws the other digits, the weights and the order (0)
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
#
# `python -m scripts.rdae outliers` makes the tables of docs/rdae.md, with other methods beside it, in less time.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} DATA_PATH=${DATA_PATH:-../Data/}

recipe rdae outliers of_outliers dataset class
data=(--dataset "$dataset" --data_path "$DATA_PATH" --one_class_idx "$class")
for seed in ${SEEDS:-0}; do
    for range in ${THRESHOLDS:-2:7:0.075 4.5:5:0.075}; do
        for threshold in $("$PYTHON" -c "from scripts.rdae import numbers; print(*numbers('$range'))"); do
            suffix=seed$seed
            "$PYTHON" $outliers "${data[@]}" --threshold "$threshold" --data_seed "$seed" --seed "$seed" \
                --log_root "$LOG_ROOT" --suffix "$suffix" "$@"
        done
    done
done
