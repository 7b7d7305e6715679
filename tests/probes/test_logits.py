"""Output logits, against what their definitions give."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import ForwardCall
from dyndiag.probes.forward import ForwardWatch
from dyndiag.probes.logits.output import OutputLogits
from dyndiag.probes.logits.output_statistics import rows
from tests.probes.test_attention import Largest, draw, tensors

SERIES = {"max", "log_partition", "mean", "collapse", "smallest_gap"}


def read(*outputs: Any, step: int = 0, **given: Any) -> dict[str, Tensor]:
    """What is read off the outputs of a step's forwards."""
    logits = OutputLogits()
    for output in outputs:
        logits.started(step, nn.Identity())
        logits.finished(ForwardCall((), given), output)
    seen = logits.collect()
    assert logits.collect() == {}
    found = tensors(seen, "logits/")
    assert all(value.dim() == 0 for value in found.values())
    return found


def test_worked_case() -> None:
    seen = read(torch.tensor([[0.0, 0.0, 5.0]]))
    assert set(seen) == SERIES
    assert float(seen["log_partition"]) == pytest.approx(5.013386, abs=1e-6)
    assert float(seen["mean"]) == pytest.approx(5 / 3)
    assert seen["max"] == seen["smallest_gap"] == 5
    assert seen["collapse"] == 0


def test_cadence() -> None:
    y = draw(4, 3)
    for step in range(23):
        assert set(read(y, step=step)) == ({"max"} if step % 11 else SERIES)


GAPS = {
    torch.float64: 53 * math.log(2), torch.float32: 24 * math.log(2),
    torch.float16: 11 * math.log(2), torch.bfloat16: 8 * math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", GAPS)
def test_gap_at_which_two_classes_collapse(dtype: torch.dtype) -> None:
    published = {53: 36.74, 24: 16.64, 11: 7.62, 8: 5.55}
    gap = GAPS[dtype]
    assert gap == pytest.approx(published[round(gap / math.log(2))], abs=0.006)
    for more, collapsed in ((0.03, 1.0), (-0.03, 0.0)):
        y = torch.tensor([[gap + more, 0.0]], dtype=dtype)
        assert read(y)["collapse"] == collapsed
        target = torch.zeros(1, dtype=torch.int64)
        assert (F.cross_entropy(y, target) == 0) == bool(collapsed)  # in the dtype's own loss
        assert read(y, labels=target)["zero_loss"] == collapsed
        assert read(y, labels=1 - target)["zero_loss"] == 0


def test_share_of_collapsed_rows_and_smallest_gap() -> None:
    y = torch.tensor([[20.0, 0, 0], [0, 0, 20.0], [0, 5.0, 0], [-3.0, -3.0, -3.0]])
    seen = read(y)
    assert seen["collapse"] == 0.5
    assert seen["smallest_gap"] == 0
    seen = read(y[:3])
    assert float(seen["collapse"]) == pytest.approx(2 / 3)
    assert seen["smallest_gap"] == 5


@given(
    n=st.integers(1, 7), classes=st.integers(2, 150), block=st.integers(60, 4000),
    scale=st.sampled_from([0.1, 10.0, 300.0]), seed=st.integers(0, 99), ties=st.booleans(),
)  # fmt: skip
def test_rows_by_blocks_are_those_of_pytorch(
    n: int, classes: int, block: int, scale: float, seed: int, ties: bool
) -> None:
    y = scale * draw(n, 3, classes, seed=seed)
    if ties:
        y = y.round()
    for each in (y, y[:, 1:], y.transpose(0, 1)):
        found = rows(each, block)
        flat = each.flatten(0, -2)
        top = flat.topk(2, dim=-1).values
        assert torch.equal(found.highest, top[:, 0])
        assert torch.equal(found.gap, top[:, 0] - top[:, 1])
        torch.testing.assert_close(found.log_partition, flat.logsumexp(-1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.total, flat.sum(-1), rtol=1e-10, atol=1e-10 * scale)
        sums = (flat - top[:, :1]).exp().sum(-1)
        assert torch.equal(found.collapsed, sums == 1)


@pytest.mark.parametrize("view", [False, True])
def test_no_second_array_of_the_logits_size(view: bool) -> None:
    y = torch.randn(2, 5, 50_000).half()
    if view:
        y = y[:, :-1]
    with Largest() as largest:
        seen = read(y, labels=torch.zeros(y.shape[:-1], dtype=torch.int64))
    assert set(seen) == SERIES  # without a loss nobody knows whether labels are shifted
    assert largest.elements <= 2**17


def test_hidden_positions_do_not_count() -> None:
    y = draw(4, 5, 6)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    hostile = y.masked_fill(~mask[..., None], torch.nan)
    seen, plain = read(hostile, attention_mask=mask.long()), read(y[mask])
    assert set(seen) == SERIES
    for name, value in plain.items():
        torch.testing.assert_close(seen[name].double(), value.double())
    none = read(y, attention_mask=torch.zeros(4, 5))
    assert none["log_partition"].isnan()
    assert none["max"] == -torch.inf


def test_micro_batches_with_vocabularies_of_other_sizes() -> None:
    a, b = draw(4, 6), draw(2, 3, 9, seed=1)
    seen, of = read(a, b), [read(a), read(b)]
    assert seen["max"] == max(a.max(), b.max())
    assert seen["smallest_gap"] == min(each["smallest_gap"] for each in of)
    assert float(seen["mean"]) == pytest.approx(float((a.sum() + b.sum()) / (24 + 54)))
    assert float(seen["log_partition"]) == pytest.approx(
        float((a.logsumexp(-1).sum() + b.logsumexp(-1).sum()) / 10)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinities_come_back(dtype: torch.dtype) -> None:
    y = draw(3, 4).to(dtype)
    y[1, 2] = -torch.inf
    seen = read(y)
    assert float(seen["log_partition"]) == pytest.approx(float(y.double().logsumexp(-1).mean()))
    assert seen["mean"] == -torch.inf
    assert float(seen["smallest_gap"]) >= 0
    y[1, 2] = torch.inf
    seen = read(y)
    assert seen["max"] == seen["log_partition"] == seen["mean"] == torch.inf
    assert seen["collapse"] <= 1
    y[1, 2] = torch.nan
    seen = read(y)
    assert all(seen[name].isnan() for name in ("max", "log_partition", "mean", "smallest_gap"))
    large = torch.full((2, 40_000), 9.0, dtype=torch.float16)  # whose sum is out of range
    assert read(large)["mean"] == 9


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(3, 4, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(3, 0),
        torch.zeros(3, 1), torch.zeros(3), torch.zeros(2, 2, 2, 2), None, "text", (), {},
    ],
    ids=lambda output: str(getattr(output, "shape", output)),
)  # fmt: skip
def test_what_are_no_logits_is_left_out(output: Any) -> None:
    assert read(output) == {}


# Targets


def test_targets_of_a_classifier() -> None:
    y, labels = draw(6, 4), torch.tensor([0, 3, -100, 1, 2, 2])
    seen = read(y, labels=labels)
    counted = labels >= 0
    expected = y[counted].gather(1, labels[counted, None]).mean()
    assert float(seen["target"]) == pytest.approx(float(expected))
    assert seen["zero_loss"] == 0


@pytest.mark.parametrize("items", [None, 20])
@pytest.mark.parametrize("shifts", [False, True])
def test_the_loss_tells_whether_labels_are_shifted(shifts: bool, items: int | None) -> None:
    y = draw(4, 5, 6).float()
    labels = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    own = F.pad(labels[:, 1:], (0, 1), value=-100) if shifts else labels
    total = F.cross_entropy(y.flatten(0, 1), own.flatten(), reduction="sum")
    loss = total / ((own >= 0).sum() if items is None else items)
    given: dict[str, Any] = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    seen = read(SimpleNamespace(logits=y, loss=loss), labels=labels, **given)
    counted = own >= 0
    expected = y[counted].gather(1, own[counted][:, None]).mean()
    assert float(seen["target"]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.bool),
        "text",
    ],
    ids=["floating", "of another shape", "bool", "text"],
)  # fmt: skip
def test_labels_that_are_no_classes_are_left_out(labels: Any) -> None:
    output = SimpleNamespace(logits=draw(4, 5, 6), loss=torch.tensor(1.0))
    assert set(read(output, labels=labels)) == SERIES


