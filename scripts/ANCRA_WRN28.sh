#!/usr/bin/env bash
# CIFAR-10 by WRN-28-10, as published: ANCRA and what it is compared with. See robust_sweep.sh.
exec bash "$(dirname "$0")/robust_sweep.sh" ancra_wrn28 cifar10 "$@"
