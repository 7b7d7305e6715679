"""The watch certifies what decides an edge event, and not much else."""

from __future__ import annotations

import math

import numpy as np

from dyndiag.detectors import replay
from dyndiag.detectors.edge_of_stability import EdgeOfStability
from dyndiag.probes.curvature.edge_watch import EdgeWatch


def test_its_thresholds_are_the_detectors() -> None:
    for name in ("gate", "lower", "upper", "rise", "leaves_below", "leaves_above"):
        assert getattr(EdgeWatch, name) == getattr(EdgeOfStability, name)


def rows(ratios: np.ndarray, certified: list[bool]) -> list[tuple[int, dict[str, float]]]:
    return [
        (
            step,
            {
                "stability/edge_ratio": float(ratio),
                "stability/edge_ratio.converged": float(flag),
                "stability/edge_ratio.provisional": float(not flag),
                "stability/full_batch": 1.0,
            },
        )
        for step, (ratio, flag) in enumerate(zip(ratios, certified, strict=True))
    ]


def watched(ratios: np.ndarray) -> list[bool]:
    """Which of these are certified: the first, every tenth, and what the watch asks for."""
    watch, flags, since = EdgeWatch(), [], math.inf
    for ratio in ratios:
        flags.append(since >= 9 or watch.decides(float(ratio)))
        since = 0 if flags[-1] else since + 1
        watch.take(float(ratio), certified=flags[-1])
    return flags


def stays(ratios: np.ndarray, certified: list[bool]) -> list[tuple[int, int, int | None, float]]:
    events = replay(rows(ratios, certified), [EdgeOfStability()])
    return [(e.start, e.peak, e.end, float(e.details["peak_value"])) for e in events]


def test_the_same_events_as_if_all_were_certified() -> None:
    generator = np.random.default_rng(0)
    found = closed = certified = total = 0
    for _ in range(300):
        walk = np.cumsum(generator.normal(0, generator.uniform(0.01, 0.2), 200))
        noise = np.exp(generator.normal(0, generator.uniform(0, 0.15), 200))
        level = np.exp(math.log(0.5) + walk - 0.1 * np.cumsum(walk > 0.7)) * noise
        truth = stays(level, [True] * 200)
        flags = watched(level)
        assert stays(level, flags) == truth
        found, closed = found + len(truth), closed + sum(e[2] is not None for e in truth)
        certified, total = certified + sum(flags), total + len(flags)
    assert found > 200 and closed > 100  # and there was something to tell
    assert certified < 0.3 * total


def test_hovering_at_the_edge_is_cheap() -> None:
    generator = np.random.default_rng(1)
    ratios = np.r_[np.linspace(0.2, 1, 40), 1 + 0.05 * generator.standard_normal(400)]
    flags = watched(ratios)
    assert len(stays(ratios, flags)) == 1
    assert sum(flags[60:]) < 0.2 * len(flags[60:])


def test_flat_below_the_rise_is_not_certified_at_every_sample() -> None:
    ratios = 0.9 + 0.02 * np.random.default_rng(2).standard_normal(100)
    assert sum(watched(ratios)) <= 12
