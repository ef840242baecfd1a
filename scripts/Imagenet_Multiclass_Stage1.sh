#!/usr/bin/env bash
# ImageNet-30, all classes as one: stage 1, contrastive features (CSI), 1000 epochs. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" imagenet_multi Stage1 "$@"
