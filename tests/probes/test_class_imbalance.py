"""Losses and gradient shares of classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.batches import MicroBatches, own_loss
from dyndiag.probes.predictions.class_imbalance import ClassImbalance
from dyndiag.state import Measurements, TrainState
from tests.models import batches, cross_entropy, mlp
from tests.probes.test_predictions import Table, state_of, table_loss
from tests.probes.test_targets import LABELS, TOKENS, LanguageModel


def by_class(seen: Measurements, name: str) -> dict[int, float]:
    prefix = f"predictions/{name}/"
    return {
        int(key.removeprefix(prefix)): float(value)  # type: ignore[arg-type]
        for key, value in seen.items()
        if isinstance(key, str) and key.startswith(prefix)
    }


def linear(inputs: int, classes: int) -> nn.Linear:
    model = nn.Linear(inputs, classes, bias=False)
    nn.init.zeros_(model.weight)
    return model


def test_shares_of_classes_that_do_not_meet() -> None:
    """Orthogonal inputs: g_c ∝ n_c, without cross terms, so shares are n_c² over their sum."""
    y = torch.tensor([0] * 6 + [1] * 3 + [2])
    state = state_of(linear(3, 3), 0, cross_entropy, (torch.eye(3)[y], y))
    seen = ClassImbalance().measure(state)
    assert by_class(seen, "loss_by_class") == pytest.approx({c: math.log(3) for c in range(3)})
    shares = by_class(seen, "gradient_share_by_class")
    assert shares == pytest.approx({0: 36 / 46, 1: 9 / 46, 2: 1 / 46})
    assert seen["predictions/low_loss_gradient_share"] == 0.0


def test_classes_that_pull_against_each_other_have_shares_over_one() -> None:
    """The same input for both: each gradient alone is larger than what is left of them."""
    y = torch.tensor([0, 0, 0, 1])
    state = state_of(linear(1, 2), 0, cross_entropy, (torch.ones(4, 1), y))
    shares = by_class(ClassImbalance().measure(state), "gradient_share_by_class")
    # g_0 = −¾·½, g_1 = +¼·½ along (1, −1), g = −¼.
    assert shares == pytest.approx({0: 9 / 4, 1: 1 / 4})


def test_by_autograd_and_however_the_batch_is_cut() -> None:
    model, (x, y) = mlp().eval(), batches("mlp", 1)[0]
    y[4] = -100
    whole = ClassImbalance().measure(state_of(model, 0, cross_entropy, (x, y)))
    state = state_of(model, 0, cross_entropy, (x[:2], y[:2]), (x[2:], y[2:]))
    cut = TrainState(**{**vars(state), "probe": MicroBatches(state.probe.batches, (0.4, 0.6))})  # type: ignore[union-attr]
    found = ClassImbalance().measure(cut)
    for name in ("loss_by_class", "gradient_share_by_class"):
        assert by_class(found, name) == pytest.approx(by_class(whole, name), rel=1e-5)

    def squared(rows: Tensor) -> float:
        loss = F.cross_entropy(model(x), y.clamp_min(0), reduction="none")[rows].sum()
        return sum(
            g.square().sum().item() for g in torch.autograd.grad(loss, list(model.parameters()))
        )

    total = squared(y >= 0)
    truth = {c: squared(y == c) / total for c in set(y.tolist()) - {-100}}
    assert by_class(whole, "gradient_share_by_class") == pytest.approx(truth, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_learnt_has_no_part_in_the_gradient() -> None:
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([0, 0, 0])
    seen = ClassImbalance().measure(state_of(Table(logits), 0, table_loss, (torch.arange(3), y)))
    p = 1 / (1 + math.exp(9))
    truth = 2 * p**2 / (2 * p**2 + 0.25)
    assert float(seen["predictions/low_loss_gradient_share"]) == pytest.approx(truth, rel=1e-3)  # type: ignore[arg-type]


def test_many_classes_are_an_array_without_shares() -> None:
    y = torch.tensor([5, 5, 200])
    logits = torch.randn(3, 300)
    seen = ClassImbalance().measure(state_of(Table(logits), 0, table_loss, (torch.arange(3), y)))
    ((name, losses),) = seen.items()
    assert name == "predictions/loss_by_class"
    assert isinstance(losses, Tensor)
    each = F.cross_entropy(logits, y, reduction="none")
    assert losses[5].item() == pytest.approx(each[:2].mean().item())
    assert losses[200].item() == pytest.approx(each[2].item())
    assert int(losses.isnan().sum()) == 298


@pytest.mark.parametrize(
    ("loss_fn", "y", "words", "left"),
    [
        (lambda m, b: 2 * table_loss(m, b), torch.tensor([1, 0]), "not the mean", 2),
        (lambda m, b: m(b[0]).sum(), torch.tensor([0.5, 1.0]), "no targets", 0),
    ],
)
def test_what_is_left_out_is_said(loss_fn: Any, y: Tensor, words: str, left: int) -> None:
    probe = ClassImbalance()
    seen = probe.measure(state_of(Table(torch.randn(2, 3)), 0, loss_fn, (torch.arange(2), y)))
    assert len(seen) == left
    assert words in probe.notices[0]


class Parts(nn.Module):
    """Logits by the real part for the first class, the imaginary one for the second; 0 else."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_real(self.values) if self.values.is_complex() else self.values
        return F.pad(pairs[x], (0, 1))


