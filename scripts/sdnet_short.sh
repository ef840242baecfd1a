#!/usr/bin/env bash
# SDNets at a size that a CPU can carry: resnet8, sdnet8 and sdnet8_all for 20 epochs, seeds 0 and 1, on the photographs in
# DATA_PATH ({train,test}/<class>/*); accuracy, and noise x lambda at three levels. See sdnet_sweep.sh, whose variables
# act here, too.
set -euo pipefail
[ -n "${DATA_PATH:-}" ] || { echo "error: DATA_PATH: give a folder with train/<class>/ and test/<class>/" >&2; exit 2; }
SEEDS=${SEEDS:-0 1} exec bash "$(dirname "$0")/sdnet_sweep.sh" sdnet_short folder "$@"
