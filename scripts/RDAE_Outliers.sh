#!/usr/bin/env bash
# The published sweep of the threshold: 4859 fours and 265 other digits of MNIST, one run and its evaluation for each
# threshold and seed. What is finished is not trained again. Further flags go to every training command.
#
#   THRESHOLDS   numbers or FIRST:LAST:STEP (2:7:0.075 4.5:5:0.075)
#   SEEDS        each draws the other digits, the weights and the order (0)
#   DATA_PATH    folder of the data sets (../Data/)
#   LOG_ROOT     folder of the run folders (./logs)
#   PYTHON       interpreter (python)
#
# `python -m scripts.rdae outliers` makes the table of docs/rdae.md, with other methods beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs} DATA_PATH=${DATA_PATH:-../Data/}

recipe rdae dataset nominal outliers of_outliers outliers_run

# With a decimal point, as they stand in the names of run folders.
thresholds() {
    local range
    for range in "$@"; do
        LC_ALL=C awk -F: -v range="$range" 'BEGIN {
            split(range, part, ":")
            count = part[3] > 0 ? int((part[2] - part[1]) / part[3] + 1e-9) : 0
            for (i = 0; i <= count; i++) {
                value = sprintf("%.6g", part[1] + i * part[3])
                print value ~ /\./ ? value : value ".0"
            }
        }'
    done | sort -gu
}

for seed in ${SEEDS:-0}; do
    for threshold in $(thresholds ${THRESHOLDS:-2:7:0.075 4.5:5:0.075}); do
        data=(--dataset "$dataset" --data_path "$DATA_PATH" --one_class_idx "$nominal" --data_seed "$seed")
        "$PYTHON" $outliers "${data[@]}" --threshold "$threshold" --seed "$seed" --log_root "$LOG_ROOT" \
            --suffix "seed$seed" "$@"
        "$PYTHON" $of_outliers --load_path "$LOG_ROOT/${dataset}_${outliers_run}_t${threshold}_one_class_${nominal}_outliers_265_seed$seed"
    done
done
