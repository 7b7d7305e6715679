"""Gradients against Adam's second moment: by hand, against real optimizers, and in a real spike."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyndiag.optimizers import UpdateRule, read_rule
from dyndiag.probes import flat
from dyndiag.probes.gradients import second_moment
from dyndiag.probes.gradients.adam_moments import AdamMoments
from dyndiag.schedule import Every
from tests.probes.stepping import give, parameters, passing, row, take

EVERY = Every(1)
ADAM_LIKE: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"foreach": False}),
    "adam foreach": (torch.optim.Adam, {"foreach": True}),
    "adam fused": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.7)}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {"betas": (0.9, 0.9)}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def decay(optimizer: torch.optim.Optimizer) -> float:
    group = optimizer.param_groups[0]
    return float(group["betas"][1] if "betas" in group else group["alpha"])


def test_a_gradient_three_times_the_root_of_v() -> None:
    model = parameters([0.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters())
    give(model, [1.0, 1.0])
    take(AdamMoments(EVERY), model, optimizer)  # v̂ is 1 now
    give(model, [3.0, 0.5])
    seen = take(AdamMoments(EVERY), model, optimizer, 1)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(9, rel=1e-12)
    assert seen["gradients/spike_ratio_max/a"] == seen["gradients/spike_ratio_max"]
    assert seen["gradients/spike_ratio_p999"] == seen["gradients/spike_ratio_max"]
    assert seen["gradients/rms"] == pytest.approx(math.sqrt((9 + 0.25) / 2))


@pytest.mark.parametrize("kind", ADAM_LIKE)
def test_against_the_mean_of_the_squares_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "BLOCK", 1000)
    make, options = ADAM_LIKE[kind]
    g = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(60, 50), "b": nn.Linear(50, 2)}).double()
    optimizer = make(model.parameters(), lr=1e-3, **options)
    probe, shapes = AdamMoments(EVERY), [p.shape for p in model.parameters()]
    history: list[Any] = []
    for step in range(8):
        grads = [torch.randn(s, generator=g, dtype=torch.float64) * 10**step for s in shapes]
        give(model, *grads)
        seen = take(probe, model, optimizer, step)
        history.append(grads)
        if step == 0:
            assert not any("spike" in name for name in seen)
            continue
        beta = decay(optimizer)
        weights = [(1 - beta) * beta ** (step - 1 - i) for i in range(step)]
        ratios = [
            grads[i] ** 2
            * (1 - beta**step)
            / sum(w * h[i] ** 2 for w, h in zip(weights, history[:-1], strict=True))
            for i in range(len(shapes))
        ]
        together = torch.cat([ratio.flatten() for ratio in ratios]).numpy()
        expected = np.quantile(together, 0.999, method="inverted_cdf")
        assert seen["gradients/spike_ratio_p999"] == pytest.approx(expected, rel=1e-9)
        assert seen["gradients/spike_ratio_max"] == pytest.approx(together.max(), rel=1e-9)
        of_b = max(float(ratios[2].max()), float(ratios[3].max()))
        assert seen["gradients/spike_ratio_max/b"] == pytest.approx(of_b, rel=1e-9)


@pytest.mark.parametrize("kind", ADAM_LIKE)
def test_what_epsilon_takes_of_the_optimizers_own_update(kind: str) -> None:
    make, options = ADAM_LIKE[kind]
    g = torch.Generator().manual_seed(1)
    model = parameters(torch.zeros(7), torch.zeros(3))
    optimizer = make(model.parameters(), lr=1e-3, **(options | {"eps": 0.03, "weight_decay": 0.0}))
    probe, steps = AdamMoments(EVERY), 12
    for step in range(steps):
        size = 0.1 if step < 9 else 0.01
        grads = [size * torch.randn(n, generator=g, dtype=torch.float64) for n in (7, 3)]
        give(model, *grads)
        twin_model = copy.deepcopy(model)
        twin = make(twin_model.parameters(), lr=1e-3, **(options | {"weight_decay": 0.0}))
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.param_groups[0]["eps"] = 0.0
        give(twin_model, *grads)
        before = [p.detach().clone() for p in model.parameters()]
        seen = take(probe, model, optimizer, step)
        twin.step()
        shares = []
        for p, q, start in zip(model.parameters(), twin_model.parameters(), before, strict=True):
            shares.append(((p - start) / (q - start)).mean().item())
        if kind == "radam" and step < 6:
            continue  # not rectified yet: it divides by nothing
        assert seen["gradients/epsilon_share"] == pytest.approx(min(shares), rel=1e-7)
        assert seen["gradients/epsilon_share/b"] == pytest.approx(shares[1], rel=1e-7)
        assert 0 < seen["gradients/epsilon_share"] < 0.95


def rms_ratio(gradient: Any, v: Any, eps: float) -> float:
    return float(np.sqrt(np.mean(np.square(gradient) / np.maximum(v, eps**2))))


def test_rms_ratio_and_half_an_epsilon_share() -> None:
    model = parameters([0.0, 0.0], [0.0])
    optimizer = torch.optim.Adam(model.parameters(), eps=0.5, betas=(0.9, 0.99))
    give(model, [0.5, -0.5], [0.02])
    first = take(AdamMoments(EVERY), model, optimizer)
    assert first["gradients/epsilon_share/a"] == pytest.approx(0.5, rel=1e-12)
    assert first["gradients/rms_ratio/a"] == pytest.approx(1.0, rel=1e-12)
    assert first["gradients/rms_ratio/b"] == pytest.approx(0.04)  # as ε² is above v̂ there
    assert first["gradients/rms_ratio"] == first["gradients/rms_ratio/a"]
    assert first["gradients/epsilon_share"] == pytest.approx(0.02 / 0.52)
    give(model, [4.0, 0.0], [0.02])
    second = take(AdamMoments(EVERY), model, optimizer, 1)
    v = np.array([0.99 * 0.01 * 0.25 + 0.01 * 16, 0.99 * 0.01 * 0.25]) / (1 - 0.99**2)
    expected = rms_ratio([4.0, 0.0], v, 0.5)
    assert second["gradients/rms_ratio/a"] == pytest.approx(expected, rel=1e-12)


def test_rms_ratio_is_of_the_largest_v_in_amsgrad_and_uncorrected_in_rmsprop() -> None:
    for make, options in (
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (torch.optim.RMSprop, {"alpha": 0.5}),
    ):
        model = parameters([0.0])
        optimizer = make(model.parameters(), **options)
        v, largest = 0.0, 0.0
        for step, gradient in enumerate((4.0, 0.1, 0.2)):
            give(model, [gradient])
            seen = take(AdamMoments(EVERY), model, optimizer, step)
            v = 0.5 * v + 0.5 * gradient**2
            largest = max(v, largest)
            divisor = largest / (1 - 0.5 ** (step + 1)) if "amsgrad" in options else v
            assert seen["gradients/rms_ratio"] == pytest.approx(gradient / math.sqrt(divisor))


def test_adamax_and_centred_rmsprop() -> None:
    model = parameters([0.0])
    optimizer: Any = torch.optim.Adamax(model.parameters(), eps=1e-12)
    for step, gradient in enumerate((1.0, 3.0)):
        give(model, [gradient])
        seen = take(AdamMoments(EVERY), model, optimizer, step)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(9)
    assert "gradients/rms_ratio" not in seen and "gradients/rms" in seen

    model = parameters([0.0])
    optimizer = torch.optim.RMSprop(model.parameters(), centered=True)
    for step, gradient in enumerate((1.0, 3.0)):
        give(model, [gradient])
        seen = take(AdamMoments(EVERY), model, optimizer, step)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(9)
    assert "gradients/epsilon_share" not in seen


def test_elements_that_never_had_a_gradient() -> None:
    model = parameters([0.0, 0.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters())
    probe = AdamMoments(EVERY)
    give(model, [1.0, 0.0, 0.0])
    take(probe, model, optimizer)
    give(model, [2.0, 0.0, 5.0])
    seen = take(probe, model, optimizer, 1)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(4)
    assert seen["gradients/epsilon_share"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_as_itself(bad: float) -> None:
    model = parameters([0.0, 0.0], [0.0])
    optimizer = torch.optim.Adam(model.parameters())
    probe = AdamMoments(EVERY)
    give(model, [1.0, 1.0], [1.0])
    take(probe, model, optimizer)
    give(model, [2.0, bad], [2.0])
    seen = take(probe, model, optimizer, 1)
    for part in ("", "/a"):
        assert str(seen[f"gradients/spike_ratio_max{part}"]) == str(bad)
        assert str(seen[f"gradients/rms{part}"]) == str(bad)
        assert not math.isfinite(seen[f"gradients/rms_ratio{part}"])
    assert seen["gradients/spike_ratio_max/b"] == pytest.approx(4)


def test_parameters_without_a_gradient_or_that_come_later() -> None:
    model = parameters([0.0], [0.0], torch.zeros(0))
    model["b"].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    probe = AdamMoments(EVERY)
    for step in range(4):
        if step == 2:
            model["b"].requires_grad_(True)
        give(model, [1.0], [1.0] if step >= 2 else None, torch.zeros(0) if step else None)
        seen = take(probe, model, optimizer, step)
        assert ("gradients/spike_ratio_max/b" in seen) == (step == 3)
        assert ("gradients/rms_ratio/b" in seen) == (step >= 2)
    give(model, None, None, None)
    assert take(probe, model, optimizer, 4) == {}


def test_half_precision_is_computed_in_float32() -> None:
    model = parameters(torch.zeros(64), dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    probe = AdamMoments(EVERY)
    give(model, torch.full((64,), 1e-3))
    take(probe, model, optimizer)
    v = optimizer.state[model["a"]]["exp_avg_sq"].double() / 1e-3
    give(model, torch.full((64,), 1.0))
    seen = take(probe, model, optimizer, 1)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(1 / v[0].item(), rel=1e-5)


def test_parameters_of_several_dtypes() -> None:
    model = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)})
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    probe = AdamMoments(EVERY)
    for step in range(2):
        give(model, [1.0 + step, 1.0], [1.0 + 2 * step, 1.0])
        seen = take(probe, model, optimizer, step)
    assert seen["gradients/spike_ratio_max/a"] == pytest.approx(4, rel=1e-5)
    assert seen["gradients/spike_ratio_max"] == pytest.approx(9, rel=1e-5)
    assert seen["gradients/rms_ratio"] > 1


def test_complex_weights_are_pairs_of_real_ones() -> None:
    g = torch.Generator().manual_seed(0)
    pairs = nn.ParameterDict({"a": torch.randn(1500, 2, generator=g)})
    whole = nn.ParameterDict({"a": torch.view_as_complex(pairs["a"].detach().clone())})
    probes = AdamMoments(EVERY), AdamMoments(EVERY)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (pairs, whole)]
    for step in range(3):
        gradient = torch.randn(1500, 2, generator=g)
        pairs["a"].grad, whole["a"].grad = gradient, torch.view_as_complex(gradient.clone())
        real = take(probes[0], pairs, optimizers[0], step)
        seen = take(probes[1], whole, optimizers[1], step)
    assert seen == pytest.approx(real, rel=1e-5)


def test_sparse_gradients_are_what_it_says() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    probe = AdamMoments(EVERY)
    model(torch.tensor([1, 3])).sum().backward()
    assert take(probe, model, optimizer) == {}
    assert "are sparse" in probe.notices[0]


def test_without_a_second_moment_it_says_so() -> None:
    model = parameters([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = AdamMoments(EVERY)
    give(model, [1.0])
    assert take(probe, model, optimizer) == {}
    (notice,) = probe.notices
    assert notice.startswith("SGD keeps no second moment")


def test_where_a_closure_computes_the_gradients() -> None:
    model = parameters([1.0])
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(2):
        give(model, [1.0 + step])
        optimizer.step()
        seen = row(AdamMoments(EVERY).after(passing(model, optimizer, step)))
    assert {name.partition("/a")[0] for name in seen} == {
        "gradients/rms", "gradients/rms_ratio", "gradients/epsilon_share",
    }  # fmt: skip


def test_the_loss_scale_of_a_fused_optimizer_is_divided_out() -> None:
    model = parameters([1.0])
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    give(model, [1.0])
    optimizer.step()
    give(model, [48.0])
    under_way = passing(model, optimizer, 1, scale=torch.tensor(16.0))
    assert row(AdamMoments(EVERY).before(under_way))["gradients/spike_ratio_max"] == pytest.approx(
        9
    )


class NoWaiting(TorchDispatchMode):
    """Raises where an accelerator would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim"):
            raise AssertionError(f"{name} waits")
        return func(*args, **(kwargs or {}))


