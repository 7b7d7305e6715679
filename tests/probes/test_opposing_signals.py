"""Losses of single examples, and the groups that training moves against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.batches import ForwardCall, own_loss
from dyndiag.probes.predictions.class_imbalance import ClassImbalance
from dyndiag.probes.predictions.example_losses import example_losses
from dyndiag.probes.predictions.opposing_signals import LossQuantiles, OpposingSignals
from dyndiag.schedule import Every
from dyndiag.state import Measurements, TrainState
from tests.models import ConvNet, batches, cross_entropy, mlp
from tests.probes.test_predictions import Table, state_of, table_loss
from tests.probes.test_targets import TOKENS, LanguageModel, ids_and_next


def squares(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()


class Weight(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w[:, None]


def losses(state: TrainState) -> Tensor:
    found = example_losses(state)
    assert found is not None
    assert bool(found[1].all())
    return found[0]


def value(seen: Measurements, name: str) -> float:
    return float(seen[f"predictions/{name}"])  # type: ignore[arg-type]


def test_each_examples_loss_by_cross_entropy_and_by_cutting() -> None:
    model, (x, y) = mlp().eval(), batches("mlp", 1)[0]
    calls: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    each = F.cross_entropy(model(x), y, reduction="none")
    found = losses(state_of(model, 0, counted, (x[:2], y[:2]), (x[2:], y[2:])))
    assert torch.allclose(found, each, atol=1e-6)
    assert calls == [2, 4]
    calls.clear()
    found = losses(state_of(model, 0, lambda m, b: 2 * counted(m, b), (x, y)))
    assert torch.allclose(found, 2 * each, atol=1e-6)
    assert calls == [6, *[1] * 6]


def test_losses_of_a_regression_and_of_sequences() -> None:
    x, y = torch.randn(5, 3), torch.randn(5)
    state = state_of(Weight(1.0, 2.0, 3.0), 0, squares, (x, y))
    residuals = x @ torch.tensor([1.0, 2.0, 3.0]) - y
    assert torch.allclose(losses(state), 0.5 * residuals.square(), atol=1e-5)

    model, ids = LanguageModel(), TOKENS
    by_row = [ids_and_next(model, (row[None, :-1], row[None, 1:])) for row in ids]
    for loss_fn, batch in (
        (ids_and_next, (ids[:, :-1], ids[:, 1:])),
        (own_loss, ForwardCall((), {"input_ids": ids, "labels": ids, "num_items_in_batch": 60})),
        (
            lambda m, b: own_loss(m, b) + 0.0 * own_loss(m, b).square() + 0.5,
            {"input_ids": ids, "labels": ids},
        ),
    ):
        found = losses(state_of(model, 0, loss_fn, batch))
        offset = 0.5 if isinstance(batch, dict) else 0.0
        assert torch.allclose(found, torch.stack(by_row) + offset, atol=1e-5)


def test_quantiles_are_numpys() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(41, 2, generator=g), torch.randn(41, generator=g)
    y[0] = x[0].sum()
    seen = LossQuantiles().measure(state_of(Weight(1.0, 1.0), 0, squares, (x, y)))
    each = 0.5 * (x.sum(1) - y).square().double().numpy()
    ((names, values),) = [(k, v) for k, v in seen.items() if isinstance(k, tuple)]
    assert names == tuple(f"predictions/loss_quantile/{q}" for q in ("05", "25", "50", "75", "95"))
    assert isinstance(values, Tensor)
    truth = np.quantile(each, [0.05, 0.25, 0.5, 0.75, 0.95])
    assert values.tolist() == pytest.approx(truth.tolist(), rel=1e-5)
    assert value(seen, "low_loss_share") == pytest.approx((each < 0.01).mean())


def test_examples_without_a_target_have_no_loss() -> None:
    model, y = Table(torch.randn(4, 3)), torch.tensor([0, -100, 2, 1])
    found = example_losses(state_of(model.eval(), 0, table_loss, (torch.arange(4), y)))
    assert found is not None
    assert found[1].tolist() == [True, False, True, True]
    probe = OpposingSignals()
    probe.measure(state_of(model, 0, table_loss, (torch.arange(4), y)))
    seen = probe.measure(state_of(Table(torch.randn(4, 3)), 11, table_loss, (torch.arange(4), y)))
    assert 1 not in _examples(seen, "rising") + _examples(seen, "falling")


def _examples(seen: Measurements, group: str) -> list[int]:
    found = seen[f"predictions/opposing_{group}_examples"]
    assert isinstance(found, Tensor)
    return found.tolist()


def test_two_groups_that_pull_against_each_other() -> None:
    """Least squares on (x, +y) and (x, −y): at 0 their gradients are opposite."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(150, 4, generator=g)
    y = torch.rand(150, generator=g) + 0.5
    model, probe = Weight(0.0, 0.0, 0.0, 0.0), OpposingSignals()
    batch = (x.repeat(2, 1), torch.cat([y, -y]))
    with torch.no_grad():
        model.w.add_(1e-3)
    assert probe.measure(state_of(model, 0, squares, batch)) == {}
    with torch.no_grad():
        model.w.zero_()
    seen = probe.measure(state_of(model, 11, squares, batch))
    rising, falling = _examples(seen, "rising"), _examples(seen, "falling")
    assert len(rising) == len(falling) == 3  # 1 % of 300
    assert sorted((i + 150) % 300 for i in rising) == sorted(falling)
    assert value(seen, "opposing_cosine") == pytest.approx(-1.0, abs=1e-6)
    pull = y * x.sum(1)
    biggest = pull.abs().sort(descending=True)
    assert sorted(i % 150 for i in rising) == sorted(biggest.indices[:3].tolist())
    # From w = 1e-3 · 1 to 0 the loss of (x, y) rises by 1e-3 y Σx − ½ (1e-3 Σx)².
    change = 1e-3 * biggest.values[:3].mean().item()
    assert value(seen, "opposing_rise") == pytest.approx(change, rel=1e-2)
    assert value(seen, "opposing_fall") == pytest.approx(-change, rel=1e-2)
    assert biggest.indices[0].item() in (rising[0] % 150, falling[0] % 150)
    assert probe._before is not None
    assert model.w.grad is None


