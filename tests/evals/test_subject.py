"""What an evaluation works on follows from its flags: draws, samples, augmentation, references, the network's mode."""

import json
import shutil

import pytest
import torch

import eval as evaluate
from common.flags import build_parser, parse
from datasets.augment import AlignedSpec
from evals import EVALS
from evals.evidence import CONTRASTIVE, SPARSE, Evidence
from evals.features import concatenate, draw_means
from evals.subject import Subject, load_subject
from program import SPECS
from tests.conftest import SHIFT, TINY


def subject_of(folder, *more: str, evidence: Evidence = CONTRASTIVE, reference: bool = False) -> Subject:
    args = [*TINY, *SHIFT, "--load_path", str(folder), "--device", "cpu", *more]
    flags = parse(args, build_parser("test", EVALS, "ood_pre", SPECS))
    return load_subject(flags, evidence, trained_by=["simclr_CSI", "cocsr_dict"], reference=reference)


def test_flags_of_the_draws_are_used(stage1):
    subject = subject_of(stage1)
    assert (subject.samples, subject.references, subject.draws.seed) == (1, 0, 0)
    assert subject.draws.aligned == AlignedSpec() and len(subject.draws.shifts) == 5
    flags = ["--ood_samples", "7", "--seed", "5", "--refmix_batch_size", "11", "--ood_batch_size", "13"]
    flags += ["--resize_factor", "0.54", "--resize_fix", "--color_jitter_strength", "0.5"]
    subject = subject_of(stage1, *flags, reference=True)
    assert (subject.samples, subject.references, subject.draws.seed, subject.draws.batch_size) == (7, 11, 5, 13)
    assert subject.draws.aligned == AlignedSpec(0.5, 0.54, True)


def test_coding_flags_of_evaluation_are_used_where_the_file_does_not_say(stage2):
    flags = ["--sr_admm_stage", "17", "--sr_tol", "0.2", "--sr_lambda", "3", "--sr_rho", "2"]
    bank = subject_of(stage2, *flags, "--invert_sr_feature_norm", evidence=SPARSE).net.sr_nets
    assert (bank.coding.steps, bank.coding.tol) == (17, 0.2)
    assert (bank.coding.lam, bank.coding.rho) == pytest.approx((1e-3, 1.0))  # as it was trained


def test_the_network_is_in_evaluation_mode_and_training_images_mix_with_their_neighbours(stage1):
    subject = subject_of(stage1, "--refmix_batch_size", "4", reference=True)
    assert not any(module.training for module in subject.net.modules())
    train, pool = subject.training()[:2]
    images = subject.split.train()
    assert pool is not None and len(pool) == 4
    reads = CONTRASTIVE.outputs(subject.net)
    own, other = (
        concatenate(draw_means(reads, images, subject.draws, 1, label="test", references=r)) for r in (None, pool)
    )
    torch.testing.assert_close(train["z"], own["z"].float())
    assert (train["z"] - other["z"]).abs().max() > 1e-3


def test_the_seed_of_an_evaluation_changes_its_draws_and_more_samples_its_means(stage1, tmp_path):
    found = []
    for n, more in enumerate(([], ["--seed", "1"], ["--ood_samples", "2"])):
        folder = shutil.copytree(stage1, tmp_path / str(n))
        assert evaluate.main([*TINY, *SHIFT, "--load_path", str(folder), "--device", "cpu", *more]) == 0
        found.append(json.loads((folder / "result_ood_pre_CSI.json").read_text())["pooled"])
    assert len(set(found)) == 3
