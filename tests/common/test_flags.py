from dataclasses import dataclass

import pytest

from common.errors import UserError
from common.flags import REFUSED, Flags, RunSpec, Spec, build_parser, flag, parse
from models.sparse.dictionary import SparseSpec
from program import SPECS
from training import STAGE1, STAGE2, run_name


def flags(*argv: str, mode: str = "simclr_CSI") -> Flags:
    return parse(list(argv), build_parser("x.py", ["simclr", "simclr_CSI", "cocsr_dict"], mode, SPECS))


def test_published_defaults():
    f = flags(mode="simclr")
    expected = {"dataset": "cifar10", "data_path": "../Data/", "num_worker": 4, "one_class_idx": None}
    expected |= {"model": "resnet18", "mode": "simclr", "simclr_dim": 128, "shift_trans_type": "none", "mix_alpha": 0.5}
    expected |= {"color_jitter_strength": 1, "error_step": 5, "save_step": 10, "epochs": 1000, "optimizer": "lars"}
    expected |= {"lr_scheduler": "cosine", "warmup": 10, "lr_init": 0.1, "weight_decay": 1e-6, "batch_size": 128}
    expected |= {"test_batch_size": 100, "sim_lambda": 1, "temperature": 0.5, "ood_samples": 1, "ood_batch_size": 100}
    expected |= {"resize_factor": 0.08, "resize_fix": False, "refmix_batch_size": 128, "sr_lambda": 0.01}
    expected |= {"sr_dict_size": 512, "sr_layer": ["penultimate"], "sr_rho": 1, "sr_admm_stage": 40, "sr_lr": 1e-3}
    expected |= {"sr_decay_lr": 1e-6, "loss_lambda_sr": 1, "loss_lambda_sr_l1": 0.01, "loss_lambda_dict_constr": 0.1}
    expected |= {"loss_dict_constr_mode": 0, "loss_dict_constr_value": 1, "seed": 0, "device": "auto", "amp": "auto"}
    assert {k: f.as_dict()[k] for k in expected} == expected


def test_aliases_of_the_readme_and_of_launchers():
    assert flags("--epoch", "1300").as_dict()["epochs"] == 1300 and flags("--epochs", "7").as_dict()["epochs"] == 7
    assert flags("--local-rank", "2").as_dict()["local_rank"] == flags("--local_rank", "2").as_dict()["local_rank"] == 2
    with pytest.raises(UserError):
        flags("--epo", "3")  # no other abbreviation


@pytest.mark.parametrize(
    "argv, name",
    [
        (
            "--mode simclr_CSI --shift_trans_type rot_bmix --one_class_idx 3 --suffix f512_mix82",
            "cifar10_resnet18_unsup_simclr_CSI_shift_rot_bmix_one_class_3_f512_mix82",
        ),
        ("--mode simclr --shift_trans_type rot_bmix", "cifar10_resnet18_unsup_simclr"),
        (
            "--mode cocsr_dict --shift_trans_type rot_bmix --sr_lambda 1e-3 --sr_lr 1e-3 --invert_sr_feature_norm"
            " --one_class_idx 0 --suffix f512_mix82_dm1_init",
            "cifar10_resnet18_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_0_f512_mix82_dm1_init",
        ),
        ("--mode cocsr_dict", "cifar10_resnet18_unsup_cocsr_dict_shift_none_cocsr_ld0.01_lr0.001"),
        (
            "--mode cocsr_dict --sr_lambda_rel 0.3",
            "cifar10_resnet18_unsup_cocsr_dict_shift_none_cocsr_ldrel0.3_lr0.001",
        ),
    ],
)
def test_run_names_are_the_published_ones(argv, name):
    f = flags(*argv.split())
    assert run_name(f, (STAGE1 | STAGE2)[f.mode]) == name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_flags_parse_and_are_refused_by_name(name):
    actions = {a.dest: a for a in build_parser("x", ["m"], "m", SPECS)._actions}
    argv = [f"--{name}"] + ([] if actions[name].nargs == 0 else ["1"])
    with pytest.raises(UserError, match=f"--{name} is refused"):
        flags(*argv)


@pytest.mark.parametrize("argv", ["--dataset nosuch", "--model nosuch", "--shift_trans_type nosuch", "--mode nosuch"])
def test_unknown_names_are_reported_with_the_known_ones(argv):
    with pytest.raises(UserError, match=rf"{argv.split()[0]}.*choose from"):
        flags(*argv.split())


@pytest.mark.parametrize("argv", ["--batch_size 0", "--epochs -1", "--temperature 0", "--ood_samples 0"])
def test_numbers_that_must_be_positive(argv):
    with pytest.raises(UserError, match=argv.split()[0]):
        flags(*argv.split())


