"""Neural collapse against its definition, its ends, and what it shows in training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dyndiag
from dyndiag.batches import own_loss
from dyndiag.probes.activations.neural_collapse import NeuralCollapse, collapse
from dyndiag.schedule import Every
from tests.models import batches, cross_entropy, model_of
from tests.probes.sampled import state_of, taken
from tests.probes.test_targets import LABELS, LanguageModel


def gaussian(rows: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=g, dtype=torch.float64)


def by_definition(features: Tensor, classes: Tensor) -> tuple[float, float]:
    """NC1 and VCI with all matrices written out."""
    h, y = features.numpy(), classes.numpy()
    mean, kinds = h.mean(axis=0), np.unique(y)
    between = within = np.zeros((h.shape[1], h.shape[1]))
    for k in kinds:
        of = h[y == k]
        off = of.mean(axis=0) - mean
        between = between + len(of) / len(h) * np.outer(off, off)
        within = within + (of - of.mean(axis=0)).T @ (of - of.mean(axis=0)) / len(h)
    pinv = np.linalg.pinv(between, rcond=1e-10)
    nc1 = np.trace(within @ pinv) / len(kinds)
    total = np.linalg.pinv(np.cov(h.T, bias=True), rcond=1e-10)
    return nc1, 1 - np.trace(total @ between) / np.linalg.matrix_rank(between, tol=1e-10)


@pytest.mark.parametrize(("n", "d", "k"), [(60, 5, 3), (80, 20, 10), (50, 3, 8), (40, 30, 4)])
def test_both_are_what_their_definitions_say(n: int, d: int, k: int) -> None:
    g = torch.Generator().manual_seed(n)
    y = torch.randint(k, (n,), generator=g) * 7  # classes of different sizes, named anyhow
    h = gaussian(n, d) + gaussian(7 * k, d, 1)[y]
    found = collapse(h, y)
    nc1, vci = by_definition(h, y)
    assert found.nc1 == pytest.approx(nc1, rel=1e-8)
    assert found.vci == pytest.approx(vci, abs=1e-8)
    assert (found.samples, found.classes, found.rank) == (n, len(y.unique()), d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_full_collapse(dtype: torch.dtype) -> None:
    y = torch.arange(200) % 4
    found = collapse(gaussian(4, 6)[y].to(dtype), y)
    assert found.nc1 == pytest.approx(0, abs=1e-12)
    assert found.vci == pytest.approx(0, abs=1e-12)
    assert found.rank == 3


@pytest.mark.parametrize(("n", "floor"), [(5000, 0.98999), (200, 0.74874), (60, 0.15254)])
def test_the_floor_of_pure_noise(n: int, floor: float) -> None:
    d, y = 50, torch.arange(n) % 10
    values = torch.tensor([collapse(gaussian(n, d, s), y).vci for s in range(20)])
    assert 1 - d / (n - 1) == pytest.approx(floor, abs=1e-5)
    # 1 − vci is the mean of 9 squared cosines between random subspaces: each Beta(d/2, (n−1−d)/2).
    a, b = d / 2, (n - 1 - d) / 2
    error = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / 20)
    assert values.mean().item() == pytest.approx(floor, abs=4 * error)


@given(seed=st.integers(0, 199), shift=st.floats(-9, 9), log=st.floats(-3, 3))
def test_vci_does_not_change_under_invertible_maps(seed: int, shift: float, log: float) -> None:
    y = torch.arange(60) % 4
    h = gaussian(60, 8, seed) + 2 * gaussian(4, 8, seed + 999)[y]
    by = torch.eye(8, dtype=torch.float64) * 10**log + 0.5 * gaussian(8, 8, seed + 5)
    changed = h @ by + shift
    if torch.linalg.cond(by) < 1e6:
        assert collapse(changed, y).vci == pytest.approx(collapse(h, y).vci, abs=1e-6)
    turn = torch.linalg.qr(gaussian(8, 8, seed))[0]
    assert collapse(10**log * h @ turn, y).nc1 == pytest.approx(collapse(h, y).nc1, rel=1e-6)


@given(n=st.integers(2, 40), d=st.integers(1, 12), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_ranges(n: int, d: int, k: int, seed: int) -> None:
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    found = collapse(gaussian(n, d, seed), y)
    if found.classes > 1:
        assert -1e-9 <= found.vci <= 1 + 1e-9
        assert found.nc1 >= -1e-9


def test_units_that_are_dead_change_nothing() -> None:
    y = torch.arange(60) % 4
    h = gaussian(60, 8) + gaussian(4, 8, 1)[y]
    padded = torch.cat([h, torch.zeros(60, 5, dtype=h.dtype), h[:, :3]], dim=1)
    assert collapse(padded, y).rank == 8
    assert collapse(padded, y).vci == pytest.approx(collapse(h, y).vci)


def test_what_is_not_finite_or_equal_for_all() -> None:
    h, y = gaussian(20, 3), torch.arange(20) % 2
    h[3, 1] = math.inf
    assert math.isnan(collapse(h, y).vci)
    assert math.isnan(collapse(torch.ones(20, 3), y).nc1)


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))


def data(rows: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    return gaussian(rows, 8).float(), torch.arange(rows) % classes


def sample(model: nn.Module, *batch: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    probe = NeuralCollapse()
    state = state_of(model, *batch, **options)
    assert probe.applies(state)
    found = taken(probe, state)
    assert taken(probe, state) == pytest.approx(found, nan_ok=True)
    return found, probe.notices


def test_the_features_are_those_before_the_last_layer() -> None:
    model, (x, y) = classifier(), data(40)
    seen, notices = sample(model, (x, y))
    expected = collapse(model[:2](x).detach(), y)
    assert seen["neural_collapse/nc1"] == pytest.approx(expected.nc1)
    assert seen["neural_collapse/vci"] == pytest.approx(expected.vci)
    assert seen["neural_collapse/vci_of_noise"] == pytest.approx(1 - 5 / 39)
    assert notices == []
    parts, _ = sample(model, (x[:13], y[:13]), (x[13:], y[13:]))
    assert parts == pytest.approx(seen)


def test_targets_that_do_not_count_are_left_out() -> None:
    model, (x, y) = classifier(), data(40)
    hidden = y.clone()
    hidden[::3] = -100
    seen, _ = sample(model, (x, hidden))
    kept = hidden >= 0
    assert seen["neural_collapse/vci"] == pytest.approx(
        collapse(model[:2](x[kept]).detach(), y[kept]).vci
    )


def test_tokens_are_samples_and_language_models_shift() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=5, n_embd=4, n_layer=1, n_head=1, n_positions=20,
            bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(5, (6, 20))
    mask = torch.ones(6, 20, dtype=torch.long)
    mask[0, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    seen, notices = sample(model, batch, loss_fn=own_loss)
    with torch.no_grad():
        h = model.transformer(ids, attention_mask=mask).last_hidden_state[:, :-1]
    kept = labels[:, 1:] >= 0
    expected = collapse(h[kept], labels[:, 1:][kept])
    assert seen["neural_collapse/vci"] == pytest.approx(expected.vci, abs=1e-5)
    assert notices == []


def test_many_features_are_combined_and_many_samples_thinned() -> None:
    class Features(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    y = torch.arange(1100) % 3
    h = gaussian(1100, 600) + 0.3 * gaussian(3, 600, 1)[y]
    seen, _ = sample(Features(600), (h.float(), y))
    assert seen["neural_collapse/vci_of_noise"] == pytest.approx(1 - 512 / 1099)
    assert collapse(h, y).vci < seen["neural_collapse/vci"] < 0.2
    y = torch.arange(9000) % 3
    h = gaussian(9000, 4) + 2 * gaussian(3, 4, 1)[y]
    seen, _ = sample(Features(4), (h.float(), y))
    assert seen["neural_collapse/vci_of_noise"] == pytest.approx(1 - 4 / 4095)
    assert seen["neural_collapse/vci"] == pytest.approx(collapse(h, y).vci, abs=0.02)


def without_targets(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


class Convolved(nn.Module):
    """Class scores by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("model", "batch", "loss_fn", "says", "kept"),
    [
        (classifier(), (gaussian(9, 8).float(),), without_targets, "no targets", set()),
        (classifier(), data(40, 1), cross_entropy, "one class only", set()),
        (classifier(), data(6), cross_entropy, "6 samples of 4 classes", set()),
        (classifier(), data(7, 3), cross_entropy, "7 samples", {"nc1", "vci", "vci_of_noise"}),
        (model_of("mlp"), data(10, 2), cross_entropy, "more samples than dim", {"nc1"}),
        (nn.Linear(8, 1), data(9), without_targets, "no class scores", set()),
        (
            Convolved(),
            (torch.rand(8, 1, 3, 3), data(8)[1]),
            cross_entropy,
            "no torch.nn.Lin",
            set(),
        ),
    ],
)
def test_what_cannot_be_measured_is_absent_and_told_once(
    model: nn.Module, batch: Any, loss_fn: Any, says: str, kept: set[str]
) -> None:
    seen, notices = sample(model, batch, loss_fn=loss_fn)
    assert {name.removeprefix("neural_collapse/") for name in seen} == kept
    if len(kept) < 3:
        assert says in " ".join(notices)
    else:
        assert notices == []
    assert len(set(notices)) == len(notices)


