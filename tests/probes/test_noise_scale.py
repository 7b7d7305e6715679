"""The gradient noise scale, where it is known in closed form and where it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyndiag.batches import MicroBatches
from dyndiag.demos import digits
from dyndiag.probes.gradients.noise_scale import NoiseScale, unbiased
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from tests.models import cross_entropy
from tests.probes.stepping import row
from tests.probes.test_top_space import half_squared_error, state_of

EVERY = Every(1)


def state_before(model: nn.Module, loss_fn: Any, *micro: Any, weights: Any = ()) -> TrainState:
    """A step on these micro-batches, with the present weights as those before it."""
    state = state_of(model, loss_fn, micro[0])
    before = tuple([p.detach().clone() for p in state.parameters])
    return replace(state, batch=MicroBatches(micro, weights), weights_before=before)


def linear(weights: Sequence[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False).double()
    model.weight.data = torch.tensor([weights], dtype=torch.float64)
    return model


def regression(g: torch.Generator, count: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    """Standard normal inputs, and targets that are noise around 0."""
    x = torch.randn(count, width, generator=g, dtype=torch.float64)
    return x, noise * torch.randn(count, 1, generator=g, dtype=torch.float64)


def test_by_the_sample_variance_of_the_parts() -> None:
    """Of equal parts tr Σ is a part's size times the variance between them, n − 1 below."""
    g = torch.Generator().manual_seed(0)
    model = linear([0.3, -0.2, 0.5])
    x, y = regression(g, 26, 3, 1.0)  # 8 parts of 3; two examples are left out
    seen = row(NoiseScale(EVERY).measure(state_before(model, half_squared_error, (x, y))))
    each = x * (x @ model.weight.detach().T - y)
    parts = each[:24].view(8, 3, 3).mean(1)
    trace = 3 * parts.var(0).sum().item()
    square = parts.mean(0).square().sum().item() - trace / 24
    assert seen["gradients/noise_trace"] == pytest.approx(trace, rel=1e-12)
    assert seen["gradients/noise_free_square"] == pytest.approx(square, rel=1e-12)
    if square > 0:
        assert seen["gradients/noise_scale"] == pytest.approx(trace / square, rel=1e-12)


@pytest.mark.parametrize("micro", [False, True])
def test_linear_regression_in_closed_form(micro: bool) -> None:
    """Gradient x(xᵀθ − e): ‖G‖² = ‖θ‖² and tr Σ = d(‖θ‖² + σ²) + ‖θ‖² for normal x and e."""
    theta, noise, width = [0.8, -0.6, 0.0, 0.5], 1.5, 4
    g = torch.Generator().manual_seed(1)
    model, probe = linear(theta), NoiseScale(EVERY)
    found = []
    for _ in range(300):
        x, y = regression(g, 32, width, noise)
        if micro:  # of different sizes, weighted as their examples
            parts = [(x[:4], y[:4]), (x[4:12], y[4:12]), (x[12:], y[12:])]
            state = state_before(model, half_squared_error, *parts, weights=(1 / 8, 1 / 4, 5 / 8))
        else:
            state = state_before(model, half_squared_error, (x, y))
        seen = row(probe.measure(state))
        found.append((seen["gradients/noise_trace"], seen["gradients/noise_free_square"]))
    size = sum(t * t for t in theta)
    truth = torch.tensor([width * (size + noise**2) + size, size], dtype=torch.float64)
    samples = torch.tensor(found, dtype=torch.float64)
    # Independent batches: the mean of 300 is off by more than 4 of its errors once in 16,000.
    errors = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - truth).abs() < 4 * errors).all()
    assert (errors / truth < 0.1).all()
    # The running mean is worth (1 + .99)/(1 − .99) = 199 samples.
    spread = samples.std(0) / math.sqrt(199) / truth
    scale = (truth[0] / truth[1]).item()
    assert abs(seen["gradients/noise_scale"] / scale - 1) < 4 * spread.sum().item()


def test_means_are_taken_apart_and_then_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = linear([0.0]), NoiseScale(EVERY)
    state = state_before(model, half_squared_error, regression(torch.Generator(), 8, 1, 1.0))
    estimates = [(4.0, -1.0), (2.0, 1.0), (6.0, 3.0), (math.nan, 1.0), (1.0, 1.0)]
    scales = []
    for estimate in estimates:
        monkeypatch.setattr(
            "dyndiag.probes.gradients.noise_scale.unbiased", lambda *_, e=estimate: e
        )
        scales.append(row(probe.measure(state))["gradients/noise_scale"])
    assert math.isnan(scales[0])
    assert scales[1] == pytest.approx((0.99 * 4 + 2) / (0.99 * -1 + 1))
    both = [sum(0.99 ** (2 - i) * estimates[i][j] for i in range(3)) for j in range(2)]
    assert scales[2] == scales[3] == pytest.approx(both[0] / both[1])
    assert scales[4] == pytest.approx((0.99 * both[0] + 1) / (0.99 * both[1] + 1))


def test_it_is_measured_at_the_weights_before_the_step() -> None:
    batch = regression(torch.Generator().manual_seed(2), 16, 3, 1.0)
    model = linear([0.3, -0.2, 0.5])
    state = state_before(model, half_squared_error, batch)
    expected = row(NoiseScale(EVERY).measure(state))
    with torch.no_grad():
        model.weight.add_(3.0)  # the step
    assert row(NoiseScale(EVERY).measure(state)) == expected
    assert not NoiseScale().applies(replace(state, weights_before=None))
    assert NoiseScale().applies(state)


def test_a_batch_that_cannot_be_cut() -> None:
    probe = NoiseScale(EVERY)
    for batch in (regression(torch.Generator(), 1, 3, 1.0), ("words",)):
        state = state_before(linear([1.0, 1.0, 1.0]), half_squared_error, batch)
        assert probe.measure(state) == {}
        assert "cannot be cut into parts" in probe.notices.pop()


def test_unused_and_sparse_parameters() -> None:
    class Model(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embed, self.unused = nn.Embedding(7, 3, sparse=sparse), nn.Linear(2, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens)

    tokens = torch.arange(24).remainder(7)
    batch, rows = (tokens, tokens.remainder(3)), []
    for sparse in (False, True):
        torch.manual_seed(0)
        rows.append(
            row(NoiseScale(EVERY).measure(state_before(Model(sparse), cross_entropy, batch)))
        )
    assert rows[0] == pytest.approx(rows[1])


def test_both_estimates_by_hand() -> None:
    assert unbiased(5.0, 2.0, 1.0, 0.25) == (4.0, 1.0)  # 5 = 1 + 4/1 and 2 = 1 + 4/4


def test_the_noise_scale_grows_as_the_loss_falls() -> None:
    x, y = digits()
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe, seen, losses = NoiseScale(EVERY), [], []
    for step in range(400):
        drawn = torch.randint(len(x), (64,), generator=g)
        batch = x[drawn], y[drawn]
        if step % 3 == 0 and not 75 <= step < 325:
            seen.append(row(probe.measure(state_before(model, cross_entropy, batch))))
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    scales = [
        sum(row["gradients/noise_trace"] for row in some)
        / sum(row["gradients/noise_free_square"] for row in some)
        for some in (seen[:25], seen[25:])
    ]
    assert 0 < 2 * scales[0] < scales[1]
    assert seen[-1]["gradients/noise_scale"] > 2 * seen[24]["gradients/noise_scale"]
