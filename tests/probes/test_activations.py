"""Sizes, unit shares and effective ranks against closed forms; and what they show in training."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dyndiag
from dyndiag.probes import Probe
from dyndiag.probes.activations.features import effective_rank, gram
from dyndiag.probes.activations.neural_collapse import NeuralCollapse
from dyndiag.probes.activations.similarity import Similarity
from dyndiag.probes.activations.statistics import (
    Activations,
    block_output,
    unit_output,
    unit_shares,
)
from dyndiag.schedule import Every
from tests.models import KINDS, batches, cross_entropy, model_of
from tests.probes.sampled import state_of, taken


class Table(nn.Module):
    """Its one block, or one activation, puts out its input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.layers = nn.ModuleList([nn.Sequential(nn.Identity())])
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.act(self.layers[0](x))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def of(*outputs: Tensor) -> dict[str, Any]:
    model = Table(outputs[0].dtype)
    return taken(Activations(), state_of(model, *outputs, loss_fn=mean_square))


A = [[1.0, -3.0, 0.0], [2.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, -2.0, 0.0]]


def test_sizes_of_a_block() -> None:
    seen, a = of(torch.tensor(A)), np.array(A)
    assert seen["activations/rms/layers.0"] == pytest.approx(math.sqrt((a**2).mean()))
    assert seen["activations/variance/layers.0"] == pytest.approx(a.var())
    assert seen["activations/max/layers.0"] == 3
    assert seen["activations/massive/layers.0"] == 0
    assert "activations/rms_growth" not in seen  # of one block


def test_shares_of_units() -> None:
    seen = of(torch.tensor(A))  # after the ReLU: (1, 2, 1, 0), zeros, zeros
    assert seen["activations/dead/act"] == seen["activations/dead"] == pytest.approx(2 / 3)
    assert seen["activations/dormant_0.025/act"] == pytest.approx(2 / 3)
    assert seen["activations/low_use/act"] == pytest.approx(2 / 3)
    x = torch.ones(1000, 4)
    x[:, 1] = 0.07  # 0.094 of the mean
    x[:, 2] = 0.018  # 0.024 of it
    x[9:, 3] = -1.0  # active on 0.9 % of samples
    x[:9, 3] = 1900 / 9
    seen = of(x)
    mean = (1 + 0.07 + 0.018 + 1.9) / 4
    assert 0.018 / mean < 0.025 < 0.07 / mean < 0.1
    assert seen["activations/dead"] == 0
    assert seen["activations/dormant_0.025"] == 0.25
    assert seen["activations/dormant_0.1"] == 0.5
    assert seen["activations/low_use"] == 0.25
    x[9, 3] = 1.0  # on 1 %
    assert of(x)["activations/low_use"] == 0


def test_shares_of_all_units_weigh_layers_by_their_units() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        for layer, bias in ((model[0], 9.0), (model[2], -99.0)):  # the second one is dead
            layer.get_parameter("bias").fill_(bias)
    seen = taken(Activations(), state_of(model, torch.rand(4, 3), loss_fn=mean_square))
    assert seen["activations/dead/1"] == 0
    assert seen["activations/dead/3"] == seen["activations/dormant_0.1/3"] == 1
    assert seen["activations/dead"] == 6 / 8
    assert seen["activations/effective_rank/3"] == seen["activations/effective_rank_share/3"] == 0


def test_units_with_two_sides_are_active_where_they_are_not_zero() -> None:
    rows = torch.tensor([[-1.0, 0.0], [-2.0, 0.0]])
    assert unit_output(rows, 0, two_sided=True).active.tolist() == [2, 0]
    assert unit_output(rows, 0, two_sided=False).active.tolist() == [0, 0]


def test_channels_are_units_and_places_samples() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0] = 1.0
    x[1, 1, 2, 3] = 64.0
    seen = of(x)
    assert seen["activations/dead/act"] == pytest.approx(1 / 3)
    assert seen["activations/low_use/act"] == pytest.approx(1 / 3)  # 1 of 32 places is 3 %
    assert seen["activations/dormant_0.1/act"] == pytest.approx(1 / 3)


def test_growth_from_block_to_block() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(4)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1.5 * torch.eye(4))
    seen = taken(Activations(), state_of(model, torch.randn(5, 4), loss_fn=mean_square))
    assert seen["activations/rms_growth"] == pytest.approx(1.5)


def test_a_massive_activation_in_one_unit_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 10, 64, generator=g)
    assert of(x)["activations/massive/layers.0"] == 0
    x[:3, 0, 7] = 900.0  # the first token of three sequences; the median is 0.67
    seen = of(x)
    assert seen["activations/massive/layers.0"] == 3
    assert seen["activations/max/layers.0"] == 900
    assert of(x * 10)["activations/massive/layers.0"] == 3
    assert of(x / 10)["activations/massive/layers.0"] == 0  # 90 is not above 100
    x[:3, 0, 7] = 600.0
    assert of(x)["activations/massive/layers.0"] == 0  # not above 1,000 medians


