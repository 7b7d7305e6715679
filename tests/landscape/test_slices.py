"""Lines and planes against closed forms, and what they show of trained networks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from dyndiag import curvature, landscape
from dyndiag.errors import DyndiagError
from tests.landscape.made import (
    NOTHING,
    Weights,
    cross_entropy,
    double_well,
    network,
    quadratic,
    rescaled,
    task,
)
from tests.models import KINDS, batches, model_of
from tests.models import cross_entropy as any_cross_entropy

H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_middle_is_the_models_own_loss_bit_for_bit(kind: str) -> None:
    """Dropout and BatchNorm in eval mode; attention by the kernel that the model itself takes."""
    model, [batch] = model_of(kind), batches(kind, 1)
    line = landscape.line(model, any_cross_entropy, batch, points=5)
    plane = landscape.plane(model, any_cross_entropy, batch, points=3)
    assert model.training
    with torch.no_grad():
        expected = any_cross_entropy(model.eval(), batch).item()
    assert line.coordinates[2] == 0.0 and line.losses[2] == expected
    assert plane.losses[1, 1] == expected
    assert len({*line.losses}) == 5


@pytest.mark.parametrize("low, high, points", [(-0.3, 0.6, 10), (-0.1, 0.2, 4), (-0.9, 0.6, 6)])
def test_what_is_zero_but_for_rounding_is_the_model(low: float, high: float, points: int) -> None:
    line = landscape.line(
        Weights(1.0), double_well, NOTHING, along=torch.ones(1), between=(low, high), points=points
    )
    assert 0.0 in line.coordinates and 0.0 in line.losses


def test_attention_goes_by_the_kernels_that_the_user_allows() -> None:
    """Kernels differ by rounding: by another, the middle would not be the model's own loss."""
    cuda = torch.backends.cuda
    allowed = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        allowed.append((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled()))
        q = batch * model.t
        return F.scaled_dot_product_attention(q, batch, batch, is_causal=True).double().sum()

    model = Weights(1.0).float()
    q = torch.randn(2, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    for kernels in ([SDPBackend.MATH], [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        with sdpa_kernel(kernels):
            line = landscape.line(model, loss_fn, q, along=torch.ones(1), points=3)
            assert line.losses[1] == loss_fn(model, q).item()
        assert allowed == [(True, len(kernels) == 2)] * 4
        allowed.clear()


def test_a_line_through_a_quadratic() -> None:
    model, d = Weights(1.0, -2.0, 0.5), torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
    line = landscape.line(model, quadratic(H), NOTHING, along=d, between=(-3.0, 1.0), points=9)
    there = [model.t.detach() + c * d for c in line.coordinates.tolist()]
    assert line.losses == pytest.approx([float(t @ H @ t / 2) for t in there], rel=1e-13)
    assert line.coordinates.tolist() == [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0]
    assert line.norm == pytest.approx(float(d.norm()))


def test_x_and_y_of_a_plane() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model.t[0] + 10 * model.t[1]

    plane = landscape.plane(
        Weights(0.0, 0.0),
        loss_fn,
        NOTHING,
        along=torch.eye(2),
        between=((0.0, 2.0), (0.0, 1.0)),
        points=3,
    )
    assert plane.losses.tolist() == [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0], [10.0, 11.0, 12.0]]
    assert plane.x.tolist() == [0.0, 1.0, 2.0] and plane.y.tolist() == [0.0, 0.5, 1.0]
    assert plane.cosine == 0.0


def test_a_filter_normalised_direction() -> None:
    """‖d_i‖ = ‖θ_i‖ for every filter, zero for parameters of one dimension and for zero filters."""
    head = nn.Linear(16, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), head)
    with torch.no_grad():
        head.weight[2] = 0.0
    direction = landscape.random_direction(model).vector
    sizes = [p.numel() for p in model.parameters()]
    for p, d in zip(model.parameters(), direction.split(sizes), strict=True):
        if p.dim() == 1:
            assert not d.any()
        else:
            filters = d.view(p.shape).flatten(1).norm(dim=1)
            assert torch.allclose(filters, p.detach().flatten(1).norm(dim=1), rtol=1e-6)
            weights = p.detach().flatten()
            assert abs(torch.cosine_similarity(d, weights, dim=0)) < 6 / len(weights) ** 0.5
    assert torch.equal(landscape.random_direction(model).vector, direction)
    other = landscape.random_direction(model, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(other.vector, direction)


@settings(max_examples=20)
@given(scale=st.floats(0.01, 100.0))
def test_filter_normalised_lines_do_not_see_how_layers_are_scaled(scale: float) -> None:
    """ReLU networks that are the same function have the same line: what normalising is for."""
    data = task(32)
    one = network(0, 8).double()
    inputs = (data[0].double(), data[1])
    both = (one, rescaled(one, scale))
    lines = [landscape.line(m, cross_entropy, inputs, points=5).losses for m in both]
    assert lines[0] == pytest.approx(lines[1], rel=1e-9)


def test_along_eigenvectors_the_curvature_is_the_eigenvalue() -> None:
    data, model = task(64), network(0, 8).double()
    inputs = (data[0].double(), data[1])
    pairs = curvature.eigenpairs(curvature.hessian(model, cross_entropy, inputs), k=2)
    h = 1e-4
    line = landscape.line(model, cross_entropy, inputs, along=pairs, between=(-h, h), points=3)
    bend = (line.losses[0] - 2 * line.losses[1] + line.losses[2]) / h**2
    assert bend == pytest.approx(pairs.values[0].item(), rel=1e-4)
    plane = landscape.plane(
        model, cross_entropy, inputs, along=pairs, between=(-h, h), points=3, progress=False
    )
    bend = (plane.losses[0, 1] - 2 * plane.losses[1, 1] + plane.losses[2, 1]) / h**2
    assert bend == pytest.approx(pairs.values[1].item(), rel=1e-4)
    assert plane.labels[1] == f"eigenvector of λ = {pairs.values[1].item():.4g}"


def test_along_the_gradient() -> None:
    model = Weights(1.0, -2.0, 0.5)
    gradient = landscape.gradient_direction(model, quadratic(H), NOTHING)
    assert torch.allclose(gradient.vector, H @ model.t.detach())
    loader = DataLoader(TensorDataset(*task(50)), batch_size=16)  # the last holds 2
    network_ = network(0, 8)
    direction = landscape.gradient_direction(network_, cross_entropy, loader)
    loss = cross_entropy(network_, task(50))
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network_.parameters()))])
    assert torch.allclose(direction.vector, whole, atol=1e-7)


