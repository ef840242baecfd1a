import pytest
import torch

from common.errors import UserError
from datasets.shifts import SHIFTS, ShiftSpec

COUNTS = {"none": 1, "rotation": 4, "cutperm": 4, "bmix": 2, "rot_bmix": 5, "rot_smix": 7, "rot_perm": 7}
COUNTS["rot_perm_bmix"] = 8


def shifted(name: str, x: torch.Tensor, partner: torch.Tensor, alpha: float = 0.2) -> torch.Tensor:
    return torch.stack([shift(x, partner) for shift in ShiftSpec(name, alpha).functions()])


def test_table_has_the_stated_counts():
    assert {name: ShiftSpec(name).count for name in SHIFTS} == COUNTS


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "none"])
def test_known_images(golden, name):
    g = golden("shifts")
    out = shifted(name, g["x"], g["x"].roll(-1, 0), g["mix_alpha"])
    torch.testing.assert_close(out, g[f"shift_{name}"], atol=1e-5, rtol=0)


def test_pixels_go_where_the_definition_says():
    x, partner = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    out = shifted("rot_perm_bmix", x, partner)
    assert torch.equal(out[1, ..., 0, 0], x[..., 0, 3])  # counter-clockwise: the upper right corner comes upper left
    assert torch.equal(out[4], torch.cat([x[..., 2:], x[..., :2]], -1))  # cutperm 1: left and right
    assert torch.equal(out[5], torch.cat([x[..., 2:, :], x[..., :2, :]], -2))  # cutperm 2: top and bottom
    torch.testing.assert_close(out[7], 0.8 * x + 0.2 * partner)
    mixes = shifted("rot_smix", x, partner)[4:]
    for quarters, mix in enumerate(mixes, 1):
        torch.testing.assert_close(mix, 0.8 * x + 0.2 * torch.rot90(x, quarters, (2, 3)))


@pytest.mark.parametrize("name", SHIFTS)
def test_only_batch_mix_looks_at_the_partner(name):
    x = torch.rand(2, 3, 4, 4)
    differs = not torch.equal(shifted(name, x, torch.zeros_like(x)), shifted(name, x, torch.ones_like(x)))
    assert differs == ShiftSpec(name).mixes_neighbours == ("bmix" in name)


def test_refuses_a_weight_out_of_range():
    with pytest.raises(UserError, match="--mix_alpha"):
        ShiftSpec("bmix", 1.5)
