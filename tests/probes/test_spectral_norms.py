"""Singular values against SciPy, explicit circulant matrices, Fourier transforms, and bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyndiag.curvature import Operator
from dyndiag.probes.weights import spectral_norms
from dyndiag.probes.weights.spectral_norms import (
    circular_gram,
    condition_number,
    effective_rank,
    effective_rank_by_quadrature,
    gram,
    grid,
    largest_singular_value,
    rank_for_share,
    singular_values,
    stable_rank,
)
from tests.oracles.spectra import counted, dense, seeded

WORKED = torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def matrix_with(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values, in random directions."""
    generator = seeded(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return (left * sigma) @ right.T


def test_ranks_of_a_worked_example() -> None:
    assert stable_rank(WORKED).item() == pytest.approx(11 / 9)
    p = (0.6, 0.2, 0.2)
    assert effective_rank(WORKED).item() == pytest.approx(
        math.exp(-sum(x * math.log(x) for x in p))
    )
    assert effective_rank(WORKED).item() == pytest.approx(2.586, abs=5e-4)
    assert rank_for_share(WORKED, 0.99).item() == 3
    assert rank_for_share(WORKED, 0.6).item() == 1
    assert condition_number(WORKED, 4).item() == math.inf
    assert condition_number(WORKED[:3], 4).item() == 3


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
@pytest.mark.parametrize("size", [0.1, 0.3, 1 / 7, 11.1])
def test_equal_singular_values_count_as_many_as_they_are(count: int, size: float) -> None:
    sigma = torch.full((count,), size, dtype=torch.float64)
    assert stable_rank(sigma).item() == pytest.approx(count)
    assert effective_rank(sigma).item() == pytest.approx(count)
    assert condition_number(sigma, count).item() == 1
    assert rank_for_share(sigma, 0.99).item() == math.ceil(0.99 * count)


def test_the_zero_matrix_has_no_ranks() -> None:
    sigma = singular_values(torch.zeros(3, 5))
    assert sigma.tolist() == [0, 0, 0]
    for quantity in (
        stable_rank(sigma),
        effective_rank(sigma),
        rank_for_share(sigma, 0.99),
        condition_number(sigma, 5),
    ):
        assert quantity.isnan()


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e6),
)
def test_ranks_do_not_depend_on_scale_or_orientation(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    matrix = torch.randn(rows, columns, generator=seeded(seed), dtype=torch.float64)
    one, other = singular_values(matrix), singular_values(scale * matrix.T)
    truth = scipy.linalg.svdvals(matrix.numpy())
    np.testing.assert_allclose(one.numpy(), truth, rtol=1e-10, atol=1e-13 * truth[0])
    for quantity in (stable_rank, effective_rank):
        assert quantity(one).item() == pytest.approx(quantity(other).item(), rel=1e-9)
        assert 1 - 1e-9 <= quantity(one).item() <= min(rows, columns) + 1e-9
    assert rank_for_share(one, 0.99) == rank_for_share(other, 0.99)


def test_a_condition_number_that_its_gram_matrix_has_lost() -> None:
    sigma = torch.logspace(0, -12, 20, dtype=torch.float64)
    found = condition_number(singular_values(matrix_with(sigma, 50, 20)), 50).item()
    assert found == pytest.approx(1e12, rel=1e-3)  # σ_min is known to about 1e-16


def test_a_matrix_without_full_rank_has_an_infinite_condition_number() -> None:
    generator = seeded(16)
    left, right = (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (30, 12))
    found = singular_values(left @ right.T)
    assert found[-1] > 0  # by rounding
    assert condition_number(found, 30).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_decomposed_as_it_is_stored(dtype: torch.dtype) -> None:
    stored = torch.randn(8, 30, generator=seeded(1)).to(dtype)
    truth = scipy.linalg.svdvals(stored.double().numpy())
    np.testing.assert_allclose(singular_values(stored).numpy(), truth, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_singular_values(bad: float) -> None:
    matrix = torch.ones(4, 3)
    matrix[1, 1] = bad
    assert singular_values(matrix).isnan().all()
    assert math.isnan(largest_singular_value(gram(matrix), seeded(0)).value)
    rank = effective_rank_by_quadrature(gram(matrix), seeded(0))
    assert math.isnan(rank.value)
    assert not rank.converged


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_gram_is_of_the_smaller_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(shape, generator=seeded(2))
    wide = matrix.double() if shape[0] < shape[1] else matrix.double().T
    for block in (1, 11, 1 << 20):  # rows a block: one, two, all
        monkeypatch.setattr(spectral_norms, "_BLOCK", block)
        torch.testing.assert_close(dense(gram(matrix)), wide @ wide.T)


SPECTRA = {
    "power law": torch.arange(1, 121, dtype=torch.float64) ** -0.8,
    "rank ten": torch.cat([torch.linspace(0.8, 1, 10), torch.zeros(110)]).double(),
    "rank ten and noise": torch.cat([torch.linspace(0.8, 1, 10), 1e-4 * torch.rand(110)]).double(),
    "geometric": 0.9 ** torch.arange(120, dtype=torch.float64),
    "flat": torch.linspace(0.9, 1.1, 120, dtype=torch.float64),
    "one": torch.cat([torch.full((1,), 5.0), torch.full((119,), 0.1)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_largest_singular_value_is_within_its_bounds(name: str) -> None:
    sigma = SPECTRA[name]
    operator, calls = counted(gram(matrix_with(sigma, 200, 120)))
    found = largest_singular_value(operator, seeded(3))
    truth = sigma.max().item()
    assert found.products == len(calls)
    assert found.converged
    assert found.value <= truth * (1 + 1e-9)
    assert found.upper_bound is not None
    assert truth <= found.upper_bound <= 1.011 * found.value
    assert found.value >= 0.99 * truth
    assert found.error <= 0.006 * found.value


@pytest.mark.parametrize("name", SPECTRA)
def test_effective_rank_by_quadrature(name: str) -> None:
    sigma = SPECTRA[name]
    operator, calls = counted(gram(matrix_with(sigma, 150, 120)))
    truth = effective_rank(sigma).item()
    found = effective_rank_by_quadrature(operator, seeded(104))
    assert found.products <= 160
    assert found.products == len(calls)
    # Of four probes' scatter |t| is above 5.8 once in a hundred; the seed is fixed.
    assert abs(found.value - truth) <= 5.8 * found.error + 1e-9
    assert found.error <= 0.15 * truth


def test_the_stated_error_of_the_effective_rank() -> None:
    matrix = torch.randn(100, 100, generator=seeded(5), dtype=torch.float64)
    truth = effective_rank(singular_values(matrix)).item()
    # Other seeds than the matrix's, whose own rows would come back as starts.
    found = [effective_rank_by_quadrature(gram(matrix), seeded(100 + s)) for s in range(24)]
    values = torch.tensor([one.value for one in found])
    stated = torch.tensor([one.error for one in found]).square().mean().sqrt().item()
    scatter = values.std().item()
    # Of 24 values the scatter is known to 15 %; 24 times 3 degrees of freedom give as much.
    assert 0.6 < stated / scatter < 1.6
    assert abs(values.mean().item() - truth) < 4 * scatter / math.sqrt(24) + 0.01 * truth


def test_the_error_holds_what_the_quadrature_does_not_resolve() -> None:
    sigma = 0.98 ** torch.arange(1100, dtype=torch.float64)
    truth = effective_rank(sigma).item()
    squares = sigma.square()  # Gaussian starts know no direction: the matrix may be diagonal
    operator = Operator(lambda v: squares * v, 1100, torch.float64, torch.device("cpu"))
    for seed in range(200, 204):
        found = effective_rank_by_quadrature(operator, seeded(seed))
        assert 0 < found.value - truth < 4 * found.error < truth


def explicit(
    kernel: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> np.ndarray:
    """The matrix of the convolution on a grid whose ends meet, entry by entry."""
    out, inner, *taps = kernel.shape
    positions = grid(taps, stride, dilation)
    outputs = [n // s for n, s in zip(positions, stride, strict=True)]
    matrix = np.zeros((out, *outputs, inner * groups, *positions))
    weights = kernel.double().numpy()
    for o, i in itertools.product(range(out), range(inner)):
        channel = (o // (out // groups)) * inner + i
        for tap in np.ndindex(*taps):
            for at in np.ndindex(*outputs):
                read = tuple(
                    (s * m + d * k) % n
                    for s, m, d, k, n in zip(stride, at, dilation, tap, positions, strict=True)
                )
                matrix[(o, *at, channel, *read)] += weights[(o, i, *tap)]
    return matrix.reshape(out * math.prod(outputs), -1)


CASES = [
    ((3, 2, 5), (1,), (1,), 1),
    ((4, 3, 4), (2,), (1,), 1),
    ((3, 2, 3), (1,), (3,), 1),
    ((2, 3, 3, 3), (1, 1), (1, 1), 1),
    ((4, 1, 3, 3), (1, 1), (1, 1), 4),
    ((4, 2, 3, 2), (2, 1), (1, 2), 2),
    ((2, 2, 2, 1, 3), (1, 1, 2), (1, 1, 1), 1),
    ((3, 2, 2, 2), (2, 2), (1, 1), 1),
    ((3, 2, 1, 1), (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize(("shape", "stride", "dilation", "groups"), CASES)
def test_circular_convolutions_against_their_matrices(
    shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> None:
    kernel = torch.randn(shape, generator=seeded(6), dtype=torch.float64)
    matrix = explicit(kernel, stride, dilation, groups)
    operator = circular_gram(kernel, stride, dilation, groups)
    v = torch.randn(operator.size, generator=seeded(7), dtype=torch.float64)
    image = torch.from_numpy(matrix.T @ (matrix @ v.numpy()))
    torch.testing.assert_close(operator.product(v), image)
    truth = scipy.linalg.svdvals(matrix)[0]
    found = largest_singular_value(operator, seeded(8))
    assert found.upper_bound is not None
    assert 0.99 * truth <= found.value <= truth * (1 + 1e-9)
    assert truth <= found.upper_bound


def fourier_norm(kernel: Tensor, positions: tuple[int, ...]) -> float:
    """The maximum over frequencies of σ₁ of the kernel's discrete Fourier transform."""
    transform = np.fft.fftn(kernel.numpy(), s=positions, axes=tuple(range(2, kernel.dim())))
    return np.linalg.norm(np.moveaxis(transform, (0, 1), (-2, -1)), ord=2, axis=(-2, -1)).max()


@pytest.mark.parametrize(
    "shape", [(6, 4, 3), (6, 4, 3, 3), (8, 8, 5, 5), (4, 6, 3, 3, 3), (5, 3, 1, 7)]
)
def test_the_norm_is_the_largest_over_frequencies(shape: tuple[int, ...]) -> None:
    kernel = torch.randn(shape, generator=seeded(9), dtype=torch.float64)
    ones = (1,) * (len(shape) - 2)
    positions = grid(shape[2:], ones, ones)
    truth = fourier_norm(kernel, positions)
    found = largest_singular_value(circular_gram(kernel, ones, ones, 1), seeded(10))
    assert 0.99 * truth <= found.value <= truth * (1 + 1e-9)
    assert found.upper_bound is not None
    assert truth <= found.upper_bound
    # What the grid may miss, by its docstring.
    finer = {1: 32, 2: 6, 3: 2}[len(ones)]
    missed = fourier_norm(kernel, tuple(finer * n for n in positions)) / truth
    degrees = [(k - 1) / 2 for k in shape[2:]]
    cosines = (math.cos(math.pi * n / m) for n, m in zip(degrees, positions, strict=True))
    most = 1 / math.prod(cosines)
    assert 1 - 1e-12 <= missed <= most
    assert most <= (1 / math.cos(math.pi / 8)) ** len(degrees) * (1 + 1e-12)


def test_the_most_that_a_grid_can_miss() -> None:
    # cos(ω − ω₀) + … with its only maximum half way between two frequencies of the grid.
    (positions,) = grid((3,), (1,), (1,))
    half = math.pi / positions
    real = torch.tensor([math.cos(half), 0.0, math.cos(half)]).double()
    imaginary = torch.tensor([-math.sin(half), 0.0, math.sin(half)]).double()
    # As two channels, the real and imaginary parts of a complex kernel: σ₁ = max |K(ω)|.
    pair = [torch.stack([real, -imaginary]), torch.stack([imaginary, real])]
    kernel = torch.stack(pair)
    ratio = fourier_norm(kernel, (64 * positions,)) / fourier_norm(kernel, (positions,))
    assert ratio == pytest.approx(1 / math.cos(half), rel=1e-3)


def gram_iteration(matrix: np.ndarray, rounds: int) -> list[float]:
    """Upper bounds of σ₁ from the Frobenius norms of repeated Gram matrices."""
    bounds, scale = [], 0.0
    for t in range(1, rounds + 1):
        norm = np.linalg.norm(matrix)
        matrix = matrix / norm
        scale = 2 * (scale + math.log(norm))
        matrix = matrix.conj().T @ matrix
        bounds.append(math.exp((math.log(np.linalg.norm(matrix)) + scale) / 2**t))
    return bounds


def test_gram_iteration_bounds_the_same_norms() -> None:
    matrix = np.random.default_rng(0).normal(size=(20, 30))
    sigma = scipy.linalg.svdvals(matrix)[0]
    found = largest_singular_value(gram(torch.from_numpy(matrix)), seeded(0))
    bounds = gram_iteration(matrix, 6)
    ratios = scipy.linalg.svdvals(matrix) / sigma
    for t, bound in enumerate(bounds, 1):  # ‖G_t‖_F^(2^−t) in closed form
        power = 2.0 ** (t + 1)
        assert bound / sigma == pytest.approx(np.sum(ratios**power) ** (1 / power))
    assert sorted(bounds, reverse=True) == bounds
    assert found.value <= min(bounds)
    assert found.value >= min(bounds) / 1.01

    kernel = torch.randn(6, 4, 3, 3, generator=seeded(11), dtype=torch.float64)
    transform = np.fft.fftn(kernel.numpy(), s=(16, 16), axes=(2, 3)).reshape(6, 4, -1)
    bound = max(gram_iteration(transform[:, :, i], 8)[-1] for i in range(transform.shape[-1]))
    conv = largest_singular_value(circular_gram(kernel, (1, 1), (1, 1), 1), seeded(12))
    assert bound / 1.02 <= conv.value <= bound


def test_zero_padding_does_not_stretch_more() -> None:
    kernel = torch.randn(4, 3, 3, 3, generator=seeded(13), dtype=torch.float64)
    eye = torch.eye(3 * 10 * 10, dtype=torch.float64).view(-1, 3, 10, 10)
    padded = F.conv2d(eye, kernel, padding=1).flatten(1).T
    norm = torch.linalg.matrix_norm(padded, ord=2).item()
    everywhere = fourier_norm(kernel, (256, 256))
    assert 0.7 * everywhere < norm <= everywhere


def test_half_precision_kernels_are_measured_in_float32() -> None:
    kernel = torch.randn(4, 3, 3, 3, generator=seeded(14)).to(torch.bfloat16)
    operator = circular_gram(kernel, (1, 1), (1, 1), 1)
    assert operator.dtype == torch.float32
    found = largest_singular_value(operator, seeded(15)).value
    assert found == pytest.approx(fourier_norm(kernel.double(), (16, 16)), rel=1e-2)