def test_targets_of_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    watch = ForwardWatch(model, [OutputLogits()])
    output = model(input_ids=tokens, labels=tokens)
    seen = tensors(watch.collect()[2], "logits/")
    of_next = output.logits[:, :-1].gather(-1, tokens[:, 1:, None])
    assert float(seen["target"]) == pytest.approx(of_next.mean().item(), rel=1e-5)


# The phenomenon


@pytest.mark.parametrize("seed", [0, 1])
def test_softmax_collapses_past_full_accuracy_and_the_sooner_the_fewer_bits(seed: int) -> None:
    """Four separable classes: the logits grow on and on, and so do the gaps."""
    torch.manual_seed(seed)
    x = draw(64, 8, seed=seed).float()
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    right, shares, gaps = [], [], []
    for _ in range(100):
        y = model(x)
        optimizer.zero_grad()
        F.cross_entropy(y, labels).backward()
        optimizer.step()
        right.append(bool((y.argmax(-1) == labels).all()))
        seen = [read(y.detach().to(d)) for d in (torch.float16, torch.float32, torch.float64)]
        shares.append([float(each["collapse"]) for each in seen])
        gaps.append(float(seen[1]["smallest_gap"]))
    learned = right.index(True)
    half, single, double = zip(*shares, strict=True)
    assert half[learned] < 0.7
    assert single[learned] < 0.15
    assert half[-1] >= 0.95
    assert 0.15 < single[-1] < 0.6
    assert max(double) < 0.05
    assert all(a >= b >= c for a, b, c in shares)
    assert gaps[-1] > 7.6


@pytest.mark.parametrize("order", [(1.0, math.nan, 2.0), (math.nan, 2.0), (2.0, 1.0, math.nan)])
def test_a_micro_batch_without_a_number_is_not_passed_over(order: tuple[float, ...]) -> None:
    observer = OutputLogits()
    observer.started(1, nn.Identity())
    for value in order:
        observer.finished(ForwardCall(), torch.tensor([[value, 0.0]]))
    assert math.isnan(float(observer.collect()["logits/max"]))  # type: ignore[arg-type]
