"""Instability of generation traces against closed forms and whole distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.language.generation import TraceInstability, trace_instability

LN2 = math.log(2)
WORKED = [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.99, 0.01]]


def logs(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def as_mappings(rows: list[list[float]]) -> list[dict[str, float]]:
    return [{f"t{i}": math.log(p) for i, p in enumerate(row) if p > 0} for row in rows]


def as_pairs(rows: list[list[float]]) -> list[tuple[list[int], list[float]]]:
    return [([1, 2], [math.log(p) for p in row]) for row in rows]


def as_arrays(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([[7, 5]] * len(rows)), np.log(rows)


@pytest.mark.parametrize(
    "form",
    [logs, lambda rows: logs(rows).numpy(), lambda rows: list(logs(rows) + 3), as_mappings,
     as_pairs, as_arrays, lambda rows: [step[None] for step in logs(rows).float()]],
)  # fmt: skip
def test_the_worked_trace(form: Any) -> None:
    trace = trace_instability(form(WORKED))
    assert trace.instability.tolist() == pytest.approx([0.794896, 0.693147, 0.249189], abs=1e-6)
    assert (trace.instability - trace.jsd - trace.entropy).tolist() == pytest.approx([0.0] * 3)
    assert trace.strength == pytest.approx(0.794896, abs=1e-6)
    assert (trace.peak_step, trace.position, trace.timing) == (2, 0.0, "early")
    assert trace.peak_parts == pytest.approx((0.101749, LN2), abs=1e-6)
    assert trace.prefix_strength == {}
    for bound in (trace.lower_bound, trace.upper_bound):  # nothing is outside the list
        assert bound.tolist() == pytest.approx(trace.instability.tolist(), abs=1e-6)


def test_lists_that_share_one_token() -> None:
    steps = [{"a": math.log(0.7), "b": math.log(0.3)}, {"b": math.log(0.6), "c": math.log(0.4)}]
    assert trace_instability(steps).jsd.tolist() == pytest.approx([0.406716], abs=1e-6)
    swapped = [{"b": steps[0]["b"], "a": steps[0]["a"]}, steps[1]]
    assert trace_instability(swapped).jsd.tolist() == pytest.approx([0.406716], abs=1e-6)


def test_a_constant_trace_has_only_its_weighted_entropy() -> None:
    trace = trace_instability(logs([[0.7, 0.2, 0.1]] * 5), weight=2.5)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert trace.jsd.tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert trace.instability.tolist() == pytest.approx([2.5 * entropy] * 4)


def test_one_token_a_step_is_the_same_or_another() -> None:
    trace = trace_instability(logs([[0.6, 0.4], [0.8, 0.2], [0.1, 0.9]]), k=1)
    assert trace.entropy.tolist() == [0.0, 0.0]
    assert trace.jsd.tolist() == pytest.approx([0.0, LN2])


def confident_then(step: int, length: int) -> TraceInstability:
    """Sure of one token everywhere, and torn between ten at one step."""
    logits = torch.zeros(length, 50)
    logits[:, 0] = 12.0
    logits[step - 1, :10] = 12.0
    return trace_instability(logits)


@pytest.mark.parametrize(
    ("step", "timing"),
    [(5, "early"), (16, "early"), (17, "early"), (51, "early"), (52, "late"), (80, "late")],
)
def test_early_and_late_peaks_of_the_same_height(step: int, timing: str) -> None:
    trace = confident_then(step, length=100)
    assert trace.peak_step == step
    assert trace.position == pytest.approx((step - 2) / 98)
    assert trace.timing == timing
    assert trace.strength == pytest.approx(confident_then(30, length=100).strength)
    assert trace.peak_parts[1] == pytest.approx(math.log(10), abs=0.01)
    inside = [w for w in (16, 32, 64) if w >= step]
    assert list(trace.prefix_strength) == [16, 32, 64]
    for w, strength in trace.prefix_strength.items():
        assert (strength == trace.strength) == (w in inside)


def test_of_equal_peaks_the_first_counts() -> None:
    trace = trace_instability(logs([[0.9, 0.1], [0.5, 0.5]] * 4))
    assert trace.instability[0] == trace.instability[2] == trace.strength
    assert trace.peak_step == 2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_traces_too_short_for_a_position(steps: int) -> None:
    trace = trace_instability(torch.zeros(steps, 5))
    assert len(trace.instability) == max(0, steps - 1)
    assert math.isnan(trace.position)
    assert trace.timing == ""
    assert (trace.peak_step is None) == math.isnan(trace.strength) == (steps < 2)
    assert math.isnan(trace.peak_parts[0]) == (steps < 2)
    assert trace_instability([]).steps == 0


def whole(logits: Tensor, weight: float) -> Tensor:
    """Instability of the whole distributions, from the definition."""
    p = torch.softmax(logits.double(), -1)
    m = 0.5 * (p[1:] + p[:-1])
    h, h_m = (-torch.xlogy(x, x).sum(-1) for x in (p, m))
    return h_m - 0.5 * (h[1:] + h[:-1]) + weight * h[1:]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(2, 12),
    vocabulary=st.integers(1, 60),
    k=st.integers(1, 25),
    scale=st.floats(0.1, 12),
    weight=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)
def test_range_and_bounds(
    seed: int, steps: int, vocabulary: int, k: int, scale: float, weight: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(steps, vocabulary, generator=g, dtype=torch.float64)
    trace = trace_instability(logits, k, weight)
    k = min(k, vocabulary)
    assert (trace.instability >= 0).all()
    assert (trace.instability <= LN2 + weight * math.log(k) + 1e-12).all()
    truth = whole(logits, weight).numpy()
    assert (trace.lower_bound <= truth + 1e-9).all()
    assert (truth <= trace.upper_bound + 1e-7).all()
    if k == vocabulary:
        assert trace.instability == pytest.approx(truth, abs=1e-9)

    values, tokens = torch.log_softmax(logits, -1).topk(k)
    listed = trace_instability((tokens, values), k, weight, vocabulary)
    for name in ("instability", "jsd", "entropy", "lower_bound", "upper_bound"):
        assert getattr(listed, name) == pytest.approx(getattr(trace, name), abs=1e-9)
    unknown = trace_instability((tokens, values), k, weight)
    assert (unknown.upper_bound >= trace.upper_bound - 1e-9).all()


def test_bounds_are_reached() -> None:
    """Lower: the rests are one token each, the same. Upper: spread evenly, over other tokens."""
    p, q = [0.6, 0.2, 0.2, 0.0, 0.0], [0.2, 0.6, 0.2, 0.0, 0.0]
    least = trace_instability(logs([p, q]), k=1)
    assert least.jsd.tolist() == pytest.approx([LN2])
    both = trace_instability([{0: math.log(0.6), 1: math.log(0.2)}, {0: math.log(0.2),
                              1: math.log(0.6)}], vocabulary=3)  # fmt: skip
    assert both.lower_bound.tolist() == pytest.approx(whole(logs([p, q]), 1.0).tolist())
    apart = trace_instability([{0: math.log(0.6)}, {0: math.log(0.2)}], vocabulary=5, weight=1.0)
    other = [[0.6, 0.4, 0.0, 0.0, 0.0], [0.2, 0.0, 0.8 / 3, 0.8 / 3, 0.8 / 3]]
    assert apart.upper_bound[0] == pytest.approx(
        whole(logs(other), 1.0).item() + 0.8 * math.log(4 / 3)
    )


def test_without_the_vocabularys_size_there_is_no_upper_bound() -> None:
    trace = trace_instability([{"a": -0.5}, {"a": -1.0}])
    assert trace.upper_bound.tolist() == [math.inf]
    assert math.isfinite(trace.lower_bound[0])


def test_half_precision_and_infinities() -> None:
    logits = torch.tensor([[4.0, 1.0, -torch.inf], [3.0, -torch.inf, -torch.inf]]).half()
    trace = trace_instability(logits)
    assert np.isfinite(trace.instability).all()
    assert trace.entropy.tolist() == [0.0]
    broken = trace_instability(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [1.0, 2.0], [1.0, 2.0]]))
    assert np.isnan(broken.instability).tolist() == [True, True, False]
    assert math.isnan(broken.strength)


def test_tokens_that_read_the_same_are_put_together() -> None:
    pair = (["�", "�", "a"], [math.log(0.2), math.log(0.3), math.log(0.5)])
    assert trace_instability([pair, pair]).entropy.tolist() == pytest.approx([LN2])


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        (torch.zeros(2, 3, 4), r"shape \(steps, vocabulary\).*\(2, 3, 4\).*one sequence"),
        ([{"a": 0.5, "b": 0.5}], r"step 1 add up to 3\.3.*natural log-prob"),
        ([{"a": -0.1}, 3], r"step 2 must be .*int"),
        ([{"a": -0.1}, ([1, 2], [-0.1])], r"step 2 lists 2 tokens and 1 "),
        ([{}], r"step 1 lists 0 tokens"),
        ("text", r"got a str"),
    ],
)
def test_what_cannot_be_read_is_said(given_: Any, sentence: str) -> None:
    with pytest.raises(DyndiagError, match=sentence):
        trace_instability(given_)


@pytest.mark.parametrize(
    ("options", "word"), [({"k": 0}, "k must"), ({"k": True}, "k must"), ({"weight": -1}, "weight")]
)
def test_settings_are_checked(options: Any, word: str) -> None:
    with pytest.raises(DyndiagError, match=word):
        trace_instability(torch.zeros(3, 4), **options)
