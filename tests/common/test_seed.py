import torch

from common.seed import generator, seed_of


def test_every_argument_matters_and_nothing_else():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 12)]
    assert len({seed_of(*k) for k in keys}) == len(keys)
    first = torch.rand(3, generator=generator(0, "a", 1))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=generator(0, "a", 1)))
