import torch
import torch.nn.functional as F

from common.seed import generator
from datasets.shifts import rotations_and_translations
from models.feature_net import Transformation
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
