"""Reverse attention against golden numbers, by hand, and against its definition written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.reverse_attention import reverse_attention


@pytest.fixture
def ops(golden) -> dict:
    return golden("ancra_ops")


def close(found: Tensor, expected: Tensor | float, scale: float = 2e-5) -> None:
    """Within the recommended tolerance of the golden numbers."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    atol = scale * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_the_golden_ones(ops, dtype):
    z, weight, bias = (ops[f"ra_{name}"].to(dtype).requires_grad_() for name in ("z", "weight", "bias"))
    label = ops["ra_label"]
    out = reverse_attention(z, weight, bias, pool=4, labels=label)
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"ra_train_{name}"])
    loss = F.cross_entropy(out.final, label) + 2 * F.cross_entropy(out.auxiliary, label)
    close(loss, ops["ra_train_loss"])
    for found, name in zip(torch.autograd.grad(loss, (weight, bias, z)), ("weight", "bias", "z"), strict=True):
        close(found, ops[f"ra_train_grad_{name}"])

    out = reverse_attention(z, weight, bias, pool=4)
    assert torch.equal(out.auxiliary.argmax(1), ops["ra_eval_pred"])
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"ra_eval_{name}"])
    loss = F.cross_entropy(out.final, label)
    close(loss, ops["ra_eval_loss"])
    close(torch.autograd.grad(loss, z)[0], ops["ra_eval_grad_z"])


def test_the_grid_form_is_the_golden_one(ops):
    z, weight, bias, label = (ops[f"grid_{name}"] for name in ("z", "weight", "bias", "label"))
    out = reverse_attention(z, weight, bias, pool=4, labels=label)
    for found, name in zip(out, ("zprime", "aux_logits", "final_logits"), strict=True):
        close(found, ops[f"grid_train_{name}"])


def test_by_hand():
    z, weight = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    predicted = reverse_attention(z, weight, torch.zeros(2), pool=1)
    given = reverse_attention(z, weight, torch.zeros(2), pool=1, labels=torch.tensor([0]))
    assert predicted.auxiliary.tolist() == given.auxiliary.tolist() == [[1.0, 4.5]]
    assert predicted.z.flatten().tolist() == [0.5, 4.0] and predicted.final.tolist() == [[0.5, 8.25]]
    assert given.z.flatten().tolist() == [1.0, 0.0] and given.final.tolist() == [[1.0, 0.5]]
