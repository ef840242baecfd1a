"""The benchmark of MeanSparse at small sizes: its sides, its table, and what it refuses."""

import pytest
import torch

from benchmarks import mean_sparse
from benchmarks.sdnet import Data
from common.device import autocast
from models.mean_sparse import alpha_of, operators

CPU = torch.device("cpu")
FLAGS = "--device cpu --image_size 8 --batch_size 3 --repeats 1".split()


def test_sides_are_the_same_network_without_with_idle_and_with_acting_operators():
    data = Data.of(3, CPU, 8)
    nets = mean_sparse.networks("resnet8", data, "activations", 0.3)
    assert [len(operators(net)) for net in nets.values()] == [0, 7, 7]
    assert [alpha_of(net) for net in nets.values()] == [0, 0, 0.3]
    found = {name: run() for name, run in mean_sparse.sides(nets, data, autocast("off", CPU), False).items()}
    assert torch.equal(found[mean_sparse.BASE], found[mean_sparse.IDLE])
    assert not torch.equal(found[mean_sparse.BASE], found[mean_sparse.ACTING])
    assert not found[mean_sparse.ACTING].requires_grad


def test_the_table_has_images_a_second_and_shares(capsys):
    rows = mean_sparse.table({mean_sparse.BASE: [1.0, 2.0], "other": [2.0, 4.0]}, 6)
    assert rows[0][:2] == [mean_sparse.BASE, "4"] and rows[1][2].startswith("0.50")
    assert mean_sparse.main(FLAGS) == 0
    out = capsys.readouterr().out
    assert "7 operators" in out and len(out.splitlines()) == 7


@pytest.mark.parametrize(
    "more, told", [(["--alpha", "0"], "--alpha must be > 0"), (["--repeats", "0"], "--repeats and --alpha must be > 0")]
)
def test_what_cannot_be_measured_is_one_line(more, told, capsys):
    assert mean_sparse.main([*FLAGS, *more]) == 2 and told in capsys.readouterr().err
