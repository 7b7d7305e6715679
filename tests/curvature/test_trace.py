"""Trace estimators: unbiased, exact where they can be, and wrong by what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from dyndiag.curvature import Operator, Outcome, trace
from dyndiag.curvature.deflation import Deflation
from dyndiag.curvature.draws import gaussian, rademacher
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import SPECTRA, counted, matrix_with, of_diagonal, of_matrix, seeded

OUTLIERS = np.r_[[20, 15, 12, 10, 8], np.linspace(-0.5, 0.5, 115)]
METHODS = ["hutchinson", "krylov", "hutch++", "xtrace"]


def repeated(operator, count, **kwargs):
    return [trace(operator, generator=seeded(seed), **kwargs) for seed in range(count)]


def errors(found, exact):
    return np.array([f.value for f in found]) - exact


def test_two_by_two():
    """H = [[2, 1], [1, 3]]: a probe of ±1 says 5 ± 2, so its variance is 4; a Gaussian's is 30."""
    operator = of_matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double())
    single = np.array([f.value for f in repeated(operator, 400, max_products=1)])
    assert set(single.round(12)) == {3.0, 7.0}
    assert single.mean() == pytest.approx(5.0, abs=4 * 2 / math.sqrt(400))
    g = seeded(0)
    z = [gaussian(operator, g) for _ in range(20000)]
    normal = np.array([float(v @ operator.product(v)) for v in z])
    assert normal.var() == pytest.approx(30.0, rel=0.2)


def test_a_small_matrix_is_exact_at_a_product_a_column():
    operator, calls = counted(of_matrix(matrix_with(OUTLIERS)))
    found = trace(operator, max_products=120)
    assert found.products == len(calls) == 120
    assert (found.method, found.converged, found.standard_error) == ("exact", True, 0.0)
    assert found.value == pytest.approx(OUTLIERS.sum(), rel=1e-12)
    assert found.frobenius_norm == pytest.approx(np.linalg.norm(OUTLIERS), rel=1e-12)
    assert found.interval() == (found.value, found.value)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_scale_does_not_matter_even_where_float32_holds_no_squares(method, scale):
    matrix = matrix_with(OUTLIERS)
    plain = trace(of_matrix(matrix, torch.float32), method=method, max_products=60)
    found = trace(of_matrix(scale * matrix, torch.float32), method=method, max_products=60)
    assert (found.products, found.outcome) == (plain.products, plain.outcome)
    for name in ("value", "standard_error", "frobenius_norm", "frobenius_norm_error"):
        assert getattr(found, name) == pytest.approx(scale * getattr(plain, name), rel=1e-4)
    assert plain.standard_error > 0


def test_a_diagonal_is_exact_from_the_first_look():
    found = trace(of_diagonal(OUTLIERS), relative_error=1e-12)
    assert found.converged
    assert (found.products, found.method) == (6, "hutchinson")
    assert found.value == pytest.approx(OUTLIERS.sum(), rel=1e-12)


def test_the_variance_is_twice_that_of_the_diagonal():
    """Var(zᵀBz) = 2(‖B‖_F² − Σ Bᵢᵢ²): the standard error is right from few probes on."""
    spectrum = np.linspace(-1, 2, 120)
    matrix = matrix_with(spectrum)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    found = repeated(
        of_matrix(matrix), 300, method="hutchinson", relative_error=1e-9, max_products=8
    )
    said = np.array([f.standard_error for f in found]) * math.sqrt(8)
    assert said.mean() == pytest.approx(math.sqrt(variance), rel=0.02)
    assert said.std() < 0.08 * said.mean()  # by the scatter of 8 sums it would be 27 %
    made = errors(found, spectrum.sum())
    assert np.sqrt(np.mean(made**2)) == pytest.approx(math.sqrt(variance / 8), rel=0.17)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["indefinite", "power law", "flat bulk", "cluster"])
def test_unbiased(method, name):
    """At a fixed budget: stopping early, at a lucky draw, is another test."""
    exact = SPECTRA[name].sum()
    found = repeated(
        of_matrix(matrix_with(SPECTRA[name])),
        25,
        method=method,
        relative_error=1e-12,
        max_products=20,
    )
    made = errors(found, exact)
    # Student's t with 24 degrees exceeds 4.6 once in 10,000 times.
    assert abs(made.mean()) <= 4.6 * made.std(ddof=1) / math.sqrt(25) + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_coverage(method):
    """Student's interval, over 150 starts on outliers above a bulk."""
    exact = OUTLIERS.sum()
    found = repeated(
        of_matrix(matrix_with(OUTLIERS)), 150, method=method, relative_error=1e-12, max_products=24
    )
    covered = sum(low <= exact <= high for low, high in (f.interval(0.95) for f in found))
    # Skewed samples cost some; XTrace's estimates share their products.
    least = 0.85 if method == "xtrace" else 0.92
    assert covered >= binom.ppf(1e-4, 150, least)


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_stopping_early_keeps_the_error_that_was_asked_for(target):
    """The rule that ends a run looks at its own error: the lucky must not end too soon."""
    exact = OUTLIERS.sum()
    operator = of_matrix(matrix_with(OUTLIERS))
    found = repeated(operator, 60, relative_error=target, max_products=119)
    assert all(f.converged for f in found)
    assert all(f.standard_error <= target * f.value for f in found)
    made = errors(found, exact) / exact
    assert np.sqrt(np.mean(made**2)) < 1.25 * target
    assert abs(made.mean()) < 0.25 * target + 4 * made.std() / math.sqrt(60)
    covered = sum(low <= exact <= high for low, high in (f.interval(0.95) for f in found))
    assert covered >= binom.ppf(1e-4, 60, 0.92)


