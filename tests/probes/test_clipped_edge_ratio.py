"""The edge ratio of steps as they are clipped: closed forms, and runs that settle where it is 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import dyndiag
from dyndiag.batches import LossFunction, MicroBatches
from dyndiag.optimizers import UpdateRule, read_rule
from dyndiag.probes.curvature.clipping import clipped
from dyndiag.probes.curvature.sharpness import Sharpness
from dyndiag.schedule import Every
from dyndiag.state import TrainState
from dyndiag.values import Estimate
from tests.probes.test_sam import network, squared

Make = Callable[[list[nn.Parameter]], Optimizer]
F64 = torch.float64
RATIO, CLIPPED = "stability/edge_ratio", "stability/clipped_edge_ratio"


class Quadratic(nn.Module):
    """½ Σ hᵢθᵢ²."""

    def __init__(self, *hessian: float) -> None:
        super().__init__()
        self.hessian = torch.tensor(hessian, dtype=F64)
        self.theta = nn.Parameter(torch.linspace(0.3, 0.4, len(hessian), dtype=F64))


def loss_of(model: Any, batch: Any) -> Tensor:
    return 0.5 * (model.hessian * model.theta.square()).sum() * batch.mean()


class Clipped:
    """A training that clips by norm, with what clipping multiplied the gradient by at each step."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_fn: LossFunction, batch: Any
    ) -> None:
        self.model, self.optimizer, self.loss_fn, self.batch = model, optimizer, loss_fn, batch
        self.coefficients: list[Tensor] = []
        self.probe = Sharpness(Every(1))

    def steps(self, count: int, most: float) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss_fn(self.model, self.batch).backward()
            norm = clip_grad_norm_(self.model.parameters(), most)
            self.coefficients.append((most / norm.double()).clamp(max=1))
            self.optimizer.step()

    def measured(self) -> dict[str, float]:
        data = MicroBatches((self.batch,))
        state = TrainState(
            len(self.coefficients), self.model, self.optimizer, tuple(self.model.parameters()), (),
            self.loss_fn, data, data, tuple(g["lr"] for g in self.optimizer.param_groups),
            clip_coefficients=tuple(self.coefficients[-2:]),
        )  # fmt: skip
        found: dict[str, float] = {}
        for name, value in self.probe.measure(state).items():
            one = value.columns(str(name)) if isinstance(value, Estimate) else {}
            found |= one or {str(name): float(value)}  # type: ignore[arg-type]
        return found


DESCENT: dict[str, tuple[Make, float, float]] = {
    "sgd": (lambda p: SGD(p, lr=0.1), 60.0, 3.0),
    "further out": (lambda p: SGD(p, lr=0.1), 200.0, 10.0),
    "coupled decay": (lambda p: SGD(p, lr=0.1, weight_decay=0.5), 60.0, 3.025),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 30.0, 2.2105),
    "rmsprop": (lambda p: RMSprop(p, lr=0.01, alpha=0.9), 60.0, 1.505),
}


@pytest.mark.parametrize("case", DESCENT)
def test_clipped_descent_settles_where_it_is_one(case: str) -> None:
    """Whatever the edge ratio itself is, and at every step of the cycle."""
    make, top, ratio = DESCENT[case]
    model = Quadratic(top, 5.0)
    run = Clipped(model, make(list(model.parameters())), loss_of, torch.ones(2))
    run.steps(600, most=0.2)
    single = []
    for _ in range(4):
        run.steps(1, most=0.2)
        found = run.measured()
        assert found[RATIO] == pytest.approx(ratio, rel=2e-3)
        assert found[CLIPPED] == pytest.approx(1.0, rel=1e-4)
        assert found[f"{CLIPPED}.converged"] + found[f"{CLIPPED}.provisional"] == 1
        assert found[f"{CLIPPED}.error"] < 0.02
        single.append(found[RATIO] * float(run.coefficients[-1]))
    if case == "sgd":  # of one step alone it may be anything
        assert min(single) < 0.7 and max(single) > 1.5


def test_where_nothing_is_cut_off_it_is_the_edge_ratio() -> None:
    model = Quadratic(12.0, 5.0)
    run = Clipped(model, SGD(model.parameters(), lr=0.1), loss_of, torch.ones(2))
    run.steps(2, most=100.0)
    found = run.measured()
    assert found[CLIPPED] == found[RATIO] == pytest.approx(0.6)
    assert found[f"{CLIPPED}.products"] == 0  # paid by the sharpness


def test_adam_undoes_a_constant_coefficient_and_its_clipped_ratio_too() -> None:
    """So it moves as without clipping, and the ratio that it would have had is this one."""
    found = []
    for share in (1.0, 0.2):
        model = Quadratic(60.0, 5.0)
        run = Clipped(model, Adam(model.parameters(), lr=0.01, eps=1e-30), loss_of, torch.ones(2))
        for _ in range(100):
            norm = float((model.hessian * model.theta.detach()).norm())
            run.steps(1, most=share * norm)
        found.append((run.measured(), model.theta.detach()))
    (plain, here), (cut, there) = found
    assert torch.allclose(here, there, rtol=1e-4)
    assert cut[RATIO] == pytest.approx(plain[RATIO] / 0.2, rel=1e-4)
    assert cut[CLIPPED] == pytest.approx(plain[RATIO], rel=1e-4)


def rule_of(make: Make, *hessian: float) -> tuple[UpdateRule, Tensor]:
    model = nn.ParameterList(torch.tensor([0.5], dtype=F64) for _ in hessian)
    optimizer = make(list(model))
    for p, h in zip(model, hessian, strict=True):
        p.grad = h * p.detach()
    optimizer.step()
    rule = read_rule(optimizer, list(model))
    assert isinstance(rule, UpdateRule)
    return rule, torch.tensor(hessian, dtype=F64)


