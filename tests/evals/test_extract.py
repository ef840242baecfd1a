import pytest
import torch

from common.files import save_tensors
from common.flags import build_parser, parse
from datasets.augment import AlignedSpec
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec, draw_views
from evals import EVALS, TSNES, extract
from evals.classify import classify
from evals.extract import (
    CLASSIFIER,
    FITTED_SPARSE,
    LABELLED,
    Extraction,
    cocsr_outputs,
    concatenate,
    draw_means,
    net_outputs,
    reference_pool,
)
from models.checkpoint import build_net
from models.feature_net import CocsrNet, FeatureTransform
from models.sparse.admm import admm_lasso
from models.sparse.dictionary import CodingSpec, DictionaryBank
from program import SPECS
from tests.conftest import TINY
from tests.evals.test_trained import trained_of

SHIFTS = ShiftSpec("rot_bmix", 0.2).functions()


def images(n: int = 7):
    generator = torch.Generator().manual_seed(0)
    return image_set(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator), torch.zeros(n))


def network():
    return build_net("feature", "resnet8", n_classes=2, simclr_dim=6, n_shifts=5, seed=0).eval()


def spec(batch_size: int) -> DrawSpec:
    return DrawSpec(SHIFTS, AlignedSpec(), seed=3, batch_size=batch_size)


def test_means_equal_a_loop_over_draws_and_do_not_depend_on_the_batch_size():
    net, data = network(), images()
    found = concatenate(draw_means(net_outputs(net), data, spec(3), 4, label="test"))
    whole = concatenate(draw_means(net_outputs(net), data, spec(7), 4, label="test"))
    draws = []
    with torch.inference_mode():
        for t in range(4):
            ((_, views),) = draw_views(data, spec(7), t)
            draws.append(net(views).z.unflatten(0, (7, 5)))
    assert found["z"].shape == (7, 5, 6) and found["shift"].shape == (7, 5, 5)
    torch.testing.assert_close(found["z"], torch.stack(draws).mean(0), atol=1e-5, rtol=1e-5)
    for name in found:
        torch.testing.assert_close(found[name], whole[name], atol=1e-5, rtol=1e-5)


def test_many_draws_come_in_groups_with_the_same_means(monkeypatch):
    net, data = network(), images()
    whole = concatenate(draw_means(net_outputs(net), data, spec(3), 5, label="test"))
    monkeypatch.setattr(extract, "_TOGETHER", 2)
    found = concatenate(draw_means(net_outputs(net), data, spec(3), 5, label="test"))
    for name in found:
        torch.testing.assert_close(found[name], whole[name], atol=1e-6, rtol=1e-6)


def test_each_feature_is_coded_in_its_own_shifts_dictionary():
    bank = DictionaryBank(5, 64, 9, CodingSpec(0.01, 1.0, 40), torch.Generator().manual_seed(0))
    model, data = CocsrNet(network(), bank, FeatureTransform()).eval(), images()
    found = concatenate(draw_means(cocsr_outputs(model), data, spec(3), 1, label="test"))
    s = found["s"]
    for k in range(5):
        alone = admm_lasso(bank.dictionary[k : k + 1], s[:, k].T, lam=0.01).codes[0].T
        torch.testing.assert_close(found["codes"][:, k], alone.detach(), atol=1e-5, rtol=1e-4)


def test_references_are_training_images_chosen_by_the_seed():
    data = images()
    pool = reference_pool(data, 3, seed=0)
    everything = data.batch(torch.arange(7))
    assert pool.shape == (3, 3, 8, 8) and all(any(torch.equal(p, x) for x in everything) for p in pool)
    assert torch.equal(pool, reference_pool(data, 3, seed=0)) and len(reference_pool(data, 99, seed=0)) == 7


def test_references_take_the_place_of_neighbours_in_the_mixed_view_only():
    net, data, pool = network(), images(), torch.rand(4, 3, 8, 8)
    found = concatenate(draw_means(net_outputs(net), data, spec(2), 2, label="test", references=pool))
    plain = concatenate(draw_means(net_outputs(net), data, spec(2), 2, label="test"))
    torch.testing.assert_close(found["z"][:, :4], plain["z"][:, :4], atol=1e-6, rtol=1e-5)
    assert (found["z"][:, 4] - plain["z"][:, 4]).abs().amax(1).min() > 1e-4


def test_draws_are_averaged_before_features_are_inverted_and_coded(stage1):
    """Trap 7: mean first, then h / |h|^2, then codes; the other order gives other features."""
    more = ["--ood_samples", "3", "--invert_sr_feature_norm", "--sr_dict_size", "8", "--sr_fit_steps", "3"]
    trained = trained_of(stage1, *more, mode="ood_pre_multi_sr")
    train = trained.train_images()
    fitted, known = Extraction.of(FITTED_SPARSE, trained, {"s", "error", "shift"}).fit(train)
    with torch.no_grad():
        net = net_outputs(trained.net)
        draws = []
        for t in range(3):
            views = torch.cat([views for _, views in draw_views(train, fitted.draws, t)])
            draws.append(net(views.unflatten(0, (-1, 5)))["h"])
    h = torch.stack(draws).mean(0)
    torch.testing.assert_close(known["s"], h / h.square().sum(2, keepdim=True), atol=1e-6, rtol=1e-4)
    assert set(known) == {"s", "error", "shift"} and known["error"].shape == (122, 5)
    # The same dictionaries code test images.
    again = fitted.outputs(train, "again")
    assert all(torch.allclose(known[name], again[name], atol=1e-6) for name in known)


@pytest.mark.parametrize("model", ["resnet8", "wrn16_1"])
def test_classifiers_with_reverse_attention_are_evaluated_as_their_files_say(model, tmp_path):
    net = build_net("ra_classifier", model, n_classes=10, seed=0).eval()
    torch.nn.init.normal_(net.linear.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # Fresh networks tell images apart by little.
        net.linear.bias -= net.heads(torch.rand(50, 3, 8, 8)).auxiliary[0].mean(0)
    save_tensors(tmp_path / "last.model", net.state_dict(), facts={"flags": {"mode": "supervised"}, "epoch": 1})
    given = [*TINY[:-2], "--model", model, "--load_path", str(tmp_path), "--device", "cpu"]

    def loaded(table, mode: str, *more: str):
        flags = parse([*given, "--mode", mode, *more], build_parser("x", table, mode, SPECS))
        return table[mode].load(flags)

    trained = loaded(EVALS, "test_acc")
    test = trained.split.test()
    with torch.inference_mode():
        batch = test.batch(torch.arange(len(test)))
        logits, h = net(batch), net.features(batch)
    (result,) = classify(trained)
    columns = result.per_image["digits"]
    assert len(set(columns["predicted"])) > 2 and columns["predicted"].tolist() == logits.argmax(1).tolist()
    assert columns["confidence"].tolist() == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)

    found = Extraction.of(LABELLED, loaded(EVALS, "ood", "--ood_dataset", "interp"), {"linear"}).outputs(test, "test")
    torch.testing.assert_close(found["linear"][:, 0], logits, atol=1e-3, rtol=1e-4)
    found = Extraction.of(CLASSIFIER, loaded(TSNES, "supervised_tsne"), {"h"}).outputs(test, "test")
    torch.testing.assert_close(found["h"][:, 0], h, atol=1e-5, rtol=1e-4)
    # Rows of one's own guess change it: the plain network of these weights says something else.
    plain = build_net("classifier", model, n_classes=10, seed=0).eval()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if key in plain.state_dict()})
    with torch.inference_mode():
        assert (plain(batch) - logits).abs().max() > 1