@pytest.mark.parametrize("spectrum", [0.9 ** np.arange(400), np.arange(1, 401) ** -2.0])
def test_where_the_spectrum_decays_a_third_of_the_products_is_enough(spectrum):
    matrix = matrix_with(spectrum)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    hutchinson = variance / (0.01 * spectrum.sum()) ** 2
    found = repeated(of_matrix(matrix), 6, relative_error=0.01, max_products=399)
    assert all(f.converged and f.method == "krylov" for f in found)
    assert max(f.products for f in found) <= hutchinson / 3
    assert np.abs(errors(found, spectrum.sum())).max() < 0.04 * spectrum.sum()


def test_on_a_flat_spectrum_it_is_hutchinsons_estimator_to_the_bit():
    operator = of_matrix(matrix_with(np.linspace(0.9, 1.1, 300)))
    for seed in range(5):
        auto, plain = (
            trace(operator, method=m, relative_error=1e-5, max_products=60, generator=seeded(seed))
            for m in ("auto", "hutchinson")
        )
        assert auto.method == "hutchinson"
        assert auto.value == pytest.approx(plain.value, rel=1e-12)


@pytest.mark.parametrize(("method", "enough", "short"), [("hutch++", 30, 27), ("xtrace", 22, 20)])
def test_a_low_rank_is_exact(method, enough, short):
    spectrum = np.r_[np.zeros(110), np.arange(1.0, 11.0)]
    operator = of_matrix(matrix_with(spectrum))
    kwargs = {"method": method, "relative_error": 1e-12}
    for found in repeated(operator, 3, max_products=enough, **kwargs):
        assert found.value == pytest.approx(55.0, rel=1e-9)
        assert found.products == enough
    for found in repeated(operator, 3, max_products=short, **kwargs):
        assert abs(found.value - 55.0) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_low_rank_within_the_budget(method, dtype):
    """More products than the rank asks for: nothing degenerates."""
    spectrum = np.r_[np.zeros(196), 1.0, 2.0, -3.0, 9.0]
    found = trace(
        of_matrix(matrix_with(spectrum), dtype),
        method=method,
        relative_error=0.01,
        max_products=60,
    )
    assert math.isfinite(found.value)
    if method == "hutchinson":
        assert abs(found.value - 9.0) < 5 * found.standard_error
    else:
        assert found.value == pytest.approx(9.0, rel=1e-4 if dtype is torch.float32 else 1e-9)
        assert found.converged


def test_around_zero_the_error_is_a_share_of_the_norm():
    balanced = np.r_[np.linspace(-1, -0.1, 500), np.linspace(0.1, 1, 500)]
    operator = of_matrix(matrix_with(balanced))
    found = trace(operator, relative_error=0.15, max_products=200)
    assert found.outcome is Outcome.SMALL_TRACE
    assert not found.converged
    assert found.products < 110  # 2 / 0.15² = 89 probes
    assert found.error_share_of_norm <= 0.15
    assert abs(found.value) < 4 * found.standard_error
    spent = trace(operator, max_products=40)
    assert (spent.outcome, spent.products) == (Outcome.BUDGET_SPENT, 40)
    absolute = trace(operator, absolute_error=4.5, max_products=40)
    assert absolute.converged and absolute.standard_error <= 4.5


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_zero_operator_converges(method):
    found = trace(of_diagonal(np.zeros(150)), method=method)
    assert found.converged
    assert (found.value, found.standard_error, found.error_share_of_norm) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_parts_come_from_the_same_products(method):
    matrix = matrix_with(OUTLIERS)
    parts = {"a.weight": slice(0, 60), "a.bias": slice(60, 70), "b.weight": slice(70, 120)}
    operator, calls = counted(replace(of_matrix(matrix), parts=parts))
    found = [
        trace(operator, method=method, relative_error=1e-9, max_products=30, generator=seeded(s))
        for s in range(30)
    ]
    assert len(calls) == sum(f.products for f in found)
    for one in found[:5]:
        assert sum(value for value, _ in one.parts.values()) == pytest.approx(one.value)
        assert sum(value for value, _ in one.modules().values()) == pytest.approx(one.value)
        assert one.diagonal.sum().item() == pytest.approx(one.value)
        assert list(one.modules(1)) == ["a", "b"]
    for name, part in parts.items():
        exact = float(matrix.diagonal()[part].sum())
        values = np.array([f.parts[name][0] for f in found])
        assert values.mean() == pytest.approx(exact, abs=4.5 * values.std() / math.sqrt(30) + 1e-9)
        said = np.sqrt(np.mean([f.parts[name][1] ** 2 for f in found]))
        assert 0.55 <= said / (values.std() + 1e-12) <= 1.7
    exact = matrix.diagonal().numpy()
    mean = np.mean([f.diagonal.numpy() for f in found], axis=0)
    assert np.linalg.norm(mean - exact) < 0.35 * np.linalg.norm(exact)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_comes_by_the_way(method):
    norm = np.linalg.norm(OUTLIERS)
    found = repeated(
        of_matrix(matrix_with(OUTLIERS)), 25, method=method, relative_error=1e-9, max_products=30
    )
    squares = np.array([f.frobenius_norm**2 for f in found])
    assert squares.mean() == pytest.approx(norm**2, abs=4.6 * squares.std() / math.sqrt(25) + 1e-9)
    said = np.sqrt(np.mean([f.frobenius_norm_error**2 for f in found]))
    made = np.std([f.frobenius_norm for f in found])
    assert 0.5 <= said / made <= 2 or made < 1e-6 * norm


