from __future__ import annotations

import math

from dyndiag.detectors import EarlyOvershoot, replay
from dyndiag.values import Event


def events(ratios: list[float], warmup: list[float]) -> list[Event]:
    rows = [
        (step, {"stability/realised_edge": ratio, "stability/warmup": warm})
        for step, (ratio, warm) in enumerate(zip(ratios, warmup, strict=True))
    ]
    return replay(rows, [EarlyOvershoot()])


def test_from_the_first_step_that_raises_the_loss_to_the_first_that_does_not() -> None:
    (event,) = events([0.5, 1.5, 9.1, math.nan, 1.2, 0.4, 0.4], [1] * 7)
    assert (event.start, event.peak, event.end) == (1, 2, 5)
    assert event.severity == 9.1
    assert event.details["value"] == 1.5


def test_after_warm_up_it_is_no_overshoot() -> None:
    assert events([0.5, 1.5, 2.0], [0] * 3) == []


def test_the_end_of_warm_up_closes_it() -> None:
    (event,) = events([2.0, 2.0, 2.0], [1, 1, 0])
    assert (event.start, event.end) == (0, 2)


def test_at_one_nothing_opens_and_nan_says_nothing() -> None:
    assert events([1.0, math.nan, 1.0], [1] * 3) == []


def test_the_rest_of_a_row_may_be_missing() -> None:
    rows = [
        (0, {"stability/warmup": 1.0}),
        (1, {"stability/realised_edge": 1.5}),
        (2, {"train/loss": 1.0}),
        (3, {"stability/warmup": 0.0}),
    ]
    (event,) = replay(rows, [EarlyOvershoot()])
    assert (event.start, event.end) == (1, 3)
