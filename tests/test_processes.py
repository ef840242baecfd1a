"""Several processes make the run that one makes: gradients, weights, scores, and what happens when one is hit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
import train_cocsr
from common.dist import Shard, World
from common.errors import UserError
from common.files import load_tensors, save_tensors
from models.checkpoint import build_net
from tests.conftest import ROOT, SHIFT, TINY
from tests.machines import ARGUMENTS, can_join, killed_and_started_again, machines
from tests.processes import found_by

_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


ATTACK = "--num_steps 2 --epsilon 0.1 --step_size 0.05".split()


@pytest.fixture(scope="module")
def found(stage1, tmp_path_factory):
    """Findings of each mode, by number of processes: three of them share batches of 25 unevenly."""
    tiny = [*TINY, "--device", "cpu", "--lr_init", "0.05"]
    every = [arg for arg in tiny if arg not in ("--one_class_idx", "3")]
    cases = {
        "simclr_CSI": [*tiny, *SHIFT, "--mode", "simclr_CSI"],
        "uniclr": [*tiny, *SHIFT, "--mode", "simclr_CSI", "--sim_loss", "uniclr", "--soft_temperature", "0.5"],
        "in pieces": [*tiny, *SHIFT, "--mode", "simclr_CSI", "--micro_batch", "5", "--optimizer", "muon"],
        "sup_simclr_CSI": [*every, "--mode", "sup_simclr_CSI", "--optimizer", "sgd"],
        "rot_trans": [*tiny, "--mode", "rot_trans", "--ema_decay", "0.5"],
        "supervised": [*every, "--mode", "supervised", "--model", "sdnet8_all"],
        "adv_trades": [*every, "--mode", "adv_trades", "--ra", "--anc", "--strategy", "hard_adv", *ATTACK],
        "rdae": [*tiny, "--mode", "rdae", "--layers", "8"],
        "vae": [*tiny, "--mode", "vae", "--autoencoder", "vae", "--layers", "8", "3"],
        "cocsr_dict": [*tiny, *SHIFT, "--mode", "cocsr_dict", "--resume_path", str(stage1), "--epochs", "9"],
    }
    heads = tmp_path_factory.mktemp("heads") / "last.model"
    save_tensors(heads, build_net("feature", "resnet8", n_classes=10, simclr_dim=8, n_shifts=4, seed=0).state_dict())
    cases["sup_CSI_linear"] = [*every, "--mode", "sup_CSI_linear", "--load_path", str(heads)]
    cases["cocsr_dict"] += "--sr_dict_size 24 --sr_lambda 1e-3 --invert_sr_feature_norm --ini_sr_dict_train".split()
    cases["cocsr_dict"] += "--loss_dict_margin 0.5".split()
    cases["uniclr"] += "--copies 3 --deep_supervision 0.5".split()
    return {size: found_by(size, tmp_path_factory.mktemp("found"), cases) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "case",
    [
        "simclr_CSI",
        "uniclr",
        "in pieces",
        "sup_simclr_CSI",
        "sup_CSI_linear",
        "rot_trans",
        "supervised",
        "adv_trades",
        "rdae",
        "vae",
        "cocsr_dict",
    ],
)
def test_gradients_and_weights_are_those_of_one_process(found, case, size):
    (one,) = found[1]
    for other in found[size]:
        for name, value in one[case]["values"].items():
            # Shares of atoms are counted in float32.
            assert other[case]["values"][name] == pytest.approx(value, abs=1e-7 if "sr/" in name else 1e-10), name
        assert one[case]["grads"].keys() == other[case]["grads"].keys()
        for kind in ("grads", "weights"):
            for name, value in one[case][kind].items():
                torch.testing.assert_close(other[case][kind][name], value, atol=1e-10, rtol=0, msg=f"{kind} {name}")
    moved = [torch.equal(found[size][0][case]["weights"][n], w) for n, w in found[size][1][case]["weights"].items()]
    assert all(moved)  # the same bits in all processes


@pytest.mark.parametrize("size", [2, 3])
def test_gathered_projections_carry_the_gradient_of_the_whole_as_with_diffdist(found, size):
    for process in found[size]:
        for name in ("ours", "theirs"):
            torch.testing.assert_close(process["gather"][name], process["gather"]["right"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shards_cover_a_batch_once(batch, size):
    shards = [World(rank, size).shard(batch) for rank in range(size)]
    own = [shard.indices()[: shard.num_real].tolist() for shard in shards]
    assert sum(own, []) == list(range(batch))
    for shard in shards:
        positions = shard.indices()
        assert len(positions) == (shard.size + 1 if size > 1 else batch)
        assert torch.equal(positions[1:], (positions[:-1] + 1) % batch)
        assert torch.equal(shard.rows(2) % batch, positions[: shard.size].repeat(2))
    items = list(range(batch))
    assert sum([World(rank, size).shard_list(items) for rank in range(size)], []) == items
    assert Shard(batch).all_gather(torch.ones(batch)).sum() == batch


def test_the_launcher_says_which_process_this_is():
    assert World.of({}) == World() and World().is_main
    address = {"MASTER_ADDR": "first", "MASTER_PORT": "29400"}
    assert World.of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **address}) == World(3, 8, 1)
    for env in ({"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(UserError, match="torchrun"):
            World.of(env)


# ------------------------------------------------------------------------------------------------- commands


def two(*args, **settings):
    """Two processes of a script of the project, as a user starts them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*_TWO, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **settings)


