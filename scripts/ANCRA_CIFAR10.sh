#!/usr/bin/env bash
# CIFAR-10 by ResNet-18, as published: ANCRA and what it is compared with. See robust_sweep.sh.
exec bash "$(dirname "$0")/robust_sweep.sh" ancra cifar10 "$@"
