#!/usr/bin/env bash
# ImageNet-30, one class at a time: stage 1, contrastive features (CSI), 1000 epochs. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" imagenet Stage1 "$@"
