#!/usr/bin/env bash
# SDNets and ResNet-18 on CIFAR-100, as published: 220 epochs, accuracy, noise x lambda. See sdnet_sweep.sh.
exec bash "$(dirname "$0")/sdnet_sweep.sh" sdnet cifar100 "$@"
