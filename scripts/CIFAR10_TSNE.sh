#!/usr/bin/env bash
# CIFAR-10, one class at a time: t-SNE pictures of features and dictionary atoms. See sweep.sh.
exec bash "$(dirname "$0")/sweep.sh" cifar10 TSNE "$@"
