"""The script of the published configurations of MeanSparse: which commands it starts, and that these parse."""

import pytest

from models.placements import PLACEMENTS
from scripts.recipes import Recipe
from tests.scripts.conftest import script
from tests.scripts.test_sdnet_sweep import plan
from tests.scripts.test_sweeps import options

# alpha, radius, norm, placement and model of the specification.
PUBLISHED = {
    "wrn94": ("0.15", "8/255", "linf", "blocks", "dm_wrn94_16"),
    "rawrn70": ("0.25", "8/255", "linf", "blocks", "ra_wrn70_16"),
    "rawrn70-v1": ("0.25", "8/255", "linf", "activations", "ra_wrn70_16"),
    "wrn70": ("0.2", "8/255", "linf", "activations", "dm_wrn70_16"),
    "wrn70-l2": ("0.25", "0.5", "l2", "blocks", "dm_wrn70_16"),
    "wrn70-c100": ("0.15", "8/255", "linf", "blocks", "dm_wrn70_16_cifar100"),
    "swin-l": ("0.1", "4/255", "linf", "blocks", "timm_swin_large_patch4_window7_224"),
    "convnext-l": ("0.3", "4/255", "linf", "activations", "timm_convnext_large"),
    "rawrn101": ("0.2", "4/255", "linf", "activations", "ra_wrn101_2"),
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_configuration_puts_operators_in_and_attacks(key, commands, tmp_path, capsys):
    base = tmp_path / "base.pt"
    base.touch()
    alpha, radius, norm, placement, model = PUBLISHED[key]
    put, judge = commands("meansparse", key, BASE=str(base), DATA_PATH=str(tmp_path), IMAGES="5")
    flags = options(put)
    assert flags["--placement"] == [placement] and placement in PLACEMENTS and flags["--model"] == [model]
    assert flags["--stats"] == ["batchwise"] and flags["--load_path"] == [str(base)]
    flags = options(judge)
    assert (flags["--ms_alpha"], flags["--epsilon"], flags["--norm"]) == ([alpha], [radius], [norm])
    assert {"autoattack", "straight_autoattack", "base_autoattack"} < set(flags["--attacks"])
    assert flags["--ood_batch_size"] == ["64" if key == "swin-l" else "128"] and flags["--attack_images"] == ["5"]
    for line in (put, judge):
        assert "meansparse" in plan(line, capsys)["run_dir"] or line is judge


def test_a_published_file_is_attacked_as_it_is(commands, tmp_path):
    file = tmp_path / "sparse.pt"
    file.touch()
    (judge,) = commands("meansparse", "wrn94", SPARSE=str(file), ALPHA="0.3", DATASET="cifar100")
    flags = options(judge)
    assert flags["--load_path"] == [str(file)] and flags["--ms_alpha"] == ["0.3"] and flags["--dataset"] == ["cifar100"]


@pytest.mark.parametrize(
    "args, env, told",
    [
        (["wrn"], {}, "usage: meansparse.sh KEY"),
        ([], {}, "usage: meansparse.sh KEY"),
        (["wrn94"], {}, "BASE: give the weights of Bartoldson2024Adversarial_WRN-94-16"),
        (["wrn94"], {"BASE": "nowhere.pt"}, "BASE: no file nowhere.pt"),
        (["wrn94"], {"SPARSE": "nowhere.pt"}, "SPARSE: no file nowhere.pt"),
    ],
)
def test_what_cannot_run_is_one_line(args, env, told, tmp_path):
    done = script("meansparse", "false", *args, LOG_ROOT=str(tmp_path), **env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_every_configuration_names_its_base():
    for key in PUBLISHED:
        family = "meansparse_" + key.replace("-", "_")
        assert Recipe(family).words("base")