def test_a_growing_basis_keeps_its_probes_of_use():
    """As if each had been sent through the deflated matrix, which costs products."""
    matrix = matrix_with(SPECTRA["indefinite"])
    operator = of_matrix(matrix)
    rest, g = Deflation(operator), seeded(0)
    z = [rademacher(operator, g) for _ in range(4)]
    for probe in z:
        rest.keep(probe)
    direction = gaussian(operator, g)
    basis = []
    for _ in range(20):
        basis.append(rest.project(direction))
        direction = rest.extend(direction)
    q = torch.linalg.qr(torch.stack(basis).T).Q
    out = torch.eye(120, dtype=torch.float64) - q @ q.T
    left = out @ matrix @ out
    table, variance = rest.readings().numbers()
    np.testing.assert_allclose(table[:, 0], [float(p @ left @ p) for p in z], atol=1e-9)
    np.testing.assert_allclose(rest.trace, float(torch.trace(q.T @ matrix @ q)), atol=1e-9)
    torch.testing.assert_close(rest.diagonal(), (matrix - left).diagonal())
    entries = torch.stack([p * (left @ p) for p in z])
    assert variance == pytest.approx(2 * float(entries.var(0).sum()))


def test_the_stated_cost_is_the_cost_paid():
    for method in ("auto", *METHODS):
        operator, calls = counted(of_matrix(matrix_with(OUTLIERS)))
        found = trace(operator, method=method, relative_error=0.02)
        assert found.products == len(calls) >= 6
        assert len(calls) <= 100


def test_one_probe_has_no_standard_error():
    found = trace(of_matrix(matrix_with(OUTLIERS)), max_products=1)
    assert math.isnan(found.standard_error)
    assert found.interval() == (-math.inf, math.inf)
    assert not found.converged


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("good", [0, 15])
def test_a_product_that_is_not_finite_ends_it(method, good):
    inner, calls = counted(of_matrix(matrix_with(OUTLIERS)))
    spoilt = replace(
        inner, product=lambda v: inner.product(v) / (1.0 if len(calls) < good else 0.0) * 1.0
    )
    found = trace(spoilt, method=method, relative_error=1e-6)
    assert found.outcome is Outcome.NOT_FINITE
    assert math.isnan(found.value)
    assert found.products < good + 16


def test_a_small_matrix_that_is_not_finite():
    operator = Operator(lambda v: v * math.nan, 5, torch.float32, torch.device("cpu"))
    found = trace(operator)
    assert found.outcome is Outcome.NOT_FINITE
    assert math.isnan(found.value)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_same_answer_at_every_call_and_no_global_stream(method):
    before = torch.get_rng_state()
    operator = of_matrix(matrix_with(OUTLIERS))
    kwargs = {"method": method, "relative_error": 0.01, "max_products": 40}
    assert trace(operator, **kwargs) == trace(operator, **kwargs)
    assert trace(operator, **kwargs) != trace(operator, generator=seeded(1), **kwargs)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reason_is_told():
    operator = of_matrix(matrix_with(0.9 ** np.arange(200)))
    found = trace(operator, relative_error=0.01, max_products=150)
    assert "effective rank" in found.reason and "basis of" in found.reason
    assert found.effective_rank == pytest.approx(19, rel=0.1)


def test_at_the_door():
    with pytest.raises(DyndiagError, match=r"at least 1 and relative_error above 0.* 0 and 0.05"):
        trace(of_diagonal([1.0]), max_products=0)
    with pytest.raises(DyndiagError, match=r"method must be one of auto, hutchinson.* 'hutch'"):
        trace(of_diagonal([1.0]), method="hutch")
    with pytest.raises(DyndiagError, match=r"absolute_error must be 0 or more, but it is -1"):
        trace(of_diagonal([1.0]), absolute_error=-1)
    with pytest.raises(DyndiagError, match=r"at least 4 products, but max_products is 3"):
        trace(of_diagonal(np.ones(9)), method="xtrace", max_products=3)
