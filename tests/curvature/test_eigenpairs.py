"""Eigenpairs: right, with bounds that hold, at the stated cost, and honest when they fail."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from dyndiag.curvature import Eigenpairs, Operator, Outcome, eigenpairs
from dyndiag.curvature.certificate import Christoffel
from dyndiag.curvature.eigenpairs import _accurate, _certified, _Rules
from dyndiag.curvature.lanczos import Lanczos
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import (
    SPECTRA,
    counted,
    dense,
    matrix_with,
    of_diagonal,
    of_matrix,
    seeded,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
ENDS = ("largest", "smallest", "both", "magnitude")


def expected(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    ascending = np.sort(spectrum)
    match which:
        case "largest":
            return ascending[::-1][:k]
        case "smallest":
            return ascending[:k]
        case "both":
            return np.r_[ascending[::-1][:k], ascending[:k]]
    return ascending[np.argsort(-np.abs(ascending), kind="stable")][:k]


def misfits(operator: Operator, pairs: Eigenpairs) -> Tensor:
    """‖Av − λv‖ of each pair, from the definition, in the operator's own arithmetic."""
    images = torch.stack([operator.product(v) for v in pairs.vectors]).double()
    return (images - pairs.values[:, None] * pairs.vectors.double().cpu()).norm(dim=1)


class TestTruth:
    @pytest.mark.parametrize("which", ENDS)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_outermost_pair(self, name, which):
        operator = of_matrix(matrix_with(SPECTRA[name]))
        pairs = eigenpairs(operator, which=which)
        truth = expected(SPECTRA[name], 1, which)
        top, bottom = SPECTRA[name].max(), SPECTRA[name].min()
        if pairs.upper_bound is not None:
            assert pairs.upper_bound >= top
        if pairs.lower_bound is not None:
            assert pairs.lower_bound <= bottom
        assert (pairs.upper_bound is None) is (which == "smallest")
        assert (pairs.lower_bound is None) is (which == "largest")
        if not pairs.converged:  # only where the end asked for is 0 or next to it
            assert np.abs(truth).min() < 1e-3 * np.abs(SPECTRA[name]).max()
            return
        found = pairs.values.abs() if which == "magnitude" else pairs.values
        truth = np.abs(truth) if which == "magnitude" else truth  # a tie of ± may fall either way
        np.testing.assert_allclose(found, truth, rtol=1e-3)

    @pytest.mark.parametrize("which", ENDS)
    def test_several(self, which):
        spectrum = np.r_[-6.0, -5.0, -3.5, np.linspace(-1, 1, 100), 3.0, 4.0, 7.0]
        operator = of_matrix(matrix_with(spectrum))
        pairs = eigenpairs(operator, 3, which=which)
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, expected(spectrum, 3, which), rtol=1e-6)
        assert pairs.vectors.shape == (len(pairs.values), 106)
        gram = pairs.vectors @ pairs.vectors.T
        assert (gram - torch.eye(len(gram))).abs().max() < 1e-12

    def test_algebraic_and_not_by_magnitude(self):
        spectrum = np.r_[-30.0, np.linspace(-1, 1, 50), 21.0]
        assert eigenpairs(of_diagonal(spectrum)).values[0] == pytest.approx(21.0)
        found = eigenpairs(of_diagonal(spectrum), which="magnitude")
        assert found.values[0] == pytest.approx(-30.0)

    def test_by_magnitude_both_ends_are_certified(self):
        """By the certificate alone: what hides on the far side is missed at the stated risk."""
        operator = of_diagonal(np.r_[-1.3, np.linspace(-1, 1, 300)])
        generator, missed = seeded(0), 0
        for _ in range(300):
            pairs = eigenpairs(
                operator,
                which="magnitude",
                relative_tolerance=10.0,
                certificate_width=0.05,
                risk=0.1,
                generator=generator,
            )
            assert pairs.converged
            missed += bool(1.05 * pairs.values[0].abs() < 1.3)
        assert missed <= binom.ppf(1 - 1e-5, 300, 0.1)

    def test_ten_close_outliers(self):
        spectrum = np.r_[np.linspace(0, 1, 1990), np.linspace(4.1, 5, 10)]
        pairs = eigenpairs(of_diagonal(spectrum), 10)
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, spectrum[:-11:-1], rtol=1e-3)


