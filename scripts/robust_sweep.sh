#!/usr/bin/env bash
# Adversarial training and what is left of it under attack: `bash scripts/robust_sweep.sh FAMILY DATASET [flag ...]` trains
# the rows of a family of recipes.env (ancra, ancra_wrn28, ancra_wrn34, ancra_tiny, robust_short), and attacks the last and
# the best epoch of each; where there is a plain network of the same seed, images that were attacked there, too. Further
# flags go to training. What is finished is not done again.
#
#   ROWS          networks (those of the family)
#   SEEDS         each draws the weights, the order and the noise (0)
#   EPOCHS        length of training (that of the row)
#   WEIGHTS       which epochs are attacked (last best)
#   ATTACK_FLAGS  further flags of attacks, `--attacks default autoattack` say
#   DATA_PATH     folder of the data sets (../Data/)
#   LOG_ROOT      folder of the run folders (./logs)
#   PYTHON        interpreter (python)
#
# `python -m scripts.robust LOG_ROOT` makes the tables of docs/robustness.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
source scripts/once.sh

[ $# -ge 2 ] || refuse "usage: robust_sweep.sh FAMILY DATASET [flag ...]"
family=$1 dataset=$2
case "$family" in
    ancra | ancra_wrn28 | ancra_wrn34 | ancra_tiny | robust_short) ;;
    *) refuse "FAMILY is ancra, ancra_wrn28, ancra_wrn34, ancra_tiny or robust_short, not '$family'" ;;
esac
shift 2
recipe "$family" rows model epochs of_attack
PYTHON=${PYTHON:-python} LOG_ROOT=${LOG_ROOT:-./logs}
logs=$(expanded "$LOG_ROOT")

run_of() { # ROW SEED: the run folder that its command makes
    local row=row_$1 name="" before=""
    recipe "$family" "$row"
    for word in ${!row}; do
        [ "$before" != --mode ] || name=$word
        case "$word" in --ra | --anc) name+=_${word#--} ;; esac
        before=$word
    done
    echo "$logs/${dataset}_${model}_${name}_s$2"
}

for seed in ${SEEDS:-0}; do
    for row in ${ROWS:-$rows}; do
        length=${family}_epochs_$row words=row_$row run=$(run_of "$row" "$seed")
        recipe "$family" "$words"
        "$PYTHON" ${!words} --dataset "$dataset" --data_path "${DATA_PATH:-../Data/}" --model "$model" \
            --epochs "${EPOCHS:-${!length:-$epochs}}" --seed "$seed" --log_root "$LOG_ROOT" --suffix "s$seed" "$@"
    done
    source=$(run_of plain "$seed")/last.model
    for row in ${ROWS:-$rows}; do
        run=$(run_of "$row" "$seed") transfer=()
        [ "$row" = plain ] || [ ! -f "$source" ] || transfer=(--transfer_path "$source")
        for weights in ${WEIGHTS:-last best}; do
            file=$run/$weights.model tag=_$weights
            [ "$weights" != last ] || tag=""
            # Without held-out images no epoch is selected.
            [ "$weights" = last ] || [ -f "$file" ] || continue
            once "$run/result_attack$tag.json" "$file" "${transfer[@]:1}" -- \
                "$PYTHON" $of_attack --load_path "$file" --seed "$seed" "${transfer[@]}" ${ATTACK_FLAGS:-}
        done
    done
done
