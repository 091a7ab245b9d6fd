"""Attention, loss and dropout of packed rows, compared with their plain versions."""

import math
from itertools import pairwise

import pytest
import torch

from onecard.models import loss, packed_attention
from onecard.models.dropout import CheapDropout
from onecard.system import gpus


def dense_reference(query, key, value, lengths, scaling):
    """Softmax attention with a dense block-diagonal causal mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None]) & torch.ones(len(document), len(document)).tril().bool()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    "lengths", [(5,), (7, 7, 3, 1), (40, 2, 33, 1, 1, 30), (packed_attention.SHORT + 20, 9, 350, 8)]
)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_is_dense_masked_attention(lengths, scaling):
    """Output and all gradients agree in fp64, for short and long documents and grouped heads."""
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = ((1, 6, total, 8), (1, 2, total, 8), (1, 2, total, 8))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output, _ = packed_attention.packed_attention(
        torch.nn.Identity(), *inputs, None, scaling=scaling, document_lengths=lengths
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reference = dense_reference(*exact, lengths, scaling or 8**-0.5)
    grad = torch.randn_like(output)
    assert torch.allclose(output.double(), reference, atol=1e-5)
    ours = torch.autograd.grad(output, inputs, grad)
    theirs = torch.autograd.grad(reference, exact, grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.double(), other, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_bf16_gradients_are_as_good_as_those_of_torch(offset):
    """They are compared with fp64, also for numbers that cancel (an offset of all queries and keys)."""
    torch.manual_seed(0)
    lengths = (130, 200, 64, 300)
    inputs = [
        (torch.randn(1, heads, sum(lengths), 16) + offset).bfloat16().requires_grad_() for heads in (6, 2, 2)
    ]
    grad = torch.randn(1, sum(lengths), 6, 16).bfloat16()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reference = torch.autograd.grad(dense_reference(*exact, lengths, 0.25), exact, grad.double())
    ours, _ = packed_attention.packed_attention(torch.nn.Identity(), *inputs, None, document_lengths=lengths)
    plain = packed_attention.each_document(*inputs, lengths, 0.25).transpose(1, 2)
    errors = [
        [
            ((mine.double() - right).norm() / right.norm()).item()
            for mine, right in zip(torch.autograd.grad(output, inputs, grad), reference, strict=True)
        ]
        for output in (ours, plain)
    ]
    assert all(mine <= 1.3 * theirs for mine, theirs in zip(*errors, strict=True)), errors


def test_short_documents_are_grouped_without_much_padding():
    """Each document is there once, padding is at most a fifth of the longest, and groups fit the limit."""
    lengths = tuple(int(x) for x in torch.randint(1, 300, (60,), generator=torch.Generator().manual_seed(1)))
    groups = packed_attention.similar_lengths(lengths)
    places = sorted(place for group in groups for place in group)
    assert [end - start for start, end in places] == list(lengths)
    assert places[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(places))
    for group in groups:
        sizes = [end - start for start, end in group]
        assert min(sizes) * 5 >= max(sizes) * 4
        assert len(group) * max(sizes) <= packed_attention.GROUP


@pytest.mark.parametrize("other", [{"softcap": 30.0}, {"sliding_window": 3}, {"s_aux": torch.zeros(2)}])
def test_attention_of_another_kind_is_refused(other):
    """Soft caps, sinks and windows shorter than a row are not implemented, so they are refused."""
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="soft cap"):
        packed_attention.packed_attention(None, q, q, q, None, document_lengths=(4,), **other)
    packed_attention.packed_attention(None, q, q, q, None, document_lengths=(4,), sliding_window=4)


def test_attention_refuses_what_it_cannot_do():
    """No document lengths, a mask or two rows give an error, instead of documents that are mixed."""
    q = torch.randn(1, 2, 4, 8)
    for arguments in ({}, {"document_lengths": (4,), "mask": torch.ones(1, 1, 4, 4)}):
        with pytest.raises(ValueError, match="document_lengths"):
            packed_attention.packed_attention(None, q, q, q, arguments.pop("mask", None), **arguments)


@pytest.mark.parametrize("targets", [1, loss.CHUNK - 1, loss.CHUNK, 3 * loss.CHUNK + 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_is_the_full_cross_entropy(targets, bias, trained):
    """Sum, gradients and hits equal those from full logits, for chunk borders and one target."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 700, bias=bias).requires_grad_(trained)
    hidden = torch.randn(targets, 32, requires_grad=True)
    labels = torch.randint(0, 700, (targets,))
    ours, correct = loss.loss_and_correct(hidden, head, labels)
    reference = torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    scale = 1 / targets
    of = [hidden, *head.parameters()] if trained else hidden
    mine, other = (torch.autograd.grad(total * scale, of) for total in (ours, reference))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, other, strict=True))
    assert correct.item() == (head(hidden).argmax(-1) == labels).sum().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_many_half_precision_targets_is_not_rounded(dtype):
    """20,000 targets sum to far more than fp16 holds; the sum and the gradient's scale stay exact."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False).requires_grad_(False).to(dtype)
    hidden = torch.randn(20_000, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, 300, (20_000,))
    ours, _ = loss.loss_and_correct(hidden, head, labels)
    assert ours.dtype == torch.float32
    logits = head(hidden.detach()).double()
    assert ours.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(ours / 997, hidden)
    exact = hidden.detach().double().requires_grad_()
    loss_exact = (
        torch.nn.functional.cross_entropy(exact @ head.weight.double().T, labels, reduction="sum") / 997
    )
    (expected,) = torch.autograd.grad(loss_exact, exact)
    assert gradient.double().norm().item() == pytest.approx(expected.norm().item(), rel=2e-3)


def test_full_logits_never_exist():
    """No tensor as large as [targets, vocabulary] is made in the forward or backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    head = torch.nn.Linear(16, 2000, bias=False).requires_grad_(False)
    hidden = torch.randn(8 * loss.CHUNK, 16, requires_grad=True)
    with Largest():
        loss.loss_and_correct(hidden, head, torch.randint(0, 2000, (8 * loss.CHUNK,)))[0].backward()
    assert largest <= loss.CHUNK * 2000


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_cheap_dropout_is_dropout(p):
    """The share of zeros is p, the others are scaled, and forward and backward use one mask."""
    torch.manual_seed(0)
    dropout = CheapDropout(p)
    x = torch.ones(499, 1001, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    zeros = (y == 0).double().mean().item()
    assert zeros == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()) + 2e-5)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_cheap_dropout_follows_the_seed():
    """The same seed gives the same mask; neighbouring elements are independent."""
    dropout = CheapDropout(0.5)
    x = torch.ones(1 << 16)
    torch.manual_seed(7)
    first = dropout(x)
    torch.manual_seed(7)
    assert torch.equal(dropout(x), first)
    mask = (first != 0).double()
    for distance in (1, 2, 3, 4):
        together = (mask[:-distance] * mask[distance:]).mean().item()
        assert together == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("capability", "builds", "runs"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_75", "sm_80"], True),  # code for the same major and an earlier minor version
        ((7, 0), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_75", "compute_80"], True),  # intermediate code is compiled by the driver
        ((12, 0), ["sm_90a", "sm_120a"], True),
    ],
)
def test_a_card_needs_code_in_the_build(capability, builds, runs):
    """These are CUDA's rules of binary compatibility, as far as they can be checked without a GPU."""
    assert gpus.has_code_for(capability, tuple(builds)) == runs
