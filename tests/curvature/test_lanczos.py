"""The recurrence keeps its defining relation, on friendly and on hostile spectra."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndiag.curvature import Operator
from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.lanczos import Lanczos, _full_precision
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
    return run.combine(torch.eye(len(run)))


def outermost(count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.arange(len(values))[-count:]


def restarted_run_of(
    operator: Operator, steps: int, rows: int, kept: Callable[[np.ndarray], np.ndarray]
) -> Lanczos:
    """A thick restart wherever the next product would take more rows."""
    run = Lanczos(operator, gaussian(operator, seeded(0)), rows)
    for _ in range(steps):
        if len(run) + 2 > rows:
            run.compress(kept(run.ritz()[0]))
        run.extend()
    return run


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
    while len(run) < 7:
        run.extend()
        if run.exhausted and not run.complete:
            run.restart(torch.randn(7, generator=seeded(len(run)), dtype=torch.float64))
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


class TestThickRestart:
    @pytest.mark.parametrize("name", [name for name in SPECTRA if name != "low rank"])
    @pytest.mark.parametrize(
        ("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["f64", "f32"]
    )
    def test_the_pairs_keep_their_residuals(self, name, dtype, rounding):
        """A y − θ y is s q with one q for all pairs, after a dozen restarts too."""
        matrix = matrix_with(SPECTRA[name]).to(dtype)
        run = restarted_run_of(of_matrix(matrix, dtype), 60, 8, outermost(3))
        values, vectors = run.ritz()
        ritz_vectors = run.combine(torch.from_numpy(vectors.T)).double()
        scale = float(np.abs(SPECTRA[name]).max())
        misfit = ritz_vectors @ matrix.double() - torch.from_numpy(values)[:, None] * ritz_vectors
        np.testing.assert_allclose(misfit.norm(dim=1), run.residuals(), atol=rounding * scale)
        gram = ritz_vectors @ ritz_vectors.T
        assert (gram - torch.eye(len(gram))).abs().max() < 2 * rounding
        assert torch.linalg.svdvals(misfit)[1] < rounding * scale

    @pytest.mark.parametrize("at", [2, 9])
    def test_one_that_keeps_everything_changes_nothing(self, at):
        operator = of_diagonal(SPECTRA["indefinite"])
        plain, restarted = run_of(operator, at), run_of(operator, at)
        restarted.compress(np.arange(at))
        for _ in range(12):
            for run in (plain, restarted):
                run.extend()
            np.testing.assert_allclose(restarted.ritz()[0], plain.ritz()[0], atol=1e-13)
            np.testing.assert_allclose(restarted.residuals(), plain.residuals(), atol=1e-12)

    def test_a_dozen_vectors_find_what_forty_do(self):
        spectrum = np.r_[np.linspace(0, 1, 395), 1.2, 1.3, 1.4, 1.5, 1.6]
        run = restarted_run_of(of_diagonal(spectrum), 100, 12, outermost(7))
        np.testing.assert_allclose(run.ritz()[0][-5:], spectrum[-5:], rtol=1e-12)

    @pytest.mark.parametrize("rows", [5, 16, 17, 21])
    def test_no_row_more_than_allowed(self, rows):
        operator = of_diagonal(SPECTRA["indefinite"])
        run = restarted_run_of(operator, 60, rows, outermost(2))
        assert sum(map(len, run._blocks)) == rows

    def test_wide_vectors_are_mixed_in_parts(self):
        """More columns than a change of basis takes at once."""
        operator = of_diagonal(np.linspace(0, 1, 150_000) ** 8)
        run = run_of(operator, 6)
        before = run.combine(torch.from_numpy(run.ritz()[1].T.copy()))
        run.compress(np.array([0, 3, 5]))
        torch.testing.assert_close(basis_of(run), before[[0, 3, 5]])

    def test_what_is_discarded_stays_known(self):
        run = run_of(of_diagonal(SPECTRA["cluster"]), 6)
        values, _ = run.ritz()
        run.compress(np.array([1, 4, 5]))
        assert run.discarded == values[[0, 2, 3]].tolist()
        assert len(run) == 3
        np.testing.assert_allclose(run.ritz()[0], values[[1, 4, 5]])

    def test_of_an_exhausted_space(self):
        """Closed rows and the segment's own are compressed side by side."""
        spectrum = np.r_[np.zeros(5), 1.0, 2.0, 3.0, 3.0]
        operator = of_matrix(matrix_with(spectrum))
        run = run_of(operator, 4)
        assert run.exhausted
        run.compress(np.array([1, 3]))
        np.testing.assert_allclose(run.ritz()[0], [1, 3], atol=1e-14)
        run.restart(gaussian(operator, seeded(1)))
        assert run.segment == 2
        while True:
            run.extend()
            if run.exhausted:
                break
        run.compress(np.arange(len(run))[-3:])
        np.testing.assert_allclose(run.ritz()[0], [2, 3, 3], atol=1e-13)
        np.testing.assert_allclose(run.residuals(), 0, atol=1e-13)
        basis = basis_of(run)
        assert (basis @ basis.T - torch.eye(3)).abs().max() < 1e-13


def test_our_own_products_are_in_full_precision_and_the_settings_come_back():
    """A training loop may allow itself TF32: a Ritz vector combined in it is off by 1e-3."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = getattr(matmul, name)
        with _full_precision():
            assert getattr(matmul, name) in ("ieee", False)
        assert getattr(matmul, name) == allowed not in ("ieee", False)
        assert torch.get_float32_matmul_precision() == "medium"
        basis = basis_of(run_of(of_diagonal(SPECTRA["indefinite"], torch.float32), 5))
    finally:
        torch.set_float32_matmul_precision(before)
    assert (basis @ basis.T - torch.eye(5)).abs().max() < 1e-6
