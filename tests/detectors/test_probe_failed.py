from __future__ import annotations

from dyndiag.detectors import ProbeFailed, replay


def test_each_probe_fails_once() -> None:
    rows = [
        (0, {"train/loss": 1.0}),
        (5, {"failures/curvature": 1.0, "train/loss": 1.0}),
        (9, {"failures/curvature": 1.0, "failures/attention": 1.0}),
    ]
    first, second = replay(rows, [ProbeFailed()])
    assert (first.start, first.peak, first.end) == (5, 5, 5)
    assert first.series == ("failures/curvature",)
    assert first.details["probe"] == "curvature"
    assert (second.start, second.series) == (9, ("failures/attention",))


def test_a_zero_is_no_failure_until_it_is_one() -> None:
    rows = [(0, {"failures/curvature": 0.0}), (1, {"failures/curvature": 1.0})]
    (event,) = replay(rows, [ProbeFailed()])
    assert event.start == 1
