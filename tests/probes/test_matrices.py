"""Singular values of a model's weights: which are measured, by what name, and what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dyndiag
from dyndiag.probes import Probe, StepProbe
from dyndiag.probes.predictions.input_jacobian import InputJacobian
from dyndiag.probes.weights import matrices
from dyndiag.probes.weights.distances import WeightDistances
from dyndiag.probes.weights.matrices import WeightMatrices
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from dyndiag.values import Estimate
from tests.models import Recurrent, Transformer, batches, cross_entropy

EXACT = ("spectral_norm", "stable_rank", "effective_rank", "condition_number", "rank_99")


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


def weight(model: nn.Sequential, i: int) -> Tensor:
    found = model[i].weight
    assert isinstance(found, Tensor)
    return found.detach()


def state_of(model: nn.Module, step: int = 0) -> TrainState:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = tuple(p for _, p in named)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainState(step, model, optimizer, parameters, tuple(name for name, _ in named))


def measured(model: nn.Module, probe: WeightMatrices | None = None) -> dict[str, Any]:
    seen = (probe or WeightMatrices()).measure(state_of(model))
    return {str(name): value for name, value in seen.items()}


def number(value: Any) -> float:
    return value.value if isinstance(value, Estimate) else float(value)


def modules_in(seen: dict[str, Any], quantity: str = "stable_rank") -> set[str]:
    start = f"weights/{quantity}/"
    return {name.removeprefix(start) for name in seen if name.startswith(start)}


def test_the_quantities_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = mlp()
    seen = measured(model)
    assert modules_in(seen) == {"0", "2"}
    sigma = np.linalg.svd(weight(model, 0).double().numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    truth = {
        "spectral_norm": sigma[0],
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "condition_number": sigma[0] / sigma[-1],
        "rank_99": 1 + int(np.searchsorted(np.cumsum(p), 0.99)),
    }
    assert {name for name in seen if name.endswith("/0")} == {f"weights/{q}/0" for q in truth}
    for quantity, value in truth.items():
        assert float(seen[f"weights/{quantity}/0"]) == pytest.approx(value, rel=1e-9)


def test_large_matrices_are_estimated_with_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 120, bias=False), nn.Linear(120, 4, bias=False))
    exact = measured(model)
    monkeypatch.setattr(matrices, "_LARGEST_DECOMPOSED", 50)
    seen = measured(model)
    assert modules_in(seen, "condition_number") == modules_in(seen, "rank_99") == {"1"}
    norm, rank = seen["weights/spectral_norm/0"], seen["weights/stable_rank/0"]
    truth = float(exact["weights/spectral_norm/0"])
    assert 0.99 * truth <= norm.value <= truth <= norm.upper_bound
    assert norm.converged
    assert norm.products > 0
    truth = float(exact["weights/stable_rank/0"])
    assert rank.lower_bound <= truth <= rank.value <= 1.02 * truth
    assert rank.value - rank.error <= truth
    effective = seen["weights/effective_rank/0"]
    assert abs(effective.value - float(exact["weights/effective_rank/0"])) <= 5.8 * effective.error


@pytest.mark.parametrize("most", [0, 1024])
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_weights_that_are_zero_or_not_finite(
    fill: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_LARGEST_DECOMPOSED", most)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(2, 3, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(fill)
    seen = measured(model)
    for module in ("0", "1"):
        norm = number(seen[f"weights/spectral_norm/{module}"])
        assert norm == 0 if fill == 0 else math.isnan(norm)
        assert math.isnan(number(seen[f"weights/stable_rank/{module}"]))
        assert math.isnan(number(seen[f"weights/effective_rank/{module}"]))


def test_convolutions_have_the_norm_of_the_layer_and_the_ranks_of_the_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 4, 4, stride=2),
        nn.Conv2d(4, 8, 4, stride=4),
        nn.Conv3d(2, 3, (1, 2, 3)),
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 6, 2, stride=2, groups=2),
    )
    seen = measured(model)
    assert modules_in(seen) == modules_in(seen, "spectral_norm") == set("0123456")
    for i in range(len(model)):
        flat = weight(model, i).double().flatten(1)
        sigma = torch.linalg.svdvals(flat)
        ratio = (sigma.square().sum() / sigma[0].square()).item()
        assert number(seen[f"weights/stable_rank/{i}"]) == pytest.approx(ratio)
        norm = seen[f"weights/spectral_norm/{i}"]
        if i in (3, 5):  # windows that do not overlap: a matrix on patches
            assert float(norm) == pytest.approx(sigma[0].item())
        else:
            assert isinstance(norm, Estimate)
            assert norm.converged
    groups = weight(model, 6).double().flatten(1).split(3)
    largest = max(torch.linalg.matrix_norm(group, ord=2).item() for group in groups)
    assert seen["weights/spectral_norm/6"].value == pytest.approx(largest, rel=1e-5)
    # On images of its own, in the middle of which borders do not matter.
    x = torch.randn(1, 6, 12, 12)
    transposed = model[2]
    for _ in range(200):
        x = x / x.norm()
        x = nn.functional.conv2d(transposed(x) - transposed(0 * x), weight(model, 2), stride=2)
    padded = x.norm().sqrt().item()
    norm = seen["weights/spectral_norm/2"]
    assert 0.9 * norm.value < padded <= 1.05 * norm.upper_bound


def test_names_and_what_is_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.positions = nn.Embedding(5, 4)
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.mix = nn.Parameter(torch.randn(4, 4))
            self.phase = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
            self.attend = nn.MultiheadAttention(4, 2)
            self.lstm = nn.LSTM(4, 3)
            self.norm = nn.LayerNorm((2, 4))
            self.empty = nn.Parameter(torch.empty(0, 4))
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Model()
    probe = WeightMatrices()
    seen = measured(model, probe)
    assert modules_in(seen) == {
        "mix",
        "attend",
        "attend.out_proj",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "head",
    }
    left_out = " ".join(probe.notices)
    assert "(positions.weight)" in left_out
    assert "(experts)" in left_out
    assert "(phase)" in left_out
    assert "embed.weight" not in left_out
    assert len(probe.notices) == 3


def test_frozen_weights_are_left_out() -> None:
    model = mlp()
    next(model.parameters()).requires_grad_(False)
    assert modules_in(measured(model)) == {"2"}


def test_parametrized_weights_are_measured_as_they_are_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 5), n_power_iterations=30),
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    )
    with torch.no_grad():
        dict(model.named_parameters())["0.parametrizations.weight.original"].mul_(17)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = measured(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modules_in(seen) == {"0", "1"}
    assert float(seen["weights/spectral_norm/0"]) == pytest.approx(1, rel=1e-3)
    flat = weight(model, 1).double().flatten(1)
    ratio = flat.square().sum() / torch.linalg.matrix_norm(flat, ord=2).square()
    assert float(seen["weights/stable_rank/1"]) == pytest.approx(ratio.item())


def test_many_matrices_are_kept_as_arrays() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(130)], nn.Conv1d(2, 2, 3))
    seen = measured(model)
    assert set(seen) == {f"weights/{quantity}" for quantity in EXACT}
    norms = seen["weights/spectral_norm"]
    assert norms.shape == (131,)
    for i in (0, 129):
        sigma = torch.linalg.svdvals(weight(model, i).double())
        assert norms[i].item() == pytest.approx(sigma[0].item())


@pytest.mark.parametrize("model", [Transformer(), Recurrent()], ids=["transformer", "lstm"])
def test_the_same_values_again_and_nothing_changed(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    first, second = measured(model), measured(model)
    assert {k: number(v) for k, v in first.items()} == {k: number(v) for k, v in second.items()}
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def trained_on_images(
    folder: Path | None, probes: Sequence[Probe | StepProbe] = ()
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(3 * 36, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ExitStack() as stack:
        monitor = None
        if folder is not None:
            monitor = stack.enter_context(
                dyndiag.Monitor(
                    model, optimizer, cross_entropy, run=folder, probes=probes, tensorboard=False
                )
            )
        for batch in batches("conv", 3):
            loss = cross_entropy(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss=loss, batch=batch)
    return model


def test_a_run_keeps_them_and_trains_as_without(tmp_path: Path) -> None:
    alone = trained_on_images(None)
    due = Every(2)
    probes: list[Probe | StepProbe] = [
        WeightMatrices(due), InputJacobian(due), WeightDistances(due),
    ]  # fmt: skip
    model = trained_on_images(tmp_path / "run", probes)
    for name, value in model.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name])
    run = dyndiag.Run(tmp_path / "run")
    assert run["weights/spectral_norm/0"].index.tolist() == [0, 2]
    assert (run["weights/spectral_norm/0.upper_bound"] > run["weights/spectral_norm/0"]).all()
    sigma = torch.linalg.svdvals(weight(model, 4).double())
    assert run["weights/spectral_norm/4"][2] == pytest.approx(sigma[0].item())
    for name in ("weights/norm", "weights/distance_from_last", "predictions/input_jacobian_norm"):
        assert run[name].notna().all()
    assert not any(name.startswith("failures") for name in run.names)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, steps: int = 151
) -> dict[str, list[float]]:
    """A full-batch training with the weights measured at every 50th step."""
    probe = WeightMatrices()
    series: dict[str, list[float]] = {}
    for step in range(steps):
        loss_fn(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            for name, value in measured(model, probe).items():
                series.setdefault(name.removeprefix("weights/"), []).append(number(value))
    return series


def test_ranks_of_a_deep_linear_network_fall_towards_that_of_its_task() -> None:
    # Descent on a product of matrices prefers low rank (Arora et al. 2019): here the task's is 2.
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(3)])
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    target = torch.randn(16, 2) @ torch.randn(2, 16) / 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    series = trained(model, optimizer, lambda m: (m(torch.eye(16)).T - target).square().sum())
    for layer in ("0", "1", "2"):
        start, *_, end = series[f"effective_rank/{layer}"]
        assert start > 12
        assert end < start / 1.9
        start, *_, end = series[f"stable_rank/{layer}"]
        assert start > 4
        assert end < 2


def two_linear_layers(first: Tensor, second: Tensor) -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(len(one), len(one), False) for one in (first, second)])
    with torch.no_grad():
        for p, start in zip(model.parameters(), (first, second), strict=True):
            p.copy_(start)
    return model


def rotations(count: int, size: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(size, size, generator=g))[0] for _ in range(count)]


@pytest.mark.parametrize(("full", "rank"), [(False, 2), (True, 16)])
def test_so_many_singular_values_are_learnt_as_the_task_has(full: bool, rank: int) -> None:
    """From a small start; the others' are left at some 1e-4, less than 1 % of all together."""
    left, right = rotations(2, 16, seed=0)
    s = torch.full((16,), 3.0) if full else torch.tensor([4.0, 2.0, *[0.0] * 14])
    target = left @ s.diag() @ right.T
    g = torch.Generator().manual_seed(1)
    model = two_linear_layers(*(1e-4 * torch.randn(2, 16, 16, generator=g)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss(model: nn.Module) -> Tensor:
        return 0.5 * (model(torch.eye(16)).T - target).square().sum()

    series = trained(model, optimizer, loss, steps=301)
    assert loss(model).item() < 1e-4
    for layer in ("0", "1"):
        counts = series[f"rank_99/{layer}"]
        assert counts[0] >= 13  # of a Gaussian matrix
        assert counts[-1] == rank


def test_the_condition_number_grows_to_the_tasks_unless_it_is_held() -> None:
    """Two layers from half a rotation share the task's σ equally, so theirs are its roots.

    L = ½‖BA − T‖² + ¼μ(‖AᵀA − 1‖² + ‖BBᵀ − 1‖²) is ½(u − σ)² + ½μ(u − 1)² for u, the square of
    either layer's singular value: least at (σ + μ)/(1 + μ).
    """
    left, between, right = rotations(3, 6, seed=0)
    s = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0, 0.25])
    target = left @ s.diag() @ right.T
    ends = {}
    for held in (0.0, 4.0):
        model = two_linear_layers(0.5 * between @ right.T, 0.5 * left @ between.T)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def loss(model: nn.Module, held: float = held) -> Tensor:
            first, second = model.parameters()
            off = [first.T @ first - torch.eye(6), second @ second.T - torch.eye(6)]
            fit = 0.5 * (model(torch.eye(6)).T - target).square().sum()
            return fit + held / 4 * sum(one.square().sum() for one in off)

        series = trained(model, optimizer, loss, steps=601)
        truth = math.sqrt((16 + held) / (0.25 + held))  # 8, and 2.17
        for layer in ("0", "1"):
            numbers = series[f"condition_number/{layer}"]
            assert numbers[0] < 1.2  # after a step of 1 % from a rotation
            assert numbers[-1] == pytest.approx(truth, rel=1e-2)
        ends[held] = numbers[-1]
    assert ends[0.0] > 3 * ends[4.0]


def test_spectral_norms_grow_where_the_learning_rate_is_too_large() -> None:
    x, y = batches("mlp", 1)[0]
    growth = {}
    for rate in (0.05, 0.8):
        torch.manual_seed(0)
        model = mlp(32)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        norms = trained(model, optimizer, lambda m: cross_entropy(m, (x, y)))["spectral_norm/2"]
        growth[rate] = norms[-1] / norms[0]
    assert 3 < growth[0.05] < 6
    assert growth[0.8] > 2 * growth[0.05]