def truth(rule: UpdateRule, hessian: Tensor, c: float) -> float:
    """½λ₁(A^½(cH + γ_c)A^½ + ηγ_d) for a diagonal H."""
    each = []
    for h, r in zip(hessian.tolist(), rule.tensors, strict=True):
        assert r is not None
        p = 1.0 if r.preconditioner is None else float(r.preconditioner)
        step = r.learning_rate * r.gain / p
        each.append(0.5 * (step * (c * h + r.coupled_decay) + r.learning_rate * r.decoupled_decay))
    return max(each)


@pytest.mark.parametrize("c", [0.05, 0.4, 1.0])
@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=2.0), True),
        (lambda p: AdamW(p, lr=0.1, weight_decay=2.0), True),
        (lambda p: Adam([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}], lr=0.1), True),
        (lambda p: AdamW([{"params": p[:1]}, {"params": p[1:], "weight_decay": 0}], lr=0.1), False),
        (lambda p: SGD([{"params": p[:1], "weight_decay": 3}, {"params": p[1:]}], lr=0.1), False),
        (lambda p: SGD([{"params": p[1:], "weight_decay": 3}, {"params": p[:1]}], lr=0.1), False),
    ],
)
def test_decay_is_not_clipped(make: Make, exact: bool, c: float) -> None:
    rule, hessian = rule_of(make, 7.0, 2.0)
    whole = truth(rule, hessian, 1.0)
    ratio = Estimate(whole, error=0.01, products=9, provisional=True, upper_bound=whole + 0.02)
    found = clipped(ratio, rule, [torch.tensor(c), torch.tensor(c)])
    assert found is not None
    real = truth(rule, hessian, c)
    slack = found.error - 0.01 * c
    assert abs(found.value - real) <= slack + 1e-7
    assert found.upper_bound is not None and found.upper_bound >= real + 0.02 * c - 1e-7
    assert (slack < 1e-7) == (exact or c == 1.0)
    assert slack <= 0.5 * (1 - c) * 0.15 + 1e-7  # half of (1 − c) times the largest ½ηγ
    assert (found.provisional, found.products) == (True, 0)


def test_absent_without_clipping_and_where_it_is_not_known() -> None:
    rule, _ = rule_of(lambda p: SGD(p, lr=0.1), 7.0)
    ratio, one = Estimate(0.35), torch.tensor(0.5)
    assert clipped(ratio, rule, []) is None
    assert clipped(ratio, rule, [one]) is None  # the first clipped step
    for broken in (torch.nan, 0.0):  # a gradient of zeros, and one that is not finite
        assert clipped(ratio, rule, [one, torch.tensor(broken)]) is None
    coupled, _ = rule_of(lambda p: Adam(p, lr=0.1, weight_decay=0.1), 7.0)
    assert clipped(ratio, coupled, [one, one]) is None
    model = Quadratic(12.0, 5.0)
    run = Clipped(model, SGD(model.parameters(), lr=0.1), loss_of, torch.ones(2))
    run.steps(1, most=0.2)
    assert RATIO in run.measured() and CLIPPED not in run.measured()


def test_a_clipped_network_trains_far_beyond_its_edge_at_a_clipped_ratio_of_one() -> None:
    """Descent there would diverge: clipping holds χ · c at 1, while χ goes on rising."""
    model, batch = network()
    run = Clipped(model, SGD(model.parameters(), lr=2.0), squared, batch)
    start = squared(model, batch).item()
    ratios, clipped_ratios = [], []
    for _ in range(10):
        run.steps(25, most=0.05)
        found = run.measured()
        ratios.append(found[RATIO])
        clipped_ratios.append(found[CLIPPED])
    assert ratios[0] > 2 and ratios[-1] > 6
    assert all(0.95 < ratio < 1.05 for ratio in clipped_ratios)
    assert squared(model, batch).item() < 0.5 * start
    model, batch = network()  # the same without clipping
    run = Clipped(model, SGD(model.parameters(), lr=2.0), squared, batch)
    run.steps(25, most=1e9)
    assert not squared(model, batch).item() < start


def watched(folder: Path, most: float | None, loop: str = "plain") -> dyndiag.Run:
    model, batch = network()
    optimizer = SGD(model.parameters(), lr=2.0 if most else 0.1)
    with dyndiag.Monitor(model, optimizer, squared, run=folder, tensorboard=False) as monitor:
        for i in range(40):
            loss = squared(model, batch)
            loss.backward()
            if most is not None and (loop == "plain" or i % 2 == 0):
                clip_grad_norm_(model.parameters(), most)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, batch=batch)
    return dyndiag.Run(folder)


def test_a_run_keeps_it_beside_the_edge_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 60.0)  # every step is sampled
    run = watched(tmp_path / "clipped", 0.05)
    ratio, clipped_ratio = run[RATIO], run[CLIPPED]
    assert ratio.index.tolist() == list(range(40))
    assert clipped_ratio.index.tolist() == ratio.index.tolist()[1:]
    cut = run["gradients/clip_coefficient"]
    both = 2 / (1 / cut + 1 / cut.shift(1))
    assert clipped_ratio.tolist() == pytest.approx((ratio * both).iloc[1:].tolist(), rel=1e-6)
    assert run[f"{CLIPPED}.converged"].iloc[0] == run[f"{RATIO}.converged"].iloc[1]
    assert clipped_ratio.iloc[-10:].between(0.95, 1.05).all() and (ratio.iloc[-10:] > 2).all()
    assert CLIPPED not in watched(tmp_path / "plain", None).names
    assert CLIPPED not in watched(tmp_path / "now and then", 0.05, "every other step").names
