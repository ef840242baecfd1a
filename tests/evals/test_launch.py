import json

import pytest

import eval as evaluate
import tsne
from tests.conftest import SHIFT, TINY


@pytest.mark.parametrize(
    "script, flags, shifts",
    [
        (evaluate, [*SHIFT], 5),
        (evaluate, ["--mode", "ood_pre_cocsr", "--shift_trans_type", "rotation"], 4),
        (evaluate, ["--mode", "rot_trans"], 36),
        (evaluate, ["--mode", "test_acc"], 1),
        (evaluate, ["--mode", "test_marginalized_acc"], 4),
        (evaluate, ["--mode", "ood", "--ood_score", "baseline", "baseline_marginalized"], 4),
        (tsne, [*SHIFT], 5),
    ],
)
@pytest.mark.parametrize("place", ["run", "run/last.model"])
def test_a_dry_run_says_how_many_views_it_would_look_at_and_where(script, flags, shifts, place, tmp_path, capsys):
    args = [*TINY, *flags, "--ood_batch_size", "10", "--load_path", str(tmp_path / place), "--dry_run"]
    assert script.main(args) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["K"], told["views_per_step"], told["run_dir"]) == (shifts, 10 * shifts, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
