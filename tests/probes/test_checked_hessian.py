"""The live run's products are checked once, and right where a kernel's own are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dyndiag
from dyndiag.batches import MicroBatches
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.state import TrainState
from tests.curvature.test_engines import Custom, Detached
from tests.models import batches, cross_entropy, mlp


def state(model: nn.Module, count: int = 1) -> TrainState:
    data = MicroBatches(tuple(batches("mlp", count)))
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return TrainState(0, model, optimizer, parameters, names, cross_entropy, data, data)


def with_kernel(function: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), Custom(function), nn.Linear(16, 4)).double()


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_of_torchs_own_kernels_is_checked_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []

    def check(*given: Any, **more: Any) -> Any:
        checks.append(dyndiag.curvature.hessian(*given, **more).engine.check.outcome)
        return dyndiag.curvature.hessian(*given, **more)

    monkeypatch.setattr("dyndiag.probes.curvature.checked_hessian.hessian", check)
    checked, here = CheckedHessian(), state(mlp(), count)
    first, second = checked.of_probe(here), checked.of_batch(here)
    assert checks == ["agrees"]
    assert first.engine.name == second.engine.name == "cached" and not checked.notices
    v = torch.randn(first.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.product(v), second.product(v))
    assert first.loss == pytest.approx(second.loss)


def test_a_wrong_second_derivative_is_found_out_and_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrong = with_kernel(Detached)
    right = nn.Sequential(wrong[0], nn.Tanh(), wrong[2])
    data = tuple(tensor.double() if tensor.is_floating_point() else tensor
                 for tensor in batches("mlp", 1)[0])  # fmt: skip
    truth = dyndiag.curvature.eigenpairs(dyndiag.curvature.hessian(right, cross_entropy, data))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model, batch)

    optimizer = torch.optim.SGD(wrong.parameters(), lr=1e-9)
    with (
        pytest.warns(dyndiag.DyndiagWarning, match="products by finite_differences.*are wrong"),
        dyndiag.Monitor(wrong, optimizer, loss_fn, run=tmp_path / "run") as monitor,
    ):
        for _ in range(2):
            loss = loss_fn(wrong, data)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=data)
    found = dyndiag.Run(tmp_path / "run")["curvature/sharpness"].iloc[0]
    assert found == pytest.approx(truth.values.item(), rel=1e-2)
