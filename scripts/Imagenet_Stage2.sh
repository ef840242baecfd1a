#!/usr/bin/env bash
# ImageNet-30, one class at a time: stage 2, sparse dictionaries on stage 1, epochs 1001 to 1300. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" imagenet Stage2 "$@"