def test_one_example_each_at_least_and_two_in_all() -> None:
    x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    probe = OpposingSignals(Every(1))
    probe.measure(state_of(Weight(0.0, 0.0), 0, squares, (x, y)))
    seen = probe.measure(state_of(Weight(0.5, 0.5), 1, squares, (x, y)))
    assert (_examples(seen, "rising"), _examples(seen, "falling")) == ([1], [0])
    assert value(seen, "opposing_cosine") == pytest.approx(0.0)
    probe = OpposingSignals()
    for step in (0, 11):
        assert probe.measure(state_of(Weight(1.0), step, squares, (x[:1, :1], y[:1]))) == {}
    other = (torch.ones(3, 1), torch.ones(3))
    assert probe.measure(state_of(Weight(1.0), 22, squares, other)) == {}  # another probe batch


def test_no_cosine_where_a_group_has_no_gradient() -> None:
    x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    probe = OpposingSignals()
    probe.measure(state_of(Weight(0.0, 0.0), 0, squares, (x, y)))
    seen = probe.measure(state_of(Weight(1.0, 0.5), 11, squares, (x, y)))
    assert value(seen, "opposing_fall") == pytest.approx(-0.5)
    assert "predictions/opposing_cosine" not in seen


@pytest.mark.parametrize("probe", [LossQuantiles, OpposingSignals])
def test_what_has_no_examples_says_so(probe: Any) -> None:
    one = probe()
    for batch, loss_fn, words in (
        (torch.tensor(1.0), lambda m, b: m.w.sum(), "cannot be cut"),
        ({"x": torch.ones(2, 1)}, None, "pass loss_fn"),
    ):
        model: nn.Module = Weight(1.0)
        assert one.measure(state_of(model, 0, loss_fn, batch)) == {}
        assert words in one.notices.pop()


def test_without_a_loss_function_there_are_changes_and_no_gradients() -> None:
    probe, y = OpposingSignals(), torch.tensor([2, 0, 1])
    for step in (0, 11):
        model = Table(torch.randn(3, 3))
        seen = probe.measure(state_of(model, step, None, (torch.arange(3), y)))
    assert "predictions/opposing_rise" in seen
    assert "predictions/opposing_cosine" not in seen


def test_batch_norm_does_not_couple_examples() -> None:
    model, batch = ConvNet(), batches("conv", 1)[0]
    model(batch[0])
    probe = LossQuantiles()
    one = probe.measure(state_of(model.train(), 0, lambda m, b: 1.0 * cross_entropy(m, b), batch))
    each = F.cross_entropy(model.eval()(batch[0]), batch[1], reduction="none")
    ((_, values),) = [(k, v) for k, v in one.items() if isinstance(k, tuple)]
    assert isinstance(values, Tensor)
    assert values[2].item() == pytest.approx(each.double().quantile(0.5).item(), rel=1e-5)


