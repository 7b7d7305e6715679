"""Made-up runs for the report's tests: small, with numbers that are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyndiag.detectors import default_detectors, replay
from dyndiag.store import Writer
from dyndiag.values import Estimate, Event

HOSTILE = "\u202e<script>alert(1)</script>\"'&"
FACTS = {
    "dyndiag": "0.1.0",
    "torch": "2.13.0",
    "started": "2026-11-21T09:00:00+00:00",
    "finished": "2026-11-21T09:42:00+00:00",
    "optimizer": {"class": "SGD", "groups": [{"lr": 0.4, "momentum": 0}]},
    "loss_function": "mse_loss",
    "probe_batch": {"size": 20, "description": "20×1 float64"},
    "budget": 0.05,
    "cost": {"Sharpness": {"seconds": 1.0, "samples": 50, "products": 400}},
    "training_seconds": 40.0,
}
Rows = Sequence[tuple[int, dict[str, Any]]]


def settings() -> dict[str, dict[str, float]]:
    return {detector.kind: detector.parameters for detector in default_detectors()}


def write(
    folder: Path,
    rows: Rows,
    metadata: Mapping[str, Any] | None = None,
    events: Iterable[Event] | None = None,
) -> Path:
    """A run with these rows; its events are those that the detectors find, unless given."""
    scalars = [
        (step, {k: v for k, v in values.items() if not isinstance(v, np.ndarray)})
        for step, values in rows
    ]
    writer = Writer(folder)
    writer.write(rows, list(replay(scalars) if events is None else events))
    writer.write_metadata({**FACTS, "detectors": settings(), **(metadata or {})})
    writer.close()
    return folder


def sample(name: str, value: float, status: str = "c", width: float = 0.02) -> dict[str, float]:
    """An estimate's columns: certified, provisional or not converged."""
    return Estimate(
        value,
        error=width * abs(value),
        products=8,
        converged=status == "c",
        provisional=status == "p",
        upper_bound=value * (1 + width),
    ).columns(name)


def edge(steps: int = 2000, every: int = 21) -> Rows:
    """Sharpness rises to 2/η = 5 over the first 900 steps and stays; the loss jumps twice there.

    At the edge the loss rises at every other step; samples before step 300 are provisional, one at
    the end is not converged.
    """
    rows = []
    for i in range(steps):
        loss = 1.0 / (1 + i / 300) * (1 + (0.02 if i % 2 and i > 900 else 0.0))
        for jump in (1300, 1600):
            if jump <= i < jump + 12:
                loss *= 3 - 0.15 * (i - jump)
        values: dict[str, Any] = {
            "train/loss": loss,
            "train/learning_rate": 0.4,
            "gradients/norm": 0.1 + loss,
            "gradients/norm/hidden": 0.1 + loss / 2,
            "gradients/norm/out": 0.05,
            "updates/ratio": 1e-3 * loss,
            "logits/max": 1.0 + i / steps,
        }
        if i % every == 0:
            ratio = 0.4 + 0.6 * min(1.0, i / 900) + (0.03 * math.sin(i) if i > 900 else 0.0)
            status = "p" if i < 300 else "o" if i > steps - every - 1 else "c"
            values |= sample("curvature/sharpness", 5 * ratio, status)
            values |= sample("stability/edge_ratio", ratio, status)
            values |= {"stability/threshold": 5.0, "stability/full_batch": 1.0}
            values["stability/warmup"] = 0.0
        if i % 210 == 0:
            values |= Estimate(11.0 + i / 1000, error=1.5, products=10).columns("curvature/trace")
        if i in (0, 1000):
            grid = np.linspace(-1.0, 6.0, 71)
            mean = np.exp(-0.5 * ((grid - 0.2) / 0.1) ** 2) + 0.01 * np.exp(-((grid - 5) ** 2))
            values["curvature/density"] = np.stack([grid, mean, 0.2 * mean])
            values["curvature/density_nodes"] = np.array([[-0.5, 0.0, 5.0], [0.1, 0.85, 0.05]])
        rows.append((i, values))
    return rows


def switch(steps: int = 400, at: int = 200) -> Rows:
    """Two tasks: A at 98 % falls to 70 % ten steps after the switch and is back at 96 % later."""
    rows = []
    for i in range(steps):
        a, b = 0.98, 0.1
        if i >= at:
            since = i - at
            a = 0.98 - 0.028 * since if since <= 10 else min(0.96, 0.70 + 0.01 * (since - 10))
            b = min(0.95, 0.1 + 0.01 * since)
        rows.append(
            (
                i,
                {
                    "train/loss": 2.3 / (1 + i / 20) if i < at else 0.4 - 0.001 * (i - at),
                    "continual/task": float(i >= at),
                    "continual/accuracy/A": a,
                    "continual/samples/A": 500.0,
                    "continual/accuracy/B": b,
                    "continual/samples/B": 500.0,
                },
            )
        )
    return rows


def spiked(steps: int = 600, at: int = 400, back: bool = True, logits: bool = False) -> Rows:
    """A loss around 2.5 that jumps to 4.5 at one step; with attention logits that peaked before."""
    noise = np.random.default_rng(0).normal(0, 0.03, steps)
    rows = []
    for i in range(steps):
        loss = 2.5 + 5.0 * math.exp(-i / 30) + noise[i]
        if at <= i < at + 4 or (not back and i >= at):
            loss += 2.0
        values = {"train/loss": loss, "gradients/norm": 1.0 + 0.1 * noise[i]}
        if logits:
            for block in range(3):
                peak = 7000.0 if block == 1 and at - 30 < i < at else 0.0
                values[f"attention/logit_max/blocks.{block}"] = 20.0 + block + peak
        rows.append((i, values))
    return rows
