#!/usr/bin/env bash
# ImageNet-30, all classes as one: AUROC of the CSI_sr score on the test images. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" imagenet_multi Eval "$@"
