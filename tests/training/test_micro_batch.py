import pytest
import torch

from common.device import memory_errors
from common.errors import RunStopped
from models.checkpoint import build_net
from models.sparse.dictionary import CodingSpec, DictionaryBank
from training.micro_batch import forward_in_micro_batches
from training.modes.cocsr_dict import DictionaryLossSpec, dictionary_step
from training.modes.simclr import contrastive_step

K = 3


def network():
    return build_net("feature", "resnet8", n_classes=2, simclr_dim=6, n_shifts=K, seed=0).double()


def views(images=5):
    return torch.rand(2 * K * images, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(net, micro_batch):
    labels = torch.tensor([0, 1, 0, 1, 1])
    step = contrastive_step(net, views(), labels, n_shifts=K, micro_batch=micro_batch)
    total = torch.stack(list(step.losses.values())).sum()
    params = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, params, allow_unused=True)
    return total.detach(), [g for g in found if g is not None]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 9])
def test_the_gradient_of_stage_1_in_pieces_is_that_of_the_whole(micro_batch):
    net = network().eval()  # no statistics of the batch
    loss, whole = gradient(net, None)
    same_loss, pieces = gradient(net, micro_batch)
    assert abs(loss - same_loss) < 1e-12 and len(whole) == len(pieces) > 20
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_running_statistics_see_every_piece_once():
    net, by_hand = network().train(), network().train()
    gradient(net, 2)
    with torch.no_grad():
        for piece in views().unflatten(0, (2 * K, 5)).split(2, 1):
            by_hand(piece.flatten(0, 1))
    for (name, a), b in zip(net.named_buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10, msg=name)
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_pieces_hold_fewer_activations():
    net, sizes = network().train(), {}
    for micro_batch in (None, 1):
        held = 0

        def pack(x):
            nonlocal held
            held += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward_in_micro_batches(net, views(), 5, micro_batch)
        sizes[micro_batch] = held
    assert sizes[1] < sizes[None] / 10


@pytest.mark.parametrize("detach, deep", [(False, None), (True, None), (False, "1,5")])
def test_the_dictionary_step_in_pieces_is_that_of_the_whole(detach, deep):
    spec = DictionaryLossSpec(1.0, 0.01, 0.1, 0, 1.0, detach, deep, loss_dict_margin=0.5)
    bank = DictionaryBank(K, 8, 10, CodingSpec(0.05, 1.0, 12), torch.Generator().manual_seed(0)).double()
    s = torch.randn(K, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for micro_batch in (None, 3):
        step = dictionary_step(bank, s, spec, micro_batch)
        losses = torch.stack(list(step.losses.values()))
        (of_D,) = torch.autograd.grad(losses.sum(), bank.dictionary)
        found[micro_batch] = [losses.detach(), of_D, *step.watch.values()]
    for a, b in zip(found[None], found[3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_memory_that_cannot_be_had_is_reported_with_the_remedy():
    with pytest.raises(RunStopped, match=r"out of memory; lower --batch_size .*can't allocate"):
        with memory_errors("lower --batch_size"):
            torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(RunStopped, match="lower --x"), memory_errors("lower --x"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        with pytest.raises(RunStopped, match="lower --x"), memory_errors("lower --x"):
            raise torch.AcceleratorError(text)
    with pytest.raises(RuntimeError, match="shape"), memory_errors("lower --x"):
        raise RuntimeError("shape mismatch")
