"""What a trained network still learns, against fresh ones."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyndiag
from dyndiag.errors import DyndiagError
from dyndiag.probes.continual.plasticity import Plasticity, plasticity
from tests.loops import sgd, train
from tests.models import batches, cross_entropy, mlp, model_of

BATCHES = batches("mlp", 3)


def rate(learning_rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=learning_rate)


def measured(model: nn.Module, steps: int = 5, **options: Any) -> Plasticity:
    options = {"make_optimizer": rate(0.1), "progress": False} | options
    return plasticity(model, mlp, cross_entropy, BATCHES, steps, **options)


def test_the_losses_are_those_of_training_by_hand() -> None:
    """float64, gradient descent on ½ (w − b)² with b = 1, 3 in turn."""

    class Point(nn.Module):
        def __init__(self, start: float) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def half_square(model: Any, batch: Tensor) -> Tensor:
        return 0.5 * (model.w - batch).square().mean()

    model = Point(9.0)
    found = plasticity(
        model, lambda: Point(0.0), half_square,
        [torch.tensor([1.0]), torch.tensor([3.0])], 3, make_optimizer=rate(0.5), fresh=2,
        progress=False,
    )  # fmt: skip
    for start, course, loss in (
        (9.0, found.course, found.loss),
        (0.0, found.fresh_courses[0], found.fresh_losses[0]),
    ):
        w, expected = start, []
        for b in (1.0, 3.0, 1.0):
            expected.append(0.5 * (w - b) ** 2)
            w -= 0.5 * (w - b)
        assert course == pytest.approx(expected)
        assert loss == pytest.approx(0.25 * ((w - 1) ** 2 + (w - 3) ** 2))
    assert found.fresh_losses[0] == found.fresh_losses[1]
    assert found.standard_error == 0.0
    assert found.lost == pytest.approx(found.loss - found.fresh_loss)
    assert model.w.item() == 9.0


def test_batches_weigh_by_their_size() -> None:
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    uneven = [(x[:15], y[:15]), (x[15:], y[15:])]
    options: dict[str, Any] = {"make_optimizer": rate(0.0), "progress": False}
    found = plasticity(mlp(), mlp, cross_entropy, uneven, 1, **options)
    whole = plasticity(mlp(), mlp, cross_entropy, [(x, y)], 1, **options)
    assert found.fresh_losses == pytest.approx(whole.fresh_losses)


def test_the_same_at_every_call_and_another_with_another_generator() -> None:
    model = mlp()
    assert measured(model) == measured(model)
    other = measured(model, generator=torch.Generator().manual_seed(1))
    assert other.fresh_losses != measured(model).fresh_losses
    assert len(set(other.fresh_losses)) == 3  # each fresh network has a start of its own
    assert other.loss == measured(model).loss  # nothing in this model draws at random
    values = torch.tensor(other.fresh_losses, dtype=torch.float64)
    assert other.standard_error == pytest.approx((values.std() / math.sqrt(3)).item())
    assert math.isnan(measured(model, fresh=1).standard_error)


@pytest.mark.parametrize("kind", ["mlp", "conv", "transformer", "lstm"])
def test_leaves_no_trace(kind: str) -> None:
    model, data = model_of(kind), batches(kind, 2)
    cross_entropy(model, data[0]).backward()
    model[0].register_full_backward_hook(fail) if kind == "mlp" else None  # type: ignore[index]
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    streams = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]
    plasticity(
        model, lambda: model_of(kind), cross_entropy, data, 3, make_optimizer=rate(0.1), fresh=1,
        progress=False,
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and grad is not None and torch.equal(p.grad, grad)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.array_equal(np.random.get_state()[1], streams[1])  # type: ignore[index]
    assert random.getstate() == streams[2]


def test_a_copy_is_trained_and_not_the_model_itself() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def fresh() -> nn.Module:  # made once the trained network's turn is over
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        return mlp()

    plasticity(model, fresh, cross_entropy, BATCHES, 2, make_optimizer=rate(0.1), progress=False)


def fail(*_: Any) -> None:
    raise AssertionError("the training's own hook was called")


def test_in_the_midst_of_a_watched_training(tmp_path: Path) -> None:
    runs = {}
    for often in (0, 1):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sgd(model)
        with dyndiag.Monitor(
            model, optimizer, cross_entropy, run=tmp_path / str(often), tensorboard=False,
            budget=1e-9,
        ) as monitor:  # fmt: skip
            losses = train(monitor, model, optimizer, 3)
            for _ in range(often):
                measured(model)
            losses += train(monitor, model, optimizer, 3)
        runs[often] = (losses, dyndiag.Run(tmp_path / str(often))["logits/max"].tolist())
    assert runs[0] == runs[1]


def test_a_model_that_keeps_a_result_with_its_graph() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inner(x)
            return self.last

    model = Keeps()
    kept = model(BATCHES[0][0])
    found = plasticity(
        model, Keeps, cross_entropy, BATCHES, 2, make_optimizer=rate(0.1), progress=False
    )
    assert len(found.course) == 2
    assert model.last is kept


@pytest.mark.parametrize("nothing", [{"batches": []}, {"steps": 0}, {"fresh": 0}])
def test_nothing_to_train_on(nothing: dict[str, Any]) -> None:
    options = {"batches": BATCHES, "steps": 2, "make_optimizer": rate(0.1)} | nothing
    with pytest.raises(DyndiagError, match="at least one batch, one step and one fresh network"):
        plasticity(mlp(), mlp, cross_entropy, **options)


def test_a_network_that_is_not_fresh() -> None:
    model, other = mlp(), mlp()
    for same in (model, other):
        with pytest.raises(DyndiagError, match="make_fresh_model must make a new network"):
            plasticity(
                model, partial(nn.Module.train, same), cross_entropy, BATCHES, 2,
                make_optimizer=rate(0.1), progress=False,
            )  # fmt: skip


def test_the_progress_bar_waits_for_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    measured(mlp(), progress=True)
    assert capsys.readouterr().err == ""


# Networks that lost it.


def memorising(tasks: int, steps: int) -> tuple[nn.Module, Any]:
    """A network trained on one set of random labels after the other; how to measure it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 16, generator=g)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.01)

    def labels() -> Tensor:
        return torch.randint(10, (128,), generator=g)

    torch.manual_seed(0)
    model = network()
    optimizer = adam(model.parameters())
    for _ in range(tasks):
        y = labels()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, lambda: plasticity(
        model, network, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, labels())], steps,
        make_optimizer=adam, progress=False,
    )  # fmt: skip


def test_a_network_trained_on_many_random_labels_no_longer_learns_them() -> None:
    _, measure = memorising(tasks=12, steps=60)
    found = measure()
    assert found.fresh_loss < 0.1  # fresh networks memorise the labels
    assert found.loss > 0.5
    assert found.lost > 20 * found.standard_error


def test_an_untrained_network_has_lost_nothing() -> None:
    _, measure = memorising(tasks=0, steps=60)
    found = measure()
    assert abs(found.lost) < 5 * math.sqrt(3) * found.standard_error  # one against three alike


@pytest.mark.slow
def test_plasticity_fades_with_every_task() -> None:
    losses = [memorising(tasks, steps=80)[1]().loss for tasks in (0, 5, 10, 20, 40)]
    assert losses == sorted(losses) and losses[-1] > 0.9 * math.log(10)  # chance