def test_complex_weights_count_both_parts() -> None:
    pairs, batch = torch.randn(6, 2), (torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 1]))
    pairs[:4, 1] -= 3
    real, whole = (
        ClassImbalance().measure(state_of(Parts(values), 0, table_loss, batch))
        for values in (pairs, torch.view_as_complex(pairs))
    )
    for name in ("loss_by_class", "gradient_share_by_class"):
        assert by_class(whole, name) == pytest.approx(by_class(real, name), rel=1e-5)


def test_of_a_loss_that_is_not_finite_nothing_is_said_of_its_kind() -> None:
    logits, y = torch.randn(2, 3), torch.tensor([1, 0])
    logits[0, 0] = torch.nan
    probe = ClassImbalance()
    seen = probe.measure(state_of(Table(logits), 0, table_loss, (torch.arange(2), y)))
    losses = by_class(seen, "loss_by_class")
    assert math.isnan(losses[1])
    assert losses[0] == pytest.approx(F.cross_entropy(logits[1:], y[1:]).item())
    assert probe.notices == []
    model = LanguageModel()
    nn.init.constant_(model.table, torch.nan)
    assert probe.measure(state_of(model, 11, own_loss, LABELS)) == {}
    assert probe.notices == []


def test_a_loss_over_hidden_positions_is_not_that_of_the_visible_ones() -> None:
    """Padding that the mask hides but the labels do not: the loss counts it, the classes do not."""
    mask = torch.ones_like(TOKENS).index_fill_(1, torch.tensor([4, 5]), 0)
    batch = dict(LABELS, attention_mask=mask)
    probe = ClassImbalance()
    seen = probe.measure(state_of(LanguageModel(), 0, own_loss, batch))
    assert by_class(seen, "loss_by_class")
    assert not by_class(seen, "gradient_share_by_class")
    assert "not the mean" in probe.notices[0]


def test_a_rare_class_is_learnt_late() -> None:
    """One in twenty; at first it has little of the gradient, then nearly all of it."""
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(400) % 20 == 0).long()
    x = torch.randn(400, 4, generator=g) + 1.5 * y[:, None]
    model, probe = linear(4, 2), ClassImbalance()
    model.bias = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for step in range(45):
        optimizer.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
        if step % 11 == 0:
            found.append(probe.measure(state_of(model, step, cross_entropy, (x, y))))
    losses = [by_class(seen, "loss_by_class") for seen in found]
    shares = [by_class(seen, "gradient_share_by_class") for seen in found]
    assert losses[1][1] > math.log(2) > 3 * losses[1][0]  # worse than at the start
    assert losses[-1][1] > 5 * losses[-1][0]
    assert shares[0][1] < 0.1 * shares[0][0]
    assert shares[-1][1] > 0.5 * shares[-1][0]
