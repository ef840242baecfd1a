#!/usr/bin/env bash
# CIFAR-10, all classes as one: stage 2, sparse dictionaries on stage 1, epochs 1001 to 1300. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar10_multi Stage2 "$@"