def test_the_median_of_many_is_off_by_as_much_as_stated() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400_000, generator=g) * 0.4  # the median's rank r gives a bound of 400 · r
    for rank, massive in ((0.49, 0), (0.51, 1)):  # five standard errors off on either side
        planted = x.clone()
        planted[7] = 400 * rank
        assert block_output(planted.view(-1, 100), 0).massive.item() == massive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = of(x)
    assert seen["activations/rms/layers.0"] == pytest.approx(x.double().square().mean().sqrt())
    assert seen["activations/variance/layers.0"] == pytest.approx(x.double().var(correction=0))
    huge = torch.full((4, 4), 3e38, dtype=torch.bfloat16)
    assert of(huge)["activations/rms/layers.0"] == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize(("bad", "size"), [(math.inf, math.inf), (math.nan, math.nan)])
def test_what_is_not_finite_comes_back(bad: float, size: float) -> None:
    x = torch.ones(8, 4, dtype=torch.bfloat16)
    x[0, 0], x[:, 1] = bad, 0.0
    seen = of(x)
    assert seen["activations/rms/layers.0"] == pytest.approx(size, nan_ok=True)
    assert seen["activations/max/layers.0"] == pytest.approx(size, nan_ok=True)
    for name in ("variance/layers.0", "effective_rank/act", "dormant_0.1/act", "dormant_0.1"):
        assert math.isnan(seen[f"activations/{name}"])
    assert seen["activations/dead/act"] == 0.25


def test_dead_is_not_what_is_merely_small() -> None:
    x = torch.full((8, 2), 1e-38)  # its square is nothing in float32
    assert of(x)["activations/dead"] == 0
    assert of(x)["activations/rms/layers.0"] == pytest.approx(1e-38)
    tiny = torch.ones(8, 3)
    tiny[:, 1:] *= torch.tensor([1e-40, 0.0])
    assert of(tiny)["activations/dead/act"] == pytest.approx(1 / 3)


def test_a_constant_has_no_variance() -> None:
    assert of(torch.full((7, 3), 0.1))["activations/variance/layers.0"] == pytest.approx(0)
    assert of(torch.full((7, 3), 0.1))["activations/variance/layers.0"] >= 0


@settings(max_examples=20)
@given(rows=st.integers(2, 9), features=st.integers(1, 9), seed=st.integers(0, 99), cut=st.data())
def test_micro_batches_are_one_batch(rows: int, features: int, seed: int, cut: Any) -> None:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    at = cut.draw(st.integers(1, rows - 1))
    whole, parts = of(x), of(x[:at], x[at:])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_large_outputs_are_taken_in_pieces() -> None:
    x = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    seen = of(x)
    assert seen["activations/rms/layers.0"] == pytest.approx(x.double().square().mean().sqrt())
    assert seen["activations/max/layers.0"] == x.abs().max()
    mean = x.relu().double().mean(dim=0)
    expected = unit_shares(mean, (x > 0).sum(dim=0), 3000)
    assert seen["activations/dormant_0.1"] == expected["dormant_0.1"].item() / 1000


