#!/usr/bin/env bash
# A published configuration of MeanSparse: `bash scripts/meansparse.sh KEY` puts operators into the base network in BASE,
# with the published alpha, and attacks it: without them, with plain and with straight-through gradients. A published
# file in SPARSE, which has operators, is attacked as it is. KEY: wrn94, rawrn70, rawrn70-v1, wrn70, wrn70-l2, wrn70-c100,
# swin-l, convnext-l, rawrn101.
#
#   BASE          weights of RobustBench, or of this project
#   SPARSE        a published file, in place of BASE
#   ALPHA         alpha (the published one)
#   IMAGES        test images (all)
#   ATTACK_FLAGS  further flags of attacks
#   DATA_PATH     folder of the data sets (../Data/)
#   LOG_ROOT      folder of the run folders (./logs)
#   MODEL, DATASET  in place of those of the configuration, for networks of this project
#   PYTHON        interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/recipes.sh
source scripts/once.sh # refuse, expanded

KEYS="wrn94 rawrn70 rawrn70-v1 wrn70 wrn70-l2 wrn70-c100 swin-l convnext-l rawrn101"
key=${1:-}
[[ $# -ge 1 && " $KEYS " == *" $key "* ]] || refuse "usage: meansparse.sh KEY, one of $KEYS"
shift
recipe "meansparse_${key//-/_}" base model dataset alpha threat placement judged_batch put judge
model=${MODEL:-$model} dataset=${DATASET:-$dataset}
PYTHON=${PYTHON:-python} out=$(expanded "${LOG_ROOT:-./logs}")/meansparse_$key
data=(--dataset "$dataset" --data_path "${DATA_PATH:-../Data/}" --model "$model")
if [ -n "${SPARSE:-}" ]; then
    weights=$(expanded "$SPARSE")
    [ -f "$weights" ] || refuse "SPARSE: no file $weights; give the published weights of $base with operators"
else
    [ -n "${BASE:-}" ] || refuse "BASE: give the weights of $base, or in SPARSE the published file with operators"
    source_file=$(expanded "$BASE")
    [ -f "$source_file" ] || refuse "BASE: no file $source_file"
    "$PYTHON" $put "${data[@]}" --placement "$placement" --load_path "$source_file" --log_root "$out" --suffix "$key" "$@"
    weights=$out/${dataset}_${model}_meansparse_${placement}_$key/last.model
fi
"$PYTHON" $judge "${data[@]}" --load_path "$weights" --out "$out" --ms_alpha "${ALPHA:-$alpha}" $threat \
    --ood_batch_size "$judged_batch" ${IMAGES:+--attack_images "$IMAGES"} ${ATTACK_FLAGS:-}