def arguments(logs, *more):
    return [*ARGUMENTS, "--log_root", str(logs), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes, as the published program starts them: the launcher adds --local-rank to the flags."""
    logs = tmp_path_factory.mktemp("two")
    published = ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=29617"]
    command = [sys.executable, *published, "train.py", *arguments(logs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("2 processes") == 1, done.stderr
    return next(logs.iterdir())


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit(whole, tmp_path):
    args = arguments(tmp_path)
    # The second process hears it, in its fourth step.
    code = (
        "import os, signal, sys, train; from training import loop; real, n = loop.descend, []\n"
        "def descend(*a):\n"
        "    n.append(1)\n"
        "    if len(n) == 4 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*a)\n"
        "loop.descend = descend; sys.exit(train.main(sys.argv[1:]))"
    )
    script = tmp_path / "asked.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = two(script, *args)
    assert done.returncode != 0 and done.stderr.count("saved after step") == 1, done.stderr
    folder = tmp_path / whole.name
    state = load_tensors(folder / "last.resume", flag="x")
    assert (state["epoch"], state["step"]) == (1, 1)  # four steps an epoch; told one step late
    assert two("train.py", *args).returncode == 0
    a, b = (load_tensors(f / "last.model", flag="x") for f in (whole, folder))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_steps_by_another_number_of_processes_go_on_others_are_refused(whole, tmp_path, shell):
    shutil.copytree(whole, tmp_path / whole.name)
    same = [arg if arg != "16" else "32" for arg in arguments(tmp_path)]
    done = shell("train.py", *same)
    assert done.returncode == 0 and "was of 2 x 16 images, is of 1 x 32" in done.stdout and "finished" in done.stdout
    done = shell("train.py", *arguments(tmp_path))
    assert done.returncode == 2 and "--batch_size was 2 x 16 (processes x images), is 1 x 16" in done.stderr


def test_dictionaries_at_several_depths_are_those_of_one_process(tmp_path, shell):
    held = ["--mode", "rot_trans", "--epochs", "1", "--held_out", "21", "--log_root", str(tmp_path / "start")]
    assert train.main([*TINY, *held, "--device", "cpu"]) == 0
    (start,) = (tmp_path / "start").iterdir()
    own = ["--mode", "level_dict", "--resume_path", str(start), "--sr_dict_size", "16", "--ood_batch_size", "30"]
    own = [*own, "--device", "cpu", "--log_root"]
    assert train_cocsr.main([*own, str(tmp_path / "one")]) == 0
    done = two("train_cocsr.py", *own, tmp_path / "two")
    assert done.returncode == 0 and done.stdout.count("term neighbours") == 1, done.stderr
    one, other = (load_tensors(next((tmp_path / n).glob("*/last.cocsr_model")), flag="x") for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-10, rtol=0, msg=name)
    compared(next((tmp_path / "one").iterdir()), tmp_path, shell, "levels", "levels_pixels", mode="ood_levels")


def compared(run, tmp_path, shell, *names, mode, more=()):
    """Scores of every test image by one process and by two differ by less than 1e-10."""
    args = ["--load_path", run, "--mode", mode, "--ood_batch_size", "50", "--save_score", "--device", "cpu", *more]
    found = {}
    for size in (1, 2):
        command = ["eval.py", *args, "--out", tmp_path / str(size), "--ood_score", *names]
        done = two(*command) if size == 2 else shell(*command, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        for table in sorted((tmp_path / str(size)).glob(f"scores_{mode}_*_digits.csv")):
            rows = table.read_text().splitlines()[1:]
            found.setdefault(table.name, []).append(
                torch.tensor([float(row.split(",")[2]) for row in rows], dtype=torch.float64)
            )
    assert len(found) == len(names) + ("--score_sum" in more)
    for name, (one, other) in found.items():
        assert len(one) == 599 and one.std() > 0, name
        assert (one - other).abs().max() < 1e-10, name


def test_sums_of_scores_in_all_dictionaries_are_those_of_one_process(tmp_path, shell):
    common = [*TINY, "--shift_trans_type", "rotation", "--device", "cpu", "--log_root", str(tmp_path / "logs")]
    assert train.main([*common, "--mode", "simclr_CSI", "--epochs", "1", "--held_out", "12"]) == 0
    (start,) = (tmp_path / "logs").iterdir()
    coding = "--sr_dict_size 16 --sr_lambda_rel 0.1 --sr_rho_auto --ini_sr_dict_train --normalize_sr_dict_feature"
    own = ["--mode", "cocsr_dict", "--resume_path", str(start), "--epochs", "2", *coding.split()]
    assert train_cocsr.main([*common, *own]) == 0
    run = next(path for path in (tmp_path / "logs").iterdir() if path != start)
    names = ["CSI_srm", "CSI_src", "knn_cosine", "shift_logsoftmax"]
    compared(run, tmp_path, shell, *names, mode="ood_pre_cocsr", more=["--score_sum", "--normalize_sr_dict_feature"])


def test_scores_are_those_of_one_process_and_errors_are_reported_once(whole, tmp_path, shell):
    args = [*TINY, *SHIFT, "--mode", "ood_pre", "--ood_samples", "2", "--ood_batch_size", "50", "--save_score"]
    found = {}
    for size in (1, 2):
        folder = shutil.copytree(whole, tmp_path / str(size))
        command = ["eval.py", *args, "--load_path", folder]
        done = two(*command) if size == 2 else shell(*command, OMP_NUM_THREADS="1")
        assert done.returncode == 0 and done.stdout.count("one_class_mean") == 1, done.stderr
        scores = (folder / "scores_ood_pre_CSI_digits.csv").read_text().splitlines()[1:]
        found[size] = torch.tensor([float(row.split(",")[2]) for row in scores], dtype=torch.float64)
        assert json.loads((folder / "result_ood_pre_CSI.json").read_text())["processes"] == size
    assert len(found[1]) == 599 and (found[1] - found[2]).abs().max() < 1e-10
    done = two("eval.py", *args, "--load_path", tmp_path / "nothing")
    assert done.returncode != 0 and done.stderr.count("error: --load_path: no checkpoint") == 1


def test_a_killed_process_is_started_again_by_the_launcher(whole, tmp_path):
    """torchrun's restart: both processes begin again, and the run goes on from its checkpoint."""
    args = arguments(tmp_path, "--save_minutes", "0.0005")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*_TWO, "--max_restarts=3", "train.py", *args]
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / whole.name / "log.txt"
    while run.poll() is None and not (log.is_file() and "epoch 1/6" in log.read_text()):
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    told = run.communicate(timeout=60)
    assert run.returncode == 0, told
    assert "continuing after epoch" in log.read_text()
    a, b = (load_tensors(f / "last.model", flag="x") for f in (whole, tmp_path / whole.name))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(not can_join(), reason="network namespaces take root and iproute2")
def test_a_machine_that_dies_comes_back(whole, tmp_path):
    with machines():
        told = killed_and_started_again(tmp_path, whole)
    assert "continuing after epoch" in told and "the same weights" in told
