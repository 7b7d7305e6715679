"""The diagonal and the Frobenius norm: unbiased, and wrong by what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dyndiag.curvature import Operator, Outcome, spectral_density, trace
from dyndiag.curvature.diagonal import diagonal
from dyndiag.curvature.frobenius import frobenius_norm
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import SPECTRA, counted, matrix_with, of_diagonal, of_matrix, seeded

BOTH = pytest.mark.parametrize("estimate", [diagonal, frobenius_norm])
NOT_FINITE = Operator(lambda v: v * math.nan, 150, torch.float32, torch.device("cpu"))


def test_each_entry_and_its_error():
    """Variance of entry i: Σ_{j≠i} Aᵢⱼ², over the probes."""
    matrix = matrix_with(SPECTRA["indefinite"])
    exact = matrix.diagonal().numpy()
    spread = np.sqrt((matrix.square().sum(1) - matrix.diagonal().square()).numpy() / 20)
    found = [
        diagonal(of_matrix(matrix), relative_error=1e-9, max_products=20, generator=seeded(s))
        for s in range(100)
    ]
    values = np.array([f.value.numpy() for f in found])
    assert np.all(np.abs(values.mean(0) - exact) < 4.5 * spread / math.sqrt(100))
    np.testing.assert_allclose(values.std(0), spread, rtol=0.35)
    said = np.sqrt(np.mean([f.standard_error.numpy() ** 2 for f in found], axis=0))
    np.testing.assert_allclose(said, spread, rtol=0.12)


def test_the_norm_and_its_error():
    exact = np.linalg.norm(SPECTRA["indefinite"])
    found = [
        frobenius_norm(
            of_matrix(matrix_with(SPECTRA["indefinite"])),
            relative_error=1e-9,
            max_products=20,
            generator=seeded(s),
        )
        for s in range(100)
    ]
    squares = np.array([f.value**2 for f in found])
    assert squares.mean() == pytest.approx(exact**2, abs=4 * squares.std() / 10)
    said = np.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert said == pytest.approx(np.std([f.value for f in found]), rel=0.3)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@BOTH
def test_scale_does_not_matter_even_where_float32_holds_no_squares(estimate, scale):
    matrix = matrix_with(SPECTRA["indefinite"])
    plain = estimate(of_matrix(matrix, torch.float32), max_products=20)
    found = estimate(of_matrix(scale * matrix, torch.float32), max_products=20)
    assert (found.products, found.outcome) == (plain.products, plain.outcome)
    for name in ("value", "standard_error"):
        expected = scale * np.asarray(getattr(plain, name), dtype=float)
        assert np.all(expected > 0) or name == "value"
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4)


@pytest.mark.parametrize("estimate", [diagonal, frobenius_norm, trace, spectral_density])
def test_what_is_no_operator(estimate):
    with pytest.raises(DyndiagError, match=r"an operator is needed.*a Linear came"):
        estimate(torch.nn.Linear(2, 2))


def test_they_stop_at_the_error_asked_for():
    operator = of_matrix(matrix_with(np.linspace(1, 2, 400)))
    entries = diagonal(operator, relative_error=0.1)
    assert entries.converged and 6 <= entries.products < 100
    assert entries.standard_error.norm() <= 0.1 * entries.value.norm()
    norm = frobenius_norm(operator, relative_error=0.02)
    assert norm.converged and norm.standard_error <= 0.02 * norm.value
    assert norm.value == pytest.approx(np.linalg.norm(np.linspace(1, 2, 400)), rel=0.08)


@BOTH
def test_a_small_matrix_is_exact(estimate):
    matrix = matrix_with(SPECTRA["saddle"])
    operator, calls = counted(of_matrix(matrix))
    found = estimate(operator, max_products=120)
    assert found.converged and found.products == len(calls) == 120
    exact = matrix.diagonal() if estimate is diagonal else matrix.norm()
    torch.testing.assert_close(torch.as_tensor(found.value).double(), exact)
    assert torch.as_tensor(found.standard_error).abs().max() == 0


@BOTH
def test_the_budget_and_the_cost(estimate):
    operator, calls = counted(of_matrix(matrix_with(SPECTRA["saddle"])))
    found = estimate(operator, relative_error=1e-9, max_products=11)
    assert (found.outcome, found.products, len(calls)) == (Outcome.BUDGET_SPENT, 11, 11)
    single = estimate(operator, max_products=1)
    assert torch.as_tensor(single.standard_error).isnan().all()


@BOTH
def test_zero_and_what_is_not_finite(estimate):
    zero = estimate(of_diagonal(np.zeros(150)))
    assert zero.converged and zero.products == 6
    assert torch.as_tensor(zero.value).abs().max() == 0
    assert estimate(NOT_FINITE).outcome is Outcome.NOT_FINITE
    small = Operator(lambda v: v * math.nan, 5, torch.float32, torch.device("cpu"))
    assert estimate(small).outcome is Outcome.NOT_FINITE


@BOTH
def test_the_same_answer_at_every_call_and_no_global_stream(estimate):
    before = torch.get_rng_state()
    operator = of_matrix(matrix_with(SPECTRA["saddle"]))
    one, other = (torch.as_tensor(estimate(operator, max_products=20).value) for _ in range(2))
    assert torch.equal(one, other)
    another = estimate(operator, max_products=20, generator=seeded(1)).value
    assert not torch.equal(one, torch.as_tensor(another))
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_at_the_door(estimate):
    with pytest.raises(DyndiagError, match="at least 1 and relative_error above 0"):
        estimate(of_diagonal([1.0]), max_products=0)
