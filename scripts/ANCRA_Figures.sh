#!/usr/bin/env bash
# What attacks do to features, as ANCRA's feature_distance, draw_umap and draw_hist show it: `bash scripts/ANCRA_Figures.sh
# RUN ...` compares the run folders of classifiers, those of robust_sweep.sh say. What was measured is not measured again.
#
#   TARGET_LABEL  class whose images the histograms are of (all)
#   OUT           folder of the histograms (.)
#   PYTHON        interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/once.sh

[ $# -ge 1 ] || refuse "usage: ANCRA_Figures.sh RUN ..."
PYTHON=${PYTHON:-python} runs=()
for run in "$@"; do
    run=$(expanded "$run")
    [ -f "$run/last.model" ] || refuse "RUN: no last.model in $run; give the run folder of a classifier"
    runs+=("$run")
done
for run in "${runs[@]}"; do
    weights=$run/last.model
    once "$run/result_feature_distance.json" "$weights" -- \
        "$PYTHON" eval.py --mode feature_distance --load_path "$weights" --save_score
    once "$run/feature_umap_penultimate_shift0.png" "$weights" -- \
        "$PYTHON" tsne.py --mode feature_umap --load_path "$weights"
done
"$PYTHON" -m scripts.robust_figures "${runs[@]}" --out "${OUT:-.}" ${TARGET_LABEL:+--target_label "$TARGET_LABEL"}
