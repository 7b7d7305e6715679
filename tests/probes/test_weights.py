"""Weight norms and distances against sums by hand, closed forms, and what decay does to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dyndiag
from dyndiag.probes import StepProbe
from dyndiag.probes.passing import PassingStep
from dyndiag.probes.weights import distances as weights
from dyndiag.probes.weights.distances import WeightDistances
from dyndiag.rows import Rows
from dyndiag.schedule import Every
from tests.models import batches, cross_entropy, mlp

Row = dict[str, float]


def passing(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> PassingStep:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = (tuple(part) for part in zip(*named, strict=True))
    return PassingStep(step, model, optimizer, parameters, names)


@torch.no_grad()
def sample(
    probe: WeightDistances,
    step: int,
    model: nn.Module,
    change: Callable[[], object],
    optimizer: torch.optim.Optimizer | None = None,
    closure: bool = False,
) -> Row:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    seen = passing(step, model, optimizer)
    if not closure:
        assert probe.before(seen) == {}
    change()
    rows = Rows()
    rows.add(step, probe.after(passing(step, model, optimizer)))
    return {name: float(value) for name, value in rows.to_host()[0][1].items()}


def length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def test_it_is_a_step_probe() -> None:
    assert isinstance(WeightDistances(), StepProbe)
    assert [step for step in range(40) if WeightDistances().due.due(step)] == [0, 11, 22, 33]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_norm_and_distances_are_sums_by_hand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", block)
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(mlp(), conv)
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    probe = WeightDistances()

    def step() -> None:
        for p in model.parameters():
            p.add_(torch.randn_like(p))

    snapshots = [[p.detach().clone() for p in model.parameters()]]
    rows = []
    for k in range(3):
        rows.append(sample(probe, 11 * k, model, step))
        snapshots.append([p.detach().clone() for p in model.parameters()])
    for k, row in enumerate(rows):
        now, start, last = snapshots[k + 1], snapshots[0], snapshots[k]
        assert row["weights/norm"] == pytest.approx(length(now), rel=1e-6)
        distance = length(a - b for a, b in zip(now, start, strict=True))
        assert row["weights/distance_from_start"] == pytest.approx(distance, rel=1e-6)
        distance = length(a - b for a, b in zip(now[5:7], start[5:7], strict=True))
        assert row["weights/distance_from_start/1"] == pytest.approx(distance, rel=1e-6)
        assert row["weights/norm/scale"] == pytest.approx(abs(now[0].item()), rel=1e-6)
        if k == 0:
            assert "weights/distance_from_last" not in row
        else:
            distance = length(a - b for a, b in zip(now, last, strict=True))
            assert row["weights/distance_from_last"] == pytest.approx(distance, rel=1e-6)
        parts = [v for name, v in row.items() if name.startswith("weights/norm/")]
        assert math.hypot(*parts) == pytest.approx(row["weights/norm"], rel=1e-6)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_blocks_hold_every_row_once(lengths: list[int], most: int) -> None:
    tensors = [torch.zeros(n, 3) for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK", most)
        blocks = list(weights._blocks(tensors))
    for block in blocks:
        size = sum(weights._cut(tensors[i], rows).numel() for i, rows in block)
        assert 0 < size <= max(most, 3)
        for i, rows in block:
            weights._cut(tensors[i], rows).add_(1)
    assert all((t == 1).all() for t in tensors)


def test_the_distance_from_the_last_sample_is_over_one_interval_only() -> None:
    model, probe = mlp(), WeightDistances(Every(5))
    for step, there in [(0, False), (5, True), (15, False), (20, True)]:
        row = sample(probe, step, model, lambda: None)
        assert ("weights/distance_from_last" in row) == there
        assert "weights/distance_from_start" in row


def test_half_precision_is_subtracted_in_float32() -> None:
    model = nn.Linear(1000, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    row = sample(WeightDistances(), 0, model, lambda: model.weight.add_(1 / 128))
    assert row["weights/distance_from_start"] == pytest.approx(math.sqrt(1000) / 128, rel=1e-6)
    # A difference that bfloat16, with eight digits, would round to 99.
    row = sample(WeightDistances(), 0, model, lambda: model.weight.fill_(100))
    assert row["weights/distance_from_start"] == pytest.approx(
        math.sqrt(1000) * (100 - 1 - 1 / 128), rel=1e-6
    )
    # 3 + 1/512 is 3 in bfloat16: what is not stored is no distance.
    nn.init.constant_(model.weight, 3.0)
    row = sample(WeightDistances(), 0, model, lambda: model.weight.add_(1 / 512))
    assert row["weights/distance_from_start"] == 0


def test_layers_that_are_frozen_and_unfrozen() -> None:
    model, probe = mlp(), WeightDistances(Every(1))
    head = list(model.parameters())[2:]

    def move() -> None:
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)

    for p in head:
        p.requires_grad_(False)
    rows = [sample(probe, 0, model, move), sample(probe, 1, model, move)]
    for p in head:
        p.requires_grad_(True)
    rows += [sample(probe, 2, model, move), sample(probe, 3, model, move)]
    for p in head:
        p.requires_grad_(False)
    rows.append(sample(probe, 4, model, move))
    for p in head:
        p.requires_grad_(True)
    rows += [sample(probe, 5, model, move), sample(probe, 6, model, move)]

    first, second = 16 * 9, 4 * 17
    start = [row["weights/distance_from_start"] ** 2 for row in rows]
    assert start == pytest.approx(
        [first, 4 * first, 9 * first + second, 16 * first + 4 * second, 25 * first,
         36 * first + 9 * second, 49 * first + 16 * second], rel=1e-5
    )  # fmt: skip
    last = [row.get("weights/distance_from_last", 0.0) ** 2 for row in rows]
    assert last == pytest.approx(
        [0, first, first, first + second, first, first, first + second], rel=1e-5
    )
    assert ["weights/distance_from_last/2" in row for row in rows] == [
        False, False, False, True, False, False, True,
    ]  # fmt: skip
    assert ["weights/norm/2" in row for row in rows] == [
        False, False, True, True, False, True, True,
    ]  # fmt: skip


def test_a_closure_hides_the_weights_before_the_first_step() -> None:
    model, probe = mlp(), WeightDistances(Every(1))

    def move() -> None:
        next(model.parameters()).add_(1.0)

    rows = [sample(probe, k, model, move, closure=True) for k in range(3)]
    distances = [row["weights/distance_from_start"] for row in rows]
    assert distances == pytest.approx([0, math.sqrt(128), 2 * math.sqrt(128)], rel=1e-5)


def test_weights_that_are_not_finite_come_back_as_themselves() -> None:
    model = mlp()
    first = next(model.parameters())
    row = sample(WeightDistances(), 0, model, lambda: first.fill_(math.inf))
    assert row["weights/norm"] == math.inf
    assert math.isfinite(row["weights/norm/2"])
    row = sample(WeightDistances(), 0, model, lambda: first.fill_(math.nan))
    assert math.isnan(row["weights/norm/0"])


def test_complex_weights_count_both_parts() -> None:
    model = nn.ParameterDict({"z": torch.full((2,), 3 + 4j), "x": torch.zeros(())})
    row = sample(WeightDistances(), 0, model, lambda: model["z"].mul_(2))
    assert row["weights/norm"] == pytest.approx(math.sqrt(200))
    assert row["weights/distance_from_start"] == pytest.approx(math.sqrt(50))


def test_a_parameter_of_another_shape_is_a_new_one() -> None:
    model, probe = nn.Linear(2, 2, bias=False), WeightDistances(Every(1))
    sample(probe, 0, model, lambda: None)
    model.weight.data = torch.ones(3, 2)
    row = sample(probe, 1, model, lambda: model.weight.add_(1.0))
    assert row["weights/distance_from_start"] == pytest.approx(math.sqrt(6))


def test_effective_learning_rates_of_modules_with_one_rate() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
    groups = [
        {"params": [model[0].weight, model[0].bias, model[1].weight], "lr": 0.5},
        {"params": [model[1].bias], "lr": 0.25},
        {"params": list(model[2].parameters()), "lr": torch.tensor(0.125)},
    ]
    row = sample(WeightDistances(), 0, model, lambda: None, torch.optim.Adam(groups))
    rates = {name: value for name, value in row.items() if "learning_rate" in name}
    assert rates == {
        "weights/effective_learning_rate/0": pytest.approx(0.5 / 36),
        "weights/effective_learning_rate/2": pytest.approx(0.125 / 24),
    }


class Normalised(nn.Module):
    """Layers before normalisations without gains: their scale does not change the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.layer_norm(self.first(x), (16,)))
        return nn.functional.layer_norm(self.second(hidden), (4,))