def test_along_the_difference_of_two_checkpoints() -> None:
    a, b = Weights(-1.0, 0.5, 0.0), Weights(2.0, 0.0, 1.0)
    direction = landscape.difference(a, a.state_dict(), b)
    line = landscape.line(a, quadratic(H), NOTHING, along=direction, between=(0.0, 1.0), points=2)
    expected = [float(m @ H @ m / 2) for m in (a.t.detach(), b.t.detach())]
    assert line.losses == pytest.approx(expected, rel=1e-14)


def drift(seed: int, count: int = 7, size: int = 40) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, size, generator=g, dtype=torch.float64)
    return [{"t": row} for row in draw.cumsum(0)]


@pytest.mark.parametrize("seed", range(3))
def test_principal_components_of_a_trajectory(seed: int) -> None:
    track = drift(seed)
    rows = np.stack([state["t"].numpy() for state in track])
    model = Weights(*track[-1]["t"].tolist())
    found = landscape.principal_components(model, track)
    _, spread, components = np.linalg.svd(rows - rows.mean(0))
    shares = spread[:2] ** 2 / (spread**2).sum()
    assert found.explained_variance == pytest.approx(shares, rel=1e-10)
    for i, direction in enumerate(found.directions):
        assert abs(float(direction.vector.numpy() @ components[i])) == pytest.approx(1.0, abs=1e-12)
        along = (rows - rows[-1]) @ direction.vector.numpy()
        assert found.coordinates[:, i] == pytest.approx(along, abs=1e-12)
    plane = landscape.plane(model, lambda m, b: m.t.square().sum(), NOTHING, along=found, points=9)
    assert plane.trajectory is not None and plane.explained_variance is not None
    assert plane.trajectory[-1].tolist() == [0.0, 0.0]
    for i, axis in enumerate((plane.x, plane.y)):
        assert axis[0] < plane.trajectory[:, i].min() and plane.trajectory[:, i].max() < axis[-1]
    middle = plane.losses[plane.y.tolist().index(0.0), plane.x.tolist().index(0.0)]
    assert middle == model.t.square().sum().item()


