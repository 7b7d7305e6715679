"""Coherence of the examples' Gauss–Newton matrices against dense Jacobians."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature.coherence import coherence
from dyndiag.errors import DyndiagError

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def squared(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].argmax(1))


def dense(model: nn.Module, blocks: Tensor) -> tuple[float, float]:
    """σ and λ₁ of the mean from Hᵢ = JᵢᵀBᵢJᵢ, each written out."""
    weights = dict(model.named_parameters())
    of = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (X,)))(weights)
    jacobians = torch.cat([j.detach().flatten(2) for j in of.values()], 2)
    h = jacobians.transpose(1, 2) @ blocks @ jacobians
    c = torch.einsum("aij,bij->ab", h, h).sqrt()
    largest = torch.linalg.eigvalsh(h)[:, -1].max()
    return float(torch.linalg.eigvalsh(c)[-1] / largest), float(
        torch.linalg.eigvalsh(h.mean(0))[-1]
    )


def test_against_matrices_that_are_written_out() -> None:
    model = net()
    labels = torch.randn(12, 3, dtype=torch.float64)
    p = model(X).softmax(1).detach()
    blocks = {
        squared: torch.eye(3, dtype=torch.float64).expand(12, 3, 3),
        cross_entropy: torch.diag_embed(p) - p[:, :, None] * p[:, None],
    }
    loader: DataLoader[Any] = DataLoader(TensorDataset(X, labels), batch_size=5)
    for loss_fn, block in blocks.items():
        sigma, top = dense(model, block)
        for data in ((X, labels), loader):
            found = coherence(model, loss_fn, data)
            assert found.value == pytest.approx(sigma, rel=1e-6)
            assert found.sharpness == pytest.approx(top, rel=1e-3)
            assert found.examples == 12


def test_the_same_example_many_times_over() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    found = coherence(model, squared, (X[:1].expand(9, 4), torch.zeros(9, 1)))
    assert found.value == pytest.approx(9.0)
    assert found.sharpness == pytest.approx(float(X[0] @ X[0]), rel=1e-3)
    found = coherence(model, squared, (3 * torch.eye(4).double(), torch.zeros(4, 1)))
    assert found.value == pytest.approx(1.0)


def test_what_has_no_coherence() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    with pytest.raises(DyndiagError, match="at most 500"):
        coherence(model, squared, (torch.zeros(501, 4).double(), torch.zeros(501, 1)))
    with pytest.raises(DyndiagError, match="no example has any curvature"):
        coherence(model, lambda m, b: m(b).mean(), X)
    with pytest.raises(DyndiagError, match="not convex"):
        coherence(model, lambda m, b: m(b).cos().mean(), 0.1 * X)


def test_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stream = torch.get_rng_state()
    coherence(model, squared, (X, torch.zeros(12, 3)))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert math.isfinite(coherence(model, squared, (X, torch.zeros(12, 3))).value)
