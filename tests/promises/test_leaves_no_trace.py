"""Training with the monitor is bit for bit training without it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dyndiag
from tests.models import KINDS, batches, cross_entropy, model_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
STEPS = 30


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """All that a training consists of, as bytes."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, p in enumerate(model.parameters()):
        if p.grad is not None:
            tensors[f"grad.{i}"] = p.grad
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{key}"] = value
    found = {name: t.detach().clone().numpy().tobytes() for name, t in tensors.items()}
    found["torch"] = torch.get_rng_state().numpy().tobytes()
    found["python"] = repr(random.getstate()).encode()
    found["numpy"] = repr(np.random.get_state()).encode()
    modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    found["modes"] = repr(modes).encode()
    return found


@contextmanager
def seen_often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every probe at nearly every step: a budget that is never short."""
    with monkeypatch.context() as patch:
        patch.setattr("dyndiag.schedule.GRACE", 20.0)
        yield


def train(
    kind: str, make: Callable[[Any], torch.optim.Optimizer], watch: Callable[..., Any]
) -> tuple[dict[str, bytes], list[float]]:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model = model_of(kind)
    optimizer = make(model.parameters())
    data = batches(kind, 5)
    losses = []
    with watch(model, optimizer) as monitor:
        for step in range(STEPS):
            batch = data[step % 5]
            loss = cross_entropy(model, batch)
            loss.backward()
            if step % 3 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if step % 2:
                optimizer.zero_grad()  # else gradients go on piling up: they must be untouched
            losses.append(loss.item())
            if monitor is not None:
                monitor.step(loss=loss, batch=batch)
                if step == 10:
                    monitor.start_task("second", eval_batches=data[:2])
        random.random(), np.random.rand(), torch.rand(1)
    return everything(model, optimizer), losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(
    kind: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = OPTIMIZERS[optimizer]
    alone = train(kind, make, lambda model, optimizer: nullcontext())
    with seen_often(monkeypatch):
        watched = train(
            kind, make, lambda m, o: dyndiag.Monitor(m, o, cross_entropy, run=tmp_path / "run")
        )
    assert watched == alone
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["curvature/sharpness"]) >= 10  # and it did measure
    assert len(run["predictions/entropy"]) >= 3
    assert len(run["train/loss"]) == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_also_where_only_the_optimizer_is_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoStep:
        """A monitor that is told nothing."""

        def __init__(self, monitor: dyndiag.Monitor) -> None:
            self.monitor = monitor

        def __enter__(self) -> None:
            return None

        def __exit__(self, *error: Any) -> None:
            self.monitor.close()

    make = OPTIMIZERS["adamw"]
    alone = train(kind, make, lambda model, optimizer: nullcontext())
    probe = batches(kind, 1, seed=7)[0]
    with seen_often(monkeypatch):
        watched = train(
            kind,
            make,
            lambda m, o: NoStep(
                dyndiag.Monitor(m, o, cross_entropy, run=tmp_path / "run", probe_batch=probe)
            ),
        )
    assert watched == alone
    run = dyndiag.Run(tmp_path / "run")
    assert len(run["gradients/norm"]) == STEPS
    assert len(run["curvature/sharpness"]) >= 10


@pytest.mark.filterwarnings("ignore:dyndiag")
@pytest.mark.parametrize("kind", KINDS)
def test_also_when_a_probe_raises_halfway(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train(kind, OPTIMIZERS["sgd"], lambda model, optimizer: nullcontext())

    class Careless:
        """A loss function that changes all it can reach, and then fails, but not for training."""

        def __init__(self) -> None:
            self.calls = itertools.count(1)  # a plain number would be put back

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            call = next(self.calls)
            random.random(), np.random.rand(), torch.rand(3)
            model.train(not model.training)
            model.new_attribute = 1
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
                    p.grad = None
                    p.requires_grad_(False)
                for b in model.buffers():
                    b.add_(1)
            if call % 3:
                raise RuntimeError("boom")
            return cross_entropy(model, batch)

    careless = Careless()
    with seen_often(monkeypatch):
        watched = train(
            kind,
            OPTIMIZERS["sgd"],
            lambda m, o: dyndiag.Monitor(m, o, careless, run=tmp_path / "run"),
        )
    assert watched == alone
    assert next(careless.calls) > 11
    run = dyndiag.Run(tmp_path / "run")
    assert "failures/Sharpness" in run.names
    assert any("boom" in notice["text"] for notice in run.metadata["notices"])


def test_the_global_switches_are_as_before(tmp_path: Path) -> None:
    switches = (
        torch.is_grad_enabled,
        torch.is_inference_mode_enabled,
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.backends.cudnn.benchmark,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.get_default_dtype,
    )
    before = [switch() for switch in switches]
    model = model_of("transformer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batches("transformer", 1)[0]
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(batch=batch)
        assert [switch() for switch in switches] == before
    assert [switch() for switch in switches] == before


def test_state_that_a_module_keeps_by_itself_is_put_back(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.calls, self.seen, self.total = 0, [], torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(len(x))
            self.total += x.detach().sum()
            return self.layer(x)

    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batches("mlp", 1)[0]
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path / "run") as monitor:
        for _ in range(5):
            cross_entropy(model, batch).backward()
            optimizer.step()
            monitor.step(batch=batch)
    assert model.calls == len(model.seen) == 5
    assert model.total.item() == pytest.approx(5 * batch[0].sum().item(), rel=1e-5)


def gan(folder: Path | None, told: bool) -> list[dict[str, bytes]]:
    """Two networks that meet in both losses, each under a monitor of its own."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    maker = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    judge = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    entropy = nn.functional.binary_cross_entropy_with_logits

    def judges(model: nn.Module, batch: Any) -> Tensor:
        real, noise = batch
        fake = model(maker(noise).detach())
        return entropy(model(real), torch.ones(6, 1)) + entropy(fake, torch.zeros(6, 1))

    def makes(model: nn.Module, batch: Any) -> Tensor:
        return entropy(judge(model(batch)), torch.ones(6, 1))

    data = [x for x, _ in batches("mlp", 4)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (judge, maker)]
    monitors = []
    if folder is not None:
        probes = [(data[0], torch.zeros(6, 4)), torch.zeros(6, 4)]
        sides = zip((judge, maker), optimizers, (judges, makes), probes, strict=True)
        monitors = [
            dyndiag.Monitor(m, o, loss_fn, run=folder / loss_fn.__name__, probe_batch=probe)
            for m, o, loss_fn, probe in sides
        ]
    for step in range(12):
        noise = torch.randn(6, 4)
        for i in range(2):
            loss = makes(maker, noise) if i else judges(judge, (data[step % 4], noise))
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()
            if monitors and told:
                monitors[i].step(loss=loss)
    for monitor in monitors:
        monitor.close()
    return [everything(m, o) for m, o in zip((judge, maker), optimizers, strict=True)]