def rank_of(singular: list[float], rows: int, columns: int, seed: int = 0) -> float:
    """Effective rank of centred features with these singular values."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, len(singular), generator=g, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0))[0]
    right = torch.linalg.qr(torch.randn(columns, len(singular), generator=g).double())[0]
    return effective_rank(left * torch.tensor(singular, dtype=torch.float64) @ right.T + 3.0)


@pytest.mark.parametrize(("rows", "columns"), [(20, 8), (8, 20), (200, 5000)])
def test_effective_rank_of_known_singular_values(rows: int, columns: int) -> None:
    assert rank_of([3, 1, 1], rows, columns) == pytest.approx(2.58641, abs=1e-5)
    assert rank_of([2, 2, 2, 2], rows, columns) == pytest.approx(4)
    assert rank_of([7], rows, columns) == pytest.approx(1)
    s = [10.0 ** (-i / 2) for i in range(7)]
    expected = math.exp(scipy.stats.entropy(s))
    assert rank_of(s, rows, columns) == pytest.approx(expected)


def test_effective_rank_where_nothing_varies() -> None:
    assert effective_rank(torch.full((9, 4), 0.3)) == 0
    assert effective_rank(torch.zeros(4, 9)) == 0
    assert math.isnan(effective_rank(torch.full((4, 9), math.inf)))


def test_the_share_is_of_what_the_samples_can_show() -> None:
    wide = of(torch.randn(5, 50, generator=torch.Generator().manual_seed(0)))
    rank = wide["activations/effective_rank/layers.0"]
    assert 3.5 < rank < 4
    assert wide["activations/effective_rank_share/layers.0"] == pytest.approx(rank / 4)
    assert "activations/effective_rank/act" not in of(torch.ones(1, 4))


def test_the_gram_matrix_is_that_of_all_features() -> None:
    x = torch.randn(6, 9001, generator=torch.Generator().manual_seed(0))
    centred = (x - x.mean(dim=0)).double()
    assert torch.allclose(gram(x), centred @ centred.T, rtol=1e-5)


def test_a_model_without_activations_is_told_once() -> None:
    probe, model = Activations(), nn.Linear(8, 4)
    for _ in range(2):
        seen = taken(probe, state_of(model, batches("mlp", 1)[0]))
        assert seen["activations/rms/model"] > 0
        assert "activations/dead" not in seen
    assert len(probe.notices) == 1
    assert "no activation function" in probe.notices[0]
    assert not probe.applies(dataclasses.replace(state_of(model), probe=None))


def test_names_are_at_most_128_blocks_and_128_layers() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(150)))
    seen = taken(Activations(), state_of(model, torch.randn(3, 2), loss_fn=mean_square))
    assert sum(name.startswith("activations/rms/") for name in seen) == 128
    assert sum(name.startswith("activations/dead/") for name in seen) == 128
    assert "activations/dead/149.1" in seen


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def train(folder: Path | None) -> tuple[bytes, ...]:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        model = model_of(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probes: list[Probe] = [
            Activations(Every(1)), Similarity(Every(1)), NeuralCollapse(Every(1))
        ]  # fmt: skip
        monitor = folder and dyndiag.Monitor(
            model, optimizer, cross_entropy, run=folder, probes=probes, tensorboard=False
        )
        data, losses = batches(kind, 3), []
        for step in range(8):
            loss = cross_entropy(model, data[step % 3])
            loss.backward()
            optimizer.step()
            if step % 2:
                optimizer.zero_grad()
            losses.append(loss.item())
            if monitor:
                monitor.step(loss=loss, batch=data[step % 3])
        if monitor:
            monitor.close()
        assert model.training
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        parts = [t.numpy().tobytes() for t in [*tensors, *state, torch.rand(3)] if t is not None]
        return (*parts, repr((losses, random.random(), np.random.rand())).encode())

    assert train(tmp_path / "run") == train(None)
    run = dyndiag.Run(tmp_path / "run")
    assert not [name for name in run.names if name.startswith("failures")]
    found = [name for name in run.names if name.startswith("activations/rms/")]
    assert found
    assert all(run[name].index.tolist() == list(range(8)) for name in found)
    for name in (name for name in run.names if name.startswith("activations/cka/")):
        assert run[name].index.tolist() == list(range(1, 8))


def watched(
    folder: Path, model: nn.Module, optimizer: Any, batch: Any, steps: int, *probes: Any,
    each: Callable[[int], None] = lambda step: None,
) -> dyndiag.Run:  # fmt: skip
    """A training on one batch, with nothing but these probes taking passes."""
    with dyndiag.Monitor(
        model, optimizer, cross_entropy, run=folder, probes=probes, budget=1e-9, tensorboard=False
    ) as monitor:
        for step in range(steps):
            each(step)
            loss = cross_entropy(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, batch=batch)
    return dyndiag.Run(folder)


def test_units_die_at_a_large_learning_rate(tmp_path: Path) -> None:
    shares = {}
    for rate in (0.3, 5.0):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
        )
        x = torch.randn(256, 20)
        batch = (x, x[:, :4].argmax(dim=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        run = watched(tmp_path / str(rate), model, optimizer, batch, 61, Activations(Every(20)))
        shares[rate] = run["activations/dead"]
    # Over three seeds at most 0.008 at 0.3, and at least 0.40 from step 20 on at 5.
    assert shares[0.3].max() <= 0.02
    assert shares[5.0].iloc[0] == 0
    assert shares[5.0].iloc[1:].min() > 0.3


def test_activations_grow_with_depth_before_but_not_after_a_norm() -> None:
    growth = {}
    for norm_first in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        model = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        x = torch.randn(4, 10, 32)
        seen = taken(Activations(), state_of(model, x, loss_fn=mean_square))
        sizes = [seen[f"activations/rms/layers.{i}"] for i in range(8)]
        growth[norm_first] = seen["activations/rms_growth"]
        if norm_first:
            assert sizes == sorted(sizes)
        else:
            assert sizes == pytest.approx([1.0] * 8, abs=1e-3)
    assert growth[True] > 1.01
    assert growth[False] == pytest.approx(1.0, abs=1e-3)


def test_a_massive_activation_planted_in_a_transformer_shows_in_its_block() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    with torch.no_grad():
        model.layers[2].linear2.bias[5] += 5e4
    seen = taken(Activations(), state_of(model, torch.randn(2, 6, 16), loss_fn=mean_square))
    counts = [seen[f"activations/massive/layers.{i}"] for i in range(4)]
    assert counts == [0, 0, 12, 12]  # every token's, and on along the residual stream


def test_dropout_and_batch_statistics_play_no_part() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9))
    state = state_of(model, torch.randn(6, 8), loss_fn=lambda m, b: F.relu(m(b)).mean())
    first = taken(Activations(), state)
    assert taken(Activations(), state) == first
    assert model.training