class TestBounds:
    @DTYPES
    @pytest.mark.parametrize("name", SPECTRA)
    @pytest.mark.parametrize("budget", [3, 12, 40])
    def test_error_bounds_hold_for_the_operator_itself(self, name, budget, dtype):
        matrix = matrix_with(SPECTRA[name])
        operator = of_matrix(matrix, dtype)
        pairs = eigenpairs(operator, 2, which="both", max_products=budget)
        assert (misfits(operator, pairs) <= pairs.error_bounds).all()
        spectrum = torch.linalg.eigvalsh(dense(operator).double())
        nearest = (pairs.values[:, None] - spectrum).abs().min(dim=1).values
        assert (nearest <= pairs.error_bounds).all()

    def test_long_float32_vectors_lose_nothing(self):
        """A float32 sum of 500,000 squares is off by 1e-5, a hundred times eps."""
        pairs = eigenpairs(of_diagonal(np.full(500_000, 3.0), torch.float32))
        assert pairs.values[0] == pytest.approx(3, abs=1e-6)
        assert float(pairs.vectors[0].double().norm()) == pytest.approx(1, abs=3e-7)

    @DTYPES
    def test_bounds_never_claim_more_than_the_arithmetic_can_know(self, dtype):
        """On a rank-one operator the recurrence's own residual is 0, or 1e-20."""
        operator = of_matrix(matrix_with(np.r_[np.zeros(199), 3.0]), dtype)
        pairs = eigenpairs(operator)
        assert pairs.converged
        eps = torch.finfo(dtype).eps
        assert misfits(operator, pairs) <= pairs.error_bounds <= 1e3 * eps * 3.0

    def test_the_certificate_keeps_a_residual_from_lying(self):
        """4.9 beside 5.0: a residual of 1 % alone stops many starts at 4.9."""
        spectrum = np.r_[np.linspace(0, 1, 118), 4.9, 5.0]
        operator = of_diagonal(spectrum)
        wrong = {0.01: 0, math.inf: 0}
        for width in wrong:
            generator = seeded(1)
            for _ in range(300):
                pairs = eigenpairs(
                    operator, relative_tolerance=0.01, certificate_width=width, generator=generator
                )
                assert pairs.provisional is not pairs.converged is (width < 1)
                wrong[width] += bool(pairs.values[0] < 0.99 * 5.0)
        assert wrong[0.01] <= 4  # P(more than 4 of 300, at a risk of 1e-3) = 2e-5
        assert wrong[math.inf] > 15

    @pytest.mark.parametrize(("k", "width"), [(1, 0.01), (3, 0.003)])
    def test_of_several_pairs_more_is_asked_for(self, k, width):
        """Eigenvalues of a list may lie close together, and a list that lacks one is wrong."""
        operator = of_diagonal(np.r_[np.linspace(-1, 1, 300), 1.5, 1.506, 2.0])
        found = eigenpairs(operator, k)
        assert found.products == eigenpairs(operator, k, certificate_width=width).products
        other = 0.01 if k > 1 else 0.003
        assert found.products != eigenpairs(operator, k, certificate_width=other).products

    @pytest.mark.parametrize(("which", "sign"), [("largest", 1), ("smallest", -1)])
    def test_nothing_hides_between_the_values(self, which, sign):
        """A start with next to nothing on 3 finds 4 and 2 first: it must not stop there."""
        operator = of_diagonal(sign * np.r_[np.linspace(-0.1, 0.1, 97), 2.0, 3.0, 4.0])
        start = torch.ones(100).double()
        start[-2] = 1e-6
        rules = _Rules(2, which, 1e-3, 0.2, size=1e14, risk=0.5)  # 3 weighs 1e-14: it is seen
        run, looked_done = Lanczos(operator, start), False
        for _ in range(2):
            run.extend()
        while not (_accurate(run, rules) and _certified(run, rules, [Christoffel.of(run)])):
            looked_done |= np.abs(np.sort(sign * run.ritz()[0])[-2:] - [2, 4]).max() < 1e-6
            run.extend()
        assert looked_done
        np.testing.assert_allclose(np.sort(sign * run.ritz()[0])[-2:], [3, 4], rtol=1e-3)

    @pytest.mark.parametrize("k", [2, 3, 5])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_the_smallest_are_the_largest_mirrored(self, name, k):
        operator = of_diagonal(SPECTRA[name])
        one = eigenpairs(operator, k, relative_tolerance=0.1)
        other = eigenpairs(-operator, k, which="smallest", relative_tolerance=0.1)
        assert one.products == other.products
        torch.testing.assert_close(other.values, -one.values)
        assert other.lower_bound == pytest.approx(-one.upper_bound)

    def test_out_of_products_it_says_so_and_by_how_much(self):
        operator = of_diagonal(SPECTRA["pair 4.9/5.0 over a bulk"])
        pairs = eigenpairs(operator, max_products=3)
        assert pairs.outcome is Outcome.BOTH_MISSING
        assert not pairs.converged
        assert pairs.products == 3
        assert pairs.error_bounds[0] > 1e-3 * pairs.values[0]
        assert pairs.upper_bound > 5.0