def test_a_trajectory_is_drawn_where_it_is_nearest_to_the_plane() -> None:
    """Also where the two directions are neither orthogonal nor of unit length."""
    track, g = drift(0), torch.Generator().manual_seed(5)
    basis = torch.randn(2, 40, generator=g, dtype=torch.float64) * torch.tensor([[3.0], [0.1]])
    model = Weights(*track[-1]["t"].tolist())
    plane = landscape.plane(
        model,
        lambda m, b: m.t.square().sum(),
        NOTHING,
        along=basis,
        points=3,
        trajectory=[*track, model],
    )
    steps = np.stack(
        [(s["t"] - model.t.detach()).numpy() for s in [*track, {"t": model.t.detach()}]]
    )
    oracle = np.linalg.lstsq(basis.numpy().T, steps.T, rcond=None)[0].T
    assert plane.trajectory == pytest.approx(oracle, abs=1e-9)


def test_data_in_any_cut_gives_the_same_line() -> None:
    model, data = network(0, 8).double(), task(50)
    inputs = (data[0].double(), data[1])
    loader = DataLoader(TensorDataset(*inputs), batch_size=16, shuffle=True)
    whole = landscape.line(model, cross_entropy, inputs, points=5)
    for cut in (
        landscape.line(model, cross_entropy, loader, points=5),
        landscape.line(model, cross_entropy, inputs, points=5, micro_batch=7),
    ):
        assert cut.losses == pytest.approx(whole.losses, rel=1e-12)
    total = landscape.line(
        model,
        lambda m, b: cross_entropy(m, b) * len(b[0]),
        loader,
        points=5,
        reduction="sum",
    )
    assert total.losses == pytest.approx(50 * whole.losses, rel=1e-12)


def test_a_loader_that_shuffles_is_read_alike_each_time() -> None:
    loader = DataLoader(TensorDataset(*task(50)), batch_size=16, shuffle=True)
    model = network(0, 8)
    first = landscape.line(model, cross_entropy, loader, points=5)
    torch.rand(7)
    again = landscape.line(model, cross_entropy, loader, points=5)
    assert np.array_equal(first.losses, again.losses)


def test_in_train_mode_all_points_see_the_same_masks() -> None:
    model, [batch] = model_of("transformer"), batches("transformer", 1)
    lines = []
    for mode in (False, False, True):
        lines.append(landscape.line(model, any_cross_entropy, batch, points=3, eval_mode=mode))
        torch.rand(7)  # wherever the global stream is
    assert np.array_equal(lines[0].losses, lines[1].losses)
    assert lines[0].losses[1] != lines[2].losses[1]


def test_some_parameters_alone() -> None:
    model, data, seen = network(0, 8), task(16), []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.append(copy.deepcopy(model.state_dict()))
        return cross_entropy(model, batch)

    landscape.line(model, loss_fn, data, points=2, parameters="2")
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, seen[0][name])}
    assert moved == {"2.weight"}


def test_what_is_not_finite_is_kept() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model.t.log().sum()

    line = landscape.line(
        Weights(1.0), loss_fn, NOTHING, along=torch.ones(1), between=(-2.0, 2.0), points=5
    )
    assert np.isnan(line.losses[0]) and line.losses[1] == -np.inf
    assert line.losses[2:] == pytest.approx(np.log([1.0, 2.0, 3.0]))


def test_a_loss_that_is_made_of_derivatives() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        (slope,) = torch.autograd.grad(model.t.square().sum(), model.t, create_graph=True)
        return slope.square().sum()  # 4 t²

    line = landscape.line(Weights(1.0), loss_fn, NOTHING, along=torch.ones(1), points=3)
    assert line.losses.tolist() == [0.0, 4.0, 16.0]


