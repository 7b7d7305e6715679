"""The certificate holds at its stated risk, on spectra built against it, and is not timid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev
from scipy.stats import binom

from dyndiag.curvature import eigenpairs
from dyndiag.curvature.certificate import (
    Christoffel,
    effective_size,
    excludes,
    excludes_between,
    needed,
    reach,
)
from dyndiag.curvature.lanczos import Lanczos
from tests.oracles.spectra import of_diagonal, seeded

SPECTRUM = np.r_[np.linspace(-1, 1, 28), 1.6, 2.0]


def run_of(spectrum: np.ndarray, start: torch.Tensor, steps: int) -> Lanczos:
    run = Lanczos(of_diagonal(spectrum), start)
    for _ in range(steps):
        run.extend()
    return run


def restarted(
    spectrum: np.ndarray, start: torch.Tensor, steps: int, rows: int = 8, kept: int = 3
) -> tuple[Lanczos, list[Christoffel]]:
    """A run that goes on from its `kept` largest pairs whenever it has `rows` vectors."""
    run, past = Lanczos(of_diagonal(spectrum), start), []
    for _ in range(steps):
        if len(run) + 2 > rows:
            past.append(Christoffel.of(run))
            run.compress(np.arange(len(run))[-kept:])
        run.extend()
    return run, [*past, Christoffel.of(run)]


def log_k(moment: Christoffel, x: float) -> float:
    return float(np.logaddexp.reduce(moment.log_parts(np.array([x])))[0])


def normal(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=seeded(seed), dtype=torch.float64)


class TestK:
    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    @pytest.mark.parametrize("x", [-1.4, 0.31, 1.8, 2.02, 2.5, 9.0])
    def test_is_one_over_the_christoffel_function(self, steps, x):
        """1/K(x) = min ∫ q² dμ over polynomials of degree ≤ m with q(x) = 1, by least squares."""
        start = normal(30, 1)
        moment = Christoffel.of(run_of(SPECTRUM, start, steps))
        weights = (start / start.norm()).numpy() ** 2
        columns = chebyshev.chebvander((SPECTRUM - 0.5) / 1.5, steps)
        at_x = chebyshev.chebvander(np.array([(x - 0.5) / 1.5]), steps)[0]
        k = at_x @ np.linalg.solve(columns.T @ (weights[:, None] * columns), at_x)
        for factor, excluded in ((1 - 1e-6, True), (1 + 1e-6, False)):
            assert excludes([moment], np.array([x]), k * factor).item() is excluded

    @pytest.mark.parametrize("steps", [3, 7, 8, 15, 30])
    @pytest.mark.parametrize("kept", [1, 3, 5])
    def test_is_what_an_eigenvector_shows_of_itself_through_any_restart(self, steps, kept):
        """(uᵀv)² K(λ) = |the basis' part of u|²: measured on the vectors themselves."""
        start = normal(30, 3)
        run, moments = restarted(SPECTRUM, start, steps, kept=kept)
        direction = run._row(len(run))[None]
        basis = torch.cat((run.combine(torch.eye(len(run))), direction)).numpy()
        weights = (start / start.norm()).numpy() ** 2
        for i in np.flatnonzero(np.abs(SPECTRUM[:, None] - moments[-1].roots).min(axis=1) > 1e-4):
            shown = np.log((basis[:, i] ** 2).sum() / weights[i])
            assert log_k(moments[-1], SPECTRUM[i]) == pytest.approx(shown, abs=1e-5)

    def test_does_not_notice_a_restart_that_keeps_everything(self):
        start = normal(30, 4)
        plain, again = run_of(SPECTRUM, start, 6), run_of(SPECTRUM, start, 6)
        again.compress(np.arange(6))
        for _ in range(5):
            plain.extend()
            again.extend()
            for x in (-1.3, 0.123, 1.7, 2.2):
                one, other = log_k(Christoffel.of(plain), x), log_k(Christoffel.of(again), x)
                assert other == pytest.approx(one, abs=1e-9)

    def test_grows_where_float64_would_overflow(self):
        _, moments = restarted(SPECTRUM, normal(30, 5), 24)
        assert log_k(moments[-1], 1e30) > 2000
        assert excludes(moments, np.array([1e30, -1e30, 1e300]), 1e300).all()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_grows_beyond_every_root(self, sign):
        for seed in range(20):
            _, moments = restarted(SPECTRUM, normal(30, seed), 20, kept=1 + seed % 5)
            beyond = sign * (sign * moments[-1].roots).max() + sign * np.geomspace(1e-6, 1e3, 200)
            parts = moments[-1].log_parts(beyond)
            assert (np.diff(parts, axis=1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 25),
    st.floats(-1.5, 2.2),
    st.floats(0.001, 1.0),
    st.floats(1, 25),
)
def test_between_two_points_it_excludes_only_what_it_excludes_everywhere(
    seed, steps, low, width, log_need
):
    _, moments = restarted(SPECTRUM, normal(30, seed), steps)
    points, need = np.linspace(low, low + width, 9), np.exp(log_need)
    claimed = excludes_between(moments, points, need)
    for left, right in zip(points[:-1][claimed], points[1:][claimed], strict=True):
        assert excludes(moments, np.linspace(left, right, 101), need * (1 - 1e-9)).all()


