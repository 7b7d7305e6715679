"""Following a largest eigenvalue: as exact as stated, cheap, honest where it may have missed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyndiag.curvature import Operator, eigenpairs, loss_hessian
from dyndiag.curvature.certificate import needed
from dyndiag.curvature.complement import Complement, gram, room_below
from dyndiag.curvature.follow import Followed, Follower
from tests.oracles.networks import differentiated_twice
from tests.oracles.spectra import (
    SPECTRA,
    counted,
    matrix_with,
    of_matrix,
    seeded,
)


def misfit(operator: Operator, found: Followed) -> float:
    """‖Av − λv‖, from the definition, in the operator's own arithmetic."""
    image = operator.product(found.vector).double()
    return float((image - found.value * found.vector.double()).norm())


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1).mean()


def hessian_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Operator:
    return loss_hessian(lambda: squared_error(model, batch), list(model.parameters()))


def training(kind: str, steps: int, every: int) -> Iterator[tuple[Operator, float]]:
    """The float32 Hessian along a training run, with its exact largest eigenvalue."""
    generator = seeded(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
        )
    x = torch.randn(40, 4, generator=generator)
    batch = (x, torch.sin(3 * x[:, :2]))
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=3e-3)
        if kind == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.3)
    )
    for step in range(steps):
        used = batch
        if kind == "minibatch":
            chosen = torch.randint(40, (10,), generator=generator)
            used = (batch[0][chosen], batch[1][chosen])
        squared_error(model, used).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            exact = copy.deepcopy(model).double()
            doubled = (batch[0].double(), batch[1].double())
            truth = differentiated_twice(squared_error(exact, doubled), list(exact.parameters()))
            yield hessian_of(model, batch), float(torch.linalg.eigvalsh(truth)[-1])


@pytest.mark.parametrize(
    ("kind", "every", "share"),
    [
        ("gd", 1, 0.85),
        ("gd", 7, 0.85),
        ("adamw", 1, 0.85),
        ("adamw", 7, 0.9),  # a steep rise, with a certificate at every fifth of it
        ("minibatch", 7, 0.85),
    ],
)
def test_along_a_training_run(kind: str, every: int, share: float) -> None:
    follower, cold_generator, start = Follower(seeded(0)), seeded(0), None
    samples, paid, before = [], 0, 0
    for operator, exact in training(kind, 45 * every, every):
        watched, calls = counted(operator)
        found = follower.largest(watched)
        assert found.products == len(calls)
        assert misfit(operator, found) <= found.error_bound
        assert abs(found.value - exact) <= found.error_bound + 1e-5 * exact
        assert found.error_bound <= 1e-2 * found.value
        assert (1 - 1e-3) * exact <= found.value <= (1 + 1e-5) * exact
        assert found.converged is not found.provisional
        assert (found.upper_bound is None) is found.provisional
        if found.upper_bound is not None:
            assert exact <= found.upper_bound * (1 + 1e-6)
        samples.append(found)
        paid += found.products
        certified = eigenpairs(
            operator, start=start, relative_tolerance=1e-2, generator=cold_generator
        )
        start, before = certified.vectors[0], before + certified.products
    at = [i for i, found in enumerate(samples) if found.converged]
    assert at[0] == 0
    assert max(later - i for i, later in pairwise([*at, len(samples)])) <= 10
    assert len(at) <= len(samples) / 3
    assert paid < share * before  # the net is tiny: certificates of larger ones cost more


