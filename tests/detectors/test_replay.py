from __future__ import annotations

import itertools
import json
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndiag.detectors import default_detectors, detectors_from, replay
from dyndiag.errors import DyndiagError
from dyndiag.values import Event
from tests.detectors.planted import Row

KINDS = {
    "progressive_sharpening",
    "edge_of_stability",
    "early_overshoot",
    "loss_spike",
    "divergence",
    "non_finite",
    "stability_gap",
    "entropy_collapse",
    "entropy_explosion",
    "probe_failed",
}


def eventful(steps: int = 1500) -> list[Row]:
    """A run in which every kind of event happens."""
    rng = np.random.default_rng(0)
    time = np.arange(steps)
    loss = 2 + 3 * np.exp(-time / 200) + 0.02 * rng.normal(size=steps)
    loss[600:620] += 4.0
    loss[1300:] = 9.0
    loss[1480:] = math.nan
    sharpness = np.interp(time, [0, 500, steps], [5.0, 20.0, 20.5])
    entropy = np.interp(time, [0, 300, 600, 900, 1000, 1200], [1.0, 0.05, 0.05, 1.0, 2.5, 1.0])
    rows: list[Row] = []
    for step in range(steps):
        row = {
            "train/loss": float(loss[step]),
            "train/learning_rate": 0.1,
            "gradients/norm": float(1 + 0.1 * rng.random()),
            "continual/task": float(step >= 900),
            "continual/accuracy/A": 0.95 - 0.4 * max(0.0, 1 - abs(step - 910) / 20),
            "continual/samples/A": 1000.0,
            "policy/entropy": float(entropy[step]),
        }
        if step < 5:
            row |= {"stability/realised_edge": 1.5 - 0.2 * step, "stability/warmup": 1.0}
        elif step % 21 == 0:
            value = float(sharpness[step] * np.exp(0.01 * rng.normal()))
            row |= {
                "curvature/sharpness": value,
                "stability/edge_ratio": value / 20,
                "stability/warmup": 0.0,
                "stability/full_batch": 1.0,
            }
        if step == 700:
            row["failures/attention"] = 1.0
        rows.append((step, row))
    return rows


ROWS = eventful()
EVENTS = replay(ROWS)


def live(rows: list[Row], cuts: list[int]) -> list[Event]:
    """What is kept when rows are held back and flushed at these cuts."""
    detectors = default_detectors()
    kept: dict[object, Event] = {}
    edges = [0, *sorted(cuts), len(rows)]
    for first, last in itertools.pairwise(edges):
        flushed = [
            event
            for step, values in rows[first:last]
            for detector in detectors
            for event in detector.update(step, values)
        ]
        kept |= {event.name: event for event in flushed}
    return sorted(kept.values(), key=lambda event: (event.start, event.kind, event.series))


def test_every_kind_happens_in_the_run_below() -> None:
    assert {event.kind for event in EVENTS} == KINDS
    assert [event.start for event in EVENTS] == sorted(event.start for event in EVENTS)


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, len(ROWS)), max_size=30))
def test_events_do_not_depend_on_how_often_values_are_flushed(cuts: list[int]) -> None:
    assert live(ROWS, cuts) == EVENTS


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_events_do_not_depend_on_the_order_of_names_in_a_row(seed: int) -> None:
    order = random.Random(seed)
    shuffled = []
    for step, row in ROWS:
        items = list(row.items())
        order.shuffle(items)
        shuffled.append((step, dict(items)))
    assert replay(shuffled) == EVENTS


@settings(max_examples=20)
@given(cut=st.integers(1, len(ROWS)))
def test_no_event_is_ever_taken_back(cut: int) -> None:
    assert {event.name for event in replay(ROWS[:cut])} <= {event.name for event in EVENTS}


def test_detectors_are_rebuilt_from_parameters_that_went_through_json() -> None:
    kept = {detector.kind: detector.parameters for detector in default_detectors()}
    rebuilt = detectors_from(json.loads(json.dumps(kept)))
    assert [detector.parameters for detector in rebuilt] == list(kept.values())
    assert replay(ROWS, rebuilt) == EVENTS


def test_a_changed_threshold_changes_the_events() -> None:
    (spike,) = detectors_from({"loss_spike": {"rise": 10.0}})
    assert replay(ROWS, [spike]) == []


def test_an_unknown_detector_or_threshold_is_refused() -> None:
    with pytest.raises(DyndiagError, match="No detector is called 'cold_restart'"):
        detectors_from({"cold_restart": {}})
    with pytest.raises(DyndiagError, match="'loss_spike' was built differently"):
        detectors_from({"loss_spike": {"sigma": 3.0}})


def test_details_survive_json_and_confidence_is_a_share() -> None:
    for event in EVENTS:
        assert json.loads(json.dumps(dict(event.details), allow_nan=False)) == event.details
        assert 0 <= event.confidence <= 1
        assert math.isfinite(event.severity)
        assert isinstance(event.start, int)
        assert event.start <= event.peak
        assert event.end is None or event.peak <= event.end


def test_memory_is_bounded() -> None:
    detectors = default_detectors()
    sizes = []
    for repetition in range(8):
        for step, row in ROWS[:1300]:
            for detector in detectors:
                detector.update(repetition * 1300 + step, row)
        sizes.append(len(pickle.dumps(detectors)))
    assert sizes[-1] < 1.1 * sizes[1]


def test_no_detector_needs_torch() -> None:
    code = "import sys, dyndiag.detectors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
