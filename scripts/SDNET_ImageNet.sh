#!/usr/bin/env bash
# SDNets and ResNet-18 on ImageNet-1k, as published: 100 epochs, accuracy, noise x lambda. See sdnet_sweep.sh; the
# pictures are looked for in DATA_PATH/ImageNet/{train,val}/<class>/.
exec bash "$(dirname "$0")/sdnet_sweep.sh" sdnet_imagenet imagenet1k "$@"
