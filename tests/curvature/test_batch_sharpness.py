"""Batch sharpness over mini-batches, against least squares where every number is known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import hessian
from dyndiag.curvature.batch_sharpness import mean_batch_sharpness, ratio_of_means
from dyndiag.curvature.directional import batch_sharpness
from dyndiag.errors import DyndiagError
from tests.models import ConvNet, batches, cross_entropy


def least_squares(rows: Tensor) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(rows.shape[1], 1, bias=False, dtype=rows.dtype)
    return model, [(row, torch.tensor([3.0], dtype=rows.dtype)) for row in rows]


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum()


def test_single_rows_of_least_squares_give_the_mean_square_norm() -> None:
    rows = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, data = least_squares(rows)
    found = mean_batch_sharpness(model, half_square, data, relative_error=1e-9)
    norms = rows.square().sum(dim=1)
    assert found.batches == 400 and not found.converged
    assert found.value == pytest.approx(norms.mean().item(), rel=1e-12)
    assert found.standard_error == pytest.approx(norms.std().item() / 20, rel=1e-12)
    residual = torch.stack([model(x) - y for x, y in data]).squeeze().detach()
    squares = residual.square() * norms  # ‖g‖², and gᵀHg is that times ‖x‖²
    assert found.interaction_aware == pytest.approx(
        ((squares * norms).sum() / squares.sum()).item(), rel=1e-12
    )


def test_the_error_of_the_ratio_of_means_is_what_it_scatters_by() -> None:
    """Over 2,000 sets of 200 pairs; the scatter of a scatter over n is 1/√(2n) = 1.6 %."""
    generator = torch.Generator().manual_seed(2)
    squares = torch.rand(2000, 200, generator=generator, dtype=torch.float64)
    curvatures = squares * (1 + torch.rand(2000, 200, generator=generator, dtype=torch.float64))
    both = torch.stack([curvatures, squares], dim=-1).tolist()
    values, errors = zip(*map(ratio_of_means, both), strict=True)
    scatter = torch.tensor(values).std().item()
    assert scatter == pytest.approx(sum(errors) / 2000, rel=4 * 0.016)


def test_it_stops_once_the_error_is_small_and_says_so() -> None:
    rows = torch.ones(500, 2) + 0.05 * torch.randn(
        500, 2, generator=torch.Generator().manual_seed(3)
    )
    model, data = least_squares(rows)
    found = mean_batch_sharpness(model, half_square, data, relative_error=0.02)
    assert found.converged and 10 <= found.batches < 60
    assert found.value == pytest.approx(2, abs=5 * found.standard_error)
    one = mean_batch_sharpness(model, half_square, data[:1])
    assert not one.converged and math.isnan(one.standard_error)
    assert mean_batch_sharpness(model, half_square, data, max_batches=7).batches == 7


def test_a_batch_is_what_the_hessian_and_its_gradient_give() -> None:
    torch.manual_seed(0)
    model, batch = ConvNet(), batches("conv", 1)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = mean_batch_sharpness(model, cross_entropy, [batch])
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert found.value == pytest.approx(
        batch_sharpness(hessian(model, cross_entropy, batch)).item(), rel=1e-5
    )
    assert found.interaction_aware == pytest.approx(found.value, rel=1e-12)
    assert found.value <= torch.linalg.eigvalsh(_dense(model, batch)).max().item() * (1 + 1e-5)


def _dense(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    operator = hessian(model, cross_entropy, batch)
    return torch.stack([operator.product(row) for row in torch.eye(operator.size)])


class DetachedSquare(torch.autograd.Function):
    """A right gradient and a silently wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2 * ctx.saved_tensors[0].detach()


def test_a_kernel_with_a_wrong_second_derivative_does_not_pass_unseen() -> None:
    def by_kernel(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        squares: Tensor = DetachedSquare.apply(model(batch[0]) - batch[1])  # type: ignore[no-untyped-call]
        return 0.5 * squares.sum()

    rows = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, data = least_squares(rows)
    expected = mean_batch_sharpness(model, half_square, data)
    found = mean_batch_sharpness(model, by_kernel, data)
    assert found.value == pytest.approx(expected.value, rel=1e-4)


def test_it_leaves_loader_and_teacher_as_they_were() -> None:
    rows, draws = torch.randn(12, 6), torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(rows), batch_size=4, shuffle=True, generator=draws)
    model, teacher = nn.Linear(6, 1), nn.BatchNorm1d(6)
    before, buffers = draws.get_state(), copy.deepcopy(teacher.state_dict())

    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        loss: Tensor = model(teacher(batch[0])).square().mean()
        return loss

    mean_batch_sharpness(model, loss_fn, loader)
    assert torch.equal(draws.get_state(), before)
    assert all(torch.equal(teacher.state_dict()[name], buffers[name]) for name in buffers)


def test_a_batch_at_its_own_optimum_has_no_ratio() -> None:
    model, data = least_squares(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0]]))  # the first row's residual is zero
    found = mean_batch_sharpness(model, half_square, data)
    assert found.value == 4 and found.interaction_aware == 4 and found.batches == 2


def test_bad_input() -> None:
    model, data = least_squares(torch.ones(2, 2))
    with pytest.raises(DyndiagError, match="no batch to measure on"):
        mean_batch_sharpness(model, half_square, [])
    with pytest.raises(DyndiagError, match="between 0 and 1"):
        mean_batch_sharpness(model, half_square, data, relative_error=0)
    with pytest.raises(DyndiagError, match="must be one number"):
        mean_batch_sharpness(model, lambda m, b: m(b[0]).repeat(2), data)
