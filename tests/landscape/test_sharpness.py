"""Sharpness in the sense of SAM against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag import curvature, landscape
from dyndiag.errors import DyndiagError
from tests.landscape.made import (
    NOTHING,
    Weights,
    cross_entropy,
    network,
    quadratic,
    rescaled,
    task,
    trained,
)

STEEP = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))


def test_at_a_minimum_it_is_half_the_curvature_times_the_squared_radius() -> None:
    found = landscape.ascent_sharpness(
        Weights(0.0, 0.0), quadratic(STEEP), NOTHING, radius=0.1, steps=20
    )
    assert found.value == pytest.approx(0.02, rel=1e-6)
    assert found.one_step == 0.0  # there is no gradient to follow
    assert found.gradients == 20 and len(found.rises) == 20


def test_one_step_is_exact_where_the_loss_is_linear() -> None:
    slope = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = landscape.ascent_sharpness(
        Weights(1.0, 1.0), lambda m, _: (m.t * slope).sum(), NOTHING, radius=0.5, steps=1
    )
    assert found.value == found.one_step == pytest.approx(2.5, rel=1e-14)
    assert (found.loss, found.gradients, found.radius) == (-1.0, 1, 0.5)


@settings(max_examples=20)
@given(
    t=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    eigenvalues=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_never_above_the_maximum(t: tuple[float, float], eigenvalues: tuple[float, float]) -> None:
    h = np.diag(eigenvalues)
    angles = np.linspace(0, 2 * np.pi, 20001)
    ring = np.stack([np.cos(angles), np.sin(angles)])
    at = np.array(t)[:, None] + 0.3 * ring
    start = np.array(t) @ h @ np.array(t) / 2
    # A quadratic's maximum over a ball is on its edge, or at the centre of a concave one.
    best = max((at * (h @ at)).sum(0).max() / 2 - start, -start if np.hypot(*t) <= 0.3 else 0, 0)
    found = landscape.ascent_sharpness(
        Weights(*t), quadratic(torch.from_numpy(h)), NOTHING, radius=0.3, steps=8
    )
    assert -1e-12 <= found.value <= best + 1e-6
    assert found.value == max(0.0, *found.rises)


def test_more_steps_find_more() -> None:
    """Beside a valley whose sharp direction the gradient hardly shows."""
    model = Weights(0.001, 1.0)
    h = torch.diag(torch.tensor([400.0, 20.0], dtype=torch.float64))
    found = landscape.ascent_sharpness(model, quadratic(h), NOTHING, radius=0.5, steps=60)
    assert found.one_step < 0.3 * found.value
    angles = np.linspace(0, 2 * np.pi, 100001)
    x, y = 0.001 + 0.5 * np.cos(angles), 1 + 0.5 * np.sin(angles)
    best = (200 * x**2 + 10 * y**2).max() - found.loss
    assert found.value == pytest.approx(best, rel=1e-3)


def test_of_a_trained_network_it_is_about_half_lambda_radius_squared() -> None:
    """Near a minimum the first steps' gradient term adds to it; the bound stays below λ's."""
    data = task()
    model = trained(network(0), data, 400, 0)
    [sharpness] = curvature.eigenpairs(
        curvature.hessian(model, cross_entropy, data)
    ).values.tolist()
    gradient = landscape.gradient_direction(model, cross_entropy, data).norm
    radius = 0.02
    loader = DataLoader(TensorDataset(*data), batch_size=100)
    found = landscape.ascent_sharpness(model, cross_entropy, loader, radius=radius)
    quadratic_bound = radius * gradient + sharpness * radius**2 / 2
    assert 0.5 * quadratic_bound < found.value < 1.1 * quadratic_bound
    whole = landscape.ascent_sharpness(model, cross_entropy, data, radius=radius)
    assert found.value == pytest.approx(whole.value, rel=1e-3)


def test_adaptive_sharpness_does_not_see_how_layers_are_scaled() -> None:
    data = task(32)
    inputs = (data[0].double(), data[1])
    one = network(0, 8).double()
    other = rescaled(one, 7)
    values = {
        adaptive: [
            landscape.ascent_sharpness(
                m, cross_entropy, inputs, radius=0.3, adaptive=adaptive
            ).value
            for m in (one, other)
        ]
        for adaptive in (True, False)
    }
    assert values[True][0] == pytest.approx(values[True][1], rel=1e-9)
    assert values[False][0] != pytest.approx(values[False][1], rel=0.1)


def test_a_start_that_is_not_finite() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model.t.log().sum()

    found = landscape.ascent_sharpness(Weights(-1.0), loss_fn, NOTHING)
    assert math.isnan(found.value) and math.isnan(found.one_step) and math.isnan(found.loss)


def test_a_wall_within_the_ball() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return 1 / (1 - model.t).clamp(min=0).sum()

    found = landscape.ascent_sharpness(Weights(0.0), loss_fn, NOTHING, radius=2.0)
    assert found.value == math.inf


def test_where_nothing_slopes() -> None:
    found = landscape.ascent_sharpness(
        Weights(1.0), lambda m, _: 0.0 * m.t.sum(), NOTHING, radius=0.1
    )
    assert (found.value, found.one_step) == (0.0, 0.0)


def test_weights_too_coarse_for_the_step_are_refused() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    batch = torch.ones(4, 64).bfloat16()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(batch).float().square().mean()

    with pytest.raises(DyndiagError, match=r"too coarse.*pass model.float\(\)"):
        landscape.ascent_sharpness(model, loss_fn, batch, radius=1e-3)
    assert landscape.ascent_sharpness(model, loss_fn, batch, radius=3.0, steps=1).value > 0


@pytest.mark.parametrize(
    "ask, says",
    [
        ({"radius": 0.0}, "radius must be a finite number above 0, but it is 0.0"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, but it is 0"),
    ],
)
def test_what_is_wrong_is_said(ask: dict[str, Any], says: str) -> None:
    with pytest.raises(DyndiagError, match=says):
        landscape.ascent_sharpness(Weights(1.0), quadratic(STEEP), NOTHING, **ask)
    with pytest.raises(DyndiagError, match="no graph back to the parameters"):
        landscape.ascent_sharpness(Weights(1.0), lambda m, _: m.t.detach().sum(), NOTHING)
