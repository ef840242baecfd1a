#!/usr/bin/env bash
# CIFAR-100, one superclass at a time: AUROC of the CSI_sr score on the test images. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar100 Eval "$@"
