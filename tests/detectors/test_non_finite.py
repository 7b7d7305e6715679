from __future__ import annotations

import math

import pytest

from dyndiag.detectors import NonFinite, replay
from dyndiag.values import Event

NAN = math.nan
GRADIENT = "gradients/norm/blocks.3.mlp"


def events(rows: list[dict[str, float]]) -> list[Event]:
    return replay(list(enumerate(rows)), [NonFinite()])


def healthy(**changes: float) -> dict[str, float]:
    row = {"train/loss": 1.0, "gradients/norm": 2.0, GRADIENT: 1.0, "logits/max": 3.0}
    return row | changes


def test_the_first_series_is_named_and_the_loss_dated() -> None:
    (event,) = events(
        [healthy(), healthy(**{GRADIENT: math.inf}), *[healthy(**{"train/loss": NAN})] * 3]
    )
    assert event.series == (GRADIENT,)
    assert event.start == 1
    assert event.end is None
    assert event.details["value"] == "inf"
    assert event.details["loss_at"] == 2
    assert event.severity == 2


def test_in_one_row_the_loss_comes_first_then_names_in_order() -> None:
    row = healthy(**{"train/loss": NAN, "gradients/norm": NAN, GRADIENT: NAN})
    (event,) = events([healthy(), row])
    assert event.series == ("train/loss", "gradients/norm", GRADIENT)
    assert event.details["first"] == "train/loss"


def test_it_closes_when_all_are_finite_again() -> None:
    (event,) = events(
        [
            healthy(),
            healthy(**{"train/loss": NAN, "logits/max": math.inf}),
            healthy(**{"logits/max": math.inf}),
            healthy(),
            healthy(),
        ]
    )
    assert (event.start, event.end) == (1, 3)


def test_a_series_that_is_not_measured_keeps_its_state() -> None:
    without = healthy()
    del without["logits/max"]
    (event,) = events([healthy(), healthy(**{"logits/max": math.inf}), without, healthy()])
    assert (event.start, event.end) == (1, 3)


@pytest.mark.parametrize("name", ["train/loss", "gradients/norm"])
def test_loss_and_gradient_count_from_the_first_step(name: str) -> None:
    assert len(events([healthy(**{name: NAN})])) == 1


def test_what_was_never_finite_is_a_quantity_without_a_value() -> None:
    row = healthy(**{"updates/ratio/bias": NAN, "curvature/trace.error": NAN})
    assert events([row] * 5) == []
    later = [healthy(**{"updates/ratio/bias": 0.1}), row]
    assert len(events(later)) == 1


def test_ratios_to_the_edge_and_errors_may_be_undefined() -> None:
    good = healthy(**{"stability/realised_edge": 0.5, "curvature/trace.error": 0.1})
    bad = healthy(**{"stability/realised_edge": NAN, "curvature/trace.error": NAN})
    assert events([good, bad]) == []


def test_a_gradient_scaler_may_skip_its_first_steps() -> None:
    skipped = healthy(**{"gradients/norm": math.inf, "train/skipped": 1.0})
    assert events([skipped] * 5 + [healthy()] * 20 + [skipped] * 19 + [healthy()]) == []
    (event,) = events([healthy()] * 3 + [skipped] * 30)
    assert event.start == 3
    spoilt = {**skipped, "train/loss": NAN}
    assert len(events([healthy(), spoilt])) == 1


def test_a_sum_that_overflows_is_not_a_value_that_did() -> None:
    assert events([healthy(a=1e308, b=1e308)]) == []
