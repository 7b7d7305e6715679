"""The default series of predictions against closed forms, and the runs that show them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import ForwardCall, MicroBatches
from dyndiag.probes.predictions.predictions import Predictions
from dyndiag.schedule import FixedInterval
from dyndiag.state import TrainState


class Table(nn.Module):
    """Predicts the rows of a table of logits."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(rows))

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        assert not self.training
        return self.logits[inputs]


def table_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def state_of(model: nn.Module, step: int, loss_fn: Any, *batches: Any) -> TrainState:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return TrainState(
        step, model, optimizer, parameters, names, loss_fn=loss_fn, probe=MicroBatches(batches)
    )


def measured(
    probe: Predictions, model: Table, step: int, targets: Tensor | None = None, **how: Any
) -> dict[str, float]:
    y = torch.zeros(len(model.logits), dtype=torch.long) if targets is None else targets
    batch = how.pop("batch", (torch.arange(len(model.logits)), y))
    state = state_of(model, step, how.pop("loss_fn", table_loss), batch)
    seen = probe.measure(state).items()
    return {str(name).removeprefix("predictions/"): float(value) for name, value in seen}  # type: ignore[arg-type]


def log(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).log()


def new() -> Predictions:
    return Predictions(FixedInterval(0.1))


FIRST = {"entropy", "confidence", "loss", "accuracy", "calibration_error"}
LATER = FIRST | {"jsd", "flips", "instability", "instability_peak", "instability_peak_step"}


