#!/usr/bin/env bash
# CIFAR-10, all classes as one: stage 1, contrastive features (CSI), 1000 epochs. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar10_multi Stage1 "$@"