def trained(decay: float, steps: int, due: Every, learning_rate: float = 0.3) -> dict[int, Row]:
    """Rows of plain SGD on the normalised network, with the sum of η²‖g‖² as `path`."""
    torch.manual_seed(0)
    model = Normalised().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=decay)
    probe, rows, path = WeightDistances(due), {}, 0.0
    data = [(x.double(), y) for x, y in batches("mlp", 40)]
    for step in range(steps):
        cross_entropy(model, data[step % 40]).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        path += learning_rate**2 * length(gradients) ** 2
        if due.due(step):
            rows[step] = sample(probe, step, model, optimizer.step, optimizer) | {"path": path}
        else:
            optimizer.step()
        optimizer.zero_grad()
    return rows


def test_scale_invariant_weights_grow_by_every_gradient() -> None:
    # g ⟂ θ: ‖θ_t‖² = ‖θ₀‖² + η² Σ ‖g‖², exactly, up to LayerNorm's small constant.
    rows = trained(decay=0.0, steps=51, due=Every(10))
    squares = {step: row["weights/norm"] ** 2 for step, row in rows.items()}
    for step in (10, 30, 50):
        growth = squares[step] - squares[0]
        assert growth == pytest.approx(rows[step]["path"] - rows[0]["path"], rel=1e-3)
        for module in ("first", "second"):
            rate = rows[step][f"weights/effective_learning_rate/{module}"]
            assert rate == pytest.approx(0.3 / rows[step][f"weights/norm/{module}"] ** 2)


