#!/usr/bin/env bash
# Tiny-ImageNet by PreActResNet-18, 64 pixels, as published: ANCRA and what it is compared with. See robust_sweep.sh.
# DATA_PATH: ../Data/TinyImageNet, which `python -m scripts.prepare tiny_imagenet --source tiny-imagenet-200` makes.
DATA_PATH=${DATA_PATH:-../Data/TinyImageNet} exec bash "$(dirname "$0")/robust_sweep.sh" ancra_tiny folder --image_size 64 "$@"
