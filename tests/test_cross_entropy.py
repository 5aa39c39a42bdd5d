"""Chunked next-token loss: its value and gradients are those of the whole logits, which never exist."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.losses.cross_entropy import linear_cross_entropy

N, D, V = 50, 12, 300


def inputs():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_()
    return features, weight, torch.randint(V, (N,), generator=g)


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 64])
def test_value_and_gradients_are_those_of_the_whole_logits(chunk):
    features, weight, targets = inputs()
    loss = linear_cross_entropy(features, weight, targets, chunk=chunk)
    exact_inputs = [t.detach().double().requires_grad_() for t in (features, weight)]
    exact = F.cross_entropy(exact_inputs[0] @ exact_inputs[1].T, targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(3 * loss, (features, weight))
    for a, b in zip(ours, torch.autograd.grad(3 * exact, exact_inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)


def test_uniform_logits_cost_log_v():
    features, weight, targets = inputs()
    loss = linear_cross_entropy(features, torch.zeros_like(weight), targets, chunk=8)
    assert loss.item() == pytest.approx(torch.tensor(float(V)).log().item(), rel=1e-6)


class _Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_logits_never_exist_whole_forward_or_backward():
    features, weight, targets = inputs()
    with _Largest() as largest:
        linear_cross_entropy(features, weight, targets, chunk=10).backward()
    assert 10 * V <= largest.elements < N * V
    with _Largest() as whole:
        linear_cross_entropy(features, weight, targets, chunk=N).backward()
    assert whole.elements >= N * V  # the measure sees what it is meant to see
