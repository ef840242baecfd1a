"""RobustBench's networks: written out once more, their tensors, and their files under our names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation as TorchvisionGate

import eval as evaluate
import train
from common.errors import UserError
from models import BACKBONES
from models.checkpoint import build_net, load_net, read_state
from models.dm_wide_resnet import CIFAR10, DMWideResNet, SqueezeExcitation, dm_wrn
from models.mean_sparse import alpha_of, insert, operators
from models.ra_imagenet import RaNet
from models.robustbench import from_robustbench, is_robustbench
from tests.conftest import TINY
from tests.models.test_reference import with_statistics


def small(squeeze: float | None) -> DMWideResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return with_statistics(DMWideResNet((1, 2), (6, 12), stem=6, squeeze=squeeze))


def pictures(n: int = 2, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def written_out(net: DMWideResNet, x: Tensor) -> Tensor:
    """The forward pass, with the padding by hand that RobustBench has."""
    x = net.init_conv(x)
    for block in (block for group in net.layer for block in group.block):
        y = F.silu(block.batchnorm_0(x))
        past = x if block.shortcut is None else block.shortcut(y)
        strided = block.conv_0.stride == (2, 2)
        h = F.conv2d(
            F.pad(y, (0, 1, 0, 1) if strided else (1, 1, 1, 1)), block.conv_0.weight, stride=2 if strided else 1
        )
        h = block.conv_1(F.silu(block.batchnorm_1(h)))
        x = past + block.se(h)
    return F.silu(net.batchnorm(x)).mean((2, 3))


@pytest.mark.parametrize("squeeze", [None, 0.25])
def test_outputs_are_those_of_the_formula(squeeze):
    net, x = small(squeeze), pictures()
    torch.testing.assert_close(net(x), written_out(net, x), rtol=0, atol=1e-6)


def test_a_gate_is_torchvisions():
    gate, theirs = SqueezeExcitation(8, 2), TorchvisionGate(8, 2)
    theirs.load_state_dict(gate.state_dict())
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gate(x), theirs(x), rtol=0, atol=1e-6)


# Tensors of RobustBench's classifiers, counted by hand from its classes, with the last layer's two.
@pytest.mark.parametrize(
    "name, count, shapes",
    [
        ("dm_wrn28_10", 155, {"layer.0.block.0.shortcut.weight": (160, 16, 1, 1), "batchnorm.weight": (640,)}),
        ("dm_wrn70_16", 407, {"layer.2.block.10.conv_1.weight": (1024, 1024, 3, 3)}),
        ("dm_wrn94_16", 551, {"init_conv.weight": (16, 3, 3, 3)}),
        (
            "ra_wrn70_16",
            1147,
            {
                "layer.0.block.29.se.fc1.weight": (54, 216, 1, 1),
                "layer.1.block.0.se.fc2.bias": (432,),
                "layer.2.block.9.se.fc1.bias": (216,),
                "init_conv.weight": (96, 3, 3, 3),
            },
        ),
        (
            "ra_wrn101_2",
            661,
            {
                "stem.stem.stem.0.weight": (96, 3, 7, 7),
                "stages.stage1.stage1-block0.proj.1.running_var": (512,),
                "stages.stage1.stage1-block0.F.se.fc1.weight": (24, 128, 1, 1),
                "stages.stage1.stage1-block1.F.se.fc1.weight": (128, 128, 1, 1),
                "stages.stage3.stage3-block17.F.b.0.weight": (504, 252, 3, 3),
                "stages.stage4.stage4-block0.F.c.0.weight": (4032, 1008, 1, 1),
            },
        ),
    ],
)
def test_tensors_have_the_names_and_shapes_of_robustbench(name, count, shapes):
    with torch.device("meta"):
        state = BACKBONES[name].make().state_dict()
    assert len(state) + 2 == count
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_the_robust_network_for_imagenet_is_what_its_formula_says():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = with_statistics(RaNet((1, 2), (16, 32), (2, 4), stem=8))
    x = pictures(size=64)
    y = F.relu(net.stem["stem"]["stem"][1](F.conv2d(x, net.stem["stem"]["stem"][0].weight, stride=2, padding=3)))
    for block in (block for stage in net.stages for block in stage):
        h = F.silu(F.conv2d(y, block.F.a[0].weight))
        h = F.silu(block.F.b[1](block.F.b[0](h)))
        gate = block.F.se.fc2(F.relu(block.F.se.fc1(h.mean((2, 3), keepdim=True)))).sigmoid()
        y = F.silu(block.F.c[1](block.F.c[0](h * gate)) + (y if block.proj is None else block.proj(y)))
    torch.testing.assert_close(net(x), y.mean((2, 3)), rtol=0, atol=1e-5)
    assert not [name for name in operators(insert(net, "activations")) if "last_activation" in name or ".se." in name]


def test_a_depth_that_makes_no_blocks_raises():
    with pytest.raises(ValueError, match="the depth must be 6 n \\+ 4, got 12"):
        dm_wrn(12, 1)


def theirs(prefix: str = "", placement: str | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A classifier, and the state dict that RobustBench would have of it."""
    net = with_statistics(build_net("classifier", "dm_wrn10_1", n_classes=10, seed=0))
    if placement is not None:
        insert(net, placement)
    state = {key.replace("linear.", "logits."): value for key, value in net.state_dict().items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    return net, {f"{prefix}{key}": value for key, value in {**state, "mean": mean, "std": std}.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("placement", [None, "activations", "blocks"])
def test_a_file_of_robustbench_is_read_under_our_names(prefix, placement, tmp_path):
    net, state = theirs(prefix, placement)
    torch.save({"state_dict": state, "epoch": 3} if prefix == "module." else state, tmp_path / "theirs.pt")
    found = read_state(tmp_path / "theirs.pt", flag="load_path")
    assert is_robustbench(state) and not is_robustbench(net.state_dict())
    assert found.keys() == net.state_dict().keys() | {"input_mean", "input_std"}
    assert from_robustbench(net.state_dict()).keys() == net.state_dict().keys()
    again = load_net("classifier", found, model="dm_wrn10_1", path=tmp_path / "theirs.pt", flag="load_path").eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(x), net(x))
    assert len(operators(again)) == {None: 0, "activations": 7, "blocks": 10}[placement]


def test_names_of_timm_old_and_new():
    old = {
        "normalize.mean": torch.zeros(3),
        "model.layers.0.downsample.reduction.weight": torch.zeros(1),
        "model.layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
        "model.layers.0.blocks.1.attn_mask": torch.zeros(1),
        "model.head.weight": torch.zeros(2, 4),
        "model.head.bias": torch.zeros(2),
    }
    assert set(from_robustbench(old)) - {"input_mean"} == {
        "layers.1.downsample.reduction.weight",
        "linear.weight",
        "linear.bias",
    }
    new = {"model.head.fc.weight": torch.zeros(2, 4), "model.head.norm.weight": torch.zeros(4)}
    assert set(from_robustbench(new)) == {"linear.weight", "head.norm.weight"}
    ra = {"stem.stem.stem.0.weight": torch.zeros(1), "fc.weight": torch.zeros(2), "normalization.std": torch.zeros(3)}
    assert set(from_robustbench(ra)) == {"stem.stem.stem.0.weight", "linear.weight", "input_std"}


def test_another_normalisation_of_inputs_is_refused(tmp_path):
    state = from_robustbench(theirs()[1])
    state["input_mean"] = state["input_mean"] + 0.1
    with pytest.raises(
        UserError, match="is of inputs normalised with input_mean 0.5914, 0.5822, 0.5465, the model has"
    ):
        load_net("classifier", state, model="dm_wrn10_1", path=tmp_path, flag="load_path")


def test_operators_of_the_first_version_have_more_buffers_and_scalars_of_another_shape(tmp_path):
    net, state = theirs(placement="activations")
    for name in operators(net.backbone):
        state |= {f"{name}.momentum": torch.tensor(0.1), f"{name}.epsilon": torch.tensor(1e-10)}
        state[f"{name}.threshold"] = torch.zeros(1)
    torch.save(state, tmp_path / "theirs.pt")
    found = read_state(tmp_path / "theirs.pt", flag="load_path")
    again = load_net("classifier", found, model="dm_wrn10_1", path=tmp_path, flag="load_path")
    assert len(operators(again)) == 7


def test_operators_where_no_placement_has_them_are_refused(tmp_path):
    net, state = theirs(placement="blocks")
    state = from_robustbench({k: v for k, v in state.items() if "meansparse_end" not in k})
    with pytest.raises(UserError, match=r"has 9 MeanSparse operators, layer.0.block.0.meansparse_0 for one; a network"):
        load_net("classifier", state, model="dm_wrn10_1", path=tmp_path, flag="load_path")
    with pytest.raises(UserError, match="has 10 MeanSparse operators.*has 7 \\(activations\\)"):
        state = {k: v for k, v in from_robustbench(theirs(placement="blocks")[1]).items() if "input_" not in k}
        load_net("classifier", state, model="resnet8", path=tmp_path, flag="load_path")


def test_a_file_of_robustbench_is_sparsified_evaluated_and_never_written_to(tmp_path, capsys):
    file = tmp_path / "Wang2023Better_WRN-10-1.pt"
    torch.save(theirs()[1], file)
    before = file.read_bytes()
    data = [*TINY[:3], "8", "--model", "dm_wrn10_1", "--device", "cpu"]
    args = ["--mode", "meansparse", "--load_path", str(file), "--placement", "blocks", "--ms_alpha", "0.2"]
    assert train.main([*data, *args, "--log_root", str(tmp_path / "logs")]) == 0, capsys.readouterr().err
    (run,) = (tmp_path / "logs").iterdir()
    assert evaluate.main(["--load_path", str(run), "--device", "cpu"]) == 0, capsys.readouterr().err
    assert "accuracy" in capsys.readouterr().out and file.read_bytes() == before
    state = read_state(run / "last.model", flag="load_path")
    net = load_net("classifier", state, model="dm_wrn10_1", path=run, flag="load_path")
    assert alpha_of(net) == pytest.approx(0.2) and len(operators(net)) == 10
