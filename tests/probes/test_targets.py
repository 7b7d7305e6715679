"""Which targets a batch holds, in every way that people pass them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import MicroBatches, own_loss
from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.calibration import calibration_error
from dyndiag.probes.predictions.outputs import one_pass, passes
from dyndiag.probes.predictions.targets import correct_predictions, targets_of
from tests.models import batches, mlp
from tests.probes.test_predictions import Table, log, table_loss

TOKENS, VOCABULARY = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0)), 7


class LanguageModel(nn.Module):
    """Logits by the token before; a loss of its own where labels are given, as others shift it."""

    def __init__(self, same_start: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        table = torch.randn(VOCABULARY, VOCABULARY, generator=g) * (not same_start)
        self.table = nn.Parameter(table)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | None = None,
    ) -> Any:
        logits = self.table[input_ids]
        if labels is None:
            return logits
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        summed = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
        count = (shifted >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": summed / count, "logits": logits}


def ids_and_next(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def only_ids(model: nn.Module, tokens: Any) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def shifts_logits(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


LABELS = {"input_ids": TOKENS, "labels": TOKENS}
SHORT = {"input_ids": TOKENS, "labels": TOKENS.where(torch.arange(6) > 2, -100)}
PAIR = (TOKENS[:, :-1], TOKENS[:, 1:])
WAYS: dict[str, tuple[Any, Any, Tensor]] = {
    "inputs and targets": (ids_and_next, PAIR, TOKENS[:, 1:]),
    "targets in one row": (ids_and_next, (PAIR[0], PAIR[1].flatten()), TOKENS[:, 1:]),
    "only tokens": (only_ids, TOKENS, TOKENS[:, 1:]),
    "the model shifts its labels": (own_loss, LABELS, F.pad(TOKENS[:, 1:], (0, 1), value=-100)),
    "some labels are hidden": (
        own_loss, SHORT, F.pad(SHORT["labels"][:, 1:], (0, 1), value=-100)
    ),
    "the loss function shifts": (shifts_logits, LABELS, F.pad(TOKENS[:, 1:], (0, 1), value=-100)),
    "a share of the step's mean": (
        own_loss, dict(LABELS, num_items_in_batch=40), F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    ),
}  # fmt: skip


@pytest.mark.parametrize("same_start", [False, True], ids=["trained", "all classes equal"])
@pytest.mark.parametrize("way", WAYS)
def test_the_targets_are_those_of_the_loss(way: str, same_start: bool) -> None:
    loss_fn, batch, wanted = WAYS[way]
    found = targets_of(one_pass(LanguageModel(same_start), loss_fn, batch))
    assert found is not None
    assert found.verified
    flat = wanted.flatten()
    assert torch.equal(found.count, flat >= 0)
    assert torch.equal(found.classes[found.count], flat[flat >= 0])


def test_half_precision_losses_are_recognised() -> None:
    model = LanguageModel().bfloat16()
    found = targets_of(one_pass(model, own_loss, LABELS))
    assert found is not None
    assert found.verified
    assert torch.equal(found.classes[:5], TOKENS[0, 1:])


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1].clamp_min(0), label_smoothing=0.2)


@pytest.mark.parametrize("loss_fn", [smoothed, None, lambda m, b: m(b[0]).square().mean()])
def test_where_the_loss_says_nothing_names_and_shapes_do(loss_fn: Any) -> None:
    model, y = Table(torch.randn(5, 3)).eval(), torch.tensor([1, -100, 2, 0, -1])
    found = targets_of(one_pass(model, loss_fn, (torch.arange(5), y)))
    assert found is not None
    assert not found.verified
    assert found.count.tolist() == [True, False, True, True, False]
    losses = F.cross_entropy(model.logits, y.clamp_min(0), reduction="none").where(y >= 0, 0.0)
    assert torch.allclose(found.losses, losses.detach(), atol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS, "labels": TOKENS},  # it may be shifted, and nothing tells
        {"input_ids": TOKENS, "ids": TOKENS.float()},
        {"input_ids": TOKENS, "labels": TOKENS + 5},  # no such class
        {"input_ids": TOKENS, "labels": torch.full_like(TOKENS, -100)},
    ],
)
def test_what_cannot_be_known_is_not_guessed(batch: Any) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"]).square().mean()

    assert targets_of(one_pass(LanguageModel(), loss_fn, batch)) is None


def test_a_loss_made_of_derivatives_is_measured() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum()

    model, batch = mlp().eval(), batches("mlp", 1)[0]
    with torch.no_grad():
        (passed,) = passes(model, penalised, MicroBatches((batch,)))
    assert passed.loss is not None
    assert passed.logits is not None
    assert passed.loss.item() == pytest.approx(penalised(model, batch).item())
    assert not passed.loss.requires_grad


@pytest.mark.parametrize("targets", ["tuple", "dict"])
def test_right_predictions_are_counted_where_targets_count(targets: str) -> None:
    model = Table([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]).eval()
    x, y = torch.arange(3), torch.tensor([0, -100, 0])
    batch = (x, y) if targets == "tuple" else {"labels": y, "inputs": x}
    loss_fn = table_loss if targets == "tuple" else lambda m, b: m(b["inputs"]).sum()
    right, count = correct_predictions(model, loss_fn, batch)
    assert (int(right), count) == (1, 2)


def test_accuracy_of_a_language_model_is_of_the_next_token() -> None:
    model = LanguageModel()
    right, count = correct_predictions(model, own_loss, LABELS)
    assert count == 15
    assert int(right) == int((model.table[TOKENS[:, :-1]].argmax(-1) == TOKENS[:, 1:]).sum())


@pytest.mark.parametrize(
    ("model", "batch", "sentence"),
    [
        (Table([[1.0, 2.0]]), (torch.zeros(1, dtype=torch.long), torch.zeros(1)),
         r"expected an integer tensor of shape \(1,\).*found \(1,\), \(1,\)"),
        (nn.Linear(2, 1), (torch.zeros(1, 2), torch.zeros(1)), "no class scores"),
    ],
)  # fmt: skip
def test_without_scores_or_targets_it_says_so(model: Any, batch: Any, sentence: str) -> None:
    with pytest.raises(DyndiagError, match=sentence):
        correct_predictions(model.eval(), None, batch)


# Calibration


def by_hand(confidence: list[float], right: list[bool]) -> float:
    """Bin by bin, as published."""
    c, r = np.array(confidence, dtype=np.float32).astype(float), np.array(right, dtype=float)
    total = 0.0
    for b in range(15):
        inside = (c > b / 15) & (c <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(r[inside].mean() - c[inside].mean())
    return total


@given(
    st.lists(
        st.tuples(st.floats(2**-6, 1.0, width=32), st.booleans(), st.booleans()),
        min_size=1,
        max_size=60,
    ).filter(lambda rows: any(counts for *_, counts in rows))
)
def test_calibration_error_bin_by_bin(rows: list[tuple[float, bool, bool]]) -> None:
    confidence, right, counts = (list(column) for column in zip(*rows, strict=True))
    found = calibration_error(torch.tensor(confidence), torch.tensor(right), torch.tensor(counts))
    counted = [row for row in rows if row[2]]
    assert found.item() == pytest.approx(
        by_hand([row[0] for row in counted], [row[1] for row in counted]), abs=1e-9
    )


def test_a_calibrated_and_an_overconfident_model() -> None:
    g = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(200_000, generator=g)
    right = torch.rand(200_000, generator=g) < confidence
    every = torch.ones(200_000, dtype=torch.bool)
    # By chance alone Σ_b √(n_b p(1 − p)·2/π)/n is at most 8 bins' √(.25·2/π·8/n) = .0026.
    assert calibration_error(confidence, right, every) < 0.0026
    too_sure = (confidence + 0.3).clamp_max(1.0)
    gap = (too_sure - confidence).mean().item()
    assert calibration_error(too_sure, right, every).item() == pytest.approx(gap, abs=0.005)
    assert calibration_error(log([[0.5]]).flatten() * torch.nan, right[:1], every[:1]).isnan()