def trained(share_of_the_edge: float) -> tuple[list[float], list[float], list[int]]:
    """Many examples that agree, and six with a strong feature that means either class.

    At a learning rate of so much of 2/λ₁; cosine, rise and members of the groups every 11 steps.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g)
    x[:, 5] = 0.0
    x[:6] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 8.0])
    y = x[:, 0].clone()
    y[:6] = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    edge = 2 / torch.linalg.eigvalsh(x.T @ x / 200)[-1].item()
    model = Weight(0.0, 0.0, 0.0, 0.0, 0.0, 0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=share_of_the_edge * edge)
    probe = OpposingSignals()
    cosines: list[float] = []
    rises: list[float] = []
    members: list[int] = []
    for step in range(100):
        optimizer.zero_grad()
        squares(model, (x, y)).backward()
        optimizer.step()
        if step % 11 == 0:
            seen = probe.measure(state_of(model, step, squares, (x, y)))
            if step > 22:
                if "predictions/opposing_cosine" in seen:  # not where a group is learnt to the bit
                    cosines.append(value(seen, "opposing_cosine"))
                rises.append(value(seen, "opposing_rise"))
                members += _examples(seen, "rising") + _examples(seen, "falling")
    return cosines, rises, members


def test_at_the_edge_training_swings_between_two_groups() -> None:
    cosines, rises, members = trained(0.995)
    assert len(cosines) == 7
    assert max(cosines) < -0.9
    assert set(members) <= set(range(6))
    _, calm, _ = trained(0.5)
    assert min(rises) > 100 * max(map(abs, calm))


def learnt(wrong: int) -> list[dict[str, float]]:
    """Two clusters of 100, the first `wrong` examples labelled as the other; every 50th step."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 10, generator=g), torch.arange(200) % 2
    x[:, 0] = 0.3 * x[:, 0] + 2 * (2 * y - 1)
    y[:wrong] = 1 - y[:wrong]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    probe, rows = LossQuantiles(), []
    for step in range(401):
        optimizer.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
        if step % 50 == 0:
            seen = probe.measure(state_of(model, step, cross_entropy, (x, y)))
            row = {"low_loss_share": value(seen, "low_loss_share")}
            for names, values in seen.items():
                if isinstance(names, tuple) and isinstance(values, Tensor):
                    row |= {
                        n.rpartition("/")[2]: v for n, v in zip(names, values.tolist(), strict=True)
                    }
            row["misread"] = (model(x).argmax(1) != y).double().mean().item()
            rows.append(row)
    return rows


def test_wrong_labels_keep_the_upper_quantile_up_until_they_are_memorised() -> None:
    """An example of two classes that is taken for the other one has a loss above ln 2."""
    noisy, clean = learnt(wrong=40), learnt(wrong=0)
    early, late = noisy[1], noisy[-1]  # steps 50 and 400
    assert early["misread"] == 0.2  # just these 40: what there is to learn is learnt
    assert early["50"] < 0.5 * noisy[0]["50"]
    assert early["95"] > noisy[0]["95"]  # of these it becomes surer the other way
    assert clean[1]["95"] < 0.05 and clean[1]["low_loss_share"] > 0.8 > early["low_loss_share"]
    for row in noisy:
        assert row["95"] > math.log(2) or row["misread"] < 0.055  # 11 of 200
    assert late["misread"] == 0 and late["95"] < 0.05


def test_sparse_gradients_and_parameters_without_one() -> None:
    class Sparse(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 3, sparse=sparse)
            self.unused = nn.Parameter(torch.ones(2))
            self.head = nn.Linear(3, 4)
            for i, p in enumerate(self.parameters()):
                nn.init.normal_(p, generator=torch.Generator().manual_seed(i))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    batch = (torch.arange(9), torch.arange(9) % 4)
    found = []
    for sparse in (False, True):
        probe, shares = OpposingSignals(), ClassImbalance()
        for step in (0, 11):
            model = Sparse(sparse)
            model.head.weight.data *= 1 + step
            seen = probe.measure(state_of(model, step, cross_entropy, batch))
        seen |= shares.measure(state_of(model, 11, cross_entropy, batch))
        found.append({str(k): float(v) for k, v in seen.items() if "examples" not in str(k)})  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1])
    assert {"predictions/opposing_cosine", "predictions/gradient_share_by_class/3"} <= set(found[0])


def test_complex_weights_count_both_parts() -> None:
    """The two examples pull at one weight, the one at its real part, the other at both."""

    class Complex(nn.Module):
        def __init__(self, re: float, im: float) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.complex(torch.tensor([re]), torch.tensor([im])))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.cat((self.w.real, self.w.imag))[:, None]

    batch = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, 0.0])
    probe = OpposingSignals()
    probe.measure(state_of(Complex(1.0, -1.0), 0, squares, batch))
    seen = probe.measure(state_of(Complex(2.0, -1.0), 11, squares, batch))
    # Changes ½(4 − 1) and ½(4 − 1): equal, gradients 2·(1, 0) and 2·(3, 4).
    assert value(seen, "opposing_cosine") == pytest.approx(3 / 5)
