"""Full-batch runs on a tiny net, with the exact float64 Hessian, whose edge is known.

A tanh network of 100 units learns the fourth Chebyshev polynomial on 20 points (Cohen et al. 2021).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dyndiag.detectors import replay
from dyndiag.values import Event
from tests.detectors.planted import Row

WIDTH = 100
X = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
Y = 8 * X**4 - 8 * X**2 + 1


def loss_of(weights: Tensor) -> Tensor:
    inner, bias, outer = weights.split(WIDTH)
    return 0.5 * ((torch.tanh(X * inner + bias) @ outer[:, None] - Y) ** 2).mean()


def initial(seed: int, second_seed: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 1.9 * math.sqrt(2 / (1 + WIDTH))
    inner = scale * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    if second_seed is not None:
        generator = torch.Generator().manual_seed(second_seed)
    outer = scale * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return torch.cat([inner, torch.zeros(WIDTH, dtype=torch.float64), outer])


def hessian(weights: Tensor) -> Tensor:
    """In closed form: the Jacobian's part, and per unit what multiplies the residual."""
    inner, bias, outer = weights.split(WIDTH)
    unit = torch.tanh(X * inner + bias)
    slope = 1 - unit**2
    bend = -2 * unit * slope * outer
    residual = (unit @ outer[:, None] - Y) / len(X)
    jacobian = torch.cat([outer * slope * X, outer * slope, unit], dim=1)
    full = jacobian.T @ jacobian / len(X)
    blocks = full.view(3, WIDTH, 3, WIDTH)
    for (row, column), second in {
        (0, 0): bend * X**2,
        (0, 1): bend * X,
        (1, 1): bend,
        (0, 2): slope * X,
        (1, 2): slope,
    }.items():
        per_unit = (residual * second).sum(0)
        blocks[row, :, column].diagonal().add_(per_unit)
        if row != column:
            blocks[column, :, row].diagonal().add_(per_unit)
    return full


def test_the_closed_form_is_the_hessian() -> None:
    weights = initial(3)
    exact = torch.autograd.functional.hessian(loss_of, weights)
    torch.testing.assert_close(hessian(weights), exact, rtol=1e-12, atol=1e-12)


def row_of(loss: float, rate: float, **measured: float) -> dict[str, float]:
    row = {"train/loss": loss, "train/learning_rate": rate, "stability/full_batch": 1.0}
    return row | {name.replace("__", "/"): value for name, value in measured.items()}


def gradient_descent(steps: int, rate: float, every: int) -> list[Row]:
    weights = initial(0)
    rows = []
    for step in range(steps):
        measured = {}
        if step % every == 0:
            sharpness = torch.linalg.eigvalsh(hessian(weights))[-1].item()
            measured = {
                "curvature__sharpness": sharpness,
                "stability__threshold": 2 / rate,
                "stability__edge_ratio": sharpness * rate / 2,
            }
        leaf = weights.clone().requires_grad_()
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        weights = weights - rate * gradient
        rows.append((step, row_of(loss.item(), rate, **measured)))
    return rows


def adam(steps: int, rate: float, every: int) -> list[Row]:
    weights = torch.nn.Parameter(initial(1, 2))
    optimizer = torch.optim.Adam([weights], lr=rate)
    rows = []
    for t in range(1, steps + 1):
        loss = loss_of(weights)
        (weights.grad,) = torch.autograd.grad(loss, weights)
        optimizer.step()
        measured = {}
        if t % every == 0 or t == 1:
            second = optimizer.state[weights]["exp_avg_sq"] / (1 - 0.999**t)
            preconditioner = (1 - 0.9**t) * (second.sqrt() + 1e-8)
            root = preconditioner.rsqrt()
            scaled = root[:, None] * hessian(weights.detach()) * root
            sharpness = torch.linalg.eigvalsh(scaled)[-1].item()
            measured = {
                "curvature__preconditioned_sharpness": sharpness,
                "stability__threshold": 38 / rate,
                "stability__edge_ratio": sharpness * rate / 38,
                "stability__warmup": float(t < 44),
            }
        rows.append((t, row_of(loss.item(), rate, **measured)))
    return rows


def of_kind(kind: str, rows: list[Row]) -> list[Event]:
    return [event for event in replay(rows) if event.kind == kind]


@pytest.fixture(scope="module")
def descent() -> list[Row]:
    return gradient_descent(steps=3000, rate=0.4, every=20)


def test_gradient_descent_arrives_at_the_edge_once_and_stays(descent: list[Row]) -> None:
    (edge,) = of_kind("edge_of_stability", descent)
    assert edge.start == 380
    assert edge.end is None
    assert edge.confidence >= 0.95
    ratios = [
        row["stability/edge_ratio"]
        for step, row in descent
        if step > edge.start + 600 and "stability/edge_ratio" in row
    ]
    assert min(ratios) > 0.85
    assert max(ratios) < 1.2


def test_the_jumps_at_the_edge_come_back_and_nothing_diverges(descent: list[Row]) -> None:
    spikes = of_kind("loss_spike", descent)
    assert spikes
    assert all(event.end is not None for event in spikes)
    assert {event.kind for event in replay(descent)} == {"edge_of_stability", "loss_spike"}


def test_adam_arrives_after_warm_up_although_its_first_ratio_is_far_above_one() -> None:
    rows = adam(steps=900, rate=5e-3, every=25)
    assert rows[0][1]["stability/edge_ratio"] > 10
    (edge,) = of_kind("edge_of_stability", rows)
    assert edge.start == 650
    assert edge.end is None
    (rise,) = of_kind("progressive_sharpening", rows)
    assert rise.end == edge.start


def test_adam_at_a_low_rate_only_sharpens() -> None:
    rows = adam(steps=600, rate=3e-4, every=25)
    assert of_kind("edge_of_stability", rows) == []
    assert len(of_kind("progressive_sharpening", rows)) == 1


def test_descent_on_a_quadratic_beyond_its_edge_diverges_until_it_overflows() -> None:
    curvature, rate, weight = 8.0, 0.3, 1e-3  # rate · curvature = 2.4
    rows = []
    for step in range(1200):
        gradient = curvature * weight
        rows.append((step, row_of(0.5 * weight * gradient, rate, gradients__norm=abs(gradient))))
        weight -= rate * gradient
    (divergence,) = of_kind("divergence", rows)
    (non_finite,) = of_kind("non_finite", rows)
    assert divergence.end is None
    assert divergence.start <= 10
    # each step multiplies the loss by 1.96: 4e-6 · 1.96^k overflows at k = 1,074
    assert (non_finite.start, non_finite.series[0]) == (1074, "train/loss")
    assert all(math.isfinite(event.severity) for event in replay(rows))
