#!/usr/bin/env bash
# Adversarial training at a size that a CPU can carry: resnet8 on the photographs in DATA_PATH ({train,test}/<class>/*; ten
# thousand of them for training, see docs/robustness.md), 15 minutes of one core for each network, seeds 0 and 1. See
# robust_sweep.sh, whose variables act here, too.
set -euo pipefail
[ -n "${DATA_PATH:-}" ] || { echo "error: DATA_PATH: give a folder with train/<class>/ and test/<class>/" >&2; exit 2; }
SEEDS=${SEEDS:-0 1} exec bash "$(dirname "$0")/robust_sweep.sh" robust_short folder "$@"
