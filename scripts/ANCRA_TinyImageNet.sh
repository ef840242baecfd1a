#!/usr/bin/env bash
# Tiny-ImageNet by PreActResNet-18, 64 pixels, as published: ANCRA and what it is compared with. See robust_sweep.sh.
exec bash "$(dirname "$0")/robust_sweep.sh" ancra_tiny folder --image_size 64 "$@"
