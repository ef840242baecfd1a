"""The table of network kinds: recognised, built, loaded, and what is reported of files that do not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from models import BACKBONES, backbone_spec
from models.autoencoder.networks import AutoencoderSpec
from models.checkpoint import NETS, NetKind, build_net, kind_of, load_net
from models.feature_net import BackboneNet, FeatureNet, FeatureTransform
from models.insert import insert_before_activations
from tests.conftest import HEAVY

SIZES = {"n_classes": 3, "simclr_dim": 8, "n_shifts": 2, "projector_layers": 3, "stage_heads": True}
SPARSE = {"sr_dict_size": 7, "sr_lambda": 0.02, "sr_rho": 3.0}
SETTINGS = {"transform": FeatureTransform(), "steps": 5, "tol": 0.1}
ROWS = {"rows": 4, "features": 12, "shape": (3, 2, 2)}
DENSE = {"spec": AutoencoderSpec(layers=(5, 2))}
ARGUMENTS = {
    "feature": SIZES,
    "classifier": {"n_classes": 3},
    "ra_classifier": {"n_classes": 3, "ra_blocks": 1},
    "rot_trans": {},
    "cocsr": {**SIZES, **SPARSE, **SETTINGS},
    "levels": {
        "stage1": "rot_trans",
        "stage1_sizes": {},
        "sizes": {"pixels": 12, "stages": 20},
        "atoms": 7,
        "known": (4, 9, 64),
    },
    "autoencoder": {**ROWS, **DENSE},
}
FILE = {"model": "resnet8", "path": Path("f.model"), "flag": "load_path"}
# Kinds of networks with a backbone.
BACKED = [kind for kind in NETS if kind != "autoencoder"]


def fresh(kind: str, seed: int = 1, model: str = "resnet8", **changes):
    return build_net(kind, model, seed=seed, **{**ARGUMENTS[kind], **changes})


def settings(kind: str) -> dict:
    return {"cocsr": SETTINGS, "autoencoder": DENSE}.get(kind, {})


@pytest.mark.parametrize("kind", NETS)
def test_a_network_of_every_kind_is_recognised_and_loaded_from_its_state_dict(kind):
    net = fresh(kind)
    state = net.state_dict()
    assert kind_of(state) == kind
    sizes = NETS[kind].read_sizes(state)
    expected = {k: v for k, v in ARGUMENTS[kind].items() if k not in settings(kind)}
    assert sizes == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in expected.items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = load_net(kind, state, **FILE, **settings(kind))
    assert type(found) is type(net) and torch.equal(torch.get_rng_state(), before)
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    if kind == "cocsr":
        assert found.sr_nets.coding == net.sr_nets.coding.__class__(pytest.approx(0.02), 3.0, 5, 0.1)
        assert not any(p.requires_grad for p in found.feature_net.parameters()) and not found.feature_net.training


def test_fresh_weights_are_those_of_the_seeded_global_generator():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        expected = FeatureNet(backbone_spec("resnet8").make(), **SIZES).state_dict()
    state = fresh("feature", seed=4).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    sparse = fresh("cocsr", seed=4).state_dict()
    assert all(torch.equal(sparse[f"feature_net.{key}"], value) for key, value in expected.items())


def test_a_state_dict_of_no_kind_raises_and_of_several_the_most_markers_decide(monkeypatch):
    with pytest.raises(
        ValueError, match="none of these networks: feature, classifier, ra_classifier, rot_trans, cocsr"
    ):
        kind_of({"conv1.weight": torch.zeros(1)})
    linear = NetKind(("linear.weight",), "", NETS["feature"].build, lambda state: {})
    monkeypatch.setattr("models.checkpoint.NETS", {"linear": linear, **NETS})
    assert (
        kind_of(fresh("feature").state_dict()) == "feature" and kind_of({"linear.weight": torch.zeros(1)}) == "linear"
    )


@pytest.mark.parametrize(
    "kind, other, why",
    [
        ("feature", "rot_trans", "holds no weights of a stage-1 network (no 'linear.weight')"),
        ("rot_trans", "feature", "was not made by train.py --mode rot_trans"),
        ("cocsr", "feature", "holds no dictionaries; give a last.cocsr_model, made by train_cocsr.py"),
        ("classifier", "ra_classifier", "holds a classifier with reverse attention; give one without"),
        ("ra_classifier", "classifier", "holds no classifier with reverse attention (no 'ra_blocks')"),
    ],
)
def test_a_file_of_another_kind_is_refused(kind, other, why):
    with pytest.raises(UserError) as error:
        load_net(kind, fresh(other).state_dict(), **FILE, **settings(kind))
    assert str(error.value) == f"--load_path: f.model {why}"


def test_a_file_with_reverse_attention_says_behind_how_many_blocks():
    state = fresh("ra_classifier", model="wrn16_1").state_dict()
    found = load_net("ra_classifier", state, **{**FILE, "model": "wrn16_1"})
    assert len(found.eval().heads(torch.rand(1, 3, 8, 8)).auxiliary) == 1
    for count in (torch.tensor(0), torch.tensor([1, 2])):
        with pytest.raises(UserError, match="f.model is corrupt: its tensor ra_blocks is"):
            load_net("ra_classifier", {**state, "ra_blocks": count}, **{**FILE, "model": "wrn16_1"})


def test_networks_that_take_no_reverse_attention_are_named():
    with pytest.raises(
        UserError, match="^--model resnet18_imagenet: no reverse attention for it; there is for resnet8"
    ):
        build_net("ra_classifier", "resnet18_imagenet", n_classes=3, seed=0)


@pytest.mark.parametrize("kind", ["feature", "cocsr"])
def test_another_number_of_shifts_is_an_error_and_another_projection_size_a_note(kind, capsys):
    state = fresh(kind).state_dict()
    with pytest.raises(UserError) as error:
        load_net(kind, state, n_shifts=4, simclr_dim=9, **FILE, **settings(kind))
    why = "was trained with 2 shifts, there are 4 here (--shift_trans_type)"
    assert str(error.value) == f"--load_path: f.model {why}" and capsys.readouterr().out == ""
    found = load_net(kind, state, n_shifts=None, simclr_dim=512, **FILE, **settings(kind)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    note = "note: --simclr_dim 512: f.model was trained with 8, which is used\n"
    assert capsys.readouterr().out == note
    load_net(kind, state, n_shifts=2, simclr_dim=8, **FILE, **settings(kind))
    assert capsys.readouterr().out == ""


def test_floats_differ_by_more_than_the_rounding_of_a_file(capsys):
    state = fresh("cocsr").state_dict()
    load_net("cocsr", state, sr_lambda=0.02, sr_rho=4.0, **FILE, **SETTINGS)
    assert capsys.readouterr().out == "note: --sr_rho 4.0: f.model was trained with 3, which is used\n"


@pytest.mark.parametrize("kind", BACKED)
def test_the_model_that_a_file_holds_is_named(kind):
    other = "wrn16_1" if kind == "ra_classifier" else "resnet18_imagenet"
    state = fresh(kind, model=other).state_dict()
    with pytest.raises(UserError) as error:
        load_net(kind, state, **FILE, **settings(kind))
    why = f"does not hold a resnet8 but a {other}; --no_strict loads what fits"
    assert str(error.value) == f"--model: f.model {why}"
    only = {key: value for key, value in state.items() if "layer3" not in key}
    with pytest.raises(UserError, match="does not hold a resnet8; --no_strict"):
        load_net(kind, only, **FILE, **settings(kind))


def test_an_autoencoder_that_a_file_does_not_hold_is_named():
    state = build_net("autoencoder", "dense", seed=1, **ARGUMENTS["autoencoder"]).state_dict()
    other = {"spec": AutoencoderSpec(layers=(6, 2))}
    with pytest.raises(UserError) as error:
        load_net("autoencoder", state, **{**FILE, "model": "dense"}, **other)
    why = "does not hold a dense autoencoder of these sizes; --no_strict loads what fits"
    assert str(error.value) == f"--autoencoder: f.model {why}"
    del state["S"]
    with pytest.raises(UserError, match="f.model was not made by train.py --mode rdae, dae or vae"):
        load_net("autoencoder", state, **FILE, **DENSE)


def test_without_strict_a_network_of_which_no_backbone_tensor_fits_is_refused():
    state = {key: value for key, value in fresh("feature").state_dict().items() if "linear" in key}
    state |= {k: v for k, v in fresh("feature").state_dict().items() if k.startswith(("simclr_layer", "shift_cls"))}
    with pytest.raises(UserError, match="--no_strict: no tensor of a resnet8 fits f.model"):
        load_net("feature", state, strict=False, **FILE)


def test_without_strict_dictionaries_must_still_be_whole(capsys):
    state = fresh("cocsr").state_dict()
    kept = {key: value for key, value in state.items() if key != "feature_net.conv1.weight"}
    found = load_net("cocsr", kept, strict=False, **FILE, **SETTINGS).state_dict()
    assert all(torch.equal(found[key], value) for key, value in kept.items())
    assert capsys.readouterr().out == "--no_strict: loaded 73 of 74 tensors; fresh: conv1.weight\n"
    short = {**state, "sr_nets.dictionary": state["sr_nets.dictionary"][:, :60]}
    with pytest.raises(UserError) as error:
        load_net("cocsr", short, strict=False, **FILE, **SETTINGS)
    why = "has sr_nets.dictionary of shape (2, 60, 7), not (2, 64, 7)"
    assert str(error.value) == f"--load_path: f.model {why}"
    for flat in (torch.zeros(7), torch.zeros(1, 2, 64, 7)):
        with pytest.raises(
            UserError, match=r"f.model has dictionaries of shape \(.*\), not \(shifts, features, atoms\)"
        ):
            load_net("cocsr", {**state, "sr_nets.dictionary": flat}, **FILE, **SETTINGS)


def test_lambda_and_rho_may_be_stored_as_vectors_of_one_entry():
    state = fresh("cocsr").state_dict()
    vectors = {**state, "sr_nets.rho": torch.tensor([3]), "sr_nets.lambdaV": torch.tensor([0.02])}
    found = load_net("cocsr", vectors, **FILE, **SETTINGS)
    assert found.sr_nets.coding.rho == 3 and found.sr_nets.rho.shape == () and float(found.sr_nets.rho) == 3


class Classifier(BackboneNet):
    """A network of the tests' own: one head, an operator before each activation of the backbone."""

    def __init__(self, model: str, n_classes: int):
        super().__init__(backbone_spec(model).make())
        self.linear = nn.Linear(self.feature_dim, n_classes)
        insert_before_activations(self.backbone, lambda name: nn.BatchNorm1d(3))


