"""Thresholds of minibatch SGD against exact second-moment operators, and against SGD itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from dyndiag.curvature.coherence import coherence_of
from dyndiag.errors import DyndiagError
from dyndiag.optimizers import (
    Unknown,
    certain_divergence,
    clipped_edge_ratio,
    frobenius_ratio,
    gaussian_edge,
    mean_square_edge,
    plain_sgd_rate,
    read_rule,
    single_run_edge,
    sufficient_trace_ratio,
    trace_ratio,
)

Matrix = np.ndarray
SPECTRUM = [3.0, 1.0, 0.5, 0.2, 0.1]


def second_moment(hessians: list[Matrix], rate: float, batch: int, kept: bool) -> float:
    """Spectral radius of E[(I − ηH_B) ⊗ (I − ηH_B)], on the span of the data.

    `kept`: each example is in the batch with chance B/n; else B are drawn with replacement.
    """
    n = len(hessians)
    mean = sum(hessians) / n
    values, vectors = np.linalg.eigh(mean)
    span = vectors[:, values > 1e-9 * values.max()]
    own = [span.T @ h @ span for h in hessians]
    mean = sum(own) / n
    squares = sum(np.kron(h, h) for h in own) / n
    noise = squares * (1 - batch / n) if kept else squares - np.kron(mean, mean)
    still = np.eye(len(mean)) - rate * mean
    return float(np.abs(np.linalg.eigvals(np.kron(still, still) + rate**2 / batch * noise)).max())


def edge(radius: Callable[[float], float]) -> float:
    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if radius(middle) < 1 - 1e-12 else (low, middle)
    return low


def examples(seed: int, equal: bool) -> list[Matrix]:
    random = np.random.default_rng(seed)
    n, d = random.integers(4, 20), random.integers(2, 5)
    x = random.normal(size=(n, d)) * np.linspace(1, 0.2, d)
    if equal:
        x = 2 * x / np.linalg.norm(x, axis=1, keepdims=True)
    return [np.outer(row, row) for row in x]


def trace_and_top(hessians: list[Matrix]) -> tuple[float, float]:
    mean = sum(hessians) / len(hessians)
    return float(np.trace(mean)), float(np.linalg.eigvalsh(mean).max())


@pytest.mark.parametrize("seed", range(12))
def test_trace_rules_at_the_exact_edge(seed: int) -> None:
    hessians = examples(seed, equal=True)
    trace, top = trace_and_top(hessians)
    alone = edge(lambda rate: second_moment(hessians, rate, 1, kept=False))
    assert trace_ratio(trace, alone, 1) == pytest.approx(1.0, abs=1e-4)
    assert sufficient_trace_ratio(trace, top, alone, 1) == pytest.approx(1.0, abs=1e-4)
    for batch in (2, 4):
        at = edge(lambda rate, batch=batch: second_moment(hessians, rate, batch, kept=False))  # type: ignore[misc]
        assert trace_ratio(trace, at, batch) <= 1 + 1e-4  # necessary
        assert sufficient_trace_ratio(trace, top, at, batch) >= 1 - 1e-4  # sufficient


@pytest.mark.parametrize("seed", range(8))
def test_of_unequal_examples_the_trace_rule_is_necessary_alone(seed: int) -> None:
    hessians = examples(seed, equal=False)
    trace, _ = trace_and_top(hessians)
    at = edge(lambda rate: second_moment(hessians, rate, 1, kept=False))
    assert trace_ratio(trace, at, 1) < 0.9


def test_gradient_descent_is_the_limit_of_large_batches() -> None:
    assert sufficient_trace_ratio(7.0, 4.0, 0.5, math.inf) == 1.0
    assert trace_ratio(8.0, 0.1, 2, outputs=4) == pytest.approx(0.05)


@pytest.mark.parametrize("seed", range(8))
def test_frobenius_rule_with_the_noise_s_alignment(seed: int) -> None:
    hessians = examples(seed, equal=False)
    mean = np.mean(hessians, axis=0)
    norm = float(np.linalg.norm(mean))
    at = edge(lambda rate: second_moment(hessians, rate, 1, kept=False))
    random = np.random.default_rng(seed)
    least = math.inf
    for _ in range(300):
        d = random.normal(size=len(mean))
        noise = sum(h @ np.outer(d, d) @ h for h in hessians) / len(hessians)
        noise = noise - mean @ np.outer(d, d) @ mean
        least = min(least, np.trace(mean @ noise) / (d @ mean @ d * norm**2))
    assert frobenius_ratio(norm, at, 1, alignment=least) <= 1 + 1e-6
    assert frobenius_ratio(norm, at, 4) == pytest.approx(at * norm / 2)
    assert frobenius_ratio(norm, at, 4, alignment=0.25) == pytest.approx(at * norm / 4)


@pytest.mark.parametrize(
    ("batch", "truth"), [(1, 0.20353), (4, 0.43429), (16, 0.59109), (math.inf, 0.66667)]
)
def test_gaussian_edge(batch: float, truth: float) -> None:
    found = gaussian_edge(SPECTRUM, batch)
    assert found == pytest.approx(truth, abs=6e-6)
    if batch != math.inf:
        share = np.array(SPECTRUM) / (2 - found * np.array(SPECTRUM) * (1 + 1 / batch))
        assert found / batch * share.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_gaussian_edge_is_that_of_the_covariance(batch: int) -> None:
    """E δδᵀ of Gaussian least squares, step by step, shrinks below and grows above."""
    h = np.array(SPECTRUM)
    for factor, grows in ((0.99, False), (1.01, True)):
        rate = factor * gaussian_edge(SPECTRUM, batch)
        moments = np.diag((1 - rate * h) ** 2 + rate**2 / batch * h**2)
        moments += rate**2 / batch * np.outer(h, h)
        assert bool(np.abs(np.linalg.eigvals(moments)).max() > 1) is grows


def test_one_parameter_of_curvature_one_or_three() -> None:
    assert mean_square_edge([1, 3]) == pytest.approx(0.8, rel=1e-15)
    assert single_run_edge([1, 3]) == pytest.approx(4 / 3, rel=1e-12)
    random = np.random.default_rng(0)
    ends = {}
    for rate in (1.2, 1.45):
        run = np.zeros(500)
        for _ in range(600):
            run += np.log(np.abs(1 - rate * random.choice([1.0, 3.0], 500)))
        ends[rate] = run
    # At 1.2, half as much again as the mean-square edge, every run shrinks.
    assert (ends[1.2] < 0).all() and (ends[1.45] > 0).all()
    assert np.mean((1 - 1.2 * np.array([1.0, 3.0])) ** 2) > 1


@settings(max_examples=60)
@given(st.lists(st.floats(-0.5, 4, width=32), min_size=1, max_size=6))
def test_the_single_run_edge_is_the_first_rate_that_grows(curvatures: list[float]) -> None:
    h = np.array(curvatures)
    found = single_run_edge(curvatures)
    if h.mean() <= -1e-300:
        assert found == mean_square_edge(curvatures) == 0
        return
    assert found >= mean_square_edge(curvatures) * (1 - 1e-9)
    if not math.isfinite(found):
        return
    with np.errstate(divide="ignore"):
        rates = np.linspace(0, found, 400, endpoint=False)[1:]
        growth = np.log(np.abs(1 - rates[:, None] * h)).mean(1)
        beyond = np.log(np.abs(1 - found * (1 + 1e-6) * h)).mean()
    assert (growth <= 1e-9).all() and beyond >= -1e-9


def identical(n: int) -> list[Matrix]:
    return [np.diag([1.0, 0, 0]) for _ in range(n)]


def orthogonal(n: int) -> list[Matrix]:
    return [np.diag(row) for row in np.eye(n)]


def factors(hessians: list[Matrix]) -> list[torch.Tensor]:
    found = []
    for h in hessians:
        values, vectors = np.linalg.eigh(h)
        kept = values > 1e-12
        found.append(torch.from_numpy((np.sqrt(values[kept]) * vectors[:, kept]).T.copy()))
    return found


def test_coherence_of_the_extreme_families() -> None:
    for n in (1, 5, 8, 130):
        assert coherence_of(factors(identical(n))).value == pytest.approx(n)
    for n in (5, 130):
        assert coherence_of(factors(orthogonal(n))).value == pytest.approx(1.0)
    turns = [2 * math.pi * k / 3 for k in range(3)]
    at_120_degrees = [np.outer(x, x) for x in ([math.cos(turn), math.sin(turn)] for turn in turns)]
    found = coherence_of(factors(at_120_degrees))
    assert found.value == pytest.approx(2.0)
    assert found.sharpness == pytest.approx(0.5) and found.examples == 3
    # The edge of the extreme families, 2, is no guarantee: these are unstable from 12/7 on.
    at = edge(lambda rate: second_moment(at_120_degrees, rate, 1, kept=True))
    assert at == pytest.approx(12 / 7, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("family", [identical, orthogonal])
def test_certain_divergence_lies_above_the_edge_of_the_extreme_families(
    family: Callable[[int], list[Matrix]], batch: int
) -> None:
    hessians = family(8)
    found = coherence_of(factors(hessians))
    at = edge(lambda rate: second_moment(hessians, rate, batch, kept=True))
    exact = 2 / found.sharpness * found.value / (8 / batch + found.value - 1)
    assert at == pytest.approx(exact, rel=1e-4)
    assert at <= certain_divergence(found.sharpness, found.value, 8, batch) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_certain_divergence_of_random_families(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, d = int(random.integers(2, 10)), int(random.integers(1, 4))
    batch = int(random.integers(1, n))
    roots = random.normal(size=(n, d, int(random.integers(1, d + 1))))
    hessians = [r @ r.T * random.uniform(0.05, 4) for r in roots]
    found = coherence_of(factors(hessians))
    at = edge(lambda rate: second_moment(hessians, rate, batch, kept=True))
    assert at <= certain_divergence(found.sharpness, found.value, n, batch) * (1 + 1e-6)


def test_certain_divergence_of_the_full_batch_is_that_of_descent() -> None:
    assert certain_divergence(4.0, 3.0, 10, 10) == 0.5


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda p: SGD(p, lr=0.1), True),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), False),
        (lambda p: SGD(p, lr=0.1, weight_decay=1e-4), False),
        (lambda p: SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.2}], lr=0.1), False),
        (lambda p: SGD(p[:1], lr=0.1), False),
        (lambda p: Adam(p, lr=0.1), False),
        (lambda p: RMSprop(p, lr=0.1), False),
        (lambda p: torch.optim.ASGD(p, lr=0.1), False),
    ],
)
def test_only_plain_sgd_has_these_thresholds(
    make: Callable[[list[nn.Parameter]], Optimizer], plain: bool
) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = make(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert plain_sgd_rate(read_rule(optimizer, parameters)) == (0.1 if plain else None)
    assert plain_sgd_rate(Unknown("why")) is None


@pytest.mark.parametrize("curvature", [25.0, 60.0])
def test_clipped_descent_has_a_ratio_of_one_by_itself(curvature: float) -> None:
    hessian, theta, rate, most = torch.tensor([curvature, 5.0]), torch.tensor([0.3, 0.4]), 0.1, 0.2
    theta, hessian = theta.double(), hessian.double()
    ratios = []
    for _ in range(4000):
        gradient = hessian * theta
        norm = float(gradient.norm())
        clipped = min(norm, most)
        theta = theta - rate * gradient * clipped / norm
        ratios.append(clipped_edge_ratio(rate * curvature / 2, norm, clipped))
    assert float(theta.norm()) < 1
    assert sum(1 / r for r in ratios[-2:]) / 2 == pytest.approx(1.0, abs=1e-3)


def test_without_a_gradient_nothing_is_clipped() -> None:
    assert clipped_edge_ratio(0.9, 0.0, 0.0) == 0.9
    assert clipped_edge_ratio(0.9, 1.0, 2.0) == 0.9


@pytest.mark.parametrize(
    "use",
    [
        lambda: trace_ratio(1.0, -0.1, 1),
        lambda: trace_ratio(1.0, 0.1, 0),
        lambda: trace_ratio(1.0, 0.1, 1, outputs=0),
        lambda: gaussian_edge([1.0, -1.0], 1),
        lambda: gaussian_edge([], 1),
        lambda: mean_square_edge([math.nan]),
        lambda: certain_divergence(0.0, 1.0, 4, 1),
        lambda: certain_divergence(1.0, 1.0, 4, 5),
        lambda: clipped_edge_ratio(1.0, -1.0, 1.0),
        lambda: coherence_of([]),
        lambda: coherence_of([torch.zeros(0, 3)]),
    ],
)
def test_what_cannot_be_is_refused(use: Callable[[], object]) -> None:
    with pytest.raises(DyndiagError):
        use()


def test_flat_is_stable_at_every_rate() -> None:
    assert gaussian_edge([0.0, 0.0], 1) == math.inf
    assert mean_square_edge([0.0]) == single_run_edge([0.0]) == math.inf
