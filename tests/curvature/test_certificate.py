"""The certificate holds at its stated risk, on spectra built against it, and is not timid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev
from scipy.stats import binom

from dyndiag.curvature import eigenpairs
from dyndiag.curvature.certificate import effective_size, excludes, needed, reach
from dyndiag.curvature.lanczos import Lanczos
from tests.oracles.spectra import of_diagonal, seeded

SPECTRUM = np.r_[np.linspace(-1, 1, 28), 1.6, 2.0]


def run_of(spectrum: np.ndarray, start: torch.Tensor, steps: int) -> Lanczos:
    run = Lanczos(of_diagonal(spectrum), start)
    for _ in range(steps):
        run.extend()
    return run


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("x", [-1.4, 0.31, 1.8, 2.02, 2.5, 9.0])
def test_k_is_the_christoffel_function(steps, x):
    """1/K_m(x) = min ∫ q² dμ over polynomials of degree ≤ m with q(x) = 1, by least squares."""
    start = torch.randn(30, generator=seeded(1), dtype=torch.float64)
    run = run_of(SPECTRUM, start, steps)
    weights = (start / start.norm()).numpy() ** 2
    columns = chebyshev.chebvander((SPECTRUM - 0.5) / 1.5, steps)
    at_x = chebyshev.chebvander(np.array([(x - 0.5) / 1.5]), steps)[0]
    k = at_x @ np.linalg.solve(columns.T @ (weights[:, None] * columns), at_x)
    for factor, excluded in ((1 - 1e-6, True), (1 + 1e-6, False)):
        found = excludes(run.diagonal, run.couplings, np.array([x]), k * factor)
        assert found.item() is excluded


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_reach_is_where_the_need_is_met(steps, sign):
    run = run_of(SPECTRUM, torch.randn(30, generator=seeded(2), dtype=torch.float64), steps)
    value = run.ritz()[0][-1 if sign > 0 else 0]
    x = reach(run.diagonal, run.couplings, value, 1e6, sign)
    distance = x - value
    assert sign * distance > 0
    around = value + distance * np.array([1 - 1e-5, 1.0])
    assert excludes(run.diagonal, run.couplings, around, 1e6).tolist() == [False, True]


def test_nothing_lies_beyond_an_exhausted_space():
    run = run_of(np.r_[np.zeros(4), 2.0, 3.0], torch.ones(6).double(), 3)
    assert reach(run.diagonal, run.couplings, 3.0, 1e12, 1) == pytest.approx(3.0, rel=1e-9)
    run.couplings[-1] = 0.0
    points = np.array([2.0 + 1e-9, 3.0 + 1e-9, -7.0])
    assert excludes(run.diagonal, run.couplings, points, 1e300).all()
    zero = run_of(np.zeros(3), torch.ones(3).double(), 1)
    assert reach(zero.diagonal, zero.couplings, 0.0, 1e12, 1) == 0.0


@pytest.mark.parametrize("size", [2, 5, 200])
@pytest.mark.parametrize("fixed", [0.0, 1.0, 3.0])
def test_few_starts_weigh_less_than_the_need_allows_for(size, fixed):
    """P(w ≤ 1/needed) ≤ risk, for the worst fixed part: one orthogonal to u."""
    risk, draws = 0.1, 40_000
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(draws, size)) / np.sqrt(size)
    starts[:, 1] += fixed
    weight = starts[:, 0] ** 2 / (starts**2).sum(axis=1)
    light = int((weight <= 1 / needed(effective_size(size, fixed), risk)).sum())
    assert light <= binom.ppf(1 - 1e-6, draws, risk)
    if size > 5:
        assert light >= binom.ppf(1e-6, draws, 0.9 * risk)  # and hardly fewer


ADVERSARIAL = {
    "cluster below the top": np.r_[np.linspace(0.99, 1.0, 50), np.linspace(-0.2, 0.2, 400), 1.06],
    "outlier hidden behind a bulk": np.r_[np.linspace(-1, 1, 300), 1.3],
    "pair": np.r_[np.linspace(0, 1, 118), 4.9, 5.0],
}


@pytest.mark.parametrize(
    ("name", "risk", "warm", "starts"),
    [
        ("cluster below the top", 0.3, True, 1000),
        ("cluster below the top", 0.01, True, 1000),
        ("outlier hidden behind a bulk", 0.1, False, 800),
        ("outlier hidden behind a bulk", 0.3, True, 600),
        ("pair", 0.3, False, 800),
    ],
)
def test_the_top_is_missed_no_more_often_than_the_risk(name, risk, warm, starts):
    """The run stops by the certificate alone; a warm start is the wrong eigenvector, exactly."""
    spectrum = ADVERSARIAL[name]
    operator, top = of_diagonal(spectrum), spectrum.max()
    start = None
    if warm:
        start = torch.zeros(len(spectrum)).double()
        start[int(np.argsort(spectrum)[-2])] = 1
    generator = seeded(0)
    beyond_bound = beyond_width = 0
    for _ in range(starts):
        found = eigenpairs(
            operator,
            start=start,
            relative_tolerance=10.0,
            certificate_width=0.05,
            risk=risk,
            generator=generator,
        )
        assert found.converged
        assert found.values[0] < found.upper_bound <= 1.05 * found.values[0] * (1 + 1e-8)
        beyond_bound += top > found.upper_bound
        beyond_width += top > 1.05 * found.values[0]
    assert beyond_width <= beyond_bound <= binom.ppf(1 - 1e-5, starts, risk)
    assert beyond_bound >= binom.ppf(1e-5, starts, 0.6 * risk)  # a bound so loose proves nothing
