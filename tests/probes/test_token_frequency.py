"""Loss by how frequent the target token is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import own_loss
from dyndiag.errors import DyndiagError
from dyndiag.probes.predictions.token_frequency import TokenFrequency, frequency_deciles
from tests.probes.test_predictions import Table, state_of, table_loss
from tests.probes.test_targets import LABELS, TOKENS, LanguageModel


def by_bucket(seen: Any) -> dict[int, float]:
    return {int(name.rpartition("/")[2]): float(value) for name, value in seen.items()}


def test_ten_tokens_as_frequent_are_a_decile_each() -> None:
    assert frequency_deciles(torch.full((10,), 7), 10).tolist() == list(range(10))
    assert frequency_deciles(torch.arange(10), 12)[-2:].tolist() == [9, 9]  # never seen: rarest


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200).filter(any))
def test_deciles_go_by_frequency_and_hold_a_tenth_each(counts: list[int]) -> None:
    n = torch.tensor(counts)
    deciles = frequency_deciles(n, len(counts))
    order = n.argsort(descending=True, stable=True)
    assert (deciles[order].diff() >= 0).all()
    total, most = n.sum().item(), n.max().item()
    for b in range(10):
        mass = n[deciles == b].sum().item()
        # A bucket holds the tokens whose middle is in it: at most half a token juts out each side.
        assert mass <= total / 10 + most + 1e-6


def test_the_means_by_hand() -> None:
    """Two tokens: nine tenths of all are the first, of middle .45; the other's middle is .95."""
    y = torch.tensor([0] * 18 + [1, 1, -100])
    logits = torch.randn(21, 2, generator=torch.Generator().manual_seed(0))
    probe = TokenFrequency()
    seen = by_bucket(probe.measure(state_of(Table(logits), 0, table_loss, (torch.arange(21), y))))
    each = F.cross_entropy(logits[:20], y[:20], reduction="none")
    assert seen == {5: pytest.approx(each[:18].mean().item()),
                    10: pytest.approx(each[18:].mean().item())}  # fmt: skip


def test_buckets_stay_and_counts_of_the_training_data_are_taken() -> None:
    y = torch.tensor([0, 0, 0, 1])
    model, x = Table(torch.zeros(4, 3)), torch.arange(4)
    probe = TokenFrequency()
    first = by_bucket(probe.measure(state_of(model, 0, table_loss, (x, y))))
    later = by_bucket(probe.measure(state_of(model, 11, table_loss, (x, 1 - y))))
    assert set(first) == set(later) == {4, 9}
    told = TokenFrequency(counts=torch.tensor([1, 9]))  # the third token never came
    seen = by_bucket(told.measure(state_of(model, 0, table_loss, (x, y))))
    assert set(seen) == {5, 10}
    model.logits.data[:, 0] = 1.0
    seen = by_bucket(told.measure(state_of(model, 1, table_loss, (x, y))))
    assert seen[10] < seen[5]  # token 0 is the rare one by these counts
    wider = TokenFrequency(counts=torch.tensor([3, 1, 0, 0, 5]))
    assert set(by_bucket(wider.measure(state_of(model, 0, table_loss, (x, y))))) == {4, 9}


def test_of_a_model_that_shifts_its_labels() -> None:
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    model = LanguageModel()
    seen = by_bucket(TokenFrequency().measure(state_of(model, 0, own_loss, batch)))
    target = TOKENS[:, 1:].flatten()
    each = F.cross_entropy(model.table[TOKENS[:, :-1]].flatten(0, 1), target, reduction="none")
    bucket = frequency_deciles(torch.bincount(target), 7)[target]
    assert seen == pytest.approx(
        {b + 1: each[bucket == b].mean().item() for b in set(bucket.tolist())}
    )


def test_without_targets_it_says_so() -> None:
    probe = TokenFrequency()
    batch = (torch.arange(2), torch.zeros(2))
    table = Table(torch.randn(2, 3))
    assert probe.measure(state_of(table, 0, lambda m, b: m(b[0]).sum(), batch)) == {}
    assert "no target tokens" in probe.notices[0]


@pytest.mark.parametrize("counts", [torch.ones(2, 2), torch.zeros(4), torch.empty(0)])
def test_counts_are_checked(counts: Tensor) -> None:
    with pytest.raises(DyndiagError, match=r"counts must be .*bincount"):
        TokenFrequency(counts=counts)


class Bigram(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 24)
        self.head = nn.Linear(24, vocabulary)
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_the_loss_of_rare_tokens_lags() -> None:
    """A bigram model by gradient descent; the next token is certain, tokens are Zipf's."""
    g = torch.Generator().manual_seed(0)
    vocabulary = 60
    zipf = 1 / torch.arange(1, vocabulary + 1).double()
    following = torch.multinomial(zipf, 4000, replacement=True, generator=g)
    previous = torch.randperm(vocabulary, generator=g)[following]  # each token has its own
    batch = (previous[None], following[None])
    model, probe = Bigram(vocabulary), TokenFrequency()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    found = []
    for step in range(100):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        if step % 33 == 0:
            found.append(by_bucket(probe.measure(state_of(model, step, loss_fn, batch))))
    first, *_, last = found
    buckets = sorted(last)
    assert len(buckets) >= 8
    assert last[buckets[0]] < 0.1 * first[buckets[0]]
    assert last[buckets[-1]] > 5 * last[buckets[0]]
    thirds = [sum(last[b] for b in part) / len(part) for part in (buckets[:3], buckets[-3:])]
    assert thirds[1] > 3 * thirds[0]


def test_a_loss_of_nan_is_no_want_of_targets() -> None:
    probe, model = TokenFrequency(), LanguageModel()
    nn.init.constant_(model.table, torch.nan)
    assert probe.measure(state_of(model, 0, own_loss, LABELS)) == {}
    assert probe.notices == []
