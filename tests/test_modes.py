"""Every row of the tables of modes, by existing: two steps on 64 random pictures, saved, evaluated, loaded again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train
import train_cocsr
import tsne
from common.files import save_tensors
from common.flags import flags_of
from evals import EVALS, TSNES
from evals.scores import SCORES
from evals.specs import TsneSpec
from training import STAGE1, STAGE2
from training.modes.adversarial import METHODS

SMALL = "--dataset folder --image_size 8 --model resnet8 --num_worker 1".split()
FEW = "--noises gaussian --noise_levels 1 5 --lambdas 0.1 0.6".split()
ATTACKED = "--attack_images 6 --attack_steps 2 --square_queries 3 --epsilons 0 0.1 1 --save_score".split()
SCANNED = "--scan_images 4 --attack_steps 2 --alphas 0.1".split()
SHIFTED = "--shift_trans_type rot_bmix --mix_alpha 0.2".split()
# Modes that start from a run of another mode, and the flag that says so.
STARTS = {
    "cocsr_dict": ("simclr_CSI", "--resume_path"),
    "level_dict": ("simclr_CSI", "--resume_path"),
    "sup_linear": ("sup_simclr", "--load_path"),
    "sup_CSI_linear": ("sup_simclr_CSI", "--load_path"),
    "meansparse": ("supervised", "--load_path"),
}
# The shift of the run that a mode starts from, where it is not that of the others: dictionaries of several depths take
# rotations.
SHIFT_OF_START = {"level_dict": "rotation"}
AUTOENCODERS = ("rdae", "dae", "vae")
# How the names of modes begin that train by labels.
LABELLED = ("sup", "meansparse", *METHODS)
LENGTH = {"rdae": ["--rounds", "1", "--inner_epochs", "1"], "meansparse": ["--epochs", "0"]}
EXTRA = {
    "level_dict": "--held_out 8 --sr_dict_size 12 --sr_layer pixels stages penultimate simclr".split(),
    "meansparse": ["--ms_alpha", "0.2"],
    "cocsr_dict": "--sr_dict_size 12 --ini_sr_dict_train --invert_sr_feature_norm --epochs 2".split(),
    **{mode: ["--layers", "8"] for mode in AUTOENCODERS},
    **{mode: ["--num_steps", "2", "--ra", "--anc"] for mode in METHODS},
}
# Passes of the network in training mode in a step: of attacked images, negatives and natural ones.
PASSES = dict.fromkeys(METHODS, 3)
# Evaluations of networks of one kind: the backbone of the run that they are tested on.
MODELS = {
    "sdnet_inside": "sdnet8_all_noshortcut",
    **{name: "sdnet8" for name in EVALS if name.startswith("noise_lambda")},
}


# Evaluations of networks with operators of MeanSparse.
SPARSE = ("alpha_scan", "meansparse_inside")


def run_for(trained, evaluation: str, training: str) -> Path:
    """The run folder that an evaluation is tested on."""
    if evaluation in SPARSE:
        return trained("meansparse", model_for(evaluation), start=training)[1]
    return trained(training, model_for(evaluation))[1]


def model_for(evaluation: str) -> str:
    return MODELS.get(evaluation, "resnet8")


def of_mode(mode: str, model: str = "resnet8") -> list[str]:
    """The flags that the runs and the evaluations of a mode of training share."""
    labelled = mode.startswith(LABELLED)
    shifted = SHIFTED if mode in ("simclr_CSI", "cocsr_dict") else []
    return [*SMALL, "--model", model, *shifted, *([] if labelled else ["--one_class_idx", "0"])]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, count in {"train/a": 32, "train/b": 32, "test/a": 8, "test/b": 8}.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{n:02}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """Train a mode by a network, and what it starts from, once: its command, and its run folder."""
    logs = tmp_path_factory.mktemp("logs")
    known: dict[tuple[str, str, str, str], tuple[list[str], Path]] = {}

    def run(mode: str, model: str = "resnet8", start: str = "", shift: str = "") -> tuple[list[str], Path]:
        if mode in STARTS:
            start = start or STARTS[mode][0]
        if (mode, model, start, shift) not in known:
            before = {p for p in logs.iterdir()}
            args = [
                *of_mode(start if mode == "meansparse" else mode, model),
                "--data_path",
                str(pictures),
                "--mode",
                mode,
                "--log_root",
                str(logs),
            ]
            args += ["--shift_trans_type", shift] if shift else []
            args += ["--batch_size", "16", *LENGTH.get(mode, ["--epochs", "1"]), *EXTRA.get(mode, [])]
            if mode in STARTS:
                args += ["--suffix", start] if start != STARTS[mode][0] else []
                args += [STARTS[mode][1], str(run(start, model, shift=SHIFT_OF_START.get(mode, ""))[1])]
                before = {p for p in logs.iterdir()}
            assert script(mode).main(args) == 0
            (folder,) = {p for p in logs.iterdir()} - before
            known[mode, model, start, shift] = args, folder
        return known[mode, model, start, shift]

    return run


def start_of(trained, mode: str) -> Path:
    """The run folder that a mode starts from."""
    return trained(STARTS[mode][0], shift=SHIFT_OF_START.get(mode, ""))[1]


def script(mode: str):
    return train_cocsr if mode in STAGE2 else train


@pytest.mark.parametrize("mode", [*STAGE1, *STAGE2])
def test_a_mode_takes_its_steps_and_is_finished(mode, trained, capsys):
    args, folder = trained(mode)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == (mode not in ("meansparse", "level_dict")) and all(
        np.isfinite(list(row.values())).all() for row in rows
    )
    (weights,) = folder.glob("last.*model")
    state = torch.load(weights, weights_only=True)
    assert all(value.isfinite().all() for value in state.values())
    norms = [int(v) for k, v in state.items() if k.endswith("bn1.num_batches_tracked")]
    steps = 2 if "--one_class_idx" in args else 4
    if mode in STARTS:  # a frozen network: its statistics are those of the run it starts from
        start = torch.load(start_of(trained, mode) / "last.model", weights_only=True)
        backbone = {k.removeprefix("feature_net."): v for k, v in state.items()}
        assert all(torch.equal(backbone[k], v) for k, v in start.items() if k.startswith(("conv", "bn", "layer")))
    else:
        assert set(norms) == (set() if mode in AUTOENCODERS else {steps * PASSES.get(mode, 1)})
    assert script(mode).main(args) == 0 and "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [*STAGE1, *STAGE2])
def test_evaluation_and_t_sne_need_nothing_but_the_run(mode, trained, tmp_path, monkeypatch, capsys):
    """From another folder, and under other defaults than those of training."""
    folder = shutil.copytree(trained(mode)[1], tmp_path / "run")
    capsys.readouterr()  # Of training, where no test before this one has trained the mode.
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--load_path", str(folder)]) == 0
    (found,) = [*folder.glob("result_*.json"), *folder.glob("accuracy_*.json")]
    result = json.loads(found.read_text())
    # A network that MeanSparse was put into says that it was trained as it was before.
    trained_by = STARTS[mode][0] if mode == "meansparse" else mode
    assert result["mode"] == next(name for name, row in EVALS.items() if trained_by in row.default_for)
    assert (result["dataset"], result["flags"]["image_size"]) == ("folder", 8)
    if mode in ("simclr_CSI", "cocsr_dict"):
        assert (result["flags"]["shift_trans_type"], result["flags"]["mix_alpha"]) == ("rot_bmix", 0.2)
    assert tsne.main(["--load_path", str(folder)]) == 0 and list(folder.glob("*.png"))
    assert "trained with" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", STARTS)
def test_what_starts_from_a_run_needs_nothing_else_and_becomes_what_all_flags_make(mode, trained, tmp_path):
    args, folder = trained(mode)
    start, flag = start_of(trained, mode), STARTS[mode][1]
    own = ["--mode", mode, flag, str(start), "--batch_size", "16"]
    own += [*LENGTH.get(mode, []), *EXTRA.get(mode, ["--epochs", "1"])]
    assert script(mode).main([*own, "--log_root", str(tmp_path)]) == 0
    (again,) = tmp_path.iterdir()
    (one,), (two,) = folder.glob("last.*model"), again.glob("last.*model")
    assert again.name == folder.name
    a, b = (torch.load(file, weights_only=True) for file in (one, two))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("mode", [*STAGE1, *STAGE2])
def test_a_mode_reads_flags_of_the_specs_that_its_row_names_alone(mode, trained):
    used = json.loads((trained(mode)[1] / "args.json").read_text())["used"]
    named = {name for spec in (STAGE1 | STAGE2)[mode].specs for name in flags_of(spec)}
    assert set(used) - named <= {"local_rank"}


@pytest.mark.parametrize("name", [*EVALS, *TSNES])
def test_an_evaluation_reads_flags_of_the_specs_that_its_row_names_alone(name, trained, tmp_path, monkeypatch):
    import evals.launch as launch

    seen, evaluate_by, row = [], launch.evaluate, (EVALS | TSNES)[name]
    monkeypatch.setattr(launch, "evaluate", lambda flags, *rest: (seen.append(flags), evaluate_by(flags, *rest)))
    training = row.trained_by[-1]
    folder = shutil.copytree(run_for(trained, name, training), tmp_path / "run")
    more = (
        ["--ood_score", *row.scores, "--ood_dataset", "interp", "digits", "--test_batch_size", "3"]
        if row.scores
        else []
    )
    more += ["--sr_dict_size", "8", "--sr_fit_steps", "3"] if "multi_sr" in name else []
    more += FEW if name.startswith("noise_lambda") else []
    more += ATTACKED if name == "attack" else []
    more += SCANNED if name == "alpha_scan" else []
    script = evaluate if name in EVALS else tsne
    assert script.main(["--mode", name, "--load_path", str(folder), *more]) == 0
    named = {flag for spec in row.specs for flag in flags_of(spec)}
    assert set(seen[0].used()) - named <= {"local_rank"}


@pytest.mark.parametrize("name", [name for name, row in EVALS.items() if row.scores])
def test_every_score_of_every_detection_can_be_attacked(name, trained, tmp_path):
    row = EVALS[name]
    folder = shutil.copytree(trained(row.trained_by[-1])[1], tmp_path / "run")
    # Of several depths the sum has all terms.
    scores = row.scores[:1] if name == "ood_levels" else row.scores
    more = ["--ood_score", *scores, "--ood_dataset", "digits", "--attack", "pgd", "apgd"]
    more += ["--attack_images", "2", "--attack_steps", "2", "--epsilon", "0.2"]
    more += ["--sr_dict_size", "8", "--sr_fit_steps", "3"] if "multi_sr" in name else []
    assert evaluate.main(["--mode", name, "--load_path", str(folder), *more]) == 0
    for score in scores:
        found = json.loads((folder / f"result_{name}_{score}.json").read_text())
        assert found["attacked"]["both"] <= found["attacked"]["clean"], score
        assert found["attack"]["images"]["digits"] == {"normal": 0, "anomalous": 2}
        (gradients,) = [sign for sign in found["attack"]["health"] if sign["name"] == "images without gradient"]
        assert gradients["number"] == 0, score


def test_what_differs_from_the_weights_to_start_from_is_reported(trained, tmp_path, capsys):
    start = str(trained("simclr_CSI")[1])
    more = ["--batch_size", "16", "--mix_alpha", "0.3", "--log_root", str(tmp_path), *EXTRA["cocsr_dict"]]
    capsys.readouterr()
    assert train_cocsr.main(["--resume_path", start, *more]) == 0
    assert "were trained with --mix_alpha 0.2, this run has 0.3" in capsys.readouterr().out
    assert train_cocsr.main(["--resume_path", start, *more, "--model", "resnet18", "--suffix", "a"]) == 2
    assert "--model resnet18" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_what_defines_a_mode_is_recorded_whatever_the_weights_it_starts_from(trained, tmp_path):
    """Heads on four rotations are so, though the network had learnt four permutations."""
    from program import SPECS
    from training.launch import Script, read_job

    start = shutil.copytree(trained("sup_simclr_CSI")[1], tmp_path / "run")
    state = torch.load(start / "last.model", weights_only=True)
    save_tensors(start / "last.model", state, facts={"flags": {"shift_trans_type": "cutperm", "model": "resnet8"}})
    script = Script("train.py", STAGE1, "simclr", "last.model", "last.resume")
    job = read_job(["--mode", "sup_CSI_linear", "--load_path", str(start)], script, SPECS)
    assert job.flags.as_dict()["shift_trans_type"] == "rotation" and job.flags.as_dict()["model"] == "resnet8"


@pytest.mark.parametrize("given, expected", [([], 0.07), (["--temperature", "0.3"], 0.3)])
def test_labelled_modes_have_a_temperature_of_their_own(given, expected, pictures, tmp_path, monkeypatch):
    import training.modes.simclr as simclr

    seen = []
    real = simclr.sup_nt_xent
    monkeypatch.setattr(simclr, "sup_nt_xent", lambda *args: (seen.append(args[2]), real(*args))[1])
    args = [*SMALL, "--data_path", str(pictures), "--mode", "sup_simclr", "--epochs", "1", "--log_root", str(tmp_path)]
    assert train.main([*args, *given]) == 0 and set(seen) == {expected}


# Methods of adversarial training make networks of one kind: evaluations look at those of one.
ALIKE = set(METHODS) - {"adv_trades"}


@pytest.mark.parametrize(
    "mode, training", [(m, t) for m, row in EVALS.items() for t in row.trained_by if t not in ALIKE]
)
def test_an_evaluation_gives_the_same_numbers_when_the_weights_are_loaded_again(
    mode, training, trained, pictures, tmp_path, capsys
):
    folder = run_for(trained, mode, training)
    labelled = training.startswith(LABELLED)
    detects = mode.startswith(("ood", "rot"))
    # A score that looks at a head is for the modes that train this head.
    scores = [n for n in EVALS[mode].scores if detects and training in (SCORES[n].trained_by or [training])]
    more = ["--ood_score", *scores, "--save_score"] if detects else []
    sets = ["--ood_dataset", "interp", "digits", f"folder:{pictures / 'test/b'}", "--test_batch_size", "3"]
    more += sets if labelled and detects else []
    more += ["--sr_dict_size", "8", "--sr_fit_steps", "3"] if "multi_sr" in mode else []
    more += FEW if mode.startswith("noise_lambda") else []
    more += ATTACKED if mode == "attack" else []
    more += SCANNED if mode == "alpha_scan" else []
    # The heads of a labelled run were trained on the four rotations, or on none.
    more += ["--shift_trans_type", "rotation"] if "sup_" in training and "CSI" in training and "ood_pre" in mode else []
    more += ["--invert_sr_feature_norm"] if training == "cocsr_dict" else []
    found = []
    for copy in ("a", "b"):
        shutil.copytree(folder, tmp_path / copy)
        args = [*of_mode(training, model_for(mode)), "--data_path", str(pictures), "--mode", mode, *more]
        code = evaluate.main([*args, "--load_path", str(tmp_path / copy)])
        assert code == 0, capsys.readouterr().err
        written = sorted((tmp_path / copy).glob("*.json"))
        written = [path for path in written if path.name not in ("args.json", "lambda_line.json")]
        results = [json.loads(path.read_text()) for path in written]
        tables = {path.name: path.read_text() for path in (tmp_path / copy).glob("scores_*.csv")}
        found.append(([{k: r.get(k) for k in ("score", "auroc", *_SHARES, *_PARTS)} for r in results], tables))
    assert found[0] == found[1] and len(found[0][0]) == max(1, len(scores))
    for result in found[0][0]:
        values = [v for k, v in result.items() if k in _SHARES and v is not None]
        assert all(0 <= value <= 1 for value in values)
        assert values or any(result[name] for name in _PARTS)
    if labelled and detects:
        assert all({"interp", "digits"} < set(result["auroc"]) for result in found[0][0])


# Metrics of detection and classification; those of a data matrix and its parts, of predicted lambdas, of distances.
_SHARES = ("mean", "pooled", "accuracy", "ece", "worst_case")
_PARTS = (
    "threshold",
    "flagged",
    "mse",
    "psnr",
    "nonzero",
    "oracle",
    "positive_cosine",
    "attacked",
    "curve",
    "chosen_by",
)


@pytest.mark.parametrize("mode", [name for name, row in TSNES.items() if TsneSpec in row.specs])
def test_a_picture_mode_draws_every_shift(mode, trained, pictures, tmp_path):
    fitting = TSNES[mode].trained_by
    training = next(
        mode
        for mode in ("cocsr_dict", "simclr_CSI", "rot_trans", "rdae", "supervised", "level_dict")
        if mode in fitting
    )
    shutil.copytree(trained(training)[1], tmp_path / "run")
    args = [*of_mode(training), "--data_path", str(pictures), "--mode", mode, "--load_path", str(tmp_path / "run")]
    assert tsne.main([*args, "--tsne_points", "8"]) == 0
    pictures_made = sorted((tmp_path / "run").glob(f"{mode}_*_shift*.png"))
    assert len(pictures_made) == (1 if training in ("level_dict", "rot_trans", "rdae", "supervised") else 5)
    assert all(path.stat().st_size > 10_000 for path in pictures_made)


@pytest.mark.parametrize(
    "mode, training, score",
    [
        ("test_marginalized_acc", "sup_linear", None),
        ("test_acc", "simclr_CSI", None),
        ("ood", "sup_linear", "baseline_marginalized"),
        ("ood", "simclr_CSI", "baseline"),
        ("rot_trans", "simclr_CSI", "rot_trans"),
    ],
)
def test_heads_that_were_never_trained_are_not_evaluated(mode, training, score, trained, pictures, capsys):
    folder = trained(training)[1]
    args = [*of_mode(training), "--data_path", str(pictures), "--mode", mode, "--load_path", str(folder)]
    args = [a for a in args if a not in ("--one_class_idx", "0")]
    assert evaluate.main([*args, *(["--ood_score", score] if score else [])]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: --load_path: "), told
    # The network of Rot+Trans has heads of its own, so the file itself tells; of the others the run's args.json does.
    why = "was not made by train.py --mode rot_trans" if mode == "rot_trans" else f"was trained by --mode {training};"
    assert why in told, told


def test_weights_of_other_classes_are_reported(trained, pictures, tmp_path, capsys):
    """Two classes there, ten here: a head of the wrong size would break in the middle of the first epoch."""
    start = str(trained("sup_simclr")[1])
    common = "--dataset digits --image_size 8 --model resnet8 --epochs 9".split() + ["--log_root", str(tmp_path)]
    for mode, flag in (("sup_simclr", "--resume_path"), ("sup_linear", "--load_path")):
        assert train.main([*common, "--mode", mode, flag, start]) == 2
        told = capsys.readouterr().err
        assert flag in told and "2 classes" in told and not list(tmp_path.iterdir())
    for rates in (["--lr_init", "0"], ["--lr_init", "-1"], ["--weight_decay", "-1"]):
        args = [*SMALL, "--data_path", str(pictures), "--mode", "sup_linear", "--load_path", start, *rates]
        assert train.main([*args, "--log_root", str(tmp_path)]) == 2 and rates[0] in capsys.readouterr().err


def test_every_score_is_offered_by_some_mode_and_every_mode_of_training_is_evaluated():
    assert {name for row in EVALS.values() for name in row.scores} == set(SCORES)
    # Weights of `meansparse` say that they were trained by what came before.
    assert {mode for row in EVALS.values() for mode in row.trained_by} == {*STAGE1, *STAGE2} - {"meansparse"}
