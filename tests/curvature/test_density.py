"""Stochastic Lanczos quadrature: exact where it can be, and its spread where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from dyndiag.curvature import Operator, Outcome, spectral_density
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import SPECTRA, counted, matrix_with, of_diagonal, of_matrix, seeded

THREE = np.r_[np.zeros(90), np.ones(9), 10.0]


def test_nodes_are_exact_once_there_is_one_for_each_eigenvalue():
    found = spectral_density(of_matrix(matrix_with(THREE)), probes=5, steps=3)
    assert found.nodes.shape == found.weights.shape == (5, 3)
    torch.testing.assert_close(
        found.nodes, torch.tensor([0.0, 1.0, 10.0]).double().expand(5, 3), atol=1e-12, rtol=0
    )


def test_weights_are_right_on_average_with_the_spread_that_theory_says():
    """Multiplicity q of n: mean q/n, standard deviation √(2q(n − q)/(n²(n + 2)))."""
    found = spectral_density(of_diagonal(THREE), probes=1500, steps=3)
    q = np.array([90, 9, 1])
    spread = np.sqrt(2 * q * (100 - q) / (100**2 * 102))
    weights = found.weights.numpy()
    np.testing.assert_allclose(weights.mean(0), q / 100, atol=4 * spread.max() / math.sqrt(1500))
    np.testing.assert_allclose(weights.std(0), spread, rtol=0.15)


@pytest.mark.parametrize("name", SPECTRA)
def test_every_probe_holds_all_mass_once(name):
    found = spectral_density(of_matrix(matrix_with(SPECTRA[name])), probes=3, steps=12)
    assert found.converged
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3).double())
    for curve in (found.density, found.lowest, found.highest):
        assert curve.shape == found.grid.shape
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1.0, abs=1e-3)
    assert (found.lowest <= found.density + 1e-12).all()
    assert (found.density <= found.highest + 1e-12).all()
    assert torch.trapezoid(found.highest - found.lowest, found.grid) > 1e-3


@pytest.mark.parametrize("steps", [4, 16, 32])
def test_distance_to_the_spectrum(steps):
    """W₁ ≤ π · spread/(4 · steps) for the probe's own measure; that is near the spectrum here."""
    spectrum = np.linspace(-1, 3, 4000)
    found = spectral_density(of_diagonal(spectrum), probes=4, steps=steps)
    distance = wasserstein_distance(
        found.nodes.flatten().numpy(), spectrum, found.weights.flatten().numpy()
    )
    assert distance < math.pi * 4 / (4 * steps)
    spread = float(found.nodes.max() - found.nodes.min())
    assert found.kernel_width == pytest.approx(spread / 200)


def test_negative_mass_and_its_standard_error_are_calibrated():
    spectrum = np.r_[np.linspace(-2, -1, 60), np.linspace(1, 4, 140)]
    z = []
    for seed in range(200):
        found = spectral_density(of_diagonal(spectrum), probes=8, steps=20, generator=seeded(seed))
        z.append((found.negative_mass - 0.3) / found.negative_mass_error)
    assert abs(np.mean(z)) < 4 * np.std(z) / math.sqrt(200)
    assert 0.52 <= np.mean(np.abs(z) <= 1) <= 0.78  # Student's t with 7 degrees: 65 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_below_zero_is_not_negative_mass(dtype):
    found = spectral_density(of_matrix(matrix_with(THREE), dtype), probes=6, steps=20)
    assert found.negative_mass == 0.0
    assert found.negative_mass_error == 0.0


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_one_point_of_mass(value):
    found = spectral_density(of_diagonal(np.full(30, value)))
    assert found.converged
    assert found.products == 4
    assert found.grid[found.density.argmax()] == pytest.approx(value, abs=found.kernel_width)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1.0, abs=1e-3)


def test_a_probe_that_ends_early_is_padded_with_nothing():
    operator = of_diagonal(np.r_[np.zeros(30), 2.0])
    found = spectral_density(operator, probes=2, steps=9)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())
    assert found.products == 4


def test_the_stated_cost_is_the_cost_paid():
    operator, calls = counted(of_diagonal(SPECTRA["indefinite"]))
    assert spectral_density(operator).products == len(calls) == 4 * 30


def test_what_is_not_finite_is_left_out():
    operator, calls = counted(of_diagonal(SPECTRA["indefinite"]))
    inner = operator.product
    spoilt = Operator(
        lambda v: inner(v) / (len(calls) <= 15), 120, torch.float64, torch.device("cpu")
    )
    found = spectral_density(spoilt, probes=3, steps=10)
    assert found.outcome is Outcome.NOT_FINITE
    assert found.products == 16
    assert found.nodes.shape == (1, 10)
    assert found.density.isfinite().all()
    assert math.isnan(found.negative_mass_error)
    nothing = spectral_density(spoilt, probes=3, steps=10)
    assert nothing.density.isnan().all()
    assert nothing.nodes.shape == (0, 0)


def test_the_same_answer_at_every_call_and_no_global_stream():
    before = torch.get_rng_state()
    operator = of_diagonal(SPECTRA["indefinite"])
    one, other = spectral_density(operator), spectral_density(operator)
    assert torch.equal(one.density, other.density)
    assert not torch.equal(one.nodes, spectral_density(operator, generator=seeded(1)).nodes)
    assert torch.equal(torch.get_rng_state(), before)


def test_at_the_door():
    with pytest.raises(DyndiagError, match="at least 1, but are 0 and 30"):
        spectral_density(of_diagonal([1.0]), probes=0)