def test_decay_holds_the_norm_that_grows_without_it() -> None:
    free = trained(decay=0.0, steps=401, due=Every(50))
    held = trained(decay=0.05, steps=401, due=Every(50))
    norms = [row["weights/norm"] for row in free.values()]
    assert norms == sorted(norms)
    assert norms[-1] > 2 * norms[0]
    kept = [row["weights/norm"] for row in held.values()]
    assert max(kept) < 1.25 * min(kept)
    name = "weights/effective_learning_rate/first"
    assert free[400][name] < 0.25 * free[0][name]
    assert held[400][name] > 0.6 * held[0][name]


def test_a_resumed_run_starts_its_distance_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches("mlp", 4)
    for _ in range(2):
        with dyndiag.Monitor(
            model, optimizer, cross_entropy, run=tmp_path / "run", tensorboard=False,
            probes=[WeightDistances(Every(3))],
        ) as monitor:  # fmt: skip
            for step in range(6):
                loss = cross_entropy(model, data[step % 4])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(loss=loss, batch=data[step % 4])
    run = dyndiag.Run(tmp_path / "run")
    start = run["weights/distance_from_start"]
    assert start.index.tolist() == [0, 3, 6, 9]
    assert start[3] > start[0]
    assert start[6] < start[3]
    assert run["weights/distance_from_last"].index.tolist() == [3, 9]
    assert run["weights/norm"][9] == pytest.approx(length(model.parameters()), rel=0.1)
