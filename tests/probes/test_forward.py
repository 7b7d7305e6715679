"""Which forward passes are the training's, and that watching them is not noticed."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import dyndiag
from dyndiag.probes.forward import ForwardWatch, unwatched
from dyndiag.probes.logits.attention import AttentionLogits
from dyndiag.probes.logits.output import OutputLogits
from tests.models import Transformer, batches, mlp
from tests.probes.test_step import Watched


def watch(model: nn.Module) -> ForwardWatch:
    return ForwardWatch(model, [OutputLogits(), AttentionLogits(model)])


class Scaled(nn.Module):
    """Its logits are its inputs times a weight; its loss is their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        logits = self.weight * x
        return SimpleNamespace(logits=logits, loss=logits.mean())


def seen(found: ForwardWatch) -> tuple[float | None, float | None, int]:
    """Largest logit, loss and number of micro-batches since the last call."""
    batches, loss, signals = found.collect()
    top = signals.get("logits/max")
    return (
        None if top is None else float(top),
        None if loss is None else loss.item(),
        0 if batches is None else len(batches.batches),
    )


def ones(value: float) -> Tensor:
    return torch.full((3, 2), value)


def test_micro_batches_are_averaged() -> None:
    model = Scaled()
    found = watch(model)
    model(ones(1.0)), model(ones(3.0))
    assert seen(found) == (3.0, 2.0, 2)
    assert seen(found) == (None, None, 0)


def test_an_evaluation_with_gradients_is_not_the_training() -> None:
    model = Scaled()
    found = watch(model)
    model.eval()(ones(9.0))  # before the first step
    for _ in range(2):
        model.train()(ones(1.0))
        model.eval()(ones(9.0))
        assert seen(found) == (1.0, 1.0, 1)
        model(ones(9.0))  # between steps


def test_a_training_in_eval_mode_is_seen() -> None:
    model = Scaled()
    found = watch(model)
    model.train()(ones(1.0))
    found.collect()
    model.eval()
    for step in range(3):
        model(ones(2.0))
        assert seen(found) == ((2.0, 2.0, 1) if step else (None, None, 0))


def test_a_measurement_is_not_the_training() -> None:
    model, found = (m := Scaled()), watch(m)
    with unwatched():
        model(ones(9.0))
    assert seen(found) == (None, None, 0)


def test_a_measurement_can_differentiate_reentrant_checkpoints() -> None:
    """Which torch lets only `.backward()` pass: gradients, and curvature by their kept graph."""
    layer, x = nn.Linear(3, 3).double(), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)

    def gradients(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.tanh().sum(), list(layer.parameters()), create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), list(layer.parameters()))]

    with unwatched():
        found = gradients(checkpoint(layer, x, use_reentrant=True))
    for one, other in zip(found, gradients(layer(x)), strict=True):
        assert torch.equal(one, other)


def test_forwards_that_nobody_steps_on_are_not_hoarded() -> None:
    model = mlp()  # has no loss of its own
    found = watch(model)
    for _ in range(50):
        model(torch.zeros(2, 8))
    found_batches, _, _ = found.collect()
    assert found_batches is not None
    assert len(found_batches.batches) == 1


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor, error: type[BaseException] | None = None) -> Any:
        if error is not None:
            raise error
        return self.inner(x)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_after_a_forward_that_failed_the_next_step_is_seen(error: type[BaseException]) -> None:
    model = Fails()
    found = watch(model)
    with pytest.raises(error):
        model(ones(9.0), error)
    assert seen(found) == (None, None, 0)
    assert _get_current_function_mode_stack() == []
    model(ones(1.0))
    assert seen(found) == (1.0, 1.0, 1)


