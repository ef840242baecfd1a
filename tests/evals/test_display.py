"""Numbers as pictures, against loops and what follows from the definitions."""

import numpy as np
import pytest
import torch

from evals.display import around_grey, equalised, stretched


def images(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_each_channel_of_each_image_is_stretched_by_its_own_range():
    x = images(3, 2, 5, 4) * torch.tensor([1.0, 100.0]).view(2, 1, 1) - 7
    x[1, 0] = 3.5
    found = stretched(x)
    for n in range(3):
        for c in range(2):
            channel = x[n, c]
            expected = torch.full_like(channel, 0.5)
            if (n, c) != (1, 0):
                expected = (channel - channel.min()) / (channel.max() - channel.min())
                assert (float(found[n, c].min()), float(found[n, c].max())) == (0, 1)
            torch.testing.assert_close(found[n, c], expected)


def test_equalisation_counts_pixels_in_256_bins():
    x = stretched(images(2, 3, 9, 8) ** 3)
    found = equalised(x)
    for n in range(2):
        for c in range(3):
            values = x[n, c].flatten().tolist()
            bins = [min(255, int(256 * value)) for value in values]
            lowest = bins.count(min(bins))
            expected = [(sum(b <= own for b in bins) - lowest) / (len(bins) - lowest) for own in bins]
            np.testing.assert_allclose(found[n, c].flatten(), expected, atol=1e-7)
            assert (float(found[n, c].min()), float(found[n, c].max())) == (0, 1)


def test_equalisation_spreads_any_distribution_evenly_and_leaves_a_constant_channel():
    ramp = (torch.linspace(0, 1, 10_000, dtype=torch.float64) ** 0.3).view(1, 1, 100, 100)
    found = equalised(ramp).flatten()
    assert (found.diff() >= 0).all()
    # Bins at the end hold many values each, so that quantiles are met up to their width.
    quantiles = found.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    np.testing.assert_allclose(quantiles, [0.25, 0.5, 0.75], atol=0.02)
    assert torch.equal(equalised(torch.full((1, 1, 4, 4), 0.5)), torch.full((1, 1, 4, 4), 0.5))


@pytest.mark.parametrize("channels", [1, 3])
def test_signed_atoms_lie_around_mid_grey_by_their_own_extreme(channels):
    atoms = images(4, channels, 3, 3)
    atoms[2] = 0
    atoms[3] = -2
    found = around_grey(atoms)
    assert found.shape == atoms.shape and (found[2] == 0.5).all() and (found[3] == 0).all()
    for atom, shown in zip(atoms[:2], found[:2], strict=True):
        torch.testing.assert_close(2 * shown - 1, atom / float(atom.abs().max()))


def test_atoms_of_many_channels_are_shown_by_their_norm():
    atoms = images(2, 5, 3, 3)
    found = around_grey(atoms)
    assert found.shape == (2, 1, 3, 3)
    expected = atoms[1].square().sum(0).sqrt()
    torch.testing.assert_close(found[1, 0], expected / expected.max())
