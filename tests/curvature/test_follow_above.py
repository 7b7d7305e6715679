"""All eigenvalues above a level, followed, against dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from dyndiag.curvature import Operator
from dyndiag.curvature.follow_above import FollowerAbove
from dyndiag.errors import DyndiagError
from tests.curvature.test_follow import SPREAD, hessian_of, squared_error
from tests.oracles.spectra import counted, dense, matrix_with, of_diagonal, of_matrix, seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_all_above_a_level_while_the_matrix_drifts(dtype: torch.dtype) -> None:
    """Ten outliers, two of them equal; one sinks below the level on the way."""
    spectrum = np.r_[np.linspace(-0.5, 1, 190), 2.5, 3.0, 3.5, 4.0, 4.3, 4.6, 4.8, 4.9, 5.0, 5.0]
    matrix, other = matrix_with(spectrum), matrix_with(spectrum, seed=1)
    follower, provisional, counts = FollowerAbove(seeded(0)), 0, set()
    for t in np.linspace(0, 0.1, 13):
        moved = (1 - t) * matrix + t * other
        operator, calls = counted(of_matrix(moved, dtype))
        found = follower.above(operator, 3.2)
        exact = torch.linalg.eigvalsh(moved).flip(0)
        count = int((exact > 3.2).sum())
        assert len(calls) == found.products
        assert len(found.values) == count and found.all_of_them
        assert torch.allclose(found.values, exact[:count], rtol=1e-3)
        vectors = found.vectors.double()
        misfits = (vectors @ moved - found.values[:, None] * vectors).norm(dim=1)
        assert (misfits <= found.error_bounds).all()
        assert torch.allclose(vectors @ vectors.T, torch.eye(count).double(), atol=1e-5)
        assert found.converged is not found.provisional
        if found.provisional:
            provisional += 1
            assert found.products <= count + 6
        counts.add(count)
    assert provisional >= 10 and counts == {7, 8}


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_scale_does_not_matter_even_where_float32_holds_no_squares(scale: float) -> None:
    spectrum = np.r_[np.linspace(-0.5, 1, 190), 2.5, 3.0, 3.5, 4.0, 4.3, 4.6, 4.8, 4.9, 5.0, 5.0]
    matrix, other = matrix_with(spectrum), matrix_with(spectrum, seed=1)
    small, plain = FollowerAbove(seeded(0)), FollowerAbove(seeded(0))
    for t in np.linspace(0, 0.05, 4):
        moved = (1 - t) * matrix + t * other
        found = small.above(of_matrix(scale * moved, torch.float32), 3.2 * scale)
        expected = plain.above(of_matrix(moved, torch.float32), 3.2)
        assert (found.products, found.converged) == (expected.products, expected.converged)
        assert found.values.numpy() == pytest.approx(scale * expected.values.numpy(), rel=1e-5)


def test_several_reach_the_edge_of_a_training_run() -> None:
    """Full-batch descent: every eigenvalue above three quarters of 2/η, against the dense truth."""
    follower, most, threshold = FollowerAbove(seeded(0)), 0, 2 / 0.9
    for operator, spectrum in training_spectra(40, 20):
        found = follower.above(operator, 0.75 * threshold)
        exact = spectrum[spectrum > 0.75 * threshold]
        sure = int((spectrum > 0.76 * threshold).sum())
        assert sure <= len(found.values) <= len(exact)
        assert found.values.numpy() == pytest.approx(exact[: len(found.values)], rel=2e-3)
        most = max(most, len(exact))
    assert most >= 2


def training_spectra(samples: int, every: int) -> Iterator[tuple[Operator, np.ndarray]]:
    """The float32 Hessian along full-batch descent, with its exact spectrum, descending."""
    generator = seeded(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    x = torch.randn(40, 4, generator=generator)
    batch = (x, torch.sin(3 * x[:, :3]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    for step in range(samples * every):
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()
        if step % every == 0:
            exact = copy.deepcopy(model).double()
            truth = dense(hessian_of(exact, (batch[0].double(), batch[1].double())))
            yield hessian_of(model, batch), torch.linalg.eigvalsh(truth).flip(0).numpy()


def test_more_than_asked_for_is_said() -> None:
    found = FollowerAbove(seeded(0)).above(of_matrix(matrix_with(SPREAD)), 2.2, most=4)
    assert len(found.values) == 4 and not found.all_of_them
    assert not found.converged and not found.provisional
    assert found.values.numpy() == pytest.approx([5, 4.9, 4, 3.5], rel=1e-2)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_above_of_small_and_degenerate(size: int) -> None:
    follower = FollowerAbove(seeded(0))
    for spectrum in (np.arange(size) - 1.0, np.ones(size), np.zeros(size), np.full(size, np.nan)):
        for _ in range(2):
            operator, calls = counted(of_diagonal(spectrum))
            found = follower.above(operator, 0.5)
            assert found.products == len(calls)
            assert len(found.values) == (spectrum > 0.5).sum()
            assert found.converged is bool(np.isfinite(spectrum).all())


def test_above_needs_a_level() -> None:
    with pytest.raises(DyndiagError, match="finite level"):
        FollowerAbove(seeded(0)).above(of_matrix(matrix_with(SPREAD)), np.nan)
