"""Files as the published programs write them load for evaluation and for stage 2."""

import json
import pickle

import pytest
import torch

import eval as evaluate
import train_cocsr
from tests.conftest import SHIFT
from tests.models.published import published_sparse_state, published_state

DATA = ["--dataset", "digits", "--image_size", "8", "--one_class_idx", "3", *SHIFT]
SPARSE = ["--invert_sr_feature_norm", "--sr_lambda", "1e-3"]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """A sixth of the digits: the networks here are of full size."""
    import datasets.catalog as catalog

    real = catalog.DATASETS["digits"].load

    def load(*args):
        data = real(*args)
        return data.where(torch.arange(len(data)) % 6 == 0)

    from dataclasses import replace

    monkeypatch.setitem(catalog.DATASETS, "digits", replace(catalog.DATASETS["digits"], load=load))


def written(folder, name: str, state: dict, parallel: bool):
    """Save `state` as DataParallel does, or not, with the epoch in a pickle beside it."""
    folder.mkdir(exist_ok=True)
    torch.save({f"module.{k}": v for k, v in state.items()} if parallel else state, folder / name)
    config = name.replace("_model", "_config").replace(".model", ".config")
    (folder / config).write_bytes(pickle.dumps({"epoch": 1000}))
    return folder / name


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "model, classes", [("resnet18", 10), ("resnet18", 100), ("resnet18_imagenet", 30), ("resnet50", 10)]
)
def test_a_stage_1_file_is_evaluated_and_stage_2_goes_on_from_it(model, classes, parallel, tmp_path, capsys):
    state = published_state(model, classes, 5)
    path = written(tmp_path, "last.model", state, parallel)
    assert evaluate.main([*DATA, "--model", model, "--mode", "ood_pre", "--load_path", str(path)]) == 0
    result = json.loads((tmp_path / "result_ood_pre_CSI.json").read_text())
    assert result["epochs"] == 1000 and 0 < result["mean"] < 1
    if model == "resnet50" or parallel:
        return
    args = [*DATA, *SPARSE, "--model", model, "--sr_dict_size", "6", "--log_root", str(tmp_path / "logs")]
    args += ["--resume_path", str(tmp_path), "--epoch", "1001", "--simclr_dim", "512"]
    assert train_cocsr.main(args) == 0, capsys.readouterr().err
    assert "--simclr_dim 512" in capsys.readouterr().out  # the file's 128 is used, and that is told
    (run,) = (tmp_path / "logs").iterdir()
    after = torch.load(run / "last.cocsr_model", weights_only=True)
    assert len(after) == 133 and all(torch.equal(after[f"feature_net.{k}"], v) for k, v in state.items())


@pytest.mark.parametrize("parallel", [False, True])
def test_a_stage_2_file_is_evaluated_and_gives_what_our_own_file_gives(parallel, tmp_path):
    state = published_sparse_state("resnet18", 10, 5, 7)
    assert len(state) == 133 and state["sr_nets.rho"].dtype == torch.int64
    path = written(tmp_path / "theirs", "last.cocsr_model", state, parallel)
    ours = {**state, "sr_nets.rho": torch.tensor(1.0)}
    own = written(tmp_path / "ours", "last.cocsr_model", ours, False)
    means = []
    for file in (path, own):
        args = [*DATA, *SPARSE, "--model", "resnet18", "--mode", "ood_pre_cocsr_refmix", "--load_path", str(file)]
        assert evaluate.main(args) == 0
        means.append(json.loads((file.parent / "result_ood_pre_cocsr_refmix_CSI_sr.json").read_text()))
    assert means[0]["auroc"] == means[1]["auroc"] and means[0]["epochs"] == 1000
