"""`train.py --mode meansparse`: operators with statistics, weights as they were, and a file that knows itself."""

import json

import pytest
import torch

import eval as evaluate
import train
import train_cocsr
from common.dist import World
from common.run import recorded_flags
from datasets import ShiftSpec
from datasets.one_class import SplitSpec
from datasets.views import DrawSpec
from models.checkpoint import load_net, read_state
from models.mean_sparse import alpha_of, collect, gather, merged, operators, put_statistics
from program import SPECS
from tests.conftest import TINY
from training import STAGE1
from training.launch import Script, read_job, read_split
from training.modes import mean_sparse

DIGITS = TINY[:-2]
SHIFT = ["--shift_trans_type", "rotation"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A classifier with held-out images."""
    return trained(tmp_path_factory.mktemp("base"), *DIGITS, "--mode", "supervised", "--epochs", "2")


def trained(logs, *args, script=train):
    assert script.main([*args, "--log_root", str(logs), "--device", "cpu"]) == 0
    (folder,) = logs.iterdir()
    return folder


def sparse(start, logs, *more):
    return trained(logs, "--mode", "meansparse", "--load_path", str(start), *more)


def job_of(start, *more):
    script = Script("train.py", STAGE1, "simclr", "last.model", "last.resume")
    return read_job(["--mode", "meansparse", "--load_path", str(start), *more], script, SPECS)


def net_of(run, kind="classifier", file="last.model"):
    return load_net(kind, read_state(run / file, flag="load_path"), model="resnet8", path=run, flag="load_path").eval()


def test_weights_and_outputs_stay_and_the_file_says_what_it_was_trained_by(base, tmp_path, capsys):
    run = sparse(base, tmp_path, "--compile", "--amp", "bf16")
    told = capsys.readouterr().out
    assert "--compile has no effect here" in told and "--amp has no effect here" in told
    assert run.name == "digits_resnet8_meansparse_activations"
    before, after = (torch.load(folder / "last.model", weights_only=True) for folder in (base, run))
    assert all(torch.equal(after[key], value) for key, value in before.items()) and len(after) == len(before) + 7 * 5
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net_of(run)(images), net_of(base)(images)) and alpha_of(net_of(run)) == 0
    recorded = recorded_flags(run / "last.model")
    assert recorded_flags(base / "last.model").items() <= recorded.items() and recorded["placement"] == "activations"
    assert json.loads((run / "args.json").read_text())["flags"]["mode"] == "meansparse"


@pytest.mark.parametrize("rule, batch", [("exact", "31"), ("exact", "512"), ("batchwise", "100")])
def test_statistics_are_those_of_the_training_images_without_the_held_out(base, tmp_path, rule, batch):
    run = sparse(base, tmp_path, "--stats", rule, "--batch_size", batch, "--ms_alpha", "0.3")
    net = net_of(run)
    assert alpha_of(net) == pytest.approx(0.3)
    found = {name: (o.running_mean.clone(), o.running_var.clone()) for name, o in operators(net).items()}
    job = job_of(base)
    assert job.flags.of(SplitSpec).held_out == recorded_flags(base / "last.model")["held_out"] != 0
    images = read_split(job.flags, World(0, 1)).train()
    x = images.batch(torch.arange(len(images)))
    assert 1000 < len(x) < 1438
    collect(net, x.split(int(batch)), rule=rule)
    for name, operator in operators(net).items():
        torch.testing.assert_close(operator.running_mean, found[name][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(operator.running_var, found[name][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", ["100", "1000"])
def test_processes_find_what_one_finds(base, batch):
    """Also where one of them has no batch."""
    job = job_of(base, "--batch_size", batch)
    split = read_split(job.flags, World(0, 1))
    alone = job.mode.build(job.flags, split, World(0, 1))
    net, data = alone.model, alone.data
    before = {name: operator.running_var.clone() for name, operator in operators(net).items()}
    views = DrawSpec(ShiftSpec().functions(), None, 0, batch_size=int(batch))
    parts = [gather(net, mean_sparse._views(data, views, World(rank, 3))) for rank in range(3)]
    assert ({} in parts) == (batch == "1000") and all(part.mean.device.type == "cpu" for part in parts[0].values())
    put_statistics(net, merged(parts))
    for name, operator in operators(net).items():
        torch.testing.assert_close(operator.running_var, before[name], rtol=1e-5, atol=1e-8)


def test_a_detector_is_scored_and_its_second_stage_trained_on_it(tmp_path, capsys):
    csi = trained(tmp_path / "a", *TINY, *SHIFT, "--mode", "simclr_CSI", "--simclr_dim", "16", "--epochs", "1")
    run = sparse(csi, tmp_path / "b", "--ms_alpha", "0.2")
    assert "4 shifts" in capsys.readouterr().out and run.name.endswith("meansparse_activations_one_class_3")
    assert evaluate.main(["--load_path", str(run), "--device", "cpu", "--ood_score", "CSI"]) == 0
    result = json.loads((run / "result_ood_pre_CSI.json").read_text())
    assert result["settings"]["ms_alpha"] == pytest.approx(0.2) and result["flags"]["shift_trans_type"] == "rotation"
    more = ["--attack", "pgd_known", "pgd_known_straight", "--attack_images", "4", "--attack_steps", "2"]
    assert evaluate.main(["--load_path", str(run), "--device", "cpu", "--ood_score", "CSI", *more]) == 0
    args = ["--resume_path", str(run), *TINY, *SHIFT, "--sr_dict_size", "8", "--epochs", "2", "--simclr_dim", "16"]
    stage2 = trained(tmp_path / "c", *args, script=train_cocsr)
    net = read_state(stage2 / "last.cocsr_model", flag="load_path")
    assert float(net["feature_net.act1.0.threshold"]) == pytest.approx(0.2)
    assert evaluate.main(["--load_path", str(stage2), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert train.main(["--mode", "meansparse", "--load_path", str(stage2 / "last.cocsr_model"), *TINY]) == 2
    assert "has MeanSparse operators already" in capsys.readouterr().err


def test_what_cannot_be_sparsified_is_one_line(base, tmp_path, capsys):
    def refused(*args):
        capsys.readouterr()
        code = train.main(["--mode", "meansparse", *args, "--log_root", str(tmp_path / "logs"), "--device", "cpu"])
        err = capsys.readouterr().err
        assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "logs").exists()
        return err

    assert "--load_path: --mode meansparse works on a trained network" in refused(*DIGITS)
    assert "--ms_alpha must lie in [0, 100], got -0.1" in refused("--load_path", str(base), "--ms_alpha", "-0.1")
    assert "--ms_alpha must lie in [0, 100], got inf" in refused("--load_path", str(base), "--ms_alpha", "inf")
    assert "--epochs 1: --mode meansparse trains nothing" in refused("--load_path", str(base), "--epochs", "1")
    assert "--placement blocks: there is no slot" in refused("--load_path", str(base), "--placement", "blocks")
    run = sparse(base, tmp_path / "once")
    told = refused("--load_path", str(run))
    assert "has MeanSparse operators already; give the weights before them" in told
    rdae = trained(tmp_path / "rdae", *TINY, "--mode", "dae", "--layers", "8", "--epochs", "1")
    assert "is an autoencoder" in refused("--load_path", str(rdae), *TINY)
    other = tmp_path / "other.model"
    torch.save({"a": torch.zeros(1)}, other)
    assert "is of none of these networks" in refused("--load_path", str(other), *DIGITS)
