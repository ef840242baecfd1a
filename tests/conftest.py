"""Shared fixtures. Real images lie beside the project on the team's machines; tests that need them skip without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# One thread, here and in the processes that tests start: their work is too small for more, which cost time. Read by
# torch when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Tiny runs: small pictures, few steps, nothing that waits for a second core.
TINY = "--dataset digits --image_size 8 --model resnet8 --batch_size 61 --one_class_idx 3".split()
SHIFT = ["--shift_trans_type", "rot_bmix", "--mix_alpha", "0.2"]


# Backbones of a hundred million weights and more.
HEAVY = ("dm_wrn70_16", "dm_wrn70_16_cifar100", "dm_wrn94_16", "ra_wrn70_16", "ra_wrn101_2")


@pytest.fixture
def golden():
    """Load a file of known answers as float64 or float32 tensors, numbers for scalars."""

    def load(name: str) -> dict:
        path = ROOT / "tests" / "golden" / f"{name}.npz"
        texts = {k: v.tolist() for k, v in np.load(path).items() if v.dtype.kind == "U"}
        return texts | {
            k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(path).items() if k not in texts
        }

    return load


@pytest.fixture
def shell():
    """Run a script of the project as a user would, in a process of its own without a terminal."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def trained_stage1(tmp_path_factory) -> Path:
    import train

    logs = tmp_path_factory.mktemp("logs")
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--simclr_dim", "32", "--epochs", "2", "--log_root", str(logs)]
    assert train.main(args) == 0
    return logs / "digits_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_3"


@pytest.fixture(scope="session")
def trained_stage2(trained_stage1) -> Path:
    import train_cocsr

    logs = trained_stage1.parent
    args = [*TINY, *SHIFT, "--resume_path", str(trained_stage1), "--epoch", "4", "--log_root", str(logs)]
    args += "--sr_dict_size 24 --sr_lambda 1e-3 --loss_lambda_sr_l1 1e-3 --invert_sr_feature_norm".split()
    assert train_cocsr.main([*args, "--ini_sr_dict_train", "--loss_dict_constr_mode", "1"]) == 0
    return logs / "digits_resnet8_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_3"


@pytest.fixture(scope="module")
def stage1(trained_stage1, tmp_path_factory) -> Path:
    """A stage-1 run folder of two epochs on digits: trained once, a copy for each file of tests."""
    return shutil.copytree(trained_stage1, tmp_path_factory.mktemp("logs") / trained_stage1.name)


@pytest.fixture(scope="module")
def stage2(trained_stage2, stage1) -> Path:
    """A stage-2 run folder of two more epochs, beside `stage1`: likewise."""
    return shutil.copytree(trained_stage2, stage1.parent / trained_stage2.name)
