from __future__ import annotations

import math

from dyndiag.values import Event
from tests.detectors.planted import score


def events(*starts: int) -> list[Event]:
    return [Event("loss_spike", start, start) for start in starts]


def test_one_found_late_one_missed_one_false() -> None:
    result = score(events(101, 500), planted=[100, 300])
    assert result.delays == (1,)
    assert result.recall == 0.5
    assert result.precision == 0.5


def test_two_events_on_one_start_are_one_find_and_one_false_alarm() -> None:
    assert score(events(100, 101), planted=[100]).false_alarms == 1


def test_precision_is_undefined_without_events_and_recall_without_truth() -> None:
    assert math.isnan(score([], planted=[100]).precision)
    assert math.isnan(score(events(100), planted=[]).recall)
