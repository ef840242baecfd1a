#!/usr/bin/env bash
# CIFAR-10, one class at a time: stage 1, contrastive features (CSI), 1000 epochs. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar10 Stage1 "$@"
