#!/usr/bin/env bash
# CIFAR-10, all classes as one: AUROC of the CSI_sr score on the test images. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar10_multi Eval "$@"
