"""Entropy and divergence in blocks, against closed forms, float64 and what memory they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyndiag.probes.predictions.divergence import (
    blocks,
    compare,
    entropy,
    jensen_shannon_divergence,
    log_partition,
)


def jsd(p: list[float], q: list[float]) -> float:
    return jensen_shannon_divergence(torch.tensor([p]).log(), torch.tensor([q]).log()).item()


@pytest.mark.parametrize(
    ("p", "q", "truth"),
    [
        ([0.9, 0.1], [0.5, 0.5], 0.101749),
        ([1.0, 0.0], [0.0, 1.0], math.log(2)),
        ([0.7, 0.3, 0.0], [0.0, 0.6, 0.4], 0.406716),
        ([0.2, 0.8], [0.2, 0.8], 0.0),
    ],
)
def test_divergence_of_known_distributions(p: list[float], q: list[float], truth: float) -> None:
    assert jsd(p, q) == pytest.approx(truth, abs=1e-6)
    assert jsd(q, p) == pytest.approx(truth, abs=1e-6)


LOGITS = st.lists(st.floats(-200, 200, width=32), min_size=5, max_size=5)


@given(a=LOGITS, b=LOGITS)
def test_divergence_is_symmetric_and_bounded(a: list[float], b: list[float]) -> None:
    p, q = torch.log_softmax(torch.tensor([a]), -1), torch.log_softmax(torch.tensor([b]), -1)
    forth = jensen_shannon_divergence(p, q).item()
    back = jensen_shannon_divergence(q, p).item()
    exact = jensen_shannon_divergence(p.double(), q.double()).item()
    assert 0 <= forth <= math.log(2) + 1e-7
    assert forth == pytest.approx(back, abs=1e-6)
    assert forth == pytest.approx(exact, abs=1e-5)


def plain(z: Tensor, y: Tensor) -> Tensor:
    """H(m) − ½(H(p) + H(q)) on whole arrays, from the definition."""
    p, q = torch.softmax(z, -1), torch.softmax(y, -1)
    m = (p + q) / 2
    h_m, h_p, h_q = (-torch.xlogy(x, x).sum(-1) for x in (m, p, q))
    return h_m - 0.5 * (h_p + h_q)


@pytest.mark.parametrize("drift", [1e-3, 1e-2, 1.0])
def test_small_divergences_are_not_buried_in_rounding(drift: float) -> None:
    """To first order ⅛ Σ d²/p: at a drift of 1e-3 that is 1e-7, below float32's entropies."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 5000, generator=g, dtype=torch.float64)
    y = z + drift * torch.randn(8, 5000, generator=g, dtype=torch.float64)
    truth = plain(z, y)
    found = jensen_shannon_divergence(*(x.float().log_softmax(-1) for x in (z, y)))
    assert torch.allclose(found.double(), truth, rtol=3e-3, atol=0)
    if drift == 1e-3:
        d = torch.softmax(y, -1) - torch.softmax(z, -1)
        quadratic = (d.square() / torch.softmax(z, -1)).sum(-1) / 8
        assert torch.allclose(truth, quadratic, rtol=5e-3)
        naive = plain(z.float(), y.float()).double()
        assert (naive - truth).abs().max() > 0.3 * truth.max()  # this is what it is for


@given(
    rows=st.integers(1, 40),
    classes=st.sampled_from([2, 7, 2**17, 2**18 - 1, 2**18 + 1]),
)
def test_blocks_hold_every_row_once(rows: int, classes: int) -> None:
    scores = torch.empty(rows, 1).expand(rows, classes)
    found = [i for rows_ in blocks(scores) for i in range(*rows_.indices(rows))]
    assert found == list(range(rows))
    assert all(len(scores[part]) * classes <= max(2**18, classes) for part in blocks(scores))


def test_positions_by_the_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    before, logits = 3 * torch.randn(2, 700, 900, generator=g).double()
    kept, first = compare(before, None)
    assert first.jsd is None
    assert first.flipped is None
    now, found = compare(logits, kept)
    p = torch.softmax(logits, -1)
    assert found.jsd is not None
    assert found.flipped is not None
    assert torch.allclose(found.entropy.double(), -torch.xlogy(p, p).sum(-1), rtol=1e-5)
    assert torch.allclose(found.confidence.double(), p.amax(-1), rtol=1e-5)
    assert torch.allclose(found.jsd.double(), plain(before, logits), rtol=1e-4)
    assert torch.equal(found.flipped.bool(), before.argmax(-1) != logits.argmax(-1))
    assert torch.equal(now.best, logits.argmax(-1))
    assert torch.allclose(now.log_partition.double(), torch.logsumexp(logits, -1))
    assert torch.allclose(log_partition(logits).double(), torch.logsumexp(logits, -1))
    assert now.scores.data_ptr() == kept.scores.data_ptr()  # no memory is taken anew
    assert torch.equal(now.scores, logits.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_size_and_is_computed_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20, 50, generator=g).to(dtype)
    kept, _ = compare(one, None)
    assert kept.scores.dtype == dtype
    now, found = compare(other, kept)
    assert found.jsd is not None
    assert found.jsd.dtype == torch.float32
    truth = plain(one.double(), other.double())
    assert torch.allclose(found.jsd.double(), truth, rtol=1e-4)
    assert now.scores.dtype == dtype


def test_infinities_and_nan_come_back_as_what_they_mean() -> None:
    rows = torch.tensor([[1.0, -torch.inf, 1.0], [torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    kept, first = compare(rows.half(), None)
    _, again = compare(rows.half(), kept)
    assert first.entropy[0].item() == pytest.approx(math.log(2))
    assert again.jsd is not None
    assert again.jsd[0].item() == pytest.approx(0.0, abs=1e-7)
    for broken in (first.entropy, first.confidence, again.jsd):
        assert broken.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    "other", [torch.zeros(4, 6), torch.zeros(5, 5), torch.zeros(4, 5).half()], ids=str
)
def test_other_shapes_and_precisions_are_not_compared(other: Tensor) -> None:
    kept, _ = compare(torch.randn(4, 5), None)
    _, found = compare(other, kept)
    assert found.jsd is None
    assert found.flipped is None


class _Sizes(TorchDispatchMode):
    """The number of elements of each tensor that operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return out


@contextmanager
def largest_array() -> Iterator[Callable[[], int]]:
    with _Sizes() as sizes:
        yield lambda: sizes.largest


def test_no_array_is_larger_than_a_block() -> None:
    """At a vocabulary of 50,257; the plain way makes arrays of all positions."""
    before, logits = torch.zeros(64, 50_257), torch.ones(64, 50_257)
    kept, _ = compare(before, None)
    with largest_array() as largest:
        compare(logits, kept)
        log_partition(logits)
    assert largest() <= 2**18
    with largest_array() as largest:
        plain(before, logits)
    assert largest() == 64 * 50_257


def test_entropy_of_a_certain_row_is_zero() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert entropy(p, p.log()).tolist() == pytest.approx([0.0, math.log(2)])