def test_where_eigenvalues_cross() -> None:
    """At a wild edge of stability, between samples far apart, the top is a mixture of two vectors
    now and then, whose residual is small: twelve of these samples would be off by up to 1 % if
    their residuals had no more to satisfy than usual."""
    followers, errors = [Follower(seeded(seed)) for seed in range(12)], []
    for operator, exact in training("gd", 400, 8):
        found = [follower.largest(operator) for follower in followers]
        errors += [1 - one.value / exact for one in found if one.provisional]
    assert len(errors) > 400
    assert sum(error > 1e-3 for error in errors) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_hold_while_the_matrix_drifts(name: str, dtype: torch.dtype) -> None:
    matrix, other = matrix_with(SPECTRA[name]), matrix_with(SPECTRA[name], seed=1)
    follower = Follower(seeded(0))
    provisional = 0
    for t in np.linspace(0, 0.05, 9):
        moved = (1 - t) * matrix + t * other
        operator, calls = counted(of_matrix(moved, dtype))
        found = follower.largest(operator)
        assert found.products == len(calls)
        assert misfit(of_matrix(moved, dtype), found) <= found.error_bound
        assert float(found.vector.norm()) == pytest.approx(1, abs=1e-6)
        spectrum = torch.linalg.eigvalsh(moved)
        assert (spectrum - found.value).abs().min() <= found.error_bound
        if found.converged:
            assert found.upper_bound is not None and found.upper_bound >= spectrum[-1]
        if found.provisional:
            assert 3 <= found.products <= 14
        provisional += found.provisional
    assert provisional >= 6 or name == "flat bulk"


SPREAD = np.r_[np.linspace(-0.5, 1, 294), 2.5, 3.0, 3.5, 4.0, 4.9, 5.0]


def with_top_raised(place: int, value: float, seed: int) -> tuple[Operator, Operator]:
    """A spectrum, and the same where the `place`-th largest eigenvalue has become `value`."""
    raised = SPREAD.copy()
    raised[-place] = value
    return of_matrix(matrix_with(SPREAD, seed)), of_matrix(matrix_with(raised, seed))


def test_a_neighbour_overtakes() -> None:
    """The old top vector is orthogonal to the new one, and still an eigenvector."""
    for seed in range(10):
        before, after = with_top_raised(2, 5.1, seed)
        follower = Follower(seeded(seed))
        follower.largest(before)
        follower.largest(before)
        found = follower.largest(after)
        assert found.converged  # so far from the last vector, a provisional value is not enough
        assert found.value == pytest.approx(5.1, rel=1e-3)


@pytest.mark.parametrize("place", [3, 6])
def test_who_was_not_next_to_the_top_is_found_by_the_certificate(place: int) -> None:
    for seed in range(10):
        before, after = with_top_raised(place, 5.1, seed)
        follower = Follower(seeded(seed))
        follower.largest(before)
        found = [follower.largest(after) for _ in range(10)]
        assert any(sample.converged for sample in found)
        for sample in found:
            if sample.converged:
                assert sample.value == pytest.approx(5.1, rel=1e-3)


def test_a_stranger_far_above_is_found_soon() -> None:
    """Nothing of it is in the kept vectors: random parts find it, and the last of the kept vectors
    carries what they have found to the next sample."""
    for seed in range(20):
        before, after = with_top_raised(6, 10.0, seed)
        follower = Follower(seeded(seed))
        follower.largest(before)
        found = [follower.largest(after) for _ in range(10)]
        assert found[-1].value == pytest.approx(10, rel=1e-3)
        assert any(sample.converged for sample in found)  # a rise: certified by itself


def test_the_random_part_sees_where_no_residual_points() -> None:
    """Two blocks: the outer kept vectors lie in the first one, the new top in the second."""
    block, turned = (matrix_with([1.0, 2.0, 3.0, 4.0, 5.0], seed) for seed in (0, 1))
    before = torch.block_diag(block, torch.zeros(200, 200, dtype=torch.float64))
    grown = torch.zeros(200, dtype=torch.float64)
    grown[7] = 10.0
    after = torch.block_diag(0.98 * block + 0.02 * turned, grown.diag())
    for seed in range(20):
        follower = Follower(seeded(seed))
        follower.largest(of_matrix(before))
        found = [follower.largest(of_matrix(after)) for _ in range(7)]
        assert found[-1].value == pytest.approx(10, rel=1e-3)


