"""Linear paths and their barriers, checkpoints of every kind, BatchNorm, accuracy."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag import landscape
from dyndiag.errors import DyndiagError
from tests.landscape.made import (
    NOTHING,
    Weights,
    cross_entropy,
    double_well,
    network,
    task,
    trained,
)
from tests.models import ConvNet, Recurrent, Transformer, batches
from tests.models import cross_entropy as any_cross_entropy


def test_the_barrier_of_a_double_well() -> None:
    path = landscape.interpolate(Weights(0.3), Weights(-1.0), Weights(1.0), double_well, NOTHING)
    assert (path.barrier, path.barrier_at) == (1.0, 0.5)
    assert path.losses == pytest.approx(((2 * path.alphas - 1) ** 2 - 1) ** 2, abs=1e-15)
    assert len(path.alphas) == 25 and path.accuracies is None


def test_the_barrier_stands_on_the_line_between_the_two_losses() -> None:
    """(t² − 1)² from −2 (9) to 1 (0): the rise over the chord is what counts."""
    path = landscape.interpolate(
        Weights(0.0), Weights(-2.0), Weights(1.0), double_well, NOTHING, points=61
    )
    t = 3 * path.alphas - 2
    heights = (t**2 - 1) ** 2 - 9 * (1 - path.alphas)
    assert path.heights == pytest.approx(heights, abs=1e-12)
    assert path.barrier == pytest.approx(heights.max())


@settings(max_examples=20)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_convex_loss_has_no_barrier(a: float, b: float) -> None:
    path = landscape.interpolate(
        Weights(0.0), Weights(a), Weights(b), lambda m, _: m.t.square().sum(), NOTHING, points=5
    )
    assert 0.0 <= path.barrier <= 1e-14 * (1 + path.losses.max())


def test_both_ends_are_the_checkpoints_bit_for_bit() -> None:
    data, a, b = task(64), network(0), network(1)
    path = landscape.interpolate(network(2), a, b.state_dict(), cross_entropy, data, points=3)
    with torch.no_grad():
        ends = [cross_entropy(m, data).item() for m in (a, b)]
    assert [path.losses[0], path.losses[-1]] == ends


def test_what_is_not_finite_on_the_way() -> None:
    def path(loss: Any) -> landscape.LinearPath:
        return landscape.interpolate(
            Weights(0.0), Weights(-1.0), Weights(1.0), lambda m, _: loss(m.t.sum()), NOTHING,
            points=5,
        )  # fmt: skip

    wall = path(lambda t: 1 / t.abs())
    assert wall.losses[2] == math.inf and wall.barrier == math.inf and wall.barrier_at == 0.5
    hole = path(lambda t: t / t)
    assert math.isnan(hole.losses[2]) and math.isnan(hole.barrier) and math.isnan(hole.barrier_at)
    end = path(lambda t: 1 / (t - 1))
    assert math.isinf(end.losses[-1]) and math.isnan(end.barrier)


class Buffers(nn.Module):
    """A counter, a mask with −inf, a table: entries that are no weights."""

    def __init__(self, value: float, count: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor([value]))
        self.register_buffer("count", torch.tensor(count))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("scale", torch.tensor(value))


def test_buffers_on_the_way() -> None:
    seen: list[dict[str, Any]] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.append({name: t.tolist() for name, t in model.state_dict().items()})
        return model.t.sum()

    landscape.interpolate(
        Buffers(9.0, 9), Buffers(0.0, 2), Buffers(1.0, 7), loss_fn, NOTHING, points=5
    )
    assert [s["scale"] for s in seen] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [s["count"] for s in seen] == [2, 2, 7, 7, 7]
    assert all(s["mask"] == [0.0, -math.inf] for s in seen)


def test_batchnorm_is_recomputed_over_the_data() -> None:
    """Over one batch, the statistics are its mean and (unbiased) variance."""
    model, other, [batch] = ConvNet(), ConvNet(), batches("conv", 1)
    seen: list[tuple[Tensor, Tensor]] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        if not model.norm.training:
            z = model.conv(batch[0])
            assert torch.allclose(model.norm.running_mean, z.mean((0, 2, 3)), atol=1e-6)
            assert torch.allclose(model.norm.running_var, z.var((0, 2, 3)), rtol=1e-4)
            seen.append(model.norm.running_mean.clone())
        return any_cross_entropy(model, batch)

    path = landscape.interpolate(model, model, other, loss_fn, batch, points=3)
    assert path.recomputed_batchnorm and len(seen) == 3
    plain = landscape.interpolate(
        model, model, other, any_cross_entropy, batch, points=3, recompute_batchnorm=False
    )
    with torch.no_grad():
        ends = [any_cross_entropy(copy.deepcopy(m).eval(), batch).item() for m in (model, other)]
    assert [plain.losses[0], plain.losses[-1]] == ends
    assert not plain.recomputed_batchnorm and path.losses[0] != plain.losses[0]


def test_batchnorm_statistics_weigh_batches_by_their_examples() -> None:
    x = torch.randn(21, 3, generator=torch.Generator().manual_seed(0))
    norm, head = nn.BatchNorm1d(3), nn.Linear(3, 1)
    model = nn.Sequential(norm, head)
    found = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        found.append(dict(norm.named_buffers())["running_mean"].clone())
        return model(batch[0]).square().mean()

    other = copy.deepcopy(model)
    with torch.no_grad():
        head.weight.add_(1)
    for size, last in ((8, 21), (10, 20)):  # a last batch of 5; of 1, which has no variance
        loader = DataLoader(TensorDataset(x), batch_size=size)
        landscape.interpolate(model, model, other, loss_fn, loader, points=2)
        assert torch.allclose(found[-1], x[:last].mean(0), atol=1e-6)


def test_accuracy_along_the_path() -> None:
    data, a, b = task(100), network(0), network(1)
    loader = DataLoader(TensorDataset(*data), batch_size=32)
    path = landscape.interpolate(network(2), a, b, cross_entropy, loader, points=3)
    expected = [(m(data[0]).argmax(1) == data[1]).float().mean().item() for m in (a, b)]
    assert path.accuracies is not None
    assert path.accuracies[[0, -1]] == pytest.approx(expected)


def test_accuracy_needs_every_batch() -> None:
    """A share of some of the batches would pass for one of all."""
    data, a, b = task(40), network(0), network(1)
    targets = data[1].clone()
    targets[-1] = 9  # no class

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean()

    for y, found in ((data[1], True), (targets, False)):
        loader = DataLoader(TensorDataset(data[0], y), batch_size=16)
        path = landscape.interpolate(a, a, b, loss_fn, loader, points=2)
        assert (path.accuracies is not None) == found


@pytest.mark.parametrize("kind", ["transformer", "two integer tensors", "regression"])
def test_no_accuracy_where_it_would_be_a_guess(kind: str) -> None:
    data = task(16)
    a: nn.Module = network(0)
    b: nn.Module = network(1)
    batch: Any = (data[0], data[1], data[1])
    loss_fn: Any = cross_entropy
    if kind == "transformer":
        a, b, [batch] = Transformer(), Transformer(), batches("transformer", 1)
        loss_fn = any_cross_entropy
    if kind == "regression":
        batch = (data[0], data[1].float())
        loss_fn = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    path = landscape.interpolate(a, a, b, loss_fn, batch, points=2)
    assert path.accuracies is None


def test_two_networks_have_a_barrier_and_two_of_one_start_have_almost_none() -> None:
    data = task()
    one, other = (trained(network(seed), data, 250, seed) for seed in (0, 1))
    apart = landscape.interpolate(one, one, other, cross_entropy, data)
    shared = trained(network(0), data, 150, 0)
    twins = [trained(shared, data, 150, seed) for seed in (2, 3)]
    near = landscape.interpolate(one, twins[0], twins[1], cross_entropy, data)
    assert apart.barrier > 0.3 and near.barrier < 0.01
    assert apart.losses[[0, -1]].max() < 0.2 and near.losses[[0, -1]].max() < 0.2
    assert apart.accuracies is not None and near.accuracies is not None
    assert apart.accuracies.min() < 0.85 and near.accuracies.min() > 0.95


def forms_of(model: nn.Module, folder: Path) -> dict[str, Any]:
    """One network, in every form that it may come in."""
    state = model.state_dict()
    torch.save(state, folder / "plain.pt")
    torch.save({"step": 3, "model_state_dict": state}, folder / "nested.pt")
    torch.save({"state_dict": {f"net.{k}": t for k, t in state.items()}}, folder / "lightning.ckpt")
    (folder / "saved").mkdir()
    torch.save(state, folder / "saved" / "pytorch_model.bin")
    from safetensors.torch import save_file

    save_file(state, folder / "weights.safetensors")
    return {
        "module": model,
        "state dict": state,
        "path": folder / "plain.pt",
        "string": str(folder / "nested.pt"),
        "lightning": folder / "lightning.ckpt",
        "folder": folder / "saved",
        "safetensors": folder / "weights.safetensors",
        "parallel": {f"module.{k}": t for k, t in state.items()},
        "compiled": {f"_orig_mod.{k}": t for k, t in state.items()},
    }


def test_checkpoints_of_every_form(tmp_path: Path) -> None:
    a, b, data = network(0), network(1), task(16)
    expected = landscape.interpolate(network(2), a, b, cross_entropy, data, points=3)
    for name, form in forms_of(b, tmp_path).items():
        path = landscape.interpolate(a, a, form, cross_entropy, data, points=3)
        assert np.array_equal(path.losses, expected.losses), name


def test_the_model_itself_may_be_an_end() -> None:
    """Its weights change while the path is walked, and the checkpoint must not change with them."""
    a, b, data = network(0), network(1), task(16)
    fresh = landscape.interpolate(network(2), a, b, cross_entropy, data, points=5)
    for end in (a, a.state_dict()):
        path = landscape.interpolate(a, end, b, cross_entropy, data, points=5)
        assert np.array_equal(path.losses, fresh.losses)


def test_living_weights_may_stand_under_other_names() -> None:
    """Two layers exchanged: each is overwritten while the other is still to be read."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    living = model.state_dict()
    exchanged = {"0.weight": living["1.weight"], "1.weight": living["0.weight"]}
    kept = copy.deepcopy(exchanged)
    x = torch.ones(1, 3)
    paths = [
        landscape.interpolate(model, model, b, lambda m, x: m(x).square().sum(), x, points=5)
        for b in (exchanged, kept)
    ]
    assert np.array_equal(paths[0].losses, paths[1].losses)


