"""What several modes set up alike: their shifts, their images, the network they start from."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from common.device import Amp, autocast, pick_device
from common.dist import World
from common.errors import UserError
from common.flags import DeviceSpec, Flags
from common.seed import generator, seed_of
from datasets import ImageSet, Loading, PictureSet, ShiftSpec, Split
from datasets.augment import AlignedSpec
from datasets.shifts import Shift
from datasets.views import render_views, train_views
from models import ModelSpec
from models.checkpoint import build_net, load_pretrained
from models.csc import csc_layers, follow_weights, input_sizes
from models.feature_net import BackboneNet, FeatureNet
from models.sdnet import CSCSpec
from training.recipe import do_nothing
from training.specs import CompileSpec, StepSpec

Net = TypeVar("Net", bound=nn.Module)

# Images in a picture of views.
_SHOWN = 8


def own_device(flags: Flags, world: World) -> torch.device:
    """Where this rank computes. Raises: UserError as `pick_device`."""
    device = flags.of(DeviceSpec, only=["device"]).device
    return pick_device(device, world.local_rank if world.size > 1 else None)


def precision(flags: Flags, world: World) -> Amp:
    """In which precision the network runs, by --amp."""
    return autocast(flags.of(DeviceSpec, only=["amp"]).amp, own_device(flags, world))


def with_shared_statistics(net: Net, world: World) -> Net:
    """A network whose batch normalisation sees the batch of all processes, on GPUs; on CPUs, that of its own part."""
    if world.size == 1 or next(net.parameters()).device.type != "cuda":
        return net
    try:
        from timm.layers import convert_sync_batchnorm  # keeps activations that models of timm have in such layers
    except ImportError:
        convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert_sync_batchnorm(net)


def no_shifts(flags: Flags) -> ShiftSpec:
    """`simclr` has no shifting transformation, whatever --shift_trans_type says."""
    return ShiftSpec("none")


def rotations(flags: Flags) -> ShiftSpec:
    """The four rotations, for modes that are defined by them.

    Raises: UserError where --shift_trans_type asks for others.
    """
    # Read whether it was given or is the mode's default: weights record it.
    asked = flags.of(ShiftSpec, only=["shift_trans_type"]).shift_trans_type
    if flags.given("shift_trans_type") and asked != "rotation":
        raise UserError(f"--shift_trans_type: --mode {flags.mode} is made of the four rotations; leave it out")
    return ShiftSpec("rotation")


def several_shifts(flags: Flags) -> ShiftSpec:
    """`simclr_CSI` needs at least two."""
    spec = any_shifts(flags)
    if spec.count < 2:
        raise UserError(f"--shift_trans_type: --mode {flags.mode} classifies shifts; choose one other than none")
    return spec


def any_shifts(flags: Flags) -> ShiftSpec:
    """Raises: UserError where one image would have to be mixed with itself."""
    spec = ShiftSpec.of(flags)
    if flags.of(StepSpec).batch_size == 1 and spec.mixes_neighbours:
        raise UserError(f"--batch_size 1: {spec.shift_trans_type} mixes each image with its neighbour; use 2 or more")
    return spec


def training_images(
    split: Split, shifts: ShiftSpec, aligned: AlignedSpec, device: torch.device
) -> tuple[ImageSet | PictureSet, AlignedSpec]:
    """The normal training images, and the augmentation that is left to do on the device.

    Raises: UserError for a single image that would have to be mixed with itself.
    """
    data = split.stream(aligned).to(device)
    if len(data) == 1 and shifts.mixes_neighbours:
        raise UserError(f"--data_path: one training image alone cannot be mixed by {shifts.shift_trans_type}")
    if not data.cropped:
        return data, aligned
    if shifts.cropmix_crop_aug:
        print("note: --cropmix_crop_aug: pictures that come cropped are not cropped again in training")
    return data, aligned.without_crop()


def view_renderer(flags: Flags) -> Callable[..., Tensor]:
    """What makes views of their draws: `render_views`, fused into a few passes by --compile."""
    # Not dynamic: the whole batch and the last one are all the shapes there are.
    return torch.compile(render_views, dynamic=False) if flags.of(CompileSpec).compile else render_views


def few_views(
    data: ImageSet | PictureSet, shifts: Sequence[Shift], aligned: AlignedSpec, seed: int, epoch: int
) -> Tensor:
    """The first images of a set as training sees them, to be looked at: (K, n, 3, H, W), n at most 8."""
    index = torch.arange(min(_SHOWN, len(data)), device=data.index_device)
    (images,) = data.batches([index], Loading(), seed=seed, epoch=0)
    views = train_views(images, shifts, aligned, generator(seed, "show", epoch, device=data.device))
    return views.unflatten(0, (len(shifts), -1))


def sheet(views: Tensor) -> Tensor:
    """Views (K, n, 3, H, W) as one picture (3, ., .), a row for each shift."""
    from torchvision.utils import make_grid  # 1 s of import that evaluation does not need

    return make_grid(views.flatten(0, 1), nrow=views.shape[1], padding=1)


def all_classes(flags: Flags, split: Split) -> None:
    """Raises: UserError where a labelled mode has but one class."""
    if split.one_class_idx is not None:
        raise UserError(f"--one_class_idx: --mode {flags.mode} learns to classify; leave it out")
    if split.n_classes < 2:
        raise UserError(f"--data_path: --mode {flags.mode} learns to classify, and there is only one class")


def same_classes(net: FeatureNet, split: Split, file: Path, *, flag: str) -> None:
    """Raises: UserError where the network's linear head was made for another number of classes."""
    there = net.linear.out_features
    if there != split.n_classes:
        raise UserError(f"--{flag}: {file} was made for {there} classes, the data set has {split.n_classes}")


def fresh_net(flags: Flags, split: Split, n_shifts: int, *, stage_heads: bool = False) -> FeatureNet:
    """A network with weights that follow from the seed, the backbone's from --pretrained_path where that is given.

    stage_heads: whether earlier stages have projection heads, where the backbone has stages.
    """
    network = flags.of(ModelSpec, only=["model", "simclr_dim", "projector_layers"])
    net: FeatureNet = build_net(
        "feature",
        network.model,
        n_classes=split.n_classes,
        simclr_dim=network.simclr_dim,
        n_shifts=n_shifts,
        projector_layers=network.projector_layers,
        stage_heads=stage_heads,
        seed=seed_of(flags.seed, "weights"),
    )
    coding_settings(flags, net)
    start_from_pretrained(flags, net)
    return net


def coding_settings(flags: Flags, net: nn.Module) -> None:
    """Give the sparse coding layers of a fresh network, where it has any, the settings of the flags."""
    if csc_layers(net):
        flags.of(CSCSpec).apply(net)


def keep_atoms(net: BackboneNet, size: tuple[int, int]) -> Callable[[], None]:
    """The `after_step` of a network that trains its backbone on images of `size` (H, W): see `follow_weights`.

    Raises: UserError for images that are smaller than a kernel.
    """
    if not csc_layers(net.backbone):
        return do_nothing
    try:
        sizes = input_sizes(net.backbone, net.in_channels, size)
    except ValueError as error:
        raise UserError(f"--image_size: {error}; give larger ones") from None
    follow_weights(sizes, fresh=True)
    return partial(follow_weights, sizes)


def start_from_pretrained(flags: Flags, net: BackboneNet) -> None:
    """Load --pretrained_path, where it is given, into the backbone."""
    network = flags.of(ModelSpec, only=["model", "pretrained_path"])
    if network.pretrained_path:
        load_pretrained(net.backbone, network.pretrained_path, model=network.model)
