"""Looking inside a network of sparse coding layers, by way of files of weights and against chains written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tsne
from common.files import save_tensors
from datasets import DataSource, split_one_class
from evals import inside as module
from evals.inside import chosen_taps, spread
from evals.inside_report import atoms_title, layer_title, tap_title
from models import BACKBONES
from models.checkpoint import build_net
from tests.evals.test_display import stretched
from tests.fake_gpu import FakeGpu

CHAIN = "sdnet8_all_noshortcut"
SIZES = {
    "classifier": {"n_classes": 10},
    "feature": {"n_classes": 10, "simclr_dim": 8, "n_shifts": 4},
    "rot_trans": {},
}
MODES = {"classifier": "supervised", "feature": "simclr", "rot_trans": "rot_trans"}


def split():
    return split_one_class("digits", DataSource(image_size=8), None, 8)


def network(model: str, kind: str = "classifier"):
    """Fresh weights, and statistics of batch normalisation from the training images."""
    net = build_net(kind, model, seed=0, **SIZES[kind])
    images = split().train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over the batches
    with torch.no_grad():
        for index in torch.arange(100).split(50):
            net.train().features(images.batch(index))
    return net.eval()


@pytest.fixture
def run(tmp_path):
    """A run folder with such weights, or those of `net`."""

    def made(model=CHAIN, kind="classifier", net=None) -> Path:
        folder = tmp_path / f"{model}_{kind}"
        folder.mkdir(exist_ok=True)
        net = network(model, kind) if net is None else net
        flags = {"mode": MODES[kind], "dataset": "digits", "image_size": 8, "model": model}
        save_tensors(folder / "last.model", net.state_dict(), facts={"flags": flags, "epoch": 1})
        return folder

    return made


def look(folder: Path, *more: str) -> int:
    return tsne.main(["--mode", "sdnet_inside", "--load_path", str(folder), "--device", "cpu", *more])


@pytest.fixture
def seen(run, monkeypatch):
    """Look inside: what the JSON says, and the arrays of the pictures."""
    found = []
    real = module.Result
    monkeypatch.setattr(module, "Result", lambda *args: found.append(real(*args)) or found[-1])

    def looked(*more: str, **which) -> tuple[dict, dict[str, np.ndarray]]:
        folder = run(**which)
        assert look(folder, *more) == 0
        return json.loads((folder / "result_sdnet_inside.json").read_text()), found[-1].arrays

    return looked


def normalised(net, places) -> torch.Tensor:
    images = split().train().batch(torch.as_tensor(places))
    return (images - net.input_mean) / net.input_std


def synthesis(layer, z, size):
    """The gradient of <conv(x), z>."""
    x = torch.zeros(len(z), layer.weight.shape[1], *size, dtype=z.dtype, requires_grad=True)
    code = nn.functional.conv2d(x, layer.weight.detach(), None, layer.stride, layer.padding)
    return torch.autograd.grad((code * z).sum(), x)[0]


def test_the_stem_and_a_block_are_inverted_as_by_hand(seen, monkeypatch):
    monkeypatch.setattr(module, "_MEASURED", 40)
    result, arrays = seen("--inside_images", "12", "--ood_batch_size", "7")
    plain, kept = seen("--inside_images", "12", "--keep_mean", "--out", str(Path(result["checkpoint"]).parent / "kept"))
    train, net = split().train(), network(CHAIN)
    places = [int((train.indices == image["index"]).nonzero()) for image in result["shown"]]
    labels = [image["label"] for image in result["shown"]]
    assert labels == sorted(labels) == train.labels[places].tolist() and set(labels) == set(range(10))
    np.testing.assert_allclose(arrays["inversions/images"], train.batch(torch.tensor(places)), atol=1e-7)
    order = torch.randperm(len(train), generator=module.generator(0, "inside"))[:40]
    x = normalised(net, torch.cat([torch.tensor(places), order]))
    net, x = net.double(), x.double()
    back, block = net.backbone, net.backbone.layer1[0]

    def undone(bn, y):
        scale = (bn.running_var + bn.eps).sqrt() / bn.weight
        return ((y - bn.bias.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bn.running_mean.view(-1, 1, 1)).detach()

    z0 = back.conv1(x).detach()
    z1 = block.conv1(back.bn1(z0)).detach()
    z2 = block.conv2(block.bn1(z1)).detach()
    stem = synthesis(back.conv1, z0, (8, 8))
    first = undone(back.bn1, synthesis(block.conv1, undone(block.bn1, synthesis(block.conv2, z2, (8, 8))), (8, 8)))
    for name, y in {"stem": stem, "1.1": synthesis(back.conv1, first, (8, 8))}.items():
        # The order of shown and measured images: 12 and 40.
        centred = y[:12] - y[12:].mean(0)
        np.testing.assert_allclose(arrays[f"inversions/{name}"], stretched(centred), atol=1e-4)
        np.testing.assert_allclose(kept[f"inversions/{name}"], stretched(y[:12]), atol=1e-4)
        pairs = [zip(x[:12], y[:12], strict=True), zip(x[:12] - x[12:].mean(0), centred, strict=True)]
        for kind, images in zip(("correlation", "centred_correlation"), pairs, strict=True):
            expected = np.mean([np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in images])
            assert result[kind][name] == pytest.approx(expected, abs=1e-5)
        error = np.mean([float((a - b).square().sum() / a.square().sum()) for a, b in zip(x[:12], y[:12], strict=True)])
        assert result["error"][name] == pytest.approx(error, rel=1e-4)
    assert plain["correlation"] == pytest.approx(result["correlation"])


def test_sparsity_and_residuals_are_means_over_images_whatever_the_batch(seen, monkeypatch):
    monkeypatch.setattr(module, "_MEASURED", 30)
    result, arrays = seen("--ood_batch_size", "7")
    net, order = network(CHAIN), torch.randperm(len(split().train()), generator=module.generator(0, "inside"))[:30]
    back, x = net.backbone, normalised(net, order)
    y = back.layer1(back.bn1(back.conv1(x)))
    expected = {"conv1": (back.conv1, x), "layer2.0.conv1": (back.layer2[0].conv1, y)}
    assert result["measured"] == 30 and list(result["nonzero"]) == [
        *["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"],
        *["layer3.0.conv1", "layer3.0.conv2"],
    ]
    for name, (layer, inputs) in expected.items():
        z = layer(inputs).detach()
        assert result["nonzero"][name] == pytest.approx(np.count_nonzero(z) / z.numel(), rel=1e-6)
        assert result["mean"][name] == pytest.approx(float(z.mean()), rel=1e-4)
        inputs = inputs.detach()
        left = inputs - synthesis(layer, z, inputs.shape[2:])
        shares = [float(a.square().sum() / b.square().sum()) for a, b in zip(left, inputs, strict=True)]
        assert result["residual"][name] == pytest.approx(np.mean(shares), rel=1e-4)
        assert 0.01 < result["nonzero"][name] < 0.95 and 0 < result["residual"][name] < 1
    z = back.conv1(x).detach()
    used = np.array([np.count_nonzero(z[:, atom]) / z[:, atom].numel() for atom in range(16)])
    assert result["atoms"]["order"] == np.argsort(-used, kind="stable").tolist()
    np.testing.assert_allclose(result["atoms"]["used"], np.sort(used)[::-1], rtol=1e-6)
    np.testing.assert_allclose(arrays["used"], result["atoms"]["used"], rtol=1e-6)
    assert np.array_equal(arrays["atoms"], back.conv1.weight.detach()[result["atoms"]["order"]])
    assert result["layers"]["layer3.0.conv2"]["atoms"] == 64
    assert result["layers"]["conv1"]["lambda"] == pytest.approx(0.1) and result["layers"]["conv1"]["steps"] == 2


def test_pictures_of_every_kind_of_network_are_drawn_and_are_the_same_again(run):
    for kind in SIZES:
        folder = run(kind=kind)
        assert look(folder) == 0
        pictures = {path.name: Image.open(path) for path in folder.glob("*.png")}
        assert set(pictures) == {f"sdnet_inside_{name}.png" for name in ("inversions", "atoms", "sparsity")}
        assert all(picture.size[0] > 300 for picture in pictures.values())
        text = json.loads((folder / "result_sdnet_inside.json").read_text())
        assert set(text["pictures"].values()) == set(pictures)
    before = {name: np.asarray(picture) for name, picture in pictures.items()}
    assert look(folder) == 0
    for name, pixels in before.items():
        assert np.array_equal(np.asarray(Image.open(folder / name)), pixels)


def test_equalisation_spreads_the_inversions_and_not_the_images(seen):
    _, plain = seen()
    _, equal = seen("--equalise")
    assert np.array_equal(plain["inversions/images"], equal["inversions/images"])
    stem = equal["inversions/stem"].reshape(24, -1)
    assert abs(np.median(stem, axis=1).mean() - 0.5) < 0.05
    order = [np.argsort(arrays["inversions/stem"][0, 0].flatten(), kind="stable") for arrays in (plain, equal)]
    ranked = equal["inversions/stem"][0, 0].flatten()[order[0]]
    assert (np.diff(ranked) >= 0).all()


@pytest.mark.parametrize("model", ["sdnet8", "sdnet8_all"])
def test_of_networks_with_shortcuts_the_stem_alone_is_inverted(model, run, seen, capsys):
    result, arrays = seen(model=model)
    assert [name for name in arrays if name.startswith("inversions")] == ["inversions/images", "inversions/stem"]
    assert len(result["nonzero"]) == (1 if model == "sdnet8" else 7)
    folder = run(model)
    capsys.readouterr()
    assert look(folder, "--inside_taps", "stem", "1.1", "--out", str(folder / "new")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: --inside_taps 1.1: ") and "only the stem" in told
    assert not (folder / "new").exists()


def test_places_are_those_that_are_asked_for(seen):
    _, arrays = seen("--inside_taps", "3.1", "stem")
    assert [name for name in arrays if "/" in name] == ["inversions/images", "inversions/3.1", "inversions/stem"]


def test_a_network_without_sparse_coding_is_refused_in_a_line(run, capsys):
    folder = run("resnet8")
    assert look(folder) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: --mode sdnet_inside: resnet8 has no sparse coding layer; ")
    assert [path.name for path in folder.iterdir()] == ["last.model"]


def test_what_cannot_be_shown_is_refused_in_a_line(run, capsys):
    net = network(CHAIN)
    with torch.no_grad():
        net.backbone.layer2[0].bn1.weight[5] = 1e-9
    folder = run(net=net)
    for more, flag, why in (
        ([], "--inside_taps 2.1", "channel 5 of layer2.0.bn1 has gamma 1e-09"),
        (["--inside_images", "5000"], "--inside_images 5000", "1198 training images"),
        (["--inside_images", "0"], "--inside_images", "0"),
        (["--inside_taps", "4.1"], "--inside_taps 4.1", "there are stem, 1.1, 2.1, 3.1"),
    ):
        assert look(folder, *more) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith(f"error: {flag}") and why in told, told
        assert [path.name for path in folder.iterdir()] == ["last.model"]
    assert look(folder, "--inside_taps", "stem", "1.1") == 0


def test_weights_without_a_backbone_are_refused(tmp_path, capsys):
    save_tensors(tmp_path / "last.model", {"something": torch.zeros(1)}, facts={"flags": {"mode": "supervised"}})
    assert look(tmp_path) == 2
    assert "no network with a backbone" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_gpu_gives_the_numbers_of_the_cpu(kind, run, monkeypatch):
    monkeypatch.setattr(module, "_MEASURED", 20)
    folder, found = run(), []
    assert look(folder, "--inside_images", "2") == 0
    with FakeGpu(kind):
        more = ["--device", kind, "--inside_images", "2", "--out", str(folder / "gpu")]
        assert tsne.main(["--mode", "sdnet_inside", "--load_path", str(folder), *more]) == 0
    for place in (folder, folder / "gpu"):
        found.append(json.loads((place / "result_sdnet_inside.json").read_text()))
    for name in ("nonzero", "residual", "mean", "correlation", "centred_correlation", "error"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_images_are_spread_over_classes_and_sorted_by_label():
    labels = torch.tensor([2, 2, 2, 2, 0, 2, 0, 1])
    order = torch.tensor([3, 0, 7, 6, 1, 2, 4, 5])
    assert spread(labels, order, 2).tolist() == [7, 3]
    assert spread(labels, order, 3).tolist() == [6, 7, 3]
    assert spread(labels, order, 5).tolist() == [6, 4, 7, 3, 0]
    assert spread(labels, order, 8).tolist() == [6, 4, 7, 3, 0, 1, 2, 5]


def test_default_places_are_the_published_ones_where_the_network_has_them():
    with torch.device("meta"):
        nets = {name: BACKBONES[name].make() for name in ("sdnet18_all_noshortcut", "sdnet18_all_noshortcut_imagenet")}
    for net in nets.values():
        assert list(chosen_taps(net, None)) == ["stem", "1.1", "1.2", "2.2", "3.2"]
    layers = chosen_taps(nets["sdnet18_all_noshortcut_imagenet"], ["3.2"])["3.2"].layers
    assert len(layers) == 14 and layers[1].norm is None


def test_names_of_places_and_layers_are_short():
    assert [tap_title(name) for name in ("stem", "pool", "2.1")] == ["stem", "pool", "stage 2 block 1"]
    names = ["conv1", "pool", "layer3.1.conv2", "else.conv2"]
    assert [layer_title(name) for name in names] == ["stem", "pool", "3.2 conv2", "else.conv2"]


@pytest.mark.parametrize("channels, what", [(3, "zero is mid grey"), (1, "zero is mid grey"), (5, "norm over their 5")])
def test_the_sheet_of_atoms_says_what_it_shows(channels, what):
    assert what in atoms_title((16, channels, 7, 7))
