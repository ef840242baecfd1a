#!/usr/bin/env bash
# CIFAR-10 by WRN-34-10, as published: ANCRA and what it is compared with. See robust_sweep.sh.
exec bash "$(dirname "$0")/robust_sweep.sh" ancra_wrn34 cifar10 "$@"
