"""Hutchinson's estimator: unbiased, and its standard error is the error it makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from dyndiag.curvature import Operator, Outcome, trace
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import counted, matrix_with, of_diagonal, of_matrix, seeded

OUTLIERS = np.r_[[20, 15, 12, 10, 8], np.linspace(-0.5, 0.5, 115)]


def test_two_by_two():
    """H = [[2, 1], [1, 3]]: a probe says 5 ± 2, so the variance of one is 4."""
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    found = trace(of_matrix(matrix, torch.float32), relative_error=1e-9, max_products=2000)
    assert found.value == pytest.approx(5.0, abs=4 * 2 / math.sqrt(2000))
    assert found.standard_error == pytest.approx(2 / math.sqrt(2000), rel=0.02)


def test_two_probes():
    """Samples 5 ± 2: equal, or 4 apart, which is a standard error of 4/√2/√2."""
    operator = of_matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    errors = {
        round(trace(operator, max_products=2, generator=seeded(s)).standard_error, 12)
        for s in range(20)
    }
    assert errors == {0.0, 2.0}


def test_a_diagonal_is_exact_from_the_first_look():
    found = trace(of_diagonal(OUTLIERS), relative_error=1e-12)
    assert found.converged
    assert found.products == 6
    assert found.value == pytest.approx(OUTLIERS.sum(), rel=1e-12)


@pytest.mark.parametrize("probes", [8, 32])
def test_standard_error_is_calibrated(probes):
    operator, exact = of_matrix(matrix_with(OUTLIERS)), OUTLIERS.sum()
    z, covered, errors = [], 0, []
    for seed in range(500):
        found = trace(operator, relative_error=1e-9, max_products=probes, generator=seeded(seed))
        z.append(abs(found.value - exact) / found.standard_error)
        low, high = found.interval(0.95)
        covered += low <= exact <= high
        errors.append(found.value - exact)
    # Normal: 68 %, 95 %. Student's t takes care of the few probes, skew costs 2 or 3 % more.
    assert binom.ppf(1e-5, 500, 0.92) <= covered <= binom.ppf(1 - 1e-5, 500, 0.95)
    assert 0.55 <= np.mean(np.array(z) <= 1) <= 0.76
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(500)
    variance = 2 * (np.sum(OUTLIERS**2) - float(matrix_with(OUTLIERS).diagonal().square().sum()))
    assert np.std(errors) == pytest.approx(math.sqrt(variance / probes), rel=0.13)


def test_stopping_early_keeps_the_error_that_was_asked_for():
    operator, exact = of_matrix(matrix_with(OUTLIERS)), OUTLIERS.sum()
    errors = []
    for seed in range(200):
        found = trace(operator, relative_error=0.2, max_products=500, generator=seeded(seed))
        assert found.converged
        assert found.standard_error <= 0.2 * found.value
        errors.append(found.value / exact - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 0.2 * 1.35


def test_around_zero_it_spends_its_budget_and_says_so():
    balanced = np.r_[np.linspace(-1, -0.1, 50), np.linspace(0.1, 1, 50)]
    found = trace(of_matrix(matrix_with(balanced)), max_products=40)
    assert found.outcome is Outcome.BUDGET_SPENT
    assert not found.converged
    assert found.products == 40
    assert abs(found.value) < 4 * found.standard_error


def test_the_zero_operator_converges():
    found = trace(of_diagonal(np.zeros(9)))
    assert found.converged
    assert (found.value, found.standard_error) == (0.0, 0.0)


def test_the_stated_cost_is_the_cost_paid():
    operator, calls = counted(of_matrix(matrix_with(OUTLIERS)))
    found = trace(operator, relative_error=0.02)
    assert found.products == len(calls) > 6


def test_one_probe_has_no_standard_error():
    found = trace(of_matrix(matrix_with(OUTLIERS)), max_products=1)
    assert math.isnan(found.standard_error)
    assert found.interval() == (-math.inf, math.inf)
    assert not found.converged


def test_a_product_that_is_not_finite_ends_it():
    operator = Operator(lambda v: v * math.nan, 5, torch.float32, torch.device("cpu"))
    found = trace(operator)
    assert found.outcome is Outcome.NOT_FINITE
    assert math.isnan(found.value)
    assert found.products == 1


def test_the_same_answer_at_every_call_and_no_global_stream():
    before = torch.get_rng_state()
    operator = of_matrix(matrix_with(OUTLIERS))
    assert trace(operator) == trace(operator)
    assert trace(operator) != trace(operator, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_at_the_door():
    with pytest.raises(DyndiagError, match=r"at least 1 and relative_error above 0.* 0 and 0.05"):
        trace(of_diagonal([1.0]), max_products=0)
