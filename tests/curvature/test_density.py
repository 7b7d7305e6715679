"""Stochastic Lanczos quadrature: exact where it can be, and its spread where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from dyndiag.curvature import Operator, Outcome, spectral_density
from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.lanczos import Lanczos
from dyndiag.errors import DyndiagError
from tests.oracles.spectra import SPECTRA, counted, matrix_with, of_diagonal, of_matrix, seeded

THREE = np.r_[np.zeros(90), np.ones(9), 10.0]


def test_nodes_are_exact_once_there_is_one_for_each_eigenvalue():
    found = spectral_density(of_matrix(matrix_with(THREE)), probes=5, steps=3)
    assert found.products == 3 + 4 * 2
    torch.testing.assert_close(found.outliers[-1].item(), 10.0)
    for node in found.nodes.flatten():
        assert min(abs(node - value) for value in (0, 1, 10)) < 1e-12
    single = spectral_density(of_matrix(matrix_with(THREE)), probes=1, steps=3)
    torch.testing.assert_close(single.nodes, torch.tensor([[0.0, 1.0, 10.0]]).double())
    assert math.isnan(single.negative_mass_error)


def test_an_outlier_is_taken_out_at_its_exact_mass():
    """Its weight in a probe would be 0.01 ± 0.014."""
    spectrum = np.r_[np.linspace(0, 1, 99), 10.0]
    for seed in range(10):
        found = spectral_density(of_diagonal(spectrum), steps=25, generator=seeded(seed))
        assert found.outliers.numpy()[-1] == pytest.approx(10.0)
        edges = torch.tensor([-1.0, 5.0, 11.0]).double()
        mass, error = found.mass(edges)
        torch.testing.assert_close(mass, torch.tensor([0.99, 0.01]).double())
        torch.testing.assert_close(error, torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_weights_are_right_on_average_with_the_spread_that_theory_says():
    """Multiplicity q of n: mean q/n, standard deviation √(2q(n − q)/(n²(n + 2)))."""
    spectrum = np.r_[np.zeros(60), np.ones(40)]
    masses = [
        spectral_density(of_diagonal(spectrum), probes=1, steps=3, generator=seeded(s)).weights
        for s in range(300)
    ]
    spread = math.sqrt(2 * 60 * 40 / (100**2 * 102))
    ones = torch.cat(masses)[:, 1]
    assert ones.mean().item() == pytest.approx(0.4, abs=4 * spread / math.sqrt(300))
    assert ones.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * 300))


@pytest.mark.parametrize("copies", [2, 5])
def test_a_multiple_outlier_keeps_all_its_mass(copies):
    """The first start shows one of its vectors; the later ones must find the other copies."""
    spectrum = np.r_[np.linspace(0, 1, 200 - copies), np.full(copies, 8.0)]
    edges = torch.tensor([-1.0, 4.0, 9.0]).double()
    found = [
        spectral_density(of_diagonal(spectrum), probes=3, steps=16, generator=seeded(s))
        for s in range(40)
    ]
    taken_out = [f for f in found if (f.outliers > 4).any()]
    assert len(taken_out) > 20
    assert all(len(f.nodes) == 2 for f in taken_out)  # the first start was used up
    masses = [f.mass(edges) for f in found]
    shares = np.array([mass[1].item() for mass, _ in masses])
    spread = math.sqrt(2 * copies / 200**2)
    assert shares.mean() == pytest.approx(copies / 200, abs=4 * spread / math.sqrt(40))


def test_mass_at_zero_is_told_with_an_error():
    spectrum = np.r_[np.zeros(150), np.linspace(0.1, 2, 50)]
    found = [
        spectral_density(of_diagonal(spectrum), probes=4, steps=20, generator=seeded(s))
        for s in range(30)
    ]
    z = np.array([(f.zero_mass - 0.75) / f.zero_mass_error for f in found])
    assert np.mean(np.abs(z) <= 1) >= 0.55
    assert abs(np.mean([f.zero_mass for f in found]) - 0.75) < 0.02
    assert all(f.negative_mass == 0.0 for f in found)


def test_the_bulk_is_finer_than_its_gauss_rule():
    """A flat bulk read by m Gauss nodes is off by spread/(4m) or so: the averaged rule, by half."""
    spectrum = np.linspace(-1, 3, 20000)
    gauss, averaged = [], []
    for seed in range(10):
        run = Lanczos(of_diagonal(spectrum), gaussian(of_diagonal(spectrum), seeded(seed)))
        for _ in range(12):
            run.extend()
        values, vectors = run.ritz()
        gauss.append(wasserstein_distance(values, spectrum, vectors[0] ** 2))
        found = spectral_density(of_diagonal(spectrum), probes=1, steps=12, generator=seeded(seed))
        averaged.append(
            wasserstein_distance(found.nodes[0].numpy(), spectrum, found.weights[0].numpy())
        )
        assert found.nodes.min() >= values[0] - 1e-12 and found.nodes.max() <= values[-1] + 1e-12
    assert np.mean(averaged) < 0.65 * np.mean(gauss)


def test_a_small_matrix_is_exact():
    spectrum = np.r_[-2.0, np.linspace(0.5, 3, 19)]
    found = spectral_density(of_matrix(matrix_with(spectrum)))
    assert found.products == 20
    np.testing.assert_allclose(found.nodes[0].numpy(), spectrum, atol=1e-12)
    np.testing.assert_allclose(found.weights[0].numpy(), 1 / 20)
    assert (found.negative_mass, found.negative_mass_error) == (pytest.approx(0.05), 0.0)
    torch.testing.assert_close(
        found.mass(torch.tensor([-3.0, 0.0, 3.0]).double()),
        (torch.tensor([0.05, 0.95]).double(), torch.zeros(2).double()),
    )


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
    if name != "low rank":  # of which the pairs taken out leave one point
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
    for seed in range(60):
        found = spectral_density(of_diagonal(spectrum), probes=6, steps=14, generator=seeded(seed))
        z.append((found.negative_mass - 0.3) / found.negative_mass_error)
    assert abs(np.mean(z)) < 4 * np.std(z) / math.sqrt(60)
    # Student's t with 5 degrees: 64 %; the doubt of the nodes around zero adds some.
    assert 0.48 <= np.mean(np.abs(z) <= 1) <= 0.88


def test_negative_mass_in_the_middle_of_a_cluster_is_doubted():
    """Probes agree on a mass that their nodes cannot resolve."""
    spectrum = np.r_[np.linspace(-1e-4, 2e-4, 300), np.linspace(0.1, 2, 40)]
    misses = [
        abs(found.negative_mass - np.mean(spectrum < 0)) / found.negative_mass_error
        for found in (
            spectral_density(of_diagonal(spectrum), probes=4, steps=8, generator=seeded(s))
            for s in range(20)
        )
    ]
    assert np.mean(np.array(misses) <= 2.5) >= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_below_zero_is_not_negative_mass(dtype):
    found = spectral_density(of_matrix(matrix_with(THREE), dtype), probes=6, steps=20)
    assert found.negative_mass == 0.0
    assert found.negative_mass_error == 0.0


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_one_point_of_mass(value):
    found = spectral_density(of_diagonal(np.full(30, value)))
    assert found.converged
    assert found.products == 2
    assert found.negative_mass == (value < 0)
    assert found.zero_mass == (value == 0)
    assert found.grid[found.density.argmax()] == pytest.approx(value, abs=found.kernel_width)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1.0, abs=1e-3)


def test_a_probe_that_ends_early_is_padded_with_nothing():
    operator = of_diagonal(np.r_[np.zeros(30), 2.0])
    found = spectral_density(operator, probes=2, steps=9)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())
    assert found.products == 4


def test_the_stated_cost_is_the_cost_paid():
    operator, calls = counted(of_diagonal(SPECTRA["indefinite"]))
    assert spectral_density(operator, probes=3, steps=20).products == len(calls) == 3 * 20


def test_what_is_not_finite_is_left_out():
    operator, calls = counted(of_diagonal(SPECTRA["indefinite"]))
    inner = operator.product
    spoilt = Operator(
        lambda v: inner(v) / (len(calls) <= 15), 120, torch.float64, torch.device("cpu")
    )
    found = spectral_density(spoilt, probes=3, steps=10)
    assert found.outcome is Outcome.NOT_FINITE
    assert found.products == 16
    assert len(found.nodes) == 1
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
    with pytest.raises(DyndiagError, match="at least 1, but are 0 and 50"):
        spectral_density(of_diagonal([1.0]), probes=0)