class TestEndings:
    """Whatever ends a run but success, the outcome names what is missing."""

    operator = of_diagonal(SPECTRA["pair 4.9/5.0 over a bulk"])

    @pytest.mark.parametrize(
        ("options", "outcome"),
        [
            ({}, Outcome.CONVERGED),
            ({"certificate_width": math.inf}, Outcome.PROVISIONAL),
            ({"max_products": 5, "relative_tolerance": 1e-9}, Outcome.BOTH_MISSING),
            ({"max_products": 5, "relative_tolerance": 0.5}, Outcome.CERTIFICATE_MISSING),
            (
                {"max_products": 9, "relative_tolerance": 1e-9, "certificate_width": 1.0},
                Outcome.RESIDUAL_MISSING,
            ),
            (
                {"max_products": 9, "relative_tolerance": 1e-9, "certificate_width": math.inf},
                Outcome.RESIDUAL_MISSING,
            ),
        ],
    )
    def test_what_is_missing(self, options, outcome):
        pairs = eigenpairs(self.operator, **options)
        assert pairs.outcome is outcome
        assert pairs.converged is (outcome is Outcome.CONVERGED)
        assert pairs.provisional is (outcome is Outcome.PROVISIONAL)
        tolerance = options.get("relative_tolerance", 1e-3) * pairs.values[0]
        width = options.get("certificate_width", 0.01) * pairs.values[0]
        accurate = outcome not in (Outcome.RESIDUAL_MISSING, Outcome.BOTH_MISSING)
        certified = outcome in (Outcome.CONVERGED, Outcome.RESIDUAL_MISSING)
        assert bool(pairs.error_bounds[0] <= tolerance) is accurate
        if not math.isinf(width):
            assert bool(pairs.upper_bound <= pairs.values[0] + width + 1e-9) is certified

    def test_a_complete_basis_certifies_itself(self):
        pairs = eigenpairs(of_diagonal([1.0, 2.0, 4.0]), certificate_width=math.inf, k=3)
        assert pairs.outcome is Outcome.CONVERGED


