import torch
import torch.nn.functional as F

from models.checkpoint import build_net
from training.modes.sup_linear import head_losses, rate


def test_heads_learn_class_rotation_and_class_by_rotation():
    net = build_net("feature", "resnet8", n_classes=3, simclr_dim=8, n_shifts=4, seed=0)
    h, labels = torch.randn(8, 64), torch.tensor([2, 0])  # 4 rotations of 2 images
    terms = head_losses(net, h, labels, n_shifts=4)
    torch.testing.assert_close(terms["cls"], F.cross_entropy(net.linear(h[:2]), labels))
    rotation = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    torch.testing.assert_close(terms["shift"], F.cross_entropy(net.shift_cls_layer(h), rotation))
    joint = torch.tensor([2, 0, 5, 3, 8, 6, 11, 9])
    torch.testing.assert_close(terms["joint"], F.cross_entropy(net.joint_distribution_layer(h), joint))
    assert set(head_losses(net, h[:2], labels, n_shifts=1)) == {"cls"}


def test_the_rate_falls_to_a_tenth_at_60_75_and_90_percent():
    found = [rate(0.1, epoch, 100) for epoch in (0, 59.9, 60, 74.9, 75, 89.9, 90, 99)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.1, 0.1, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]))
