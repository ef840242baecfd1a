"""docs/coverage.md says what became of every published flag and name; here it is held against the program's tables."""

import re
import shutil

import pytest

import eval as evaluate
import train
import tsne
from common.flags import REFUSED, REFUSED_MODES, build_parser, flags_of
from datasets import DATASETS, SHIFTS, ShiftSpec
from datasets.outliers import OUTLIERS
from evals import EVALS, TSNES
from evals.scores import SCORES
from models import BACKBONES
from program import SPECS
from tests.conftest import ROOT
from training import STAGE1, STAGE2

# Section 14 of the specification.
PUBLISHED_FLAGS = """
dataset data_path download_data num_worker one_class_idx model pretrained_model mode simclr_dim shift_trans_type
mix_alpha color_jitter_strength cropmix_resize_factor cropmix_resize_fix cropmix_crop_aug local_rank resume_path
load_path no_strict suffix error_step save_step epochs optimizer lr_scheduler warmup lr_init weight_decay batch_size
test_batch_size sim_lambda temperature ood_dataset ood_score ood_layer ood_samples ood_batch_size resize_factor
resize_fix refmix_batch_size sr_lambda sr_dict_size sr_layer invert_sr_feature invert_sr_feature_norm
invert_sr_feature_mean invert_sr_feature_DNT invert_sr_coef_DNT ini_sr_dict_train normalize_sr_feature
normalize_sr_dict_feature sr_rho sr_admm_stage sr_lr sr_decay_lr loss_lambda_sr loss_lambda_sr_l1
loss_lambda_dict_constr loss_dict_constr_mode loss_dict_constr_value loss_lambda_dict_contra_sr
loss_sr_deep_supervision loss_dict_detach_feature loss_dict_detach_sr_coef disable_sim_score disable_shi_score
print_score save_score
""".split()


_INFOS = {name: info for spec in SPECS for name, info in flags_of(spec).items()}
REFUSED_VALUES = {name: _INFOS[name].refused for name in ("shift_trans_type", "model")} | {"mode": REFUSED_MODES}


@pytest.fixture(scope="module")
def sections() -> dict[str, dict[str, str]]:
    """Section -> first cell of each row, without back-ticks -> the rest of the row."""
    found: dict[str, dict[str, str]] = {}
    for part in (ROOT / "docs/coverage.md").read_text().split("\n## ")[1:]:
        rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", part, flags=re.M)
        names = [name for name, _ in rows]
        assert part.startswith("Modes") or len(names) == len(set(names)), "a name stands twice"
        found[part.split("\n")[0]] = dict(rows)
    return found


def known_flags() -> set[str]:
    parser = build_parser("x", ["m"], "m", SPECS)
    return {action.dest for action in parser._actions} - {"help"}


def refused(rows: dict[str, str]) -> set[str]:
    return {name for name, rest in rows.items() if any(cell.strip().startswith("refused") for cell in rest.split("|"))}


def test_every_published_flag_has_a_row_and_every_other_flag_is_said_to_be_new(sections):
    rows = {name.removeprefix("--"): rest for name, rest in sections["Flags"].items()}
    assert set(rows) == set(PUBLISHED_FLAGS) <= known_flags()
    text = (ROOT / "docs/coverage.md").read_text()
    new = text[text.index("New here:") : text.index("## Modes")]
    assert set(re.findall(r"`--(\w+)`", new)) == known_flags() - set(PUBLISHED_FLAGS)
    assert refused(rows) == set(REFUSED)
    assert all(re.match(r" (works|differently|refused) ", rest) for rest in rows.values())


def test_every_row_of_every_table_is_there(sections):
    modes = {*STAGE1, *STAGE2, *EVALS, *TSNES}
    assert set(sections["Modes"]) - refused(sections["Modes"]) == modes
    assert set(sections["Shifts"]) - refused(sections["Shifts"]) == set(SHIFTS)
    assert set(sections["Scores"]) - refused(sections["Scores"]) == set(SCORES)
    assert set(sections["Data sets"]) == {*DATASETS, *OUTLIERS}
    assert set(sections["Networks"]) - refused(sections["Networks"]) == {*BACKBONES, "timm_<name>"}
    for name in SHIFTS:
        assert sections["Shifts"][name].split("|")[0].strip() == str(ShiftSpec(name).count)


@pytest.mark.parametrize("section, flag", [("Modes", "mode"), ("Shifts", "shift_trans_type"), ("Networks", "model")])
def test_refused_names_are_refused_in_one_line_that_says_why(section, flag, sections, capsys):
    assert refused(sections[section]) == set(REFUSED_VALUES[flag])
    script = evaluate if flag == "mode" else train
    for name in REFUSED_VALUES[flag]:
        code = script.main([f"--{flag}", name])
        told = capsys.readouterr().err
        assert code == 2 and told.count("\n") == 1 and f"{name} is refused" in told


def test_flags_without_effect_are_reported_whatever_the_script(stage1, tmp_path, capsys):
    """Flags that some shared piece of code might read in passing, each where it changes nothing."""
    stage1 = shutil.copytree(stage1, tmp_path / "stage1")
    common = "--dataset digits --image_size 8 --model resnet8 --one_class_idx 3".split()
    idle = "--num_worker 2 --skip_bad_images --image_cache c --data_path x --download_data".split()
    args = [*common, *idle, "--mix_alpha", "0.3", "--cropmix_crop_aug", "--cropmix_resize_factor", "0.2"]
    more = ["--error_step", "3", "--test_batch_size", "9", "--load_path", "x", "--sr_rho", "2", "--ood_samples", "3"]
    assert train.main([*args, *more, "--mode", "simclr", "--epochs", "1", "--log_root", str(tmp_path / "l")]) == 0
    told = set(re.findall(r"note: --(\w+) has no effect here", capsys.readouterr().out))
    given = {a.removeprefix("--") for a in [*idle, *args, *more] if a.startswith("--")}
    assert told == given - {"dataset", "image_size", "model", "one_class_idx"}
    shift = ["--shift_trans_type", "rot_bmix", "--mix_alpha", "0.2"]
    idle = "--knn_k 3 --refmix_batch_size 5 --suffix a --overwrite --log_root l --epochs 3 --compile".split()
    idle += "--ood_data_path p --cropmix_resize_fix --sr_lambda 0.1 --invert_sr_feature_norm --sr_fit_steps 2".split()
    code = evaluate.main([*common, *shift, *idle, "--mode", "ood_pre", "--load_path", str(stage1)])
    told = set(re.findall(r"note: --(\w+) has no effect here", capsys.readouterr().out))
    assert code == 0 and told == {a.removeprefix("--") for a in idle if a.startswith("--")}
    idle = "--ood_dataset interp --test_batch_size 9 --skip_bad_images --ood_data_path /no --download_data".split()
    code = evaluate.main([*common, *shift, *idle, "--mode", "ood_pre", "--load_path", str(stage1)])
    told = set(re.findall(r"note: --(\w+) has no effect here", capsys.readouterr().out))
    assert code == 0 and told == {"skip_bad_images", "ood_data_path", "download_data"}
    idle = ["--ood_score", "CSI", "--print_score", "--save_score", "--ood_dataset", "interp"]
    code = tsne.main(
        [*common, *shift, *idle, "--mode", "ood_pre_tsne", "--load_path", str(stage1), "--tsne_points", "5"]
    )
    told = set(re.findall(r"note: --(\w+) has no effect here", capsys.readouterr().out))
    assert code == 0 and told == {a.removeprefix("--") for a in idle if a.startswith("--")}
