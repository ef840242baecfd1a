from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.attacks.specs import StepsSpec
from common.seed import generator
from datasets.shifts import rotations_and_translations
from models.feature_net import Transformation
from tests.training.test_recipes import batch_of, recipe_of
from training.attack import ATTACKS
from training.modes.rot_trans import transformation_losses, transformed


def test_views_bear_the_labels_that_evaluation_gives_them():
    """Each training view is the view of evaluation with the index rotation * 9 + vertical * 3 + horizontal."""
    images = torch.rand(5, 3, 8, 8)
    views, labels = transformed(images, generator(0, "test"))
    assert views.shape == (20, 3, 8, 8) and labels.shape == (3, 20)
    assert labels[0].tolist() == [q for q in range(4) for _ in range(5)]
    assert set(labels[1].tolist()) == set(labels[2].tolist()) == {0, 1, 2}
    shifts = rotations_and_translations()
    for n, (r, v, h) in enumerate(labels.T.tolist()):
        image = images[n % 5 : n % 5 + 1]
        assert torch.equal(views[n], shifts[r * 9 + v * 3 + h].combine(image, image)[0])


def test_losses_are_three_cross_entropies():
    logits = Transformation(torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 3))
    labels = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])
    terms = transformation_losses(logits, labels)
    assert list(terms) == ["rotation", "vertical", "horizontal"]
    torch.testing.assert_close(terms["horizontal"], F.cross_entropy(logits.horizontal, labels[2]))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_network_learns_from_views_that_raise_its_loss(name):
    more = ["--train_attack", name, "--epsilon", "0.1", "--num_steps", "2", "--step_size", "0.05"]
    own = more if name == "pgd" else more[:4]
    recipe, again = (recipe_of("adv_rot_trans", Path("/none"), *own) for _ in range(2))
    batch, gen, net = batch_of("adv_rot_trans", 2, 3), generator(0, "augment", 2, 3), again.model
    views, labels = transformed(batch.images[0].float() / 255, gen)
    noise = ATTACKS[name].noise(24, views, gen)

    def losses(x):
        return sum(F.cross_entropy(part, own, reduction="none") for part, own in zip(net(x), labels, strict=True))

    net.eval()
    spec = StepsSpec(num_steps=2, step_size=0.05)
    attacked = ATTACKS[name](losses, views, noise, 0.1, spec)
    with torch.no_grad():
        assert losses(attacked).sum() > losses(views).sum()
    assert (attacked - views).abs().max() <= (0.3 if name == "nfgsm" else 0.1) + 1e-6
    net.train()
    expected = {key: float(value.detach()) for key, value in transformation_losses(net(attacked), labels).items()}
    found = {key: float(value.detach()) for key, value in recipe.losses(batch).losses.items()}
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(p.requires_grad for p in recipe.model.parameters()) and recipe.model.training