def test_flags_that_nothing_read_are_reported():
    f = flags("--sr_rho", "2", "--suffix", "a", "--warmup", "3")
    assert (
        f.of(RunSpec, only=["suffix"]).suffix == "a"
        and f.unread() == ["sr_rho", "warmup"]
        and f.given("warmup")
        and not f.given("lr_init")
    )
    assert f.of(SparseSpec, only=["sr_rho"]).sr_rho == 2 and f.unread() == ["warmup"]
    assert f.unread_notes() == ["note: --warmup has no effect here (--mode simclr_CSI, --dataset cifar10)"]


@dataclass(frozen=True)
class Tolerance(Spec, group="test"):
    sr_rho: float = flag(1.0, "penalty", above=0, origin="network")
    warmup: int = flag(10, "epochs", at_least=0)
    mix_alpha: float = flag(0.5, "weight", at_least=0, at_most=1, origin="compared")
    atoms: int = flag(8, "atoms", origin="fixed")
    dataset: str = flag("cifar10", "data set", origin="data")
    place: int | None = flag(None, "class", type=int, origin="data")
    mode: str = flag("", "mode")


def small(*argv: str) -> Flags:
    return parse(list(argv), build_parser("x", ["m"], "m", [Tolerance]))


def test_a_spec_is_filled_by_its_fields_and_only_what_is_asked_for_is_read():
    f = small("--warmup", "3", "--sr_rho", "2")
    assert f.of(Tolerance, only=["warmup"]).warmup == 3 and f.unread() == ["sr_rho"]
    assert f.of(Tolerance) == Tolerance(2.0, 3, mode="m") and f.unread() == []


def test_of_the_flags_that_are_asked_about_those_that_were_given_are_told_and_read():
    f = small("--warmup", "3", "--sr_rho", "2")
    assert f.asked(Tolerance, "warmup", "mode") == {"warmup": 3} and f.unread() == ["sr_rho"]
    assert small().asked(Tolerance, "warmup") == {}


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--sr_rho 0", "--sr_rho must be > 0, got 0.0"),
        ("--warmup -1", "--warmup must be >= 0, got -1"),
        ("--mix_alpha 1.5", r"--mix_alpha must lie in \[0, 1\], got 1.5"),
        ("--mix_alpha nan", "--mix_alpha must lie"),
    ],
)
def test_ranges_are_checked_by_parser_and_spec(argv, says):
    with pytest.raises(UserError, match=says):
        small(*argv.split())
    name, value = argv.removeprefix("--").split()
    with pytest.raises(UserError, match=says):
        Tolerance(**{name: float(value) if "." in says[-4:] or value == "nan" else int(value)})


def test_two_descriptions_of_one_flag_are_an_error_of_the_program():
    @dataclass(frozen=True)
    class Other(Spec, group="test"):
        warmup: int = flag(11, "epochs")

    with pytest.raises(ValueError, match="--warmup"):
        build_parser("x", ["m"], "m", [Tolerance, Other])


def test_what_weights_recorded_are_defaults_where_the_spec_says_so():
    recorded = {"sr_rho": 3.0, "warmup": 1, "mix_alpha": 0.2, "atoms": 16, "dataset": "svhn", "place": 4, "gone": 1}
    f = small().inherited(recorded, "w", flag="load_path").of(Tolerance)
    assert f == Tolerance(3.0, 10, 0.5, 16, "svhn", 4, "m")
    f = small("--sr_rho", "2", "--atoms", "16").inherited(recorded, "w", flag="load_path")
    assert f.of(Tolerance).sr_rho == 2.0 and f.differences(recorded) == {
        "sr_rho": (3.0, 2.0),
        "mix_alpha": (0.2, 0.5),
    }
    # What belongs to another data set says nothing of this one.
    assert small("--dataset", "mnist").inherited(recorded, "w", flag="load_path").of(Tolerance).place is None
    assert small("--dataset", "svhn").inherited(recorded, "w", flag="load_path").of(Tolerance).place == 4
    with pytest.raises(UserError, match="--atoms 9: w was trained with --atoms 16"):
        small("--atoms", "9").inherited(recorded, "w", flag="load_path")


def test_what_given_flags_imply_counts_as_given():
    f = small().implied({"dataset": "mnist"})
    assert f.given("dataset") and not small().given("dataset") and f.of(Tolerance).dataset == "mnist"
    # Weights of another data set do not decide it.
    recorded = {"dataset": "svhn", "place": 4}
    assert f.inherited(recorded, "w", flag="load_path").of(Tolerance).dataset == "mnist"
    assert small("--dataset", "svhn").implied({"dataset": "mnist"}).of(Tolerance).dataset == "svhn"


def test_defaults_that_are_not_published():
    f = flags(mode="simclr").as_dict()
    expected = {"knn_k": 5, "sr_fit_steps": 300, "sr_tol": None, "save_minutes": 15, "tsne_points": 1000}
    expected |= {"micro_batch": None, "cropmix_resize_factor": 0.08, "cropmix_resize_fix": False, "image_size": None}
    assert {name: f[name] for name in expected} == expected
