"""The recurrence keeps its defining relation, on friendly and on hostile spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndiag.curvature import Operator
from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.lanczos import Lanczos
from tests.oracles.spectra import SPECTRA, counted, matrix_with, of_diagonal, of_matrix, seeded


def run_of(operator: Operator, steps: int, seed: int = 0) -> Lanczos:
    run = Lanczos(operator, gaussian(operator, seeded(seed)))
    for _ in range(steps):
        run.extend()
    return run


def tridiagonal(run: Lanczos) -> Tensor:
    off = torch.tensor(run.couplings[:-1], dtype=torch.float64)
    diagonal = torch.tensor(run.diagonal, dtype=torch.float64)
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def basis_of(run: Lanczos) -> Tensor:
    return run.combine(torch.eye(len(run.diagonal)))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_the_lanczos_relation(name, dtype, rounding):
    """A Qᵀ = Qᵀ T but for the last column, whose norm is the remainder; Q has orthonormal rows."""
    steps = 4 if name == "low rank" else 20
    matrix = matrix_with(SPECTRA[name]).to(dtype)
    run = run_of(of_matrix(matrix, dtype), steps)
    basis, exact = basis_of(run).double(), matrix.double()
    scale = float(np.abs(SPECTRA[name]).max())
    misfit = exact @ basis.T - basis.T @ tridiagonal(run)
    assert misfit[:, :-1].abs().max() < rounding * scale
    assert misfit[:, -1].norm() == pytest.approx(run.couplings[-1], abs=rounding * scale)
    assert (basis @ basis.T - torch.eye(steps)).abs().max() < rounding


def test_no_ghosts_after_a_hundred_steps():
    """Without reorthogonalisation, outliers come back as copies within 30 steps here."""
    spectrum = np.r_[np.linspace(0, 1, 395), 10.0, 20.0, 30.0, 40.0, 50.0]
    values, _ = run_of(of_diagonal(spectrum), 100).ritz()
    assert (values > 5).sum() == 5
    np.testing.assert_allclose(values[-5:], spectrum[-5:], rtol=1e-12)


def test_one_product_a_step():
    operator, calls = counted(of_diagonal(SPECTRA["indefinite"]))
    run = run_of(operator, 7)
    assert run.products == len(calls) == len(run.diagonal) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spectrum", "distinct"),
    [(np.zeros(50), 1), (np.ones(50), 1), (np.r_[np.zeros(49), 4.0], 2), ([1.0, 2.0, 3.0], 3)],
    ids=["zero", "identity", "rank one", "tiny"],
)
def test_exhausted_when_every_distinct_eigenvalue_is_found(spectrum, distinct, dtype):
    operator = of_matrix(matrix_with(spectrum), dtype)
    run = Lanczos(operator, gaussian(operator, seeded(0)))
    for _ in range(distinct):
        assert not run.diagonal or not run.exhausted
        run.extend()
    assert run.exhausted
    np.testing.assert_allclose(run.ritz()[0], np.unique(spectrum), atol=1e-5)


def test_a_restart_explores_the_complement():
    spectrum = np.r_[np.zeros(5), 3.0, 3.0]
    run = run_of(of_matrix(matrix_with(spectrum)), 2)
    assert run.exhausted
    run = Lanczos(of_matrix(matrix_with(spectrum)), torch.ones(7).double())
    while len(run.diagonal) < 7:
        run.extend()
        if run.exhausted and not run.complete:
            run.restart(torch.randn(7, generator=seeded(len(run.diagonal)), dtype=torch.float64))
    np.testing.assert_allclose(run.ritz()[0], spectrum, atol=1e-14)
    basis = basis_of(run)
    assert (basis @ basis.T - torch.eye(7)).abs().max() < 1e-14
    assert run.complete


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_leaves_what_was_known(bad):
    operator, calls = counted(of_diagonal(np.arange(1.0, 11.0)))
    inner = operator.product
    spoilt = Operator(
        lambda v: inner(v) if len(calls) < 4 else inner(v).fill_(bad),
        10,
        torch.float64,
        operator.device,
    )
    run = Lanczos(spoilt, gaussian(spoilt, seeded(0)))
    for _ in range(5):
        run.extend()
    assert not run.finite
    assert len(run.diagonal) == len(run.couplings) == 4
    assert run.products == 5
    assert np.isfinite(run.ritz()[0]).all()