def test_the_series_of_two_samples() -> None:
    probe = new()
    first = measured(probe, Table(log([[0.9, 0.1], [0.5, 0.5]])), 0)
    assert set(first) == FIRST
    second = measured(probe, Table(log([[0.4, 0.6], [0.5, 0.5]])), 11)
    assert set(second) == LATER
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert first["entropy"] == pytest.approx((entropy + math.log(2)) / 2)
    assert first["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.5)) / 2)
    assert first["confidence"] == pytest.approx(0.7)
    assert first["accuracy"] == 1.0  # of equal scores the first counts
    assert first["calibration_error"] == pytest.approx((0.1 + 0.5) / 2)
    assert second["confidence"] == pytest.approx(0.55)
    assert second["accuracy"] == 0.5
    assert second["flips"] == 0.5
    assert second["calibration_error"] == pytest.approx((0.6 + 0.5) / 2)
    assert second["instability"] == pytest.approx(second["jsd"] + second["entropy"])


def test_divergence_of_two_samples() -> None:
    probe = new()
    measured(probe, Table(log([[0.9, 0.1], [0.5, 0.5]])), 0)
    second = measured(probe, Table(log([[0.5, 0.5], [0.5, 0.5]])), 11)
    assert second["jsd"] == pytest.approx(0.101749 / 2, abs=1e-6)
    assert second["instability"] == pytest.approx(0.101749 / 2 + math.log(2), abs=1e-6)


def test_no_change_over_another_distance() -> None:
    probe, model = new(), Table(log([[0.9, 0.1]]))
    measured(probe, model, 0)
    assert set(measured(probe, model, 13)) == FIRST
    assert set(measured(probe, model, 24)) == LATER


def test_the_peak_is_the_first_of_the_highest_at_this_interval() -> None:
    probe = new()
    rows = ([[0.9, 0.1]], [[0.6, 0.4]], [[0.9, 0.1]], [[0.6, 0.4]], [[0.9, 0.1]])
    found = [measured(probe, Table(log(p)), 11 * i) for i, p in enumerate(rows)]
    strengths = [seen["instability"] for seen in found[1:]]
    assert strengths[0] == pytest.approx(strengths[2])
    assert [seen["instability_peak"] for seen in found[1:]] == [strengths[0]] * 4
    assert [seen["instability_peak_step"] for seen in found[1:]] == [11.0] * 4
    higher = measured(probe, Table(log([[0.5, 0.5]])), 55)
    assert higher["instability_peak_step"] == 55.0
    probe.due.interval = 33  # as the schedule does where samples are dear
    again = measured(probe, Table(log([[0.9, 0.1]])), 88)
    assert again["instability_peak"] == again["instability"] < strengths[0]
    assert again["instability_peak_step"] == 88.0


def test_a_nan_shows_and_is_no_peak() -> None:
    probe = new()
    for i, p in enumerate([0.5, 0.6, math.nan, 0.6, 0.6]):
        seen = measured(probe, Table(torch.tensor([[p, 1 - p]]).log()), 11 * i)
        assert math.isnan(seen["entropy"]) == (i == 2)
        assert math.isnan(seen.get("jsd", 0.0)) == (i in (2, 3))
    assert seen["instability_peak_step"] == 11.0


def test_a_nan_at_the_start_does_not_stay_the_peak() -> None:
    probe = new()
    for i, p in enumerate([math.nan, 0.6, 0.6, 0.9]):
        seen = measured(probe, Table(torch.tensor([[p, 1 - p]]).log()), 11 * i)
    assert seen["instability_peak_step"] == 22.0
    assert seen["instability_peak"] > seen["instability"]


@given(rows=st.integers(1, 5000), classes=st.sampled_from([2, 3, 100]))
def test_means_do_not_depend_on_how_positions_are_cut(rows: int, classes: int) -> None:
    g = torch.Generator().manual_seed(rows)
    model = Table(torch.randn(rows, classes, generator=g))
    found = measured(new(), model, 0)["entropy"]
    p = torch.softmax(model.logits.detach().double(), -1)
    assert found == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("how", ["keyword", "mapping"])
def test_masked_positions_do_not_count(how: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 5, generator=g)
    logits[6:] = torch.nan  # what is hidden may hold anything
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    batch = {"inputs": ids, "attention_mask": mask, "labels": ids % 5}
    shown = mask.bool().flatten()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        told = {"attention_mask": batch["attention_mask"]} if how == "keyword" else {}
        out = model(batch["inputs"], **told).flatten(0, 1)
        return F.cross_entropy(out[shown], batch["labels"].flatten()[shown])

    probe = new()
    first = measured(probe, Table(logits), 0, batch=batch, loss_fn=loss_fn)
    seen = measured(probe, Table(logits + 1), 11, batch=batch, loss_fn=loss_fn)
    p = torch.softmax(logits[:6], -1)
    assert first["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    assert first["confidence"] == pytest.approx(p.amax(-1).mean().item())
    right = (logits[:6].argmax(-1) == torch.arange(6) % 5).float().mean().item()
    assert seen["accuracy"] == pytest.approx(right)
    assert seen["jsd"] == pytest.approx(0.0, abs=1e-7)
    hidden = dict(batch, attention_mask=torch.zeros_like(mask))
    nothing = measured(new(), Table(logits), 0, batch=hidden, loss_fn=loss_fn)
    assert set(nothing) == {"loss"}


def test_micro_batches_are_put_together() -> None:
    """Of different lengths; every position counts the same."""
    g = torch.Generator().manual_seed(0)
    tables = [Table(torch.randn(9, 4, generator=g)) for _ in range(2)]
    x, y = torch.arange(9), torch.arange(9) % 4
    y[3] = -100
    parts = ((x[:2], y[:2]), (x[2:], y[2:]))
    whole, cut = new(), new()
    for i, model in enumerate(tables):
        one = measured(whole, model, 11 * i, targets=y)
        state = state_of(model, 11 * i, table_loss, *parts)
        probe = MicroBatches(parts, (2 / 8, 6 / 8))
        state = TrainState(**{**vars(state), "probe": probe})
        other = {str(name)[12:]: float(v) for name, v in cut.measure(state).items()}  # type: ignore[arg-type]
        assert other == pytest.approx(one)
    assert set(one) == LATER


def test_a_vocabulary_that_changes_its_size() -> None:
    probe = new()
    measured(probe, Table(torch.randn(4, 5)), 0)
    assert set(measured(probe, Table(torch.randn(4, 7)), 11)) == FIRST
    assert set(measured(probe, Table(torch.randn(4, 7)), 22)) == LATER


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.p, self.output = nn.Parameter(torch.zeros(1)), output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    "output",
    [torch.ones(3, 4, dtype=torch.long), torch.zeros(0, 4), torch.zeros(3, 1), torch.zeros(3),
     None, {"loss": torch.tensor(1.0)}],
    ids=["integers", "empty", "one class", "vector", "nothing", "no logits"],
)  # fmt: skip
def test_without_class_scores_there_is_only_the_loss(output: Any) -> None:
    batch = (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    with_loss = state_of(Returns(output), 0, lambda m, b: (m(b[0]), m.p.sum())[1], batch)
    assert set(new().measure(with_loss)) == {"predictions/loss"}
    assert new().measure(state_of(Returns(output), 0, None, batch)) == {}


def test_logits_of_half_precision() -> None:
    logits = torch.tensor([[9.0, -torch.inf, 2.0], [1.0, 3.0, 2.0]])
    probe = new()
    for step in (0, 11):
        seen = measured(probe, Table(logits.half()), step, loss_fn=lambda m, b: m(b[0]).sum())
    p = torch.softmax(logits, -1)
    assert seen["entropy"] == pytest.approx(-torch.xlogy(p, p).sum(-1).mean().item(), rel=1e-3)
    assert seen["jsd"] == pytest.approx(0.0, abs=1e-7)


def test_what_the_model_calls_by_keyword_is_a_batch_too() -> None:
    model = Table(log([[0.9, 0.1]]))
    call = ForwardCall((), {"inputs": torch.tensor([0])})
    seen = new().measure(state_of(model, 0, None, call))
    assert float(seen["predictions/confidence"]) == pytest.approx(0.9)  # type: ignore[arg-type]


def trained(lr: Any, noise: Any, steps: int = 240) -> dict[str, list[float]]:
    """A small net on two spirals; the series of its predictions every 11 steps."""
    torch.manual_seed(0)
    t = torch.linspace(0.3, 3, 150).repeat(2)
    y = torch.arange(2).repeat_interleave(150)
    x = torch.stack([t * torch.cos(3 * t + math.pi * y), t * torch.sin(3 * t + math.pi * y)], 1)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters())
    g = torch.Generator().manual_seed(1)
    probe = new()
    found: dict[str, list[float]] = {}
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr(step)
        wrong = torch.rand(300, generator=g) < noise(step)
        loss = F.cross_entropy(model.train()(x), torch.where(wrong, 1 - y, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 11 == 0:
            state = state_of(model, step, table_loss, (x, y))
            for name, value in probe.measure(state).items():
                found.setdefault(str(name)[12:], []).append(float(value))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("trouble", ["learning rate", "label noise"])
def test_a_jump_of_the_learning_rate_and_label_noise_make_predictions_churn(trouble: str) -> None:
    from_ = 140

    def lr(step: int) -> float:
        return 0.3 if trouble == "learning rate" and step >= from_ else 0.01

    def noise(step: int) -> float:
        return 0.5 if trouble == "label noise" and step >= from_ else 0.0

    quiet, troubled = trained(lambda s: 0.01, lambda s: 0.0), trained(lr, noise)
    first = from_ // 11  # entry 0 of jsd belongs to the second sample
    for name in ("jsd", "flips"):
        assert troubled[name][: first - 1] == quiet[name][: first - 1]
        assert max(troubled[name][first:]) > 3 * max(quiet[name][first:]) + 1e-3, name
    when = int(troubled["instability_peak_step"][-1])
    strongest = max(range(len(troubled["instability"])), key=troubled["instability"].__getitem__)
    assert when == 11 * (strongest + 1)