def test_what_was_missed_shows_at_the_next_certified_sample() -> None:
    before, after = with_top_raised(6, 5.1, 0)
    follower = Follower(seeded(0))
    follower.largest(before)
    missed, *_ = [follower.largest(after) for _ in range(9)]
    certified = follower.largest(after)
    assert missed.provisional and missed.value == pytest.approx(5, rel=1e-3)
    assert certified.converged and certified.value == pytest.approx(5.1, rel=1e-3)
    assert certified.value - missed.value > certified.error_bound + missed.error_bound


def test_what_does_not_persist_is_certified() -> None:
    for seed in range(10):
        follower = Follower(seeded(seed))
        follower.largest(of_matrix(matrix_with(SPREAD, 0)))
        operator, calls = counted(of_matrix(matrix_with(SPREAD, 1 + seed)))
        found = follower.largest(operator)  # all its vectors are random to the old ones
        assert found.products == len(calls)
        assert found.converged and not found.provisional
        assert found.value == pytest.approx(5, rel=1e-3)


def test_signs_flip() -> None:
    """The old top is the new bottom, an exact eigenvector still."""
    for seed in range(5):
        matrix = matrix_with(np.r_[np.linspace(-4, -3.9, 3), np.linspace(-1, 1, 100), 5.0], seed)
        follower = Follower(seeded(seed))
        follower.largest(of_matrix(matrix))
        found = follower.largest(of_matrix(-matrix))
        assert found.converged and found.value == pytest.approx(4, rel=1e-2)


def test_certified_first_at_every_tenth_and_when_asked() -> None:
    operator = of_matrix(matrix_with(SPREAD))
    follower = Follower(seeded(0))
    flags = [follower.largest(operator, certify=i == 13).converged for i in range(30)]
    assert [i for i, certified in enumerate(flags) if certified] == [0, 10, 13, 23]


def test_a_rise_by_a_fifth_is_certified() -> None:
    matrix = matrix_with(SPREAD)
    follower = Follower(seeded(0))
    factors = (1.0, 1.15, 1.19, 1.22, 1.4, 1.5, 0.3)
    flags = [follower.largest(of_matrix(factor * matrix)).converged for factor in factors]
    assert flags == [True, False, False, True, False, True, False]


def test_not_finite_is_neither_and_forgets_nothing() -> None:
    good = of_matrix(matrix_with(SPREAD))
    bad, calls = counted(of_matrix(torch.full((300, 300), torch.nan, dtype=torch.float64)))
    follower = Follower(seeded(0))
    first = follower.largest(bad)
    follower.largest(good)
    later = follower.largest(bad)
    for found in (first, later):
        assert not found.converged and not found.provisional
    assert first.products + later.products == len(calls)
    assert follower.largest(good).provisional


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["drawn", "identity", "zero"])
def test_small_and_degenerate(size: int, kind: str) -> None:
    spectrum = {"drawn": np.arange(size) - 1.0, "identity": np.ones(size), "zero": np.zeros(size)}
    follower = Follower(seeded(0))
    for dtype in (torch.float64, torch.float32, torch.float64):
        operator, calls = counted(of_matrix(matrix_with(spectrum[kind]), dtype))
        found = follower.largest(operator)
        assert found.products == len(calls)
        assert found.value == pytest.approx(spectrum[kind].max(), abs=1e-5)
    other = of_matrix(matrix_with(np.arange(9.0)))  # of another size: starts from nothing
    assert follower.largest(other).value == pytest.approx(8, rel=1e-3)


def test_randomness_is_the_generators_alone() -> None:
    operator = of_matrix(matrix_with(SPREAD))
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    runs = []
    for seed in (0, 0, 1):
        follower = Follower(seeded(seed))
        runs.append([follower.largest(operator).error_bound for _ in range(3)])
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert repr(np.random.get_state()) == states[2]


def test_a_certificate_only_where_the_value_asks_for_it() -> None:
    """The function sees the provisional value; what it cost is not paid twice."""
    operator, calls = counted(of_matrix(matrix_with(SPREAD)))
    follower = Follower(seeded(0))
    seen: list[float] = []

    def never(value: float) -> bool:
        seen.append(value)
        return False

    follower.largest(operator)
    calls.clear()
    no = follower.largest(operator, certify=never)
    yes = follower.largest(operator, certify=lambda value: value > 4)
    assert no.provisional and seen == [no.value]
    assert yes.converged and not yes.provisional and not yes.missed
    assert no.products + yes.products == len(calls)