class TestBoundedMemory:
    @DTYPES
    @pytest.mark.parametrize("which", ENDS)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_the_claims_hold_through_restarts(self, name, which, dtype):
        matrix = matrix_with(SPECTRA[name])
        operator = of_matrix(matrix, dtype)
        pairs = eigenpairs(operator, 2, which=which, max_products=90, max_basis=9)
        assert (misfits(operator, pairs) <= pairs.error_bounds).all()
        spectrum = torch.linalg.eigvalsh(dense(operator).double())
        assert pairs.upper_bound is None or pairs.upper_bound >= spectrum[-1]
        assert pairs.lower_bound is None or pairs.lower_bound <= spectrum[0]
        if pairs.converged:
            truth = expected(spectrum.numpy(), 2, which)
            found = pairs.values.abs() if which == "magnitude" else pairs.values
            truth = np.abs(truth) if which == "magnitude" else truth
            np.testing.assert_allclose(found, truth, rtol=0.01, atol=1e-6)

    @pytest.mark.parametrize("name", SPECTRA)
    def test_long_runs_lose_no_accuracy(self, name):
        """Forty restarts in float32: the rounding that is stated still covers ‖Av − λv‖."""
        operator = of_matrix(matrix_with(SPECTRA[name]), torch.float32)
        pairs = eigenpairs(operator, relative_tolerance=1e-12, max_products=110, max_basis=5)
        assert misfits(operator, pairs) <= pairs.error_bounds

    def test_room_enough_changes_nothing(self):
        operator = of_diagonal(SPECTRA["indefinite"])
        plain = eigenpairs(operator, 3)
        for rows in (plain.products + 1, 1000):
            other = eigenpairs(operator, 3, max_basis=rows)
            assert torch.equal(other.vectors, plain.vectors)
            assert other.upper_bound == plain.upper_bound

    def test_a_third_of_the_memory_costs_few_products(self):
        operator = of_diagonal(np.r_[np.linspace(0, 1, 1990), np.linspace(1.1, 2, 10)])
        for k, rows in ((1, 12), (10, 24)):
            plain, bounded = eigenpairs(operator, k), eigenpairs(operator, k, max_basis=rows)
            assert plain.converged
            assert bounded.converged
            assert rows < plain.products <= bounded.products <= 1.25 * plain.products
            np.testing.assert_allclose(bounded.values, plain.values, rtol=1e-3)

    @pytest.mark.parametrize(("which", "rows"), [("largest", 5), ("both", 7), ("magnitude", 7)])
    def test_copies_where_the_space_is_exhausted(self, which, rows):
        for spectrum, most in ((np.ones(40), 1), (np.r_[np.zeros(37), 3, 3, 3], 3)):
            pairs = eigenpairs(of_diagonal(spectrum), 2, which=which, max_basis=rows)
            assert pairs.converged
            np.testing.assert_allclose(pairs.values[:2], most, atol=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_fresh_start_owes_nothing_to_the_certificate_before_it(self, seed):
        """Four copies of 3 take four starts, each of which must look for itself."""
        operator = of_diagonal(np.repeat([1.0, 2.0, 3.0], [20, 10, 4]))
        pairs = eigenpairs(operator, 5, max_basis=8, generator=seeded(seed))
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, [3, 3, 3, 3, 2], atol=1e-12)

    def test_after_a_restart_nan_leaves_what_was_known(self):
        operator, calls = counted(of_diagonal(np.linspace(-1, 1, 30)))
        inner = operator.product
        for after in (4, 5, 8):
            calls.clear()
            spoilt = Operator(
                lambda v, after=after: inner(v) / (len(calls) <= after),
                30,
                torch.float64,
                operator.device,
            )
            pairs = eigenpairs(spoilt, max_basis=5)
            assert pairs.outcome is Outcome.NOT_FINITE
            assert 0 < pairs.values[0] <= 1 <= pairs.upper_bound
            assert pairs.error_bounds[0] < 1


class TestStarts:
    def test_a_wrong_warm_start_does_not_hide_the_top(self):
        """An exact eigenvector of another eigenvalue: its residual is 0 at once."""
        spectrum = np.r_[np.linspace(0, 1, 398), 4.9, 5.0]
        wrong = torch.zeros(400).double()
        wrong[-2] = 1
        for seed in range(50):
            pairs = eigenpairs(of_diagonal(spectrum), start=wrong, generator=seeded(seed))
            assert pairs.converged
            assert pairs.values[0] == pytest.approx(5.0, rel=1e-3)

    def test_a_good_one_saves_products_where_the_residual_decides(self):
        spectrum = np.r_[np.linspace(0, 1, 2000), 1.1]
        operator = of_diagonal(spectrum)
        cold = eigenpairs(operator, certificate_width=math.inf)
        warm = eigenpairs(operator, certificate_width=math.inf, start=cold.vectors[0])
        assert warm.products <= cold.products - 5
        assert warm.values[0] == pytest.approx(1.1, rel=1e-5)

    def test_any_dtype_and_length_of_vector_will_do(self):
        operator = of_diagonal(np.r_[np.linspace(0, 1, 50), 3.0])
        one = eigenpairs(operator, start=torch.ones(51))
        other = eigenpairs(operator, start=1e6 * torch.ones(51).double())
        torch.testing.assert_close(one.vectors, other.vectors)


class TestCost:
    @pytest.mark.parametrize("which", ENDS)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_the_stated_cost_is_the_cost_paid(self, name, which):
        operator, calls = counted(of_diagonal(SPECTRA[name]))
        pairs = eigenpairs(operator, 2, which=which)
        assert pairs.products == len(calls) <= 64 + 8 * (len(pairs.values) - 1)

    def test_never_more_products_than_dimensions(self):
        operator, calls = counted(of_diagonal(np.linspace(-1, 1, 9)))
        assert eigenpairs(operator, 9, relative_tolerance=1e-12).converged
        assert len(calls) == 9

    def test_certified_at_a_third_of_arpacks_first_look(self):
        """eigsh cannot look before its 20th product."""
        operator = of_diagonal(np.r_[np.linspace(0, 1, 1998), 2.0, 6.0])
        pairs = eigenpairs(operator)
        assert pairs.converged
        assert pairs.products <= 8