def test_between_two_points_it_is_not_timid():
    moments = [Christoffel.of(run_of(SPECTRUM, normal(30, 6), 14))]
    assert excludes_between(moments, np.linspace(1.65, 1.95, 9), 1e4).all()


class TestReach:
    @pytest.mark.parametrize("steps", [1, 2, 5, 9, 13])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_is_where_the_need_is_met(self, steps, sign):
        _, moments = restarted(SPECTRUM, normal(30, 2), steps)
        x = reach(moments, 1e6, sign)
        distance = x - sign * (sign * moments[-1].roots).max()
        assert sign * distance > 0
        around = x - distance * np.array([1e-5, 0.0])
        assert excludes(moments, around, 1e6).tolist() == [False, True]

    def test_nothing_lies_beyond_an_exhausted_space(self):
        run = run_of(np.r_[np.zeros(4), 2.0, 3.0], torch.ones(6).double(), 3)
        moment = Christoffel.of(run)
        assert reach([moment], 1e12, 1) == pytest.approx(3.0, rel=1e-9)
        zero = Christoffel.of(run_of(np.zeros(3), torch.ones(3).double(), 1))
        assert reach([zero], 1e12, 1) == 0.0
        ones = Christoffel.of(run_of(np.ones(3), torch.eye(3)[0].double(), 1))  # coupling 0
        points = np.array([1.0 + 1e-9, 3.0, -7.0])
        assert excludes([ones], points, 1e300).all()
        assert excludes_between([ones], points[:2], 1e300).all()
        assert not excludes([ones], np.array([1.0]), 2.0).any()

    def test_what_was_settled_stays_settled(self):
        start, known = normal(30, 7), np.inf
        for steps in range(1, 40):
            _, moments = restarted(SPECTRUM, start, steps, rows=5, kept=1)
            now = reach(moments, 1e6, 1) - moments[-1].roots.max()
            if steps % 3 == 1 and np.isfinite(known):  # the first product after a restart
                assert reach(moments, 1e6, 1) <= known * (1 + 1e-9)
            known = now + moments[-1].roots.max()


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
    "flat bulk": np.linspace(0.9, 1.1, 300),
}


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_top_above_the_bound_had_next_to_no_weight(name, rows):
    """Not statistics but the theorem: whoever misses drew a start with w < 1/needed."""
    spectrum, risk = ADVERSARIAL[name], 0.5
    operator, top = of_diagonal(spectrum), int(spectrum.argmax())
    missed = 0
    for seed in range(40):
        start = torch.randn(len(spectrum), generator=seeded(seed), dtype=torch.float64)
        weight = float((start[top] / start.norm()) ** 2)
        for budget in (6, 30):
            found = eigenpairs(
                operator,
                relative_tolerance=1e-9,
                risk=risk,
                max_products=budget,
                max_basis=rows,
                generator=seeded(seed),
            )
            if spectrum[top] > found.upper_bound:
                missed += 1
                assert weight < 1 / needed(len(spectrum), risk)
    assert missed > 0


@pytest.mark.parametrize(
    ("name", "risk", "warm", "rows", "starts"),
    [
        ("cluster below the top", 0.3, True, None, 300),
        ("cluster below the top", 0.01, True, None, 300),
        ("cluster below the top", 0.3, True, 4, 200),
        ("outlier hidden behind a bulk", 0.1, False, None, 300),
        ("outlier hidden behind a bulk", 0.3, True, 6, 200),
        ("pair", 0.3, False, 4, 300),
    ],
)
def test_the_top_is_missed_no_more_often_than_the_risk(name, risk, warm, rows, starts):
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
            max_basis=rows,
            generator=generator,
        )
        assert found.converged
        assert found.values[0] < found.upper_bound <= 1.05 * found.values[0] * (1 + 1e-8)
        beyond_bound += top > found.upper_bound
        beyond_width += top > 1.05 * found.values[0]
    assert beyond_width <= beyond_bound <= binom.ppf(1 - 1e-5, starts, risk)
    assert beyond_bound >= binom.ppf(1e-5, starts, 0.6 * risk)  # a bound so loose proves nothing


@pytest.mark.parametrize(
    ("which", "outliers", "k"),
    [
        ("largest", [1.3, 1.6, 2.0], 3),
        ("largest", [1.1, 1.2, 1.3, 1.4, 1.5, 1.6], 6),
        ("smallest", [-1.3, -1.6, -2.0], 3),
        ("both", [-1.6, -1.3, 1.3, 1.6], 2),
        ("magnitude", [-1.9, -1.3, 1.6], 3),
    ],
)
def test_a_list_lacks_one_no_more_often_than_the_risk(which, outliers, k):
    """Whichever of them it is: beyond all others, in between, or the last."""
    spectrum, risk, starts, width = np.r_[np.linspace(-1, 1, 300), outliers], 0.3, 100, 0.03
    operator, generator, lacking = of_diagonal(spectrum), seeded(0), 0
    for _ in range(starts):
        found = eigenpairs(
            operator, k, which=which, relative_tolerance=10.0, certificate_width=width, risk=risk,
            generator=generator,
        )  # fmt: skip
        values = found.values.numpy()
        shown = np.abs(values[:, None] - outliers) <= width * np.abs(values[:, None])
        last = np.abs(values).min() * (1 + width)
        lacking += bool(np.any(~shown.any(axis=0) & (np.abs(outliers) > last)))
    assert lacking <= binom.ppf(1 - 1e-5, starts, risk)
    assert lacking > 0