def test_an_accelerator_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parameters(torch.zeros(9), torch.zeros(4))
    optimizer = torch.optim.Adam(model.parameters())
    plain, probe = AdamMoments(EVERY), AdamMoments(EVERY)
    for step in range(2):
        give(model, torch.randn(9), torch.randn(4))
        under_way = [passing(model, optimizer, step) for _ in range(2)]
        expected = plain.before(under_way[0])
        assert under_way[1].gradient_norms is not None  # of another file
        with monkeypatch.context() as patch:
            # As where the counter is on the accelerator.
            patch.setattr(second_moment, "_count", lambda count: count.double())
            with NoWaiting():
                seen = probe.before(under_way[1])
                optimizer_step = optimizer.step
            assert row(seen) == pytest.approx(row(expected), rel=1e-12)
            optimizer_step()
            with NoWaiting():
                after = probe.after(under_way[1])
            assert row(after)["gradients/epsilon_share"] == pytest.approx(1, abs=1e-3)


def test_adam_spikes_when_its_second_moment_has_forgotten_the_gradient() -> None:
    """Adam on ½θ², η = .01, β₂ = .99: v decays as β₂ᵗ once g is gone, and then it is too small."""
    model = parameters([1.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-30)
    probe = AdamMoments(EVERY)
    ratios, losses, edge = [], [], []
    for step in range(1700):
        theta = model["a"].detach()
        losses.append(0.5 * theta.item() ** 2)
        give(model, theta.clone())
        ratios.append(take(probe, model, optimizer, step)["gradients/rms_ratio"])
        if step > 1500:
            rule = read_rule(optimizer, list(model.parameters()))
            assert isinstance(rule, UpdateRule)
            spread = rule.tensors[0].preconditioner.item()  # type: ignore[union-attr]
            edge.append(0.5 * 0.01 * (0.1 / 1.9) / spread)
    assert 1501 + next(i for i, chi in enumerate(edge) if chi > 1) == 1578
    assert next(step for step in range(100, 1700) if ratios[step] > 2.3) == 1662
    assert max(range(1578, 1700), key=losses.__getitem__) == 1663
    assert max(losses[1663:]) > 1e3 * min(losses[1570:1600])
    assert max(ratios[100:1578]) < 1.5
