"""What a body can change, and that all of it is put back."""

from __future__ import annotations

import functools
import os
import random
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyndiag.guard import no_trace, remember
from tests.models import mlp


class Hoarder(nn.Module):
    """A module that keeps state in everything that can hold some, itself included."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.hidden = [nn.BatchNorm1d(2)]  # not registered
        self.me: dict[str, Any] = {"self": self}
        self.me["me"] = self.me
        self.counts, self.recent = np.zeros(2), deque([0.0], maxlen=2)
        self.hooks_called: list[int] = []
        self.rng, self.old = np.random.default_rng(0), np.random.RandomState(0)
        self.python, self.torch = random.Random(0), torch.Generator().manual_seed(0)
        self.lock_like = (n for n in range(3))

    def draws(self) -> tuple[Any, ...]:
        torch_draw = torch.rand(1, generator=self.torch).item()
        return self.rng.random(), self.old.rand(), self.python.random(), torch_draw


def test_state_of_every_kind_is_put_back() -> None:
    model, twin = Hoarder(), Hoarder()
    with no_trace(model):
        model.draws()
        model.counts += 1
        model.recent.append(3.0)
        model.hooks_called.append(1)
        model.me["new"] = 1
        model.hidden[0](torch.rand(5, 2))
        model.added = 2
    assert model.draws() == twin.draws()
    assert model.counts.tolist() == [0, 0]
    assert list(model.recent) == [0.0]
    assert model.hooks_called == []
    assert set(model.me) == {"self", "me"}
    assert model.hidden[0].num_batches_tracked == 0
    assert model.hidden[0].running_mean.tolist() == [0, 0]
    assert not hasattr(model, "added")


NORM, SEED = nn.BatchNorm1d(2), torch.Generator()


def helper() -> Tensor:
    return NORM(torch.rand(4, 2, generator=SEED)).sum()


def uses_globals(model: nn.Module, batch: Any) -> Tensor:
    return helper()


def uses_closure(norm: nn.Module, seed: torch.Generator) -> Any:
    return lambda model, batch: norm(torch.rand(4, 2, generator=seed)).sum()


def uses_arguments(norm: nn.Module, seeds: list[Any], model: nn.Module, batch: Any) -> Tensor:
    return norm(torch.rand(4, 2, generator=seeds[0])).sum()


class Trainer:
    def __init__(self, norm: nn.Module, seed: torch.Generator) -> None:
        self.norm, self.seeds = norm, {"batch": seed}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.norm(torch.rand(4, 2, generator=self.seeds["batch"])).sum()


class Loss(nn.Module):
    def __init__(self, norm: nn.Module, seed: torch.Generator) -> None:
        super().__init__()
        self.norm, self.seed = norm, seed

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self.norm(torch.rand(4, 2, generator=self.seed)).sum()


@pytest.mark.parametrize(
    "loss_fn",
    [
        uses_globals,
        uses_closure(NORM, SEED),
        functools.partial(uses_arguments, NORM, [SEED]),
        Trainer(NORM, SEED).loss,
        Loss(NORM, SEED),
    ],
    ids=["globals", "closure", "partial", "method", "module"],
)
def test_what_the_loss_function_works_with_is_put_back(loss_fn: Any) -> None:
    before = SEED.get_state(), NORM.running_mean.clone()
    with no_trace(mlp(), None, loss_fn):
        loss_fn(None, None)
        assert not torch.equal(NORM.running_mean, before[1])
    assert torch.equal(SEED.get_state(), before[0])
    assert torch.equal(NORM.running_mean, before[1])
    assert NORM.num_batches_tracked == 0


CALLS = 0
LAST: int
SEEN: list[int] = []


def counts_in_a_global(model: nn.Module, batch: Any) -> int:
    global CALLS, LAST
    CALLS += 1
    LAST = CALLS
    SEEN.append(CALLS)
    return CALLS + len(SEEN)


def counts_in_its_closure() -> Any:
    calls, seen, kinds, long = 0, {"n": 0}, {"a": [{1}]}, [0] * 2000

    def loss(model: nn.Module, batch: Any) -> int:
        nonlocal calls
        calls += 1
        seen["n"] += 1
        seen[str(calls)] = 1
        kinds["a"][0].add(calls + 5)
        long.append(1)
        return calls + len(seen) + seen["n"] + len(kinds["a"][0]) + len(long)

    return loss


class Counter:
    def __init__(self) -> None:
        self.calls, self.recent = 0, deque([0], maxlen=3)

    def loss(self, model: nn.Module, batch: Any) -> int:
        return self.inner()

    def inner(self) -> int:
        self.calls += 1
        self.recent.append(self.calls)
        return self.calls + sum(self.recent)

    def __call__(self, model: nn.Module, batch: Any) -> int:
        return self.inner()


COUNTING = {
    "global": counts_in_a_global,
    "closure": counts_in_its_closure(),
    "method": Counter().loss,
    "object": Counter(),
    "partial": functools.partial(Counter().loss),
}


@pytest.mark.parametrize("kind", COUNTING)
def test_what_the_loss_function_counts_is_put_back(kind: str) -> None:
    loss_fn: Any = COUNTING[kind]
    loss_fn(None, None)
    globals().pop("LAST", None)
    model = mlp()
    with no_trace(model, torch.optim.SGD(model.parameters()), loss_fn):
        first = [loss_fn(None, None) for _ in range(4)]
    assert "LAST" not in globals()
    assert [loss_fn(None, None) for _ in range(4)] == first


@pytest.mark.parametrize("pre", [False, True])
def test_what_forward_hooks_collect_is_put_back(pre: bool) -> None:
    model, features, noise = mlp(), [torch.zeros(2)], torch.Generator().manual_seed(0)
    first = next(model.children())
    before, state = list(features), noise.get_state()

    def hook(module: nn.Module, *args: Any) -> None:
        features.append(torch.rand(2, generator=noise))

    first.register_forward_pre_hook(hook) if pre else first.register_forward_hook(hook)
    with no_trace(model, torch.optim.SGD(model.parameters())):
        model(torch.rand(3, 8))
        assert len(features) == 2
    assert features == before
    assert torch.equal(noise.get_state(), state)


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where a shell has started the tests in the background, and Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
@pytest.mark.parametrize("interrupt", [False, True])
def test_one_failure_or_interrupt_keeps_nothing_from_being_put_back(
    interrupt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight = model[0].weight.detach().clone()
    put_back, calls = remember._put_back_dict, []

    def disturbed(*args: Any) -> None:
        is_module = "training" in args[1]
        calls.append(is_module)
        if is_module and calls.count(True) == 1:
            if not interrupt:
                raise RuntimeError("lost one")
            os.kill(os.getpid(), signal.SIGINT)
        put_back(*args)

    monkeypatch.setattr(remember, "_put_back_dict", disturbed)
    with pytest.raises(KeyboardInterrupt if interrupt else RuntimeError):  # noqa: SIM117
        with no_trace(model):
            model.eval()
            with torch.no_grad():
                model[0].weight.mul_(2)
            model[1].running_mean.add_(1)
    assert calls.count(True) == 3
    assert torch.equal(model[0].weight, weight)
    assert model[1].running_mean.tolist() == [0, 0]
    if interrupt:
        assert all(module.training for module in model.modules())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_backward_hooks_are_silent_inside_and_back_afterwards() -> None:
    model, calls = mlp(), []
    model[0].weight.register_hook(lambda gradient: calls.append("tensor"))
    model[0].register_full_backward_hook(lambda *args: calls.append("module"))
    # As of an optimizer that steps in the backward pass.
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    inputs = torch.rand(2, 8, requires_grad=True)
    with no_trace(model):
        model(inputs).sum().backward()
        assert calls == []
    model(inputs).sum().backward()
    assert sorted(calls) == ["accumulated", "module", "tensor"]


def test_gradients_come_back_as_the_same_objects() -> None:
    model = mlp()
    model(torch.rand(2, 8)).sum().backward()
    gradient = model[0].weight.grad
    value = gradient.clone()
    with no_trace(model):
        gradient.zero_()
        model.zero_grad()
        model[0].weight.requires_grad_(False)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, value)
    assert model[0].weight.requires_grad


def test_a_graph_that_the_user_holds_stays_valid() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    loss = model(torch.rand(4, 2)).sum()
    with no_trace(model):
        model.eval()
        torch.autograd.grad(model(torch.rand(4, 2)).sum(), list(model.parameters()))
    loss.backward()  # would say "modified by an inplace operation"
