"""Ratios to SGD's edges, measured live: exact where they are known, and a run that crosses one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import dyndiag
from dyndiag.batches import MicroBatches
from dyndiag.probes.curvature.minibatch import BatchSharpness, Trace
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from dyndiag.values import Estimate

ROWS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def linear(size: int) -> nn.Module:
    model = nn.Linear(size, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.7)
    return model


def plain(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def state(
    model: nn.Module,
    batch: Sequence[Tensor] | None,
    probe: Sequence[Tensor],
    make: Callable[[nn.Module], Optimizer] = plain,
) -> TrainState:
    optimizer = make(model)
    parameters = tuple(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return TrainState(
        0, model, optimizer, parameters, ("weight",), squared, MicroBatches((probe,)),
        None if batch is None else MicroBatches((batch,)), (0.1,),
    )  # fmt: skip


def estimates(found: Any) -> dict[str, Estimate]:
    return {name: value for name, value in found.items() if isinstance(value, Estimate)}


def data(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows, torch.zeros(len(rows), 1, dtype=rows.dtype)


def test_a_small_hessian_is_read_exactly() -> None:
    hessian = ROWS.T @ ROWS / 3
    found = estimates(Trace(Every(1)).measure(state(linear(2), data(ROWS[:2]), data(ROWS))))
    trace, norm = float(hessian.trace()), float(hessian.norm())
    assert found["curvature/trace"].value == pytest.approx(trace) == 7 / 3
    assert found["curvature/frobenius_norm"].value == pytest.approx(norm)
    assert found["stability/trace_ratio"].value == pytest.approx(0.1 * trace / (2 * 2))
    assert found["stability/frobenius_ratio"].value == pytest.approx(0.1 * norm / math.sqrt(2))
    assert all(estimate.error == 0 and estimate.converged for estimate in found.values())


def test_a_larger_one_by_ten_products_with_errors_that_hold() -> None:
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = rows.T @ rows / 50
    probe, here = Trace(Every(1)), state(linear(30), data(rows[:5]), data(rows))
    truth = {
        "curvature/trace": float(hessian.trace()),
        "curvature/frobenius_norm": float(hessian.norm()),
        "stability/trace_ratio": 0.1 * float(hessian.trace()) / 10,
        "stability/frobenius_ratio": 0.1 * float(hessian.norm()) / math.sqrt(5),
    }
    seen = [estimates(probe.measure(here)) for _ in range(40)]
    for name, exact in truth.items():
        misses = [(found[name].value - exact) / found[name].error for found in seen]
        # Student's t with nine degrees of freedom: 3.25 at 1 %; a mean of 40 has s.d. 0.18.
        assert sum(abs(miss) > 3.25 for miss in misses) <= 4
        assert abs(sum(misses) / 40) < 0.8
        assert all(found[name].error < 0.5 * exact for found in seen)
    first = seen[0]
    assert first["curvature/trace"].products <= 10
    assert sum(e.products for e in first.values()) == first["curvature/trace"].products
    norm = first["curvature/frobenius_norm"]
    assert norm.converged is (norm.error <= 0.05 * norm.value)


OTHERS: list[Callable[[nn.Module], Optimizer]] = [
    lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    lambda m: Adam(m.parameters(), lr=0.1),
    lambda m: torch.optim.Rprop(m.parameters(), lr=0.1),
]


@pytest.mark.parametrize("make", OTHERS)
def test_of_other_optimizers_there_is_no_ratio(make: Callable[[nn.Module], Optimizer]) -> None:
    here = state(linear(2), data(ROWS), data(ROWS), make)
    assert set(Trace(Every(1)).measure(here)) == {"curvature/trace", "curvature/frobenius_norm"}
    assert set(BatchSharpness(Every(1)).measure(here)) == {"curvature/batch_sharpness"}


def test_without_a_batch_its_size_is_unknown() -> None:
    found = Trace(Every(1)).measure(state(linear(2), None, data(ROWS)))
    assert set(found) == {"curvature/trace", "curvature/frobenius_norm"}


def test_batch_sharpness_over_single_rows_is_the_trace() -> None:
    """BS at B = 1 is mean ‖x‖², 7/3, at every θ; the s.e. is that of (1, 4, 2)."""
    probe = BatchSharpness(Every(1))
    for i, row in enumerate(ROWS):
        found = probe.measure(state(linear(2), data(row[None]), data(ROWS)))
        assert float(found["curvature/batch_sharpness"]) == pytest.approx(float(row @ row))  # type: ignore[arg-type]
        ratio = estimates(found)["stability/batch_sharpness_ratio"]
        assert math.isnan(ratio.error) is (i == 0) and not ratio.converged
    assert ratio.value == pytest.approx(0.1 * 7 / 3 / 2)
    spread = torch.tensor([1.0, 4.0, 2.0]).std() / math.sqrt(3)
    assert ratio.error == pytest.approx(0.1 * float(spread) / 2)
    for _ in range(32):  # the first three leave the window
        found = probe.measure(state(linear(2), data(ROWS[:1]), data(ROWS)))
    ratio = estimates(found)["stability/batch_sharpness_ratio"]
    assert ratio.value == pytest.approx(0.05) and ratio.error == 0 and ratio.converged


def test_a_zero_gradient_has_no_direction() -> None:
    probe = BatchSharpness(Every(1))
    found = probe.measure(state(linear(2), data(0 * ROWS), data(ROWS)))
    assert set(found) == {"curvature/batch_sharpness"}
    probe.measure(state(linear(2), data(ROWS[:1]), data(ROWS)))
    found = probe.measure(state(linear(2), data(0 * ROWS), data(ROWS)))
    assert math.isnan(float(found["curvature/batch_sharpness"]))  # type: ignore[arg-type]
    assert estimates(found)["stability/batch_sharpness_ratio"].value == pytest.approx(0.05)


def test_infinities_come_back_as_themselves() -> None:
    model = linear(12)
    rows = torch.full((3, 12), 1e100, dtype=torch.float64)
    found = estimates(Trace(Every(1)).measure(state(model, data(rows), data(rows))))
    for name in ("curvature/trace", "stability/trace_ratio", "stability/frobenius_ratio"):
        assert not math.isfinite(found[name].value) and not found[name].converged


@pytest.mark.parametrize(("ratio", "diverges"), [(0.9, False), (1.1, True)])
def test_single_examples_cross_their_edge_far_below_that_of_descent(
    ratio: float, diverges: bool, tmp_path: Path
) -> None:
    """Inputs of one length: tr H = 2/η is the edge at B = 1, at a ninth of descent's 2/η."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    x = 2 * x / x.norm(dim=1, keepdim=True)  # ‖x‖² = tr H = 4
    y = x.sum(1, keepdim=True)
    model = linear(12)
    optimizer = SGD(model.parameters(), lr=ratio * 2 / 4)
    losses = []
    with dyndiag.Monitor(
        model, optimizer, squared, run=tmp_path / "run", probe_batch=(x, y), tensorboard=False
    ) as monitor:
        for step in range(300):
            i = int(torch.randint(60, (1,), generator=generator))
            batch = x[i : i + 1], y[i : i + 1]
            loss = squared(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=batch)
            if step % 100 == 0:
                losses.append(squared(model, (x, y)).item())
    run = dyndiag.Run(tmp_path / "run")
    assert (losses[-1] > 100 * losses[0]) is diverges
    assert (losses[-1] < 0.01 * losses[0]) is not diverges
    assert run["stability/edge_ratio"].max() < 0.3  # descent would be far from its edge
    measured = run["stability/trace_ratio"]
    assert abs(measured.mean() - ratio) < 3 * run["stability/trace_ratio.error"].mean()
    assert bool(measured.mean() > 1) is diverges
    sharp = run["stability/batch_sharpness_ratio"]
    assert sharp.iloc[-1] == pytest.approx(ratio, rel=1e-6)
    assert run["stability/frobenius_ratio"].mean() < 1  # with μ = 1 this rule sees nothing
    assert "edge_of_stability" not in set(run.events["kind"])
