"""The gradient probes together, as a user has them: in a monitor, and without a trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dyndiag
from dyndiag.probes import Probe, StepProbe
from dyndiag.probes.gradients.adam_moments import AdamMoments
from dyndiag.probes.gradients.cosines import Cosines
from dyndiag.probes.gradients.history import GradientHistory
from dyndiag.probes.gradients.noise_scale import NoiseScale
from dyndiag.probes.gradients.parameter_norms import ParameterNorms
from dyndiag.probes.gradients.top_space import TopSpace
from dyndiag.schedule import Every
from tests.models import batches, cross_entropy, model_of

EVERY = Every(1)


def probes() -> list[Any]:
    return [
        AdamMoments(EVERY), Cosines(EVERY), GradientHistory(), NoiseScale(EVERY),
        ParameterNorms(EVERY), TopSpace(3, EVERY),
    ]  # fmt: skip


def train(
    kind: str, make: Any, folder: Path, watched: list[Any] | None, closure: bool = False
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = model_of(kind)
    optimizer = make(model.parameters())
    monitor = None
    if watched is not None:
        monitor = dyndiag.Monitor(model, optimizer, cross_entropy, run=folder, probes=watched)
    for batch in batches(kind, 6):

        def closure_of(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure_of) if closure else closure_of()
        if not closure:
            optimizer.step()
        if monitor is not None:
            monitor.step(loss=loss, batch=batch)
    if monitor is not None:
        monitor.close()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(p.detach() for p in model.parameters()), *gradients]


def test_each_is_a_probe_of_one_kind() -> None:
    for probe in probes():
        assert isinstance(probe, Probe) != isinstance(probe, StepProbe)
        assert probe.name == type(probe).__name__
    for kind in (AdamMoments, Cosines, GradientHistory, NoiseScale, ParameterNorms, TopSpace):
        assert kind().due is not None


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_training_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    plain = train(kind, make, tmp_path, None)
    seen = train(kind, make, tmp_path, probes())
    assert all(a.equal(b) for a, b in zip(plain, seen, strict=True))
    run = dyndiag.Run(tmp_path)
    assert not run.metadata["notices"], run.metadata["notices"]
    assert run["gradients/spike_ratio_max"].index.tolist() == list(range(1, 6))
    assert run["gradients/rms_ratio"].iloc[0] == pytest.approx(1)
    assert run["gradients/epsilon_share"].between(0, 0.9).all()  # some have no true gradient
    assert (run["gradients/epsilon_share/head"] > 0.99).all()
    assert run["gradients/cosine_previous"].between(-1, 1).all()
    assert (run["updates/cosine_descent"] > 0).iloc[0]
    assert run["gradients/noise_trace"].notna().all()
    assert run["gradients/top_space_share"].between(0, 1 + 1e-6).all()
    assert len(run["curvature/top_space_overlap"]) == 5
    squares = sum(run[n].to_numpy() ** 2 for n in run.names if "/parameter_norm/" in n)
    assert squares == pytest.approx(run["gradients/norm"].to_numpy() ** 2, rel=1e-5)
    shares = sum(run[n].to_numpy() for n in run.names if "/participation/" in n)
    assert shares == pytest.approx(1)


def test_where_a_closure_computes_the_gradients(tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2)

    train("mlp", make, tmp_path, probes(), closure=True)
    run = dyndiag.Run(tmp_path)
    for name in ("rms_ratio", "cosine_previous", "parameter_norm/0.weight"):
        assert f"gradients/{name}" in run.names
    for name in ("gradients/spike_ratio_max", "updates/cosine_descent"):
        assert name not in run.names


class ManyModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(130):
            setattr(self, f"m{i}", nn.Linear(2, 2, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = x + 0.01 * module(x)
        return x


def test_more_modules_than_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ManyModules()
    optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(6, 2), torch.randint(0, 2, (6,))
    watched: list[Any] = [
        AdamMoments(EVERY),
        Cosines(EVERY),
        ParameterNorms(EVERY),
        TopSpace(3, Every(2)),
    ]
    with dyndiag.Monitor(model, optimizer, cross_entropy, run=tmp_path, probes=watched) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
            monitor.step(batch=batch)
    run = dyndiag.Run(tmp_path)
    ours = ("spike_ratio", "rms_ratio", "epsilon", "nlm", "parameter_norm", "participation")
    names = [name for name in run.names if any(part in name for part in ours)]
    assert not [name for name in names if name.count("/") > 1]
    assert math.isfinite(run["gradients/nlm_cosine"].iloc[0])
