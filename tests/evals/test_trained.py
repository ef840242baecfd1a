"""What an evaluation works on follows from its flags: draws, samples, augmentation, and the network's mode."""

import json
import shutil

import numpy as np
import pytest
import torch

import eval as evaluate
from common.flags import Flags, build_parser, parse
from common.run import recorded_flags
from datasets.augment import AlignedSpec
from evals import EVALS, mode_of_run
from evals.extract import CONTRASTIVE, Extraction, concatenate, draw_means, reference_pool
from evals.trained import Trained, evaluation_mode
from program import SPECS
from tests.conftest import SHIFT, TINY


def flags_of(*args: str) -> Flags:
    return parse(args, build_parser("test", EVALS, "ood_pre", SPECS))


def trained_of(folder, *more: str, mode: str = "ood_pre") -> Trained:
    flags = flags_of(*TINY, *SHIFT, "--mode", mode, "--load_path", str(folder), "--device", "cpu", *more)
    return EVALS[mode].load(flags)


def extraction_of(trained: Trained) -> Extraction:
    return Extraction.of(CONTRASTIVE, trained, {"z"})


def test_flags_of_the_draws_are_used(stage1):
    found = extraction_of(trained_of(stage1))
    assert (found.samples, found.draws.seed) == (1, 0)
    assert found.draws.aligned == AlignedSpec() and len(found.draws.shifts) == 5
    flags = ["--ood_samples", "7", "--seed", "5", "--ood_batch_size", "13"]
    flags += ["--resize_factor", "0.54", "--resize_fix", "--color_jitter_strength", "0.5"]
    found = extraction_of(trained_of(stage1, *flags))
    assert (found.samples, found.draws.seed, found.draws.batch_size) == (7, 5, 13)
    assert found.draws.aligned == AlignedSpec(0.5, 0.54, True)


def test_coding_flags_that_are_given_are_used_else_the_files(stage2):
    flags = ["--sr_admm_stage", "17", "--sr_tol", "0.2", "--sr_lambda", "3", "--sr_rho", "2"]
    trained = trained_of(stage2, *flags, "--invert_sr_feature_norm", mode="ood_pre_cocsr")
    coding = trained.net.sr_nets.coding
    assert (coding.steps, coding.tol) == (17, 0.2)
    assert (coding.lam, coding.rho) == (3.0, 2.0)
    coding = trained_of(stage2, "--sr_lambda", "0.001", mode="ood_pre_cocsr").net.sr_nets.coding
    assert coding.lam == float(torch.tensor(0.001)) and coding.rho == 1.0 and coding.steps == 40  # the file's, to a bit


def test_training_images_mix_with_their_neighbours_and_are_read_in_evaluation_mode(stage1):
    trained = trained_of(stage1)
    trained.net.train()
    extraction = extraction_of(trained)
    images = trained.train_images()
    _, known = extraction.fit(images)
    assert all(module.training for module in trained.net.modules())
    trained.net.eval()
    pool = reference_pool(images, 4, 0)
    assert len(pool) == 4
    own, other = (
        concatenate(draw_means(extraction.read, images, extraction.draws, 1, label="test", references=r))
        for r in (None, pool)
    )
    assert set(known) == {"z"}
    torch.testing.assert_close(known["z"], own["z"])
    assert (known["z"] - other["z"]).abs().max() > 1e-3


def test_the_mode_of_every_module_comes_back_even_after_an_error():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    net.train()
    net[0].eval()
    with pytest.raises(KeyError), evaluation_mode(net):
        assert not any(module.training for module in net.modules())
        raise KeyError
    assert [module.training for module in net.modules()] == [True, False, True]


def test_a_network_in_memory_gives_the_results_of_its_file_and_is_left_as_it_was(stage1):
    loaded = trained_of(stage1)
    net = loaded.net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    live = Trained.of(net, loaded.flags, loaded.split, epoch=2)
    assert live.device == torch.device("cpu") and (live.path, live.epoch) == (None, 2)
    (own,) = EVALS["ood_pre"].measure(live)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    (other,) = EVALS["ood_pre"].measure(trained_of(stage1))
    assert own.metrics == other.metrics and own.facts == other.facts
    assert np.array_equal(own.per_image["digits"]["score"], other.per_image["digits"]["score"])


@pytest.mark.parametrize("mode, row", [("simclr_CSI", "ood_pre"), ("cocsr_dict", "ood_pre_cocsr"), ("x", None)])
def test_a_run_is_evaluated_by_the_row_of_its_mode(mode, row, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"flags": {"mode": mode, "seed": 3}, "used": ["mode"]}))
    assert recorded_flags(tmp_path / "last.model") == {"mode": mode}
    assert mode_of_run(EVALS, str(tmp_path)) == mode_of_run(EVALS, str(tmp_path / "a")) == row
    assert mode_of_run(EVALS, str(tmp_path / "b" / "last.model")) is None
    assert mode_of_run(EVALS, None) is None


def test_every_training_mode_has_one_row_at_most_of_its_own():
    from evals import TSNES

    for evals in (EVALS, TSNES):
        modes = [mode for row in evals.values() for mode in row.default_for]
        assert len(modes) == len(set(modes))
        assert all(set(row.default_for) <= set(row.trained_by) for row in evals.values())


def test_the_seed_of_an_evaluation_changes_its_draws_and_more_samples_its_means(stage1, tmp_path):
    found = []
    for n, more in enumerate(([], ["--seed", "1"], ["--ood_samples", "2"])):
        folder = shutil.copytree(stage1, tmp_path / str(n))
        assert evaluate.main([*TINY, *SHIFT, "--load_path", str(folder), "--device", "cpu", *more]) == 0
        found.append(json.loads((folder / "result_ood_pre_CSI.json").read_text())["pooled"])
    assert len(set(found)) == 3