def test_weights_of_sixteen_bits_are_moved_in_one_rounding() -> None:
    model = nn.Linear(3, 2, bias=False).bfloat16()
    d = torch.full((6,), 0.3)
    seen = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.append(model.weight.detach().clone())
        return model(batch).float().square().mean()

    landscape.plane(
        model,
        loss_fn,
        torch.ones(4, 3).bfloat16(),
        along=[d, d.flip(0) * torch.arange(6)],
        points=2,
    )
    expected = model.weight.detach().float() - d.view(2, 3) - (0.3 * torch.arange(6)).view(2, 3)
    assert torch.equal(seen[0], expected.bfloat16())


@pytest.mark.parametrize(
    "ask, says",
    [
        ({"along": torch.ones(3)}, r"shape \(2,\).*shape \(3,\)"),
        ({"along": "gradient"}, r"a Direction, a flat tensor.*is a str"),
        ({"along": torch.zeros(2)}, "zero everywhere"),
        ({"along": torch.tensor([1.0, torch.inf])}, "NaN or inf"),
        ({}, "parameters of one dimension where they are"),
        ({"along": torch.ones(2), "points": 1}, "2 or more, but it is 1"),
        ({"along": torch.ones(2), "between": (1.0, -1.0)}, "the lower first"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(ask: dict[str, Any], says: str) -> None:
    with pytest.raises(DyndiagError, match=says):
        landscape.line(Weights(1.0, 2.0), double_well, NOTHING, **ask)


@pytest.mark.parametrize(
    "ask, says",
    [
        ({"along": torch.ones(2)}, "two directions, but along holds 1"),
        ({"along": torch.ones(2, 2)}, "parallel"),
        ({"along": torch.eye(2), "between": (1.0, (0.0, 1.0))}, "one range or two"),
        ({"along": torch.eye(2), "trajectory": [{"t": torch.ones(3)}]}, r"checkpoint 0.*shape"),
    ],
)
def test_what_is_wrong_with_a_plane_is_said(ask: dict[str, Any], says: str) -> None:
    with pytest.raises(DyndiagError, match=says):
        landscape.plane(Weights(1.0, 2.0), double_well, NOTHING, **ask)


def test_checkpoints_without_a_plane_are_refused() -> None:
    model = Weights(0.0, 0.0)
    line = [{"t": torch.tensor([float(i), 2.0 * i])} for i in range(4)]
    with pytest.raises(DyndiagError, match="lie on one line"):
        landscape.principal_components(model, line)
    with pytest.raises(DyndiagError, match="at least 3 checkpoints, but 2 came"):
        landscape.principal_components(model, line[:2])
    broken = [*line, {"t": torch.tensor([0.0, torch.nan])}]
    with pytest.raises(DyndiagError, match="hold NaN or inf"):
        landscape.principal_components(model, broken)


def width(line: landscape.Line, rise: float) -> float:
    """How far one may go, both ways together, before the loss has risen so much."""
    below = line.losses <= line.losses[len(line.losses) // 2] + rise
    return float(np.ptp(line.coordinates[below]))


def test_a_sharper_minimum_has_a_narrower_line() -> None:
    """Gradient descent follows a polynomial for the same time at two rates: each ends at its own
    edge 2/η, at about the same loss, and the one with the small rate is the sharper."""
    x = torch.linspace(-1, 1, 20)[:, None]
    data = x, 8 * x**4 - 8 * x**2 + 1

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    along, across, sharpness = [], [], []
    for rate, steps in ((0.2, 2000), (0.4, 1000)):
        model = descended(loss_fn, data, rate, steps)
        pairs = curvature.eigenpairs(curvature.hessian(model, loss_fn, data))
        sharpness.append(pairs.values.item())
        along.append(width(landscape.line(model, loss_fn, data, along=pairs), 0.1))
        across.append(width(landscape.line(model, loss_fn, data), 0.1))
    assert sharpness == pytest.approx([2 / 0.2, 2 / 0.4], rel=0.2)
    assert along[0] < 0.8 * along[1] and across[0] < 0.9 * across[1]


def descended(loss_fn: Any, data: Any, rate: float, steps: int) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 1, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 1.9 * (2 / 101) ** 0.5 * (p.dim() > 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, data).backward()
        optimizer.step()
    return model
