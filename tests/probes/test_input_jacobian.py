"""The norm of the input Jacobian against the exact one, and what it shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.batches import ForwardCall, MicroBatches
from dyndiag.probes.predictions.input_jacobian import InputJacobian
from dyndiag.state import TrainState
from dyndiag.values import Estimate
from tests.models import Transformer, batches, cross_entropy, mlp, model_of

NAME = "predictions/input_jacobian_norm"


def state_of(model: nn.Module, *parts: Any, loss_fn: Any = cross_entropy) -> TrainState:
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainState(
        0, model, optimizer, tuple(p for _, p in named), tuple(name for name, _ in named),
        loss_fn=loss_fn, probe=MicroBatches(parts),
    )  # fmt: skip


def measured(state: TrainState, probe: InputJacobian | None = None) -> Estimate:
    found = (probe or InputJacobian()).measure(state)[NAME]
    assert isinstance(found, Estimate)
    return found


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """‖J‖_F² of each example, by autograd row by row."""
    model.eval()
    found = []
    for one in x.split(1):
        rows = torch.autograd.functional.jacobian(model, one)
        found.append(rows.double().square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["mlp", "conv", "lstm"])
def test_it_agrees_with_the_exact_jacobian(kind: str) -> None:
    torch.manual_seed(0)
    model = model_of(kind)
    x, y = batches(kind, 1)[0]
    truth = exact(model, x).mean().sqrt().item()
    probe, state = InputJacobian(), state_of(model, (x, y))
    found = [measured(state, probe) for _ in range(200)]
    squares = torch.tensor([one.value for one in found]).square()
    error = (squares.std() / math.sqrt(200)).item()
    assert abs(squares.mean().item() - truth**2) < 4 * error
    # Draws alone scatter less than examples and draws together, which the stated error is of.
    stated = torch.tensor([one.error for one in found]).median().item()
    scatter = torch.tensor([one.value for one in found]).std().item()
    spread = exact(model, x).std().item() / math.sqrt(len(x)) / (2 * truth)
    assert 0.5 * math.hypot(scatter, spread) < stated < 1.5 * math.hypot(scatter, spread)


def test_a_linear_map_with_equal_singular_values_is_met_at_once() -> None:
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(2 * torch.eye(3, 5))
    found = measured(state_of(model, batches_of(7)))
    assert found.value == pytest.approx(2 * math.sqrt(3), rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)


def batches_of(count: int, features: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(count))
    return x, torch.zeros(count, dtype=torch.long)


def test_the_stated_error_is_that_over_examples() -> None:
    model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))
    probe = InputJacobian()
    found = [measured(state_of(model, batches_of(n)), probe) for n in range(150, 250)]
    values = torch.tensor([one.value for one in found])
    stated = torch.tensor([one.error for one in found]).mean().item()
    assert 0.75 < stated / values.std().item() < 1.33  # a scatter of 100 is known to 7 %


def test_sequences_count_all_their_logits() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:  # (batch, time, 3) → (batch, time, 4)
            return self.mix(x.transpose(1, 2)).transpose(1, 2)

    model, x = Convolved(), torch.randn(4, 6, 3)
    y = torch.zeros(4, 6, dtype=torch.long)
    probe = InputJacobian()
    squares = [measured(state_of(model, (x, y)), probe).value ** 2 for _ in range(300)]
    truth = exact(model, x).mean().item()
    error = float(torch.tensor(squares).std()) / math.sqrt(300)
    assert abs(sum(squares) / 300 - truth) < 4 * error


@pytest.mark.parametrize("form", ["positions", "keywords", "call", "mapping", "batch"])
def test_however_the_model_is_called(form: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
            return {"logits": self.layer(x)}

    model = Masked()
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(3, 5))
    x, y = batches_of(4)
    mask = torch.ones(4, 5)
    state = {
        "positions": state_of(model, (x, y), loss_fn=lambda m, b: m(b[0])["logits"].sum()),
        "keywords": state_of(
            model, (x, y), loss_fn=lambda m, b: m(attention_mask=mask, x=b[0])["logits"].sum()
        ),
        "call": state_of(model, ForwardCall((x,), {"attention_mask": mask}), loss_fn=None),
        "mapping": state_of(model, {"attention_mask": mask, "x": x}, loss_fn=None),
        "batch": state_of(model, (x, y), loss_fn=None),
    }[form]
    assert measured(state).value == pytest.approx(math.sqrt(3), rel=1e-6)


def test_it_is_of_the_model_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.eye(3, 5))
    assert measured(state_of(model, batches_of(6))).value == pytest.approx(math.sqrt(3), rel=1e-6)


def test_micro_batches_are_put_together() -> None:
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 5))
    found = measured(state_of(model, batches_of(3), batches_of(1)))
    assert found.value == pytest.approx(math.sqrt(3), rel=1e-6)
    alone = measured(state_of(model, batches_of(1)))
    assert alone.value == pytest.approx(math.sqrt(3), rel=1e-6)
    assert math.isnan(alone.error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 5))
    x, y = batches_of(6)
    found = measured(state_of(model, (x.to(dtype), y)))
    assert found.value == pytest.approx(math.sqrt(3), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_loss_made_of_input_gradients() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum()

    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 5))
    state = state_of(model, batches_of(6), loss_fn=penalised)
    assert measured(state).value == pytest.approx(math.sqrt(3), rel=1e-6)


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.detach().round())


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).repeat(2, 1)


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (Transformer(), batches("transformer", 1)[0], "tokens have no derivative"),
        (nn.Linear(5, 1), (torch.randn(4, 5),), "no class scores"),
        (Rounded(), batches_of(4), "no derivative by"),
        (Flattened(), batches_of(4), "not one example's a row"),
    ],
    ids=["tokens", "one output", "rounded", "flattened"],
)
def test_what_has_no_input_jacobian_is_told(model: nn.Module, batch: Any, words: str) -> None:
    probe = InputJacobian()
    state = state_of(model, batch, loss_fn=lambda m, b: m(b[0]).sum())
    assert probe.measure(state) == {}
    assert len(probe.notices) == 1
    assert words in probe.notices[0]


def test_nothing_is_left_behind() -> None:
    model, batch = mlp(), batches("mlp", 1)[0]
    stream = torch.get_rng_state()
    measured(state_of(model, batch))
    assert torch.equal(stream, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not batch[0].requires_grad
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_infinite_inputs_come_back_as_not_a_number() -> None:
    x, y = batches_of(4)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    assert math.isnan(measured(state_of(model, (x, y))).value)


def test_decay_keeps_flat_what_training_makes_steep() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    rise = {}
    for decay in (0.0, 3.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        state, probe = state_of(model, (x, y)), InputJacobian()
        found = [measured(state, probe)]
        for step in range(1, 301):
            cross_entropy(model, (x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                found.append(measured(state, probe))
        assert (model(x).argmax(1) == y).all()
        rise[decay] = [one.value / found[0].value for one in found]
    assert rise[0.0][-1] > 15
    assert 2 < rise[3.0][-1] < rise[0.0][-1] / 2