@pytest.mark.parametrize("told", [True, False])
def test_two_networks_under_two_monitors(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = gan(None, told)
    with seen_often(monkeypatch):
        assert gan(tmp_path, told) == alone
    for name in ("judges", "makes"):
        run = dyndiag.Run(tmp_path / name)
        assert run["gradients/norm"].index.tolist() == list(range(12))
        assert len(run["curvature/sharpness"]) >= 5
        assert "train/skipped" not in run.names


def test_an_interrupted_measurement_is_undone_and_the_next_step_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)  # a plain number would be put back

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) == 2:
            torch.rand(3)
            model.train(not model.training)
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    model = model_of("conv")
    optimizer = torch.optim.AdamW(model.parameters())
    batch = batches("conv", 1)[0]
    interrupts = 0
    with (
        seen_often(monkeypatch),
        dyndiag.Monitor(model, optimizer, interrupted, run=tmp_path / "run") as monitor,
    ):
        for _ in range(4):
            loss = cross_entropy(model, batch)
            loss.backward()
            optimizer.step()
            before = everything(model, optimizer)
            try:
                monitor.step(loss=loss, batch=batch)
            except KeyboardInterrupt:
                interrupts += 1
            assert everything(model, optimizer) == before
    assert interrupts == 1
    run = dyndiag.Run(tmp_path / "run")
    assert run["train/loss"].index.tolist() == [0, 1, 2, 3]
    assert run["logits/max"].index.tolist() == [0, 1, 2, 3]
