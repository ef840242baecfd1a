import pytest
import torch

import train
from common.errors import UserError
from datasets import DataSource, split_one_class
from models import BACKBONES, BackboneSpec, backbone_spec
from models.checkpoint import build_net, load_pretrained
from tests.conftest import SHIFT, TINY


def test_pretrained_weights_come_from_a_file_and_their_head_is_left(tmp_path):
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    net = build_net("feature", "resnet18_imagenet", n_classes=3, simclr_dim=8, n_shifts=2, seed=0)
    head = net.linear.weight.clone()
    load_pretrained(net.backbone, str(tmp_path / "w.pth"), model="resnet18_imagenet")
    own = net.backbone.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own) and "fc.weight" not in own
    assert torch.equal(net.linear.weight, head)
    with pytest.raises(UserError, match="--pretrained_path.*does not hold a resnet18:"):
        other = build_net("feature", "resnet18", n_classes=3, simclr_dim=8, n_shifts=2, seed=0)
        load_pretrained(other.backbone, str(tmp_path / "w.pth"), model="resnet18")


def test_training_starts_from_pretrained_weights(tmp_path):
    other = build_net("feature", "resnet8", n_classes=10, simclr_dim=128, n_shifts=5, seed=9)
    torch.save(other.backbone.state_dict(), tmp_path / "w.pth")
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--epochs", "1", "--log_root", str(tmp_path), "--lr_init", "1e-6"]
    assert train.main([*args, "--pretrained_path", str(tmp_path / "w.pth")]) == 0
    (run,) = (p for p in tmp_path.iterdir() if p.is_dir())
    after = torch.load(run / "last.model", weights_only=True)
    torch.testing.assert_close(after["conv1.weight"], other.backbone.state_dict()["conv1.weight"], atol=1e-5, rtol=0)


def test_timm_models_train_and_are_normalised_as_their_weights_expect(tmp_path):
    timm = pytest.importorskip("timm")
    name = "timm_mobilenetv3_small_050"
    spec = backbone_spec(name)
    config = timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert spec.image_size == config.input_size[-1] == 224
    net = build_net("feature", name, n_classes=3, simclr_dim=8, n_shifts=2, seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    with torch.inference_mode():
        torch.testing.assert_close(net(x).h, net.backbone((x - mean) / std), atol=1e-5, rtol=1e-5)
        assert net(x).h.shape == (2, net.feature_dim)
    args = [name if a == "resnet8" else a for a in TINY]
    args[args.index("--image_size") + 1] = "32"
    assert train.main([*args, *SHIFT, "--mode", "simclr_CSI", "--epochs", "1", "--log_root", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name.startswith(f"digits_{name}_unsup_simclr_CSI")


def test_timm_models_of_one_size_get_it_and_refuse_another(tmp_path, capsys):
    pytest.importorskip("timm")
    name = "timm_vit_tiny_patch16_224"
    assert backbone_spec(name).fixed_size and not backbone_spec("timm_resnet18").fixed_size
    split = split_one_class("digits", DataSource(), 3, 224, fixed=True)
    assert split.test().size == (224, 224)
    assert train.main(["--dataset", "digits", "--model", name, "--image_size", "32", "--log_root", str(tmp_path)]) == 2
    assert "--image_size 32: the model takes images of 224" in capsys.readouterr().err


def test_layers_that_draw_follow_the_seed_whatever_happened_before(tmp_path, monkeypatch):
    """Dropout knows the global generator only; the loop seeds it before every step."""
    real = BACKBONES["resnet8"].make

    def make() -> torch.nn.Module:
        net = real()
        net.register_forward_hook(lambda module, args, h: torch.nn.functional.dropout(h, 0.5, module.training))
        return net

    monkeypatch.setitem(BACKBONES, "resnet8", BackboneSpec(make))
    weights = []
    for n in range(2):
        torch.manual_seed(n)
        log = ["--log_root", str(tmp_path / str(n))]
        assert train.main([*TINY, *SHIFT, "--mode", "simclr_CSI", "--epochs", "1", *log]) == 0
        (run,) = (tmp_path / str(n)).iterdir()
        weights.append(torch.load(run / "last.model", weights_only=True))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_unknown_timm_models_are_reported_with_known_ones(capsys):
    pytest.importorskip("timm")
    assert train.main(["--dataset", "digits", "--model", "timm_resnet1x"]) == 2
    assert "timm has no resnet1x; it has" in capsys.readouterr().err


def test_a_missing_timm_is_reported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed"):
        backbone_spec("timm_resnet18")