@pytest.mark.parametrize("kind", ["conv", "transformer", "lstm"])
def test_models_of_other_kinds(kind: str) -> None:
    x, y = batches(kind, 1)[0]
    x, y = x.repeat(4, *[1] * (x.dim() - 1)), y.repeat(4, *[1] * (y.dim() - 1))
    seen, _ = sample(model_of(kind), (x, y))
    assert "neural_collapse/nc1" in seen


def test_features_collapse_when_training_goes_on_after_the_last_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = torch.randn(4, 10)[y] + torch.randn(200, 10)
    widths = (10, 24, 24, 24)
    model = nn.Sequential()
    for before, after in itertools.pairwise(widths):
        model.extend([nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()])
    model.append(nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    errors = {}
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=tmp_path / "run", probes=[NeuralCollapse(Every(100))],
        budget=1e-9, tensorboard=False,
    ) as monitor:  # fmt: skip
        for step in range(301):
            loss = cross_entropy(model, (x, y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=(x, y))
            if step % 100 == 0:
                with torch.no_grad():
                    errors[step] = int((model.eval()(x).argmax(dim=1) != y).sum())
                model.train()
    run = dyndiag.Run(tmp_path / "run")
    assert errors[0] > 20
    assert errors[100] == errors[200] == errors[300] == 0
    assert (run["neural_collapse/vci_of_noise"] > 0.85).all()
    for name in ("nc1", "vci"):  # about 1, 0.04, 0.015, 0.01 and 0.4, 0.03, 0.014, 0.008
        values = run[f"neural_collapse/{name}"]
        assert values.index.tolist() == [0, 100, 200, 300]
        assert values.is_monotonic_decreasing
        assert values[100] < 0.2 * values[0]
        assert values[300] < 0.5 * values[100]


def test_a_loss_of_nan_is_no_want_of_targets() -> None:
    model = LanguageModel()
    nn.init.constant_(model.table, torch.nan)
    assert sample(model, LABELS, loss_fn=own_loss) == ({}, [])
