#!/usr/bin/env bash
# CIFAR-100, one superclass at a time: stage 1, contrastive features (CSI), 1000 epochs. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar100 Stage1 "$@"
