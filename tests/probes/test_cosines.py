"""Angles of the gradient: by hand, by Euler's theorem, and where they tell of trouble."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyndiag.probes.gradients.cosines import Cosines
from dyndiag.schedule import Every
from tests.probes.stepping import give, parameters, passing, row, take
from tests.probes.test_adam_moments import NoWaiting

EVERY = Every(1)
VECTORS = st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=5,
                   max_size=5)  # fmt: skip


def cosine(one: Any, other: Any) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


def sgd(model: nn.Module, lr: float = 0.1, weight_decay: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)


@settings(max_examples=40)
@given(theta=VECTORS, first=VECTORS, second=VECTORS)
def test_against_numpy(theta: list[float], first: list[float], second: list[float]) -> None:
    model = parameters(theta[:3], theta[3:])
    optimizer, probe = sgd(model, weight_decay=0.3), Cosines(EVERY)
    give(model, first[:3], first[3:])
    assert take(probe, model, optimizer) == {}  # only copied: the next step is measured
    before = torch.cat([p.detach() for p in model.parameters()]).numpy()
    give(model, second[:3], second[3:])
    seen = take(probe, model, optimizer, 1)
    after = torch.cat([p.detach() for p in model.parameters()]).numpy()
    g = np.array(second)
    expected = {
        "gradients/cosine_previous": cosine(g, first),
        "gradients/nlm_cosine": cosine(-g, before),
        "gradients/nlm_cosine/a": cosine(-g[:3], before[:3]),
        "gradients/nlm_cosine/b": cosine(-g[3:], before[3:]),
        "updates/cosine_descent": cosine(after - before, -g),
    }
    expected |= {
        name.replace("cosine", "share"): value**2
        for name, value in expected.items()
        if "nlm" in name
    }
    assert seen == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
    assert all(abs(value) <= 1 or math.isnan(value) for value in seen.values())


def test_the_share_is_what_projecting_the_weights_out_takes() -> None:
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(50, generator=g, dtype=torch.float64)
    gradient = -2 * theta + torch.randn(50, generator=g, dtype=torch.float64)
    model = parameters(theta)
    give(model, gradient)
    seen = row(Cosines(Every(2)).before(passing(model, sgd(model))))
    rest = gradient - (theta @ gradient) / (theta @ theta) * theta
    share = 1 - (rest @ rest) / (gradient @ gradient)
    assert seen["gradients/nlm_share"] == pytest.approx(share.item(), rel=1e-12)
    assert seen["gradients/nlm_cosine"] > 0.5


def test_eulers_theorem_of_a_network_without_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    model = model.double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    z = model(x)
    F.cross_entropy(z, y).backward()
    of_logits = ((z.softmax(1) - F.one_hot(y, 3)) * z).sum().item() / 8
    seen = row(Cosines(Every(2)).before(passing(model, sgd(model))))
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    product = seen["gradients/nlm_cosine"] * theta.norm() * gradient.norm()
    assert product.item() == pytest.approx(-2 * of_logits, rel=1e-10)


def test_two_consecutive_steps_every_eleventh() -> None:
    model = parameters([3.0, 4.0])
    optimizer, probe = sgd(model, lr=1e-3), Cosines()
    measured = []
    for step in range(26):
        give(model, [(-1.0) ** step, 0.0])
        seen = take(probe, model, optimizer, step)
        if seen:
            measured.append(step)
            assert seen["gradients/cosine_previous"] == -1
            assert seen["updates/cosine_descent"] == 1
        assert (probe._kept is not None) == (step % 11 == 0)
        assert probe._before is None
    assert measured == [1, 12, 23]


def test_without_the_step_before_there_is_all_the_rest() -> None:
    model = parameters([3.0, 4.0])
    for step in (0, 5):
        give(model, [1.0, 0.0])
        seen = take(Cosines(Every(5)), model, sgd(model), step)
        assert "gradients/cosine_previous" not in seen
        assert {"gradients/nlm_cosine", "updates/cosine_descent"} < seen.keys()


def test_a_copy_is_compared_with_the_very_next_step_only() -> None:
    model, probe = parameters([3.0], [1.0]), Cosines(EVERY)
    optimizer = sgd(model)
    give(model, [1.0], [1.0])
    probe.before(passing(model, optimizer, 3))
    assert "gradients/cosine_previous" not in probe.before(passing(model, optimizer, 5))
    assert "gradients/cosine_previous" in probe.before(passing(model, optimizer, 6))
    model["b"].requires_grad_(False)  # another vector
    assert "gradients/cosine_previous" not in probe.before(passing(model, optimizer, 7))


def test_parameters_without_a_gradient_count_as_zero() -> None:
    model, probe = parameters([3.0], [1.0], [2.0]), Cosines(EVERY)
    optimizer = sgd(model)
    give(model, [1.0], [1.0], None)
    take(probe, model, optimizer)
    give(model, [1.0], None, None)
    seen = take(probe, model, optimizer, 1)
    assert seen["gradients/cosine_previous"] == pytest.approx(math.sqrt(0.5))
    assert "gradients/nlm_cosine/b" not in seen and "gradients/nlm_cosine/a" in seen
    assert seen["gradients/nlm_cosine"] == pytest.approx(-1)  # of those that have one
    give(model, None, None, None)
    assert take(probe, model, optimizer, 2) == {}


def test_half_precision_and_complex_weights() -> None:
    for dtype in (torch.bfloat16, torch.complex64):
        model = parameters(torch.arange(1, 300), dtype=dtype)
        optimizer, probe = sgd(model), Cosines(EVERY)
        for step in range(2):
            give(model, -model["a"].detach())
            seen = take(probe, model, optimizer, step)
        assert seen["gradients/nlm_cosine"] == pytest.approx(1, abs=1e-6)
        assert seen["gradients/cosine_previous"] == pytest.approx(1, abs=1e-4)


def test_where_a_closure_computes_the_gradients() -> None:
    model, probe = parameters([3.0, 4.0]), Cosines(EVERY)
    for step, gradient in enumerate(([1.0, 0.0], [1.0, 1.0])):
        give(model, gradient)
        seen = row(probe.after(passing(model, sgd(model), step)))
    assert seen == {"gradients/cosine_previous": pytest.approx(math.sqrt(0.5))}


def test_sparse_gradients_are_told_of() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2, sparse=True), "head": nn.Linear(2, 1)})
    model["head"](model["embed"](torch.tensor([1, 3]))).sum().backward()
    probe = Cosines(EVERY)
    assert take(probe, model, torch.optim.SGD(model.parameters(), lr=0.1)) == {}
    assert probe.notices[0].startswith("no cosines of the gradient: some gradients are sparse")


def test_an_accelerator_is_not_waited_for() -> None:
    model, probe = parameters([3.0, 4.0], [1.0], [1.0]), Cosines(EVERY)
    optimizer = sgd(model)
    for step in range(3):
        give(model, [1.0, 2.0], [1.0], None)
        under_way = passing(model, optimizer, step)
        assert under_way.gradient_norms is not None  # of another file
        with NoWaiting(), torch.no_grad():
            seen = probe.before(under_way)
            seen |= probe.after(under_way)
    assert len(row(seen)) == 8


def addition(modulus: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of numbers, one-hot, and their sums: the share that is trained on."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    pairs = pairs[torch.randperm(len(pairs))[: int(share * len(pairs))]]
    inputs = torch.cat([F.one_hot(pairs[:, i], modulus) for i in range(2)], 1)
    return inputs.float(), pairs.sum(1) % modulus


def test_naive_loss_minimisation_once_everything_is_learned() -> None:
    """Addition modulo 31 without biases: past 100 % the gradient mostly scales the logits."""
    for seed in range(2):
        torch.manual_seed(seed)
        x, y = addition(31, 0.4)
        layers = [nn.Linear(a, b, bias=False) for a, b in ((62, 100), (100, 100), (100, 31))]
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), eps=1e-30)
        probe, seen = Cosines(), {}
        for step in range(222):
            optimizer.zero_grad()
            z = model(x)
            F.cross_entropy(z, y).backward()
            found = take(probe, model, optimizer, step)
            if found:
                seen[step] = found, (z.argmax(1) == y).float().mean().item()
        (first, _), (last, accuracy) = seen[1], seen[210]
        assert accuracy == 1
        assert abs(first["gradients/nlm_cosine"]) < 0.2
        assert 0.65 < last["gradients/nlm_cosine"] < 0.85
        assert last["gradients/nlm_share"] > 5 * first["gradients/nlm_share"]
        assert last["gradients/nlm_cosine/4"] > 0.9
