import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from models.checkpoint import build_net
from training.losses.contrastive import nt_xent, sup_nt_xent, uniclr
from training.modes.simclr import contrastive_step, probe_error, spread
from training.specs import ContrastiveSpec


def test_step_adds_contrastive_shift_and_probe_terms():
    net = build_net("feature", "resnet8", n_classes=4, simclr_dim=8, n_shifts=2, seed=0).eval()
    views, labels = torch.rand(12, 3, 8, 8), torch.tensor([0, 1, 3])  # 2 copies, 2 shifts, 3 images
    terms = contrastive_step(
        net, views, labels, n_shifts=2, contrast=ContrastiveSpec(temperature=0.3, sim_lambda=2.0)
    ).losses
    features = net(views)
    expected = 2 * nt_xent(features.z, 0.3)
    torch.testing.assert_close(terms["sim"], expected)
    shift = F.cross_entropy(features.shift, torch.tensor([0, 0, 0, 1, 1, 1] * 2))
    torch.testing.assert_close(terms["shift"], shift)
    rows = [0, 1, 2, 6, 7, 8]  # shift 0 of both copies
    torch.testing.assert_close(terms["cls"], F.cross_entropy(net.linear(features.h[rows]), labels.repeat(2)))
    terms["cls"].backward()
    assert net.linear.weight.grad is not None and net.backbone.conv1.weight.grad is None


def test_step_with_uniclr_and_without_the_shift_classifier():
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0).eval()
    views = torch.rand(12, 3, 8, 8)
    contrast = ContrastiveSpec(temperature=0.2, sim_loss="uniclr", shift_lambda=0.0, soft_temperature=0.5)
    step = contrastive_step(net, views, torch.zeros(3).long(), n_shifts=2, contrast=contrast)
    normal = torch.tensor([True] * 3 + [False] * 3)
    torch.testing.assert_close(step.losses["sim"], uniclr(net(views).z, normal, 0.2, 0.5))
    assert set(step.losses) == {"sim", "cls"}
    with pytest.raises(UserError, match="--soft_temperature"):
        ContrastiveSpec(soft_temperature=0.5)


def test_step_of_three_copies_with_heads_of_earlier_stages():
    sizes = {"n_classes": 2, "simclr_dim": 8, "n_shifts": 2, "stage_heads": True}
    net = build_net("feature", "resnet8", seed=0, **sizes).train()
    views, labels = torch.rand(18, 3, 8, 8), torch.tensor([0, 1, 1])  # 3 copies, 2 shifts, 3 images
    contrast = ContrastiveSpec(temperature=0.3, copies=3, deep_supervision=0.4)
    losses = contrastive_step(net, views, labels, n_shifts=2, contrast=contrast).losses
    features = net(views)
    torch.testing.assert_close(losses["sim"], nt_xent(features.z, 0.3, 3))
    first, second = features.stages.unbind(1)
    torch.testing.assert_close(losses["deep"], 0.4 * (nt_xent(first, 0.3, 3) + nt_xent(second, 0.3, 3)))
    soft = ContrastiveSpec(temperature=0.3, copies=3, deep_supervision=0.4, sim_loss="uniclr", soft_temperature=0.5)
    normal = torch.tensor([True] * 3 + [False] * 3)
    found = contrastive_step(net, views, labels, n_shifts=2, contrast=soft).losses
    torch.testing.assert_close(found["sim"], uniclr(features.z, normal, 0.3, 0.5, 3))
    alike = [uniclr(z, normal, 0.3, None, 3) for z in (first, second)]  # soft at the last stage only
    torch.testing.assert_close(found["deep"], 0.4 * sum(alike))
    shift = F.cross_entropy(features.shift, torch.tensor([0, 0, 0, 1, 1, 1] * 3))
    torch.testing.assert_close(losses["shift"], shift)
    rows = [0, 1, 2, 6, 7, 8, 12, 13, 14]  # shift 0 of all copies
    torch.testing.assert_close(losses["cls"], F.cross_entropy(net.linear(features.h[rows]), labels.repeat(3)))
    losses["deep"].backward()
    assert net.stage_layers[0][0].weight.grad.norm() > 0 and net.backbone.conv1.weight.grad.norm() > 0
    assert net.simclr_layer[0].weight.grad is None and net.backbone.layer3[0].conv1.weight.grad is None


def test_the_shift_classifier_has_its_weight():
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0).eval()
    views, labels = torch.rand(12, 3, 8, 8), torch.zeros(3).long()
    whole, part = (
        contrastive_step(net, views, labels, n_shifts=2, contrast=ContrastiveSpec(shift_lambda=weight)).losses["shift"]
        for weight in (1.0, 0.3)
    )
    torch.testing.assert_close(part, 0.3 * whole)


def test_spread_is_nothing_where_all_projections_point_the_same_way():
    z = torch.randn(6, 4, dtype=torch.float64)
    assert spread(z[:1] * torch.rand(5, 1, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)
    u = z / z.norm(dim=1, keepdim=True)
    assert spread(z).item() == pytest.approx(float((1 - u @ u.T).mean()))


def test_labelled_step_takes_the_joint_label_of_class_and_rotation():
    net = build_net("feature", "resnet8", n_classes=4, simclr_dim=8, n_shifts=4, seed=0).eval()
    views, labels = torch.rand(24, 3, 8, 8), torch.tensor([0, 1, 3])  # 2 copies, 4 shifts, 3 images
    step = contrastive_step(
        net, views, labels, n_shifts=4, n_classes=4, contrast=ContrastiveSpec(temperature=0.07, sim_lambda=2.0)
    )
    joint = torch.tensor([0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15])
    torch.testing.assert_close(step.losses["sim"], 2 * sup_nt_xent(net(views).z, joint, 0.07))
    assert set(step.losses) == {"sim", "cls"}


def test_plain_simclr_has_no_shift_term():
    net = build_net("feature", "resnet8", n_classes=4, simclr_dim=8, n_shifts=1, seed=0)
    step = contrastive_step(net, torch.rand(6, 3, 8, 8), torch.zeros(3).long(), n_shifts=1)
    assert set(step.losses) == {"sim", "cls"}


def test_probe_error_counts_wrong_guesses_and_restores_the_mode():
    from datasets.sets import image_set

    net = build_net("feature", "resnet8", n_classes=3, simclr_dim=8, n_shifts=1, seed=0).train()
    with torch.no_grad():
        net.linear.weight.zero_()
        net.linear.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    data = image_set(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([1, 1, 0, 2, 1]))
    assert probe_error(net, data, 2) == pytest.approx(0.4) and net.training


def test_the_probe_is_tested_by_running_statistics_which_the_test_leaves_alone():
    from datasets.sets import image_set

    g = torch.Generator().manual_seed(0)
    net = build_net("feature", "resnet8", n_classes=3, simclr_dim=8, n_shifts=1, seed=0).train()
    data = image_set(torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=g), torch.arange(40) % 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    errors = [probe_error(net, data, size) for size in (2, 7, 40)]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        named = net.eval().linear(net(data.batch(torch.arange(40))).h).argmax(1)
    assert errors == pytest.approx([float((named != data.labels).float().mean())] * 3)