class TestRandomness:
    operator = of_diagonal(SPECTRA["indefinite"])

    def test_the_same_answer_at_every_call(self):
        one, other = eigenpairs(self.operator), eigenpairs(self.operator)
        assert torch.equal(one.vectors, other.vectors)
        assert one.upper_bound == other.upper_bound

    def test_a_generator_moves_on(self):
        generator = seeded(3)
        one = eigenpairs(self.operator, generator=generator)
        other = eigenpairs(self.operator, generator=generator)
        assert not torch.equal(one.vectors, other.vectors)
        again = eigenpairs(self.operator, generator=seeded(3))
        assert torch.equal(one.vectors, again.vectors)

    def test_global_streams_stay_where_they_are(self):
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        eigenpairs(self.operator, start=torch.ones(120))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert random.getstate() == before[2]


@DTYPES
class TestSmallAndDegenerate:
    def solve(self, spectrum, dtype, *args, **options) -> Eigenpairs:
        operator = of_matrix(matrix_with(spectrum), dtype)
        pairs = eigenpairs(operator, *args, **options)
        assert (misfits(operator, pairs) <= pairs.error_bounds).all()
        return pairs

    def test_one_dimension(self, dtype):
        for value in (3.0, 0.0, -2.0):
            pairs = self.solve([value], dtype, which="both")
            assert pairs.converged
            assert pairs.products == 1
            assert pairs.values.tolist() == [value, value]

    def test_two_dimensions(self, dtype):
        pairs = self.solve([1.0, -3.0], dtype, 2)
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, [1.0, -3.0], rtol=1e-5)

    def test_zero(self, dtype):
        pairs = self.solve(np.zeros(40), dtype, 3, which="both")
        assert pairs.converged
        assert not pairs.values.any()
        assert not pairs.error_bounds.any()
        assert pairs.upper_bound == pairs.lower_bound == 0.0

    def test_rank_one(self, dtype):
        pairs = self.solve(np.r_[np.zeros(39), 5.0], dtype, 2)
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, [5.0, 0.0], atol=1e-5)

    @pytest.mark.parametrize(
        ("spectrum", "k", "truth"),
        [
            (np.ones(40), 3, [1, 1, 1]),
            (np.r_[np.zeros(38), 3.0, 3.0], 2, [3, 3]),
            (np.r_[np.zeros(37), 3.0, 3.0, 3.0], 4, [3, 3, 3, 0]),
            (np.r_[-np.ones(20), 2 * np.ones(20)], 3, [2, 2, 2]),
        ],
        ids=["identity", "twice", "thrice", "half and half"],
    )
    def test_copies_of_an_eigenvalue_where_the_space_is_exhausted(self, dtype, spectrum, k, truth):
        pairs = self.solve(spectrum, dtype, k)
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, truth, atol=1e-5)
        assert pairs.products <= 3 * k + 2

    def test_negative_definite(self, dtype):
        pairs = self.solve(np.r_[np.linspace(-9, -5, 60), -1.0], dtype)
        assert pairs.converged
        assert pairs.values[0] == pytest.approx(-1.0, rel=1e-3)
        assert -1.0 <= pairs.upper_bound <= -0.99 + 1e-6

    def test_more_ends_than_dimensions_overlap(self, dtype):
        pairs = self.solve([1.0, 2.0, 4.0], dtype, 2, which="both")
        assert pairs.converged
        np.testing.assert_allclose(pairs.values, [4, 2, 1, 2], rtol=1e-5)


class TestNotFinite:
    def spoilt(self, after: int) -> Operator:
        operator, calls = counted(of_diagonal(np.linspace(-1, 1, 30)))
        inner = operator.product
        return Operator(
            lambda v: inner(v) / (len(calls) <= after), 30, torch.float64, operator.device
        )

    def test_at_once(self):
        pairs = eigenpairs(self.spoilt(0), 2)
        assert pairs.outcome is Outcome.NOT_FINITE
        assert not pairs.converged
        assert pairs.products == 1
        assert pairs.values.isnan().all()
        assert pairs.error_bounds.isinf().all()
        assert pairs.upper_bound == math.inf

    def test_later_it_keeps_what_it_knew(self):
        pairs = eigenpairs(self.spoilt(5))
        assert pairs.outcome is Outcome.NOT_FINITE
        assert pairs.products == 6
        assert 0 < pairs.values[0] <= 1 <= pairs.upper_bound
        assert pairs.error_bounds.isfinite().all()


