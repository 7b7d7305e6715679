"""Debiased CKA against its definition, its symmetries, and what it shows in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dyndiag
from dyndiag.probes.activations.similarity import Similarity, centred_similarities
from dyndiag.schedule import Every, FixedInterval
from tests.models import cross_entropy
from tests.probes.sampled import state_of, taken


def cka(x: Tensor, y: Tensor) -> float:
    return (centred_similarities(x) * centred_similarities(y)).sum().item()


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Song et al. 2012, equation 5, word by word; the Gram matrices are not centred."""
    n = len(k)
    k, l = (m - torch.diag(m.diag()) for m in (k, l))  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    return (
        (k @ l).trace()
        + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ l @ one)
    ) / (n * (n - 3))


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def gaussian(rows: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=g, dtype=torch.float64)


@given(n=st.integers(4, 12), a=st.integers(1, 20), b=st.integers(1, 20), seed=st.integers(0, 99))
def test_it_is_the_unbiased_estimate_of_the_literature(n: int, a: int, b: int, seed: int) -> None:
    x, y = 5 + gaussian(n, a, seed), gaussian(n, b, seed + 1000) - 3
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()
    assert cka(x, y) == pytest.approx(expected.item(), abs=1e-5)


@given(n=st.integers(5, 30), d=st.integers(2, 40), seed=st.integers(0, 99), by=st.floats(0.01, 99))
def test_rotation_shift_and_scale_change_nothing(n: int, d: int, seed: int, by: float) -> None:
    x, y = gaussian(n, d, seed), gaussian(n, d, seed + 1000)
    turn = torch.linalg.qr(gaussian(d, d, seed))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-6)
    assert cka(x, by * (x @ turn) + 7) == pytest.approx(1, abs=1e-6)
    assert cka(x, by * (y @ turn) + 7) == pytest.approx(cka(x, y), abs=1e-5)


@pytest.mark.parametrize(("n", "d"), [(64, 512), (128, 128), (256, 64)])
def test_unrelated_features_are_at_zero_where_the_plain_form_is_not(n: int, d: int) -> None:
    values = torch.tensor([cka(gaussian(n, d, s), gaussian(n, d, s + 1000)) for s in range(20)])
    # Σ U_ij V_ij over pairs i < j has mean 0 and variance 4 · n²/2 · d² against ‖U‖‖V‖ = n² d.
    deviation = math.sqrt(2) / n
    assert values.abs().max() < 4 * deviation
    assert values.mean().abs() < 4 * deviation / math.sqrt(20)
    assert 0.5 * deviation < values.std() < 1.6 * deviation
    plain = plain_cka(gaussian(n, d), gaussian(n, d, 1000)).item()
    assert plain == pytest.approx(d / (n + d), abs=0.02)
    assert plain > 10 * deviation


def test_features_that_do_not_vary_or_are_not_finite() -> None:
    x = gaussian(8, 3)
    assert math.isnan(cka(x, torch.zeros(8, 3)))
    assert math.isnan(cka(x, x.clone().fill_(math.inf)))
    assert cka(x.to(torch.bfloat16), x) == pytest.approx(1, abs=1e-3)


class Turning(nn.Module):
    """One block, whose weight is whatever a test puts there."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width, bias=False))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def test_the_series_compares_with_the_sample_before() -> None:
    probe, model = Similarity(Every(5)), Turning()
    weight = next(model.parameters())
    x = gaussian(2000, 6).float()
    seen = []
    for step, new in enumerate((torch.eye(6), 3 * torch.eye(6).flip(0), torch.eye(6)[:, :1] * 2.0)):
        with torch.no_grad():
            weight.copy_(new.expand(6, 6))
        seen.append(taken(probe, state_of(model, x, loss_fn=mean_square, step=5 * step)))
    assert seen[0] == {}
    assert seen[1] == {"activations/cka/layers.0": pytest.approx(1, abs=1e-5)}
    # Of d equal directions one is left: 1/√d, up to the error of 256 samples.
    assert seen[2]["activations/cka/layers.0"] == pytest.approx(1 / math.sqrt(6), abs=0.1)


def test_no_value_over_another_distance() -> None:
    probe, model, x = Similarity(FixedInterval(0.1, 11)), Turning(), gaussian(9, 6).float()
    found = [
        bool(taken(probe, state_of(model, x, loss_fn=mean_square, step=step)))
        for step in (0, 11, 44, 55)
    ]
    assert found == [False, True, False, True]


def test_other_samples_are_not_compared() -> None:
    probe, model = Similarity(Every(1)), Turning()
    for rows in (9, 8, 3, 3):  # and of three there is no unbiased estimate
        x = gaussian(rows, 6).float()
        assert taken(probe, state_of(model, x, loss_fn=mean_square)) == {}


def test_what_it_keeps_does_not_grow_with_the_batch() -> None:
    probe, model = Similarity(Every(1)), Turning()
    taken(probe, state_of(model, gaussian(5000, 6).float(), loss_fn=mean_square))
    assert [m.shape for m in probe._before.values()] == [(256, 256)]
    assert [m.dtype for m in probe._before.values()] == [torch.float32]


def test_micro_batches_count_together() -> None:
    seen: list[dict[str, Any]] = []
    model, x, y = Turning(), gaussian(8, 6).float(), gaussian(8, 6, 1).float()
    for cut in ([8], [3, 5]):
        probe = Similarity(Every(1))
        for values in (x, y):
            seen = [*seen, taken(probe, state_of(model, *values.split(cut), loss_fn=mean_square))]
    assert seen[1].keys() == seen[3].keys()
    assert list(seen[1].values()) == pytest.approx(list(seen[3].values()), abs=1e-6)


def test_it_falls_when_the_learning_rate_jumps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    x = torch.randn(256, 20)
    batch = (x, x[:, :4].argmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", probes=[Similarity(Every(10))],
        budget=1e-9, tensorboard=False,
    ) as monitor:  # fmt: skip
        for step in range(101):
            optimizer.param_groups[0]["lr"] = 2.0 if 50 < step <= 70 else 0.02
            loss = cross_entropy(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=batch)
    seen = dyndiag.Run(tmp_path / "run")["activations/cka/3"]
    assert seen.index.tolist() == list(range(10, 101, 10))
    assert seen.loc[:50].min() > 0.99
    assert seen.loc[60] < 0.9
    assert seen.loc[80:].min() > 0.99