class SavesProducts(nn.Module):
    """Attention under selective checkpointing, which replays products by their order."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            aten = torch.ops.aten
            saved = op in (aten.mm.default, aten.bmm.default, aten.addmm.default)
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        def attend(y: Tensor) -> Tensor:
            return self.attend(y, y, y)[0]

        return checkpoint(
            attend, x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        ).mean(1)  # fmt: skip


def test_selective_checkpointing_is_left_alone() -> None:
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = SavesProducts()
        if watched:
            watch(model)
        x = torch.randn(4, 5, 8)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_flop_counter_counts_the_models_operations_only() -> None:
    tokens = batches("transformer", 1)[0][0]
    counts = []
    for watched in (False, True):
        model = Transformer()
        if watched:
            watch(model)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_per_sample_gradients_are_not_the_training() -> None:
    model = mlp()
    found = watch(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.rand(3, 8))
    assert seen(found) == (None, None, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own
def test_code_that_is_compiled_whole_can_be_called_in_a_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.attend = torch.compile(
                lambda q: F.softmax(q @ q.transpose(-1, -2), dim=-1) @ q,
                backend="eager",
                fullgraph=True,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(self.layer(x))

    model = Model()
    watch(model)
    model(torch.rand(2, 3, 8)).sum().backward()


def test_a_model_saved_under_watch_loads_where_there_is_no_dyndiag(tmp_path: Path) -> None:
    model = mlp()
    watch(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['dyndiag'] = None; "
        "model = torch.load(sys.argv[1], weights_only=False); print(model(torch.ones(1, 8)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "[1, 4]" in done.stdout, done.stderr


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries_and_given_masks(masked: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16)

        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, dim=1)
            return q, k, v

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask if masked else None, enable_gqa=True
            )
            return y.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(9, 5, 16)
    mask = torch.rand(9, 1, 5, 5) > 0.4
    with torch.no_grad():
        q, k, _ = model.heads(x)
        z = q @ k.repeat_interleave(2, dim=1).transpose(-2, -1) / 2
    if masked:
        z = z.masked_fill(~mask, -torch.inf)
    attention = AttentionLogits(model)
    watch = ForwardWatch(model, [attention])
    model(x).sum().backward()
    _, _, seen = watch.collect()
    assert seen["attention/logit_max/model"].item() == pytest.approx(z.max().item(), rel=1e-5)
    sampled = seen["attention/logit_max_sampled/model"].item()
    assert sampled == pytest.approx(z[:2].max().item(), rel=1e-5)


class Overwrites(nn.Module):
    """Attends to what needs no gradient, and writes over it before the forward has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = x.clone()
        attended = nn.functional.scaled_dot_product_attention(query, x, x)
        query.zero_()
        return self.weight * attended


def test_attention_is_read_before_its_inputs_are_written_over() -> None:
    torch.manual_seed(0)
    model = Overwrites()
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(8, 2, 5, 3)
    model(x).sum().backward()
    w.optimizer.step()
    scores = x[:1] @ x[:1].transpose(-2, -1) / 3**0.5
    assert w.row()["attention/logit_max_sampled/model"] == pytest.approx(float(scores.max()))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.query: weakref.ref[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        self.query = weakref.ref(q)
        return F.scaled_dot_product_attention(q, k, v)


class Checkpointed(nn.Module):
    """Counts the queries that outlive their layer's forward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attends(), Attends()])
        self.use_reentrant = use_reentrant
        self.alive = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        queries = [layer.query for layer in self.layers if isinstance(layer, Attends)]
        self.alive = sum(query is not None and query() is not None for query in queries)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_frees_what_it_would_without_the_watch(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant)
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        model(torch.randn(2, 5, 4, requires_grad=True)).sum().backward()
        assert model.alive == 0
        w.optimizer.step()
        assert {name for name in w.row() if "sampled" in name} == {
            f"attention/logit_max_sampled/layers.{i}" for i in (0, 1)
        }


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_that_is_not_trained_on_is_not_the_trainings(own: bool, tmp_path: Path) -> None:
    """As where a trainer computes its own loss from the output, which has another one."""
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dyndiag.Monitor(model, optimizer, run=tmp_path / "run", tensorboard=False) as monitor:
        for _ in range(3):
            parts = [model(ones(1.0)), model(ones(3.0))]
            for part in parts:
                loss = 0.5 * part.loss if own else part.logits.square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    run = dyndiag.Run(tmp_path / "run")
    names = {"train/loss", "curvature/sharpness", "predictions/loss"}
    assert names & set(run.names) == (names if own else set())
    assert run["logits/max"].index.tolist() == [0, 1, 2]
    notices = [notice["text"] for notice in run.metadata["notices"]]
    assert any("no .loss that is trained on" in text for text in notices) != own
    if own:
        assert run["train/loss"].iloc[0] == pytest.approx(2.0)