class Code(nn.Module):
    """One of the tests' own without a backbone."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.encoder = nn.Linear(inputs, units)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize(
    "row, sizes, inner_keys",
    [
        (
            NetKind(
                ("linear.weight", "act1.0.running_mean"),
                "holds no classifier with operators",
                lambda model, **sizes: Classifier(model, **sizes),
                lambda state: {"n_classes": len(state["linear.weight"])},
            ),
            {"n_classes": 6},
            9 * 6 + 2 + 7 * 5,
        ),
        (
            NetKind(
                ("encoder.weight",),
                "holds no code",
                lambda model, inputs, units: Code(inputs, units),
                lambda state: dict(zip(("units", "inputs"), state["encoder.weight"].shape, strict=True)),
                {"units": "has {file} units, not {asked}"},
            ),
            {"inputs": 4, "units": 3},
            2,
        ),
    ],
)
def test_a_new_kind_is_one_row(row, sizes, inner_keys, monkeypatch, capsys):
    monkeypatch.setitem(NETS, "new", row)
    state = build_net("new", "resnet8", seed=1, **sizes).state_dict()
    assert kind_of(state) == "new" and len(state) == inner_keys
    found = load_net("new", state, **FILE).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    last = list(state)[-1]
    load_net("new", {k: v for k, v in state.items() if k != last}, strict=False, **FILE)
    assert f"loaded {inner_keys - 1} of {inner_keys} tensors; fresh: {last}" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--load_path: f.model {row.absent}"):
        load_net("new", fresh("rot_trans").state_dict(), **FILE)
    for name in row.must_agree:
        with pytest.raises(UserError, match="f.model has 3 units, not 5"):
            load_net("new", state, **{name: 5}, **FILE)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ("resnet18", *HEAVY)])
def test_no_model_is_taken_for_another(name):
    """Not even a resnet34, which has every tensor of a resnet18 and more."""
    state = fresh("rot_trans", model=name).state_dict()
    with pytest.raises(UserError, match=f"does not hold a resnet18 but a {name};"):
        load_net("rot_trans", state, **{**FILE, "model": "resnet18"})
