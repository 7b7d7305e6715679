"""Followed sharpness tells the same edge as one that is certified at every sample, for less."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from dyndiag.batches import MicroBatches
from dyndiag.curvature import Operator, eigenpairs
from dyndiag.curvature.follow import Followed
from dyndiag.detectors import replay
from dyndiag.detectors.edge_of_stability import EdgeOfStability
from dyndiag.probes.curvature.sharpness import Sharpness
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from dyndiag.values import Estimate


class Certified:
    """Stands in for `Follower`: certifies every sample."""

    def __init__(self, generator: torch.Generator, tolerance: float) -> None:
        self.generator, self.tolerance, self.start = generator, tolerance, None

    def largest(self, operator: Operator, *, certify: bool = False) -> Followed:
        found = eigenpairs(
            operator,
            start=self.start,
            relative_tolerance=self.tolerance,
            generator=self.generator,
        )
        self.start = found.vectors[0]
        return Followed(
            float(found.values[0]), found.vectors[0], float(found.error_bounds[0]),
            found.products, found.converged, False, found.upper_bound,
        )  # fmt: skip


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1).mean()


def columns(probe: Sharpness, state: TrainState) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for name, value in probe.measure(state).items():
        found |= value.columns(name) if isinstance(value, Estimate) else {name: float(value)}
    return found


RUNS = {
    "descent": (torch.optim.SGD, 0.3, 700, 400),
    "adamw": (torch.optim.AdamW, 4e-3, 1100, 1000),
    "unknown": (torch.optim.Rprop, 1e-3, 300, 200),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_same_edge_for_less(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rate, steps, cut = RUNS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    batch = (x, torch.sin(3 * x[:, :2]))
    optimizer = make(model.parameters(), lr=rate)
    followed = Sharpness(Every(1))
    with monkeypatch.context() as patch:
        patch.setattr("dyndiag.probes.curvature.sharpness.Follower", Certified)
        certified = Sharpness(Every(1))
    rows: dict[Sharpness, list[tuple[int, Mapping[str, float]]]] = {followed: [], certified: []}
    for step in range(steps):
        if step == cut:
            optimizer.param_groups[0]["lr"] /= 3
        squared_error(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 7:
            continue
        data = MicroBatches((batch,))
        state = TrainState(
            step, model, optimizer, tuple(model.parameters()), (), squared_error, data, data,
            (optimizer.param_groups[0]["lr"],),
        )  # fmt: skip
        for probe, written in rows.items():
            written.append((step, columns(probe, state)))

    stays = [
        [(e.start, e.peak, e.end) for e in replay(written, [EdgeOfStability()])]
        for written in rows.values()
    ]
    assert stays[0] == stays[1]
    if kind != "unknown":
        ((start, peak, end),) = stays[0]
        assert end is not None and start <= peak < end
    judged = "curvature/sharpness" if kind == "unknown" else "stability/edge_ratio"
    statuses = [row[f"{judged}.converged"] for _, row in rows[followed]]
    last = max(i for i in range(len(statuses)) if statuses[i])
    assert statuses[0] == 1 and len(statuses) - last <= 10
    assert sum(statuses) < 0.5 * len(statuses)
    for (_, row), (_, truth) in zip(rows[followed], rows[certified], strict=True):
        for name in row:
            if f"{name}.error" in row:
                assert row[name] == pytest.approx(truth[name], rel=2e-3)
                assert row[f"{name}.converged"] + row[f"{name}.provisional"] == 1
                assert (f"{name}.upper_bound" in row) == (row[f"{name}.converged"] == 1)

    def paid(probe: Sharpness) -> float:
        return sum(v for _, row in rows[probe] for k, v in row.items() if k.endswith(".products"))

    assert paid(followed) < 0.85 * paid(certified)