def test_tied_weights_that_a_file_holds_once() -> None:
    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            nn.init.constant_(self.embed.weight, value)
            self.head.weight = self.embed.weight

    once = {"embed.weight": torch.full((3, 3), 2.0)}
    path = landscape.interpolate(
        Tied(0.0), Tied(1.0), once, lambda m, _: m.head.weight.sum(), NOTHING, points=3
    )
    assert path.losses.tolist() == [9.0, 13.5, 18.0]


def test_halves_are_interpolated_in_full() -> None:
    a, b = ({"weight": torch.full((1, 1), v).half()} for v in (1.0, 2.0))
    path = landscape.interpolate(
        nn.Linear(1, 1, bias=False), a, b, lambda m, _: m.weight.sum(), NOTHING, points=5
    )
    assert path.losses.tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]


def test_a_recurrent_network() -> None:
    a, b, [batch] = Recurrent(), Recurrent(), batches("lstm", 1)
    path = landscape.interpolate(a, a, b, any_cross_entropy, batch, points=3)
    with torch.no_grad():
        assert path.losses[-1] == any_cross_entropy(b.eval(), batch).item()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    a, data = network(0), task(16)

    def refused(b: Any, says: str) -> None:
        with pytest.raises(DyndiagError, match=says):
            landscape.interpolate(a, a, b, cross_entropy, data)

    state = network(1).state_dict()
    refused(
        {k: t for k, t in state.items() if "4" not in k},
        "b does .* it lacks '4.weight' and 1 more of",
    )
    refused({**state, "extra": torch.ones(1)}, "the model lacks 'extra'")
    refused(
        network(1, width=16), r"b does not fit .* 0.weight has shape \(16, 10\) in it, and \(32"
    )
    refused(tmp_path / "nowhere.pt", "there is no checkpoint")
    refused(tmp_path, "a folder without model.safetensors or pytorch_model.bin")
    refused({"step": 3}, "a dict without tensors")
    refused(3, "a int without tensors")
    torch.save(network(1), tmp_path / "whole.pt")
    refused(tmp_path / "whole.pt", "cannot be read as tensors alone")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused(tmp_path / "text.pt", "cannot be read as tensors alone")


def test_references_to_the_living_weights_are_refused() -> None:
    model = network(0)
    early, late = model.state_dict(), model.state_dict()
    with pytest.raises(DyndiagError, match=r"same tensors in memory.*copy.deepcopy"):
        landscape.interpolate(model, early, late, cross_entropy, task(16))
    with pytest.raises(DyndiagError, match="same tensors in memory"):
        landscape.parameter_distance(early, late)
