import pytest
import torch

from common.errors import UserError
from datasets.shifts import SHIFTS, ShiftSpec, rotations_and_translations, translate

COUNTS = {"none": 1, "rotation": 4, "cutperm": 4, "bmix": 2, "rot_bmix": 5, "rot_smix": 7, "rot_perm": 7}
COUNTS |= {"rot_perm_bmix": 8, "rot_cropmix": 5, "rot_augmix": 5}
LOOKS = ("rot_cropmix", "rot_augmix")  # mixes of an image with itself: tests/datasets/test_views.py


def shifted(name: str, x: torch.Tensor, partner: torch.Tensor, alpha: float = 0.2) -> torch.Tensor:
    return torch.stack([shift.combine(x, partner) for shift in ShiftSpec(name, alpha).functions()])


def test_table_has_the_stated_counts():
    assert {name: ShiftSpec(name).count for name in SHIFTS} == COUNTS


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in ("none", *LOOKS)])
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


@pytest.mark.parametrize("name", [name for name in SHIFTS if name not in LOOKS])
def test_only_batch_mix_looks_at_the_partner(name):
    x = torch.rand(2, 3, 4, 4)
    differs = not torch.equal(shifted(name, x, torch.zeros_like(x)), shifted(name, x, torch.ones_like(x)))
    assert differs == ShiftSpec(name).mixes_neighbours == ("bmix" in name)


def test_refuses_a_weight_out_of_range():
    with pytest.raises(UserError, match="--mix_alpha"):
        ShiftSpec("bmix", 1.5)
    with pytest.raises(UserError, match="--cropmix_resize_factor"):
        ShiftSpec("rot_cropmix", cropmix_resize_factor=0.0)


def test_only_the_flags_of_a_shift_are_read():
    """What a shift does not depend on is told to have no effect."""
    from common.flags import Flags

    values = {f: getattr(ShiftSpec(), f) for f in ShiftSpec.__dataclass_fields__} | {"mix_alpha": 0.3}
    for name, row in SHIFTS.items():
        flags = Flags(values | {"shift_trans_type": name})
        spec = ShiftSpec.of(flags)
        assert set(flags.used()) == {"shift_trans_type", *row.flags}
        assert spec.mix_alpha == (0.3 if "mix" in name else 0.5)


def test_translation_mirrors_the_border():
    row = torch.arange(6.0)
    x = row.expand(2, 3, 6, 6)
    out = translate(x, torch.tensor([0, 0]), torch.tensor([2, -2]))
    assert out[0, 0, 0].tolist() == [2, 1, 0, 1, 2, 3] and out[1, 0, 0].tolist() == [2, 3, 4, 5, 4, 3]
    down = translate(x.mT, torch.tensor([2, -2]), torch.tensor([0, 0]))
    assert torch.equal(down, out.mT)


def test_the_36_transformations_of_rot_trans_against_padding_and_slicing():
    x = torch.rand(2, 3, 8, 8)
    found = [shift.combine(x, x) for shift in rotations_and_translations()]
    assert len(found) == 36
    for k, out in enumerate(found):
        padded = torch.nn.functional.pad(torch.rot90(x, k // 9, (2, 3)), (2, 2, 2, 2), mode="reflect")
        top, left = 2 - 2 * (k // 3 % 3 - 1), 2 - 2 * (k % 3 - 1)
        assert torch.equal(out, padded[:, :, top : top + 8, left : left + 8])