class TestAtTheDoor:
    operator = of_diagonal([1.0, 2.0, 3.0])

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"k": 0}, r"between 1 and the operator's size, 3, but it is 0"),
            ({"k": 2.0}, r"a whole number between 1 .* but it is 2.0"),
            ({"start": [1.0, 2.0, 3.0]}, r"a tensor of shape \(3,\).*but it is \[1.0"),
            ({"k": 4}, r"between 1 and the operator's size, 3, but it is 4"),
            ({"which": "LM"}, r"one of largest, smallest, both, magnitude, not 'LM'"),
            ({"relative_tolerance": 0.0}, r"above 0, but they are 0.0 and 0.01"),
            ({"certificate_width": -1.0}, r"above 0, but they are 0.001 and -1.0"),
            ({"risk": 1.0}, r"probability between 0 and 1, but it is 1.0"),
            ({"k": 2, "max_products": 1}, r"at least 2 products, but max_products is 1"),
            ({"max_basis": 3}, r"at least 4 for k=1 and which='largest', but it is 3"),
            ({"max_basis": 4, "which": "both"}, r"at least 5 for k=1 and which='both'"),
            ({"max_basis": 5, "which": "magnitude"}, r"at least 6"),
            ({"start": torch.ones(2)}, r"shape \(3,\).*but it has shape \(2,\)"),
            ({"start": torch.zeros(3)}, r"finite and not zero, but its norm is 0.0"),
            ({"start": torch.tensor([1, math.nan, 0])}, r"but its norm is nan"),
        ],
    )
    def test_bad_arguments(self, options, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            eigenpairs(self.operator, **options)

    def test_no_operator(self):
        with pytest.raises(DyndiagError, match="Operator"):
            eigenpairs(torch.nn.Linear(2, 2))


@st.composite
def matrices(draw) -> Tensor:
    """Small symmetric matrices; integers make copies, zeros and exact ranks common."""
    n = draw(st.integers(1, 7))
    entry = draw(st.sampled_from([st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32)]))
    flat = draw(st.lists(entry, min_size=n * n, max_size=n * n))
    root = torch.tensor(flat, dtype=torch.float64).view(n, n)
    return root + root.T


# Its first Ritz value is 0.007 by chance, and no measure of the matrix's size.
UNLUCKY = torch.tensor(
    [
        [0.0, 2.0, 0.0, 2.0, 2.0, -3.0],
        [2.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 2.0, 0.0, 1.0],
        [2.0, 0.0, 2.0, 0.0, 0.0, -3.0],
        [2.0, 0.0, 0.0, 0.0, 2.0, -2.0],
        [-3.0, 0.0, 1.0, -3.0, -2.0, 2.0],
    ]
).double()


@settings(max_examples=150)
@example(UNLUCKY, "largest", 1, 1)
@given(matrices(), st.sampled_from(ENDS), st.integers(1, 7), st.integers(1, 7))
def test_on_any_small_matrix_the_claims_hold(matrix, which, k, budget):
    n = len(matrix)
    k, budget = min(k, n), min(max(k, budget), n)
    operator, calls = counted(of_matrix(matrix))
    pairs = eigenpairs(operator, k, which=which, max_products=budget)
    assert pairs.products == len(calls) <= budget
    assert (misfits(operator, pairs) <= pairs.error_bounds).all()
    spectrum = torch.linalg.eigvalsh(matrix)
    slack = 1e-12 * spectrum.abs().max()
    assert (pairs.values <= spectrum[-1] + slack).all()  # Ritz values lie inside the spectrum
    assert (pairs.values >= spectrum[0] - slack).all()
    if budget == n:
        assert pairs.converged
        truth = expected(spectrum.numpy(), k, which)
        found = pairs.values.abs().numpy() if which == "magnitude" else pairs.values.numpy()
        truth = np.abs(truth) if which == "magnitude" else truth
        assert np.abs(found - truth).max() <= 1e-2 * np.abs(truth).max() + slack
