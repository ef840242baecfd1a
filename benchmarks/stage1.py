"""A step of stage 1: views, network, contrastive and shift losses, backward, LARS. Ours against the published step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.augmentation import published_views
from benchmarks.compare import Part, distance
from common.device import Amp, autocast
from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.loading import Loading
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import render_views, shift_labels, train_views
from models.checkpoint import build_net
from models.feature_net import FeatureNet
from training.modes.simclr import contrastive_step
from training.optim import Lars

_SPEC = AlignedSpec()
_SHIFTS = ShiftSpec("rot_bmix", 0.2).functions(_SPEC)
_K = len(_SHIFTS)


def part(
    device: torch.device,
    model: str = "resnet8",
    images: int = 64,
    compiled: bool = False,
    bf16: bool = False,
    on_gpu: int = 512,
) -> Part:
    """One step on 10 views of each of `images` images of 32 pixels, or of `on_gpu` images on a GPU.

    bf16: both sides by autocast.
    """
    images = on_gpu if device.type == "cuda" else images
    amp = autocast("bf16" if bf16 else "off", device)
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=g)
    data = image_set(pixels, torch.zeros(images)).to(device)
    index = torch.arange(images, device=device)
    floats, labels = data.batch(index), data.labels.to(device)
    nets = [
        build_net("feature", model, n_classes=10, simclr_dim=128, n_shifts=_K, seed=0).to(device).train()
        for _ in range(2)
    ]
    own, theirs = nets[0], nets[1].to(memory_format=torch.contiguous_format)
    step, published = _Step(own), _PublishedStep(theirs)
    render = render_views
    if compiled:
        own.compile(dynamic=False)
        render = torch.compile(render_views, dynamic=False)

    def ours() -> None:
        (images,) = data.batches([index], Loading(views=2), seed=0, epoch=1)
        views = train_views(images, _SHIFTS, _SPEC, generator(0, "augment", 1, 0, device=device), render)
        step(views, labels, amp)

    def check(_: None, __: None) -> str:
        """The losses of the same weights on the same views, the probe's gradient, and where LARS takes the weights."""
        theirs.load_state_dict(own.state_dict())
        before = _weights(own)
        views = published_views(floats)
        both = own, theirs
        # In float32: the two memory formats choose other kernels, which under TF32 differ by 1e-3 in every product.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            losses = [made(views, labels, amp) for made in (_Step(own), _PublishedStep(theirs))]
        torch.testing.assert_close(*losses, atol=0, rtol=1e-2 if bf16 else 1e-4)
        gradients = [net.linear.weight.grad for net in both]
        moves = [_weights(net) - before for net in both]
        probe, weights = (distance(x, y) for x, y in (gradients, moves))
        assert max(probe, weights) < (0.3 if bf16 else 1e-2), f"probe's gradient {probe:.1e}, weights {weights:.1e}"
        ends = " and ".join(f"{float(x.sum()):.4f}" for x in losses)
        return f"losses {ends}, the step that the weights take equal to {weights:.0e}"

    def theirs_step() -> None:
        published(published_views(floats), labels, amp)

    name = f"stage-1 step, {model}{', compiled' if compiled else ''}{', bf16' if bf16 else ''}"
    arithmetic = "bf16" if bf16 else "convolution"
    return Part(name, f"{10 * images} views", ours, theirs_step, check, arithmetic=arithmetic)


def _weights(net: FeatureNet) -> Tensor:
    """All that LARS trains, in one vector."""
    return torch.cat([p.detach().flatten() for name, p in net.named_parameters() if not name.startswith("linear.")])


class _Step:
    """Our step on given views; returns the three losses."""

    def __init__(self, net: FeatureNet):
        self.net = net
        others = [p for name, p in net.named_parameters() if not name.startswith("linear.")]
        self.optimizers = [Lars(others, lr=0.1, weight_decay=1e-6), torch.optim.Adam(net.linear.parameters(), 1e-3)]

    def __call__(self, views: Tensor, labels: Tensor, amp: Amp) -> Tensor:
        step = contrastive_step(self.net, views, labels, n_shifts=_K, amp=amp)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses = torch.stack(list(step.losses.values()))
        losses.sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return losses.detach()


def published_losses(net: FeatureNet, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive, shift and probe losses with whole matrices of exponentials and masks, as published."""
    h = net.backbone((views - 0.5) / 0.5)
    z, shift, n = net.simclr_layer(h), net.shift_cls_layer(h), len(views)
    z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
    similarity = torch.exp(z @ z.t() / 0.5) * (1 - torch.eye(n, device=z.device))
    similarity = -torch.log(similarity / (similarity.sum(1, keepdim=True) + 1e-8) + 1e-8)
    half = n // 2
    sim = (similarity[:half, half:].diag().sum() + similarity[half:, :half].diag().sum()) / n
    target = shift_labels(_K, len(labels), 2, views.device)
    unshifted = torch.cat([part[: len(labels)] for part in h.detach().chunk(2)])
    return sim, F.cross_entropy(shift, target), F.cross_entropy(net.linear(unshifted), labels.repeat(2))


class _PublishedStep:
    """The step on its own network: contiguous memory, a loop over tensors in LARS, the losses read at every step."""

    def __init__(self, net: FeatureNet):
        self.net = net
        self.others = [p for n, p in net.named_parameters() if not n.startswith("linear.")]
        self.sgd = torch.optim.SGD(self.others, 0.1, momentum=0.9, foreach=False)
        self.adam = torch.optim.Adam(net.linear.parameters(), 1e-3, foreach=False)

    def __call__(self, views: Tensor, labels: Tensor, amp: Amp) -> Tensor:
        with amp():
            losses = published_losses(self.net, views, labels)
        self.sgd.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        sum(losses[:2]).backward()  # type: ignore[union-attr]
        for p in self.others:
            if p.grad is not None:
                _lars(p, 1e-6)
        self.sgd.step()
        losses[2].backward()
        self.adam.step()
        [loss.item() for loss in losses]
        return torch.stack(losses).detach().float()


def _lars(p: nn.Parameter, weight_decay: float) -> None:
    assert p.grad is not None
    with torch.no_grad():
        w, g = p.norm(), p.grad.norm()
        if w > 0 and g > 0:
            p.grad.add_(p, alpha=weight_decay).mul_(0.001 * w / (g + weight_decay * w + 1e-8))