def test_a_certificate_says_that_the_warm_start_missed_something() -> None:
    """A stranger 2 % above the top: the warm start does not see it, and the certificate does."""
    before, after = with_top_raised(6, 5.1, 0)
    follower = Follower(seeded(0))
    follower.largest(before)
    assert follower.largest(after).value == pytest.approx(5, rel=1e-3)
    found = follower.largest(after, certify=True)
    assert found.missed and found.value == pytest.approx(5.1, rel=1e-3)
    assert not follower.largest(after, certify=True).missed


@pytest.mark.parametrize("turn", [0.0, 0.02, 0.1])
def test_no_more_than_stated_lie_above(turn: float) -> None:
    """Known pairs of another matrix, a run in their complement, and the exact spectrum."""
    spectrum = np.r_[SPREAD, 5.0]
    moved = (1 - turn) * matrix_with(spectrum) + turn * matrix_with(spectrum, seed=1)
    operator = of_matrix(moved)
    exact = torch.linalg.eigvalsh(moved).numpy()
    vectors = torch.linalg.eigh(matrix_with(spectrum))[1][:, -4:].T
    values, mixing = torch.linalg.eigh(vectors @ moved @ vectors.T)
    vectors = (mixing.T @ vectors).flip(0)
    values = values.flip(0)
    residuals = vectors @ moved - values[:, None] * vectors
    start = torch.randn(301, generator=seeded(5), dtype=torch.float64)
    both = Complement(operator, vectors, values.numpy(), residuals, start)
    need, told = needed(301, 1e-3), 0
    for _ in range(25):
        both.run.extend()
        assert both.upper_bound(need) >= exact[-1]
        for count in range(5):
            for x in (3.2, 3.7, 4.5, 4.95, 5.05, 5.2, 5.6):
                if both.at_most(count, x, need):
                    assert (exact > x).sum() <= count
                    told += 1
        found, bounds, columns = both.pairs()
        top = both.combined(columns[:, :3])
        misfits = (top @ moved - torch.from_numpy(found[:3].copy())[:, None] * top).norm(dim=1)
        assert (misfits.numpy() <= bounds[:3] + 1e-9).all()
        assert (found[:5] <= exact[::-1][:5] + 1e-9).all()
    assert told > 100
    assert both.upper_bound(need) <= 1.01 * exact[-1]


def test_the_certificate_errs_no_oftener_than_it_says() -> None:
    """A stranger above what is known, a risk of a tenth: it may be missed in a tenth of starts."""
    matrix = matrix_with(np.r_[SPREAD[:-1], 5.0])
    vectors = torch.linalg.eigh(matrix)[1].T.flip(0)
    known, operator, missed = vectors[1:3], of_matrix(matrix), 0
    values = np.array([float(v @ matrix @ v) for v in known])
    for seed in range(400):
        start = torch.randn(300, generator=seeded(seed), dtype=torch.float64)
        both = Complement(operator, known, values, torch.zeros_like(known), start)
        for _ in range(12):
            both.run.extend()
            if both.at_most(0, 4.95, needed(300, 0.1)):
                missed += 1
                break
    assert missed <= 60  # 40 expected at most; 61 or more in 3 of 10,000 draws


def test_room_below() -> None:
    """(5, ε; ε, μ) has the eigenvalue x where (x − 5)(x − μ) = ε²."""
    square = np.array([[0.01]])
    assert room_below(5.1, 0, np.array([5.0]), square) == pytest.approx(0.1)
    assert room_below(5.1, 1, np.array([5.0]), square) == 0
    assert room_below(4.9, 0, np.array([5.0]), square) == np.inf
    assert room_below(5.1, 0, np.array([5.0]), 0 * square) == 0
    residuals = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert gram(residuals).tolist() == [[25.0, 4.0], [4.0, 1.0]]
