"""What is read off the training step itself, against what PyTorch computes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyndiag.boundary import Boundary
from dyndiag.probes import StepWatch
from dyndiag.rows import Rows
from dyndiag.state import TrainState
from tests.models import Transformer, batches, cross_entropy, mlp


class Watched:
    """A model in training, with the rows that a watch reads off it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        named = list(model.named_parameters())
        self.watch = StepWatch(
            model,
            optimizer,
            tuple(name for name, _ in named),
            tuple(p for _, p in named),
            Boundary(),
            lambda steps: None,
        )

    def row(self) -> dict[str, float]:
        step = self.watch.take()
        rows = Rows()
        rows.add(0, step.seen)
        self.watch.step += 1
        return rows.to_host()[0][1]


def watched(model: nn.Module | None = None, **options: float) -> Watched:
    torch.manual_seed(0)
    model = model or mlp()
    return Watched(model, torch.optim.SGD(model.parameters(), lr=0.1, **options))


def backward(w: Watched, batch: object = None) -> None:
    w.optimizer.zero_grad()
    cross_entropy(w.model, batch or batches("mlp", 1)[0]).backward()


def test_gradient_norms_are_those_of_pytorch() -> None:
    w = watched()
    backward(w)
    expected = torch.nn.utils.get_total_norm([p.grad for p in w.model.parameters()])
    of_first = torch.nn.utils.get_total_norm([p.grad for p in w.model[0].parameters()])
    w.optimizer.step()
    row = w.row()
    assert row["gradients/norm"] == pytest.approx(expected.item(), rel=1e-6)
    assert row["gradients/norm/0"] == pytest.approx(of_first.item(), rel=1e-6)
    assert "gradients/norm_clipped" not in row
    parts = [row["gradients/norm/0"], row["gradients/norm/2"]]
    assert math.hypot(*parts) == pytest.approx(row["gradients/norm"])


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_clipping_by_norm_shows_the_norm_before_and_after(most: float) -> None:
    w = watched()
    backward(w)
    before = nn.utils.clip_grad_norm_(w.model.parameters(), most)
    w.optimizer.step()
    row = w.row()
    assert row["gradients/norm"] == pytest.approx(before.item(), rel=1e-5)
    assert row["gradients/norm_clipped"] == pytest.approx(min(before.item(), most), rel=1e-3)
    assert row["gradients/clip_coefficient"] == pytest.approx(
        min(most / before.item(), 1), rel=1e-4
    )


def test_the_clipped_share_is_of_the_last_hundred_steps() -> None:
    model = nn.ParameterList([torch.ones(25)])
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(160):
        w.optimizer.zero_grad()
        model[0].sum().backward()  # norm 5
        nn.utils.clip_grad_norm_(model.parameters(), 1.0 if step % 2 or step < 60 else 10.0)
        w.optimizer.step()
        row = w.row()
        if step == 59:
            assert row["gradients/clip_coefficient"] == pytest.approx(0.2, rel=1e-4)
            assert row["gradients/clipped_share"] == 1
    assert row["gradients/clipped_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loop_that_starts_to_clip_later_is_noticed(set_to_none: bool, micro_batches: int) -> None:
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    rows = []
    for step in range(20):
        for _ in range(micro_batches):
            cross_entropy(model, batches("mlp", 1)[0]).backward()
        before = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        if step >= 18:
            nn.utils.clip_grad_norm_(model.parameters(), before / 3)
        w.optimizer.step()
        w.optimizer.zero_grad(set_to_none=set_to_none)
        rows.append((before, w.row()))
    assert all(row["gradients/norm"] == pytest.approx(before) for before, row in rows[:18])
    assert all("gradients/norm_clipped" not in row for _, row in rows[:18])
    before, first = rows[18]  # nothing was kept to tell how much it was clipped by
    assert first["gradients/norm_clipped"] == pytest.approx(before / 3, rel=1e-4)
    assert "gradients/norm" not in first
    before, later = rows[19]
    assert later["gradients/norm_clipped"] == pytest.approx(before / 3, rel=1e-4)
    assert later["gradients/norm"] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_that_is_clipped_later_is_noticed(layer: int) -> None:
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(20):
        cross_entropy(model, batches("mlp", 1)[0]).backward()
        if step == 19:
            nn.utils.clip_grad_norm_(model[layer].parameters(), 1e-3)
        w.optimizer.step()
        w.optimizer.zero_grad()
        row = w.row()
        assert ("gradients/norm_clipped" in row) == (step == 19)
        assert ("gradients/norm" in row) == (step < 19)


def test_fewer_micro_batches_at_the_end_of_an_epoch_are_no_clipping() -> None:
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(40):
        for _ in range(1 if step % 7 == 6 else 3):
            cross_entropy(model, batches("mlp", 1)[0]).backward()
        w.optimizer.step()
        w.optimizer.zero_grad()
        row = w.row()
        assert "gradients/norm" in row and "gradients/norm_clipped" not in row


def hooked(model: nn.Module) -> int:
    return sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())


def test_a_loop_that_clips_by_norm_is_watched_by_one_parameter() -> None:
    """Until it does something else, which is noticed within 101 clipped steps."""
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(130):
        cross_entropy(model, batches("mlp", 1)[0]).backward()
        before = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        if step < 60:
            nn.utils.clip_grad_norm_(model.parameters(), before / 3)
        else:
            nn.utils.clip_grad_norm_(model[0].parameters(), before / 30)
        w.optimizer.step()
        w.optimizer.zero_grad()
        row = w.row()
        assert hooked(model) == (1 if 15 <= step < 100 else 4)
        assert row["gradients/norm_clipped"] < 0.99 * before
        if step < 60:
            assert row["gradients/norm"] == pytest.approx(before, rel=1e-5)
            assert row["gradients/clip_coefficient"] == pytest.approx(1 / 3, rel=1e-4)
        assert ("gradients/norm" in row) == (step < 101)


def test_the_one_watched_parameter_may_miss_a_gradient() -> None:
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(24):
        cross_entropy(model, batches("mlp", 1)[0]).backward()
        if step == 20:
            for p in model[0].parameters():
                p.grad = None
        before = nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        ).item()
        if step == 22:
            for p in model.parameters():
                p.grad.zero_()
        nn.utils.clip_grad_norm_(model.parameters(), before / 3)
        w.optimizer.step()
        w.optimizer.zero_grad()
        row = w.row()
        if step < 22:
            assert row["gradients/norm_clipped"] == pytest.approx(before / 3, rel=1e-4)
        assert ("gradients/norm" in row) == (step not in (20, 22))
        assert row.get("gradients/norm", before) == pytest.approx(before, rel=1e-4)


def test_more_micro_batches_from_some_step_on_cost_one_norm_at_most() -> None:
    """Where all steps were alike no hook is left that would count the backward passes."""
    w = Watched(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(40):
        for _ in range(3 if step >= 20 else 1):
            cross_entropy(model, batches("mlp", 1)[0]).backward()
        w.optimizer.step()
        w.optimizer.zero_grad()
        row = w.row()
        assert ("gradients/norm" in row) == (step != 20)
        assert ("gradients/norm_clipped" in row) == (step == 20)
        assert hooked(model) == (0 if 15 <= step < 20 else 4)


def test_the_only_parameter_is_seen_clipped() -> None:
    model = nn.ParameterList([torch.ones(4)])
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[0].sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    w.optimizer.step()
    row = w.row()
    assert row["gradients/norm"] == pytest.approx(2, rel=1e-4)
    assert row["gradients/norm_clipped"] == pytest.approx(0.5, rel=1e-4)


def test_clipping_by_value_leaves_the_norm_before_unknown() -> None:
    w = watched()
    backward(w)
    nn.utils.clip_grad_value_(w.model.parameters(), 0.01)
    w.optimizer.step()
    row = w.row()
    assert "gradients/norm" not in row
    assert row["gradients/norm_clipped"] > 0


def test_accumulated_gradients_count_as_one_batch() -> None:
    one, parts = watched(), watched()
    inputs, targets = batches("mlp", 1)[0]
    backward(one, (inputs, targets))
    parts.optimizer.zero_grad()
    for rows in (slice(0, 3), slice(3, 6)):
        (cross_entropy(parts.model, (inputs[rows], targets[rows])) / 2).backward()
    for w in (one, parts):
        w.optimizer.step()
    assert parts.row()["gradients/norm"] == pytest.approx(one.row()["gradients/norm"], rel=1e-5)


def test_gradients_are_read_after_a_closure_has_computed_them() -> None:
    plain, closed = watched(), watched()
    for _ in range(2):
        backward(plain)
        plain.optimizer.step()
        expected = plain.row()

        def closure() -> float:
            backward(closed)
            return 0.0

        closed.optimizer.step(closure)
        row = closed.row()
    assert row["gradients/norm"] == expected["gradients/norm"]


def test_sparse_and_missing_gradients() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "unused": nn.Linear(2, 2)})
    w = Watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model["embed"](torch.tensor([1, 1, 3])).sum().backward()
    w.optimizer.step()
    row = w.row()
    assert row["gradients/norm"] == pytest.approx(math.sqrt(4 * 2**2 + 4 * 1**2))
    assert "gradients/norm/unused" not in row


def test_maximum_and_log_partition_of_the_logits() -> None:
    w = watched()
    batch = batches("mlp", 1)[0]
    with torch.no_grad():
        logits = w.model(batch[0])
    backward(w, batch)
    w.optimizer.step()
    row = w.row()
    assert row["logits/max"] == logits.max().item()
    assert row["logits/log_partition"] == pytest.approx(logits.logsumexp(-1).mean().item(), 1e-6)


def test_forwards_without_gradients_are_not_the_training() -> None:
    w = watched()
    with torch.no_grad():
        w.model(torch.full((2, 8), 100.0))
    backward(w)
    w.optimizer.step()
    assert w.row()["logits/max"] < 10


def scores(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Attention scores of each layer, unmasked pairs only, one row of them a sequence."""
    found = []
    x = model.embed(tokens)
    for attend in model.attend:
        inner = model.norm(x)
        q, k, _ = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in attend.qkv(inner).chunk(3, -1))
        z = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        hidden = torch.ones(z.shape[-2:], dtype=torch.bool).triu(1)
        found.append(z.masked_fill(hidden, -torch.inf).flatten(1).amax(-1))
        x = x + attend(inner)
    return found


@pytest.mark.parametrize("by_hand", [True, False])
def test_largest_attention_logit(by_hand: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(by_hand=by_hand, dropout=0.0)
    w = watched(model)
    tokens, targets = (t.repeat(3, 1) for t in batches("transformer", 1)[0])  # 18 sequences
    for step in range(2):
        expected = [z.detach() for z in scores(model, tokens)]
        w.watch._forward.collect()
        backward(w, (tokens, targets))
        w.optimizer.step()
        row = w.row()
        for layer, z in enumerate(expected):
            sampled = row[f"attention/logit_max_sampled/attend.{layer}"]
            assert sampled == pytest.approx(z[:3].max().item(), rel=1e-5)
            if step == 0:
                assert row[f"attention/logit_max/attend.{layer}"] == pytest.approx(
                    z.max().item(), rel=1e-5
                )
            else:
                assert f"attention/logit_max/attend.{layer}" not in row


@pytest.mark.parametrize("need_weights", [True, False])
def test_largest_attention_logit_of_multihead_attention(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hides = torch.tensor([[False] * 4 + [True]]).expand(len(x), 5)
            y, _ = self.attend(x, x, x, key_padding_mask=hides, need_weights=need_weights)
            return y

    torch.manual_seed(0)
    model = Model()
    w = watched(model)
    x = torch.randn(16, 5, 8)
    q, k, _ = F.linear(x, model.attend.in_proj_weight, model.attend.in_proj_bias).chunk(3, -1)
    q, k = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k))
    z = (q @ k.transpose(-2, -1) / 2)[..., :4].detach()
    model(x).square().mean().backward()
    w.optimizer.step()
    row = w.row()
    assert row["attention/logit_max/attend"] == pytest.approx(z.max().item(), rel=1e-5)
    assert row["attention/logit_max_sampled/attend"] == pytest.approx(z[:2].max().item(), rel=1e-5)


def test_update_ratio_is_the_true_change() -> None:
    w = watched(weight_decay=0.1, momentum=0.9)
    before = [p.detach().clone() for p in w.model.parameters()]
    backward(w)
    w.optimizer.step()
    taken = w.watch.take()
    named = list(w.model.named_parameters())
    state = TrainState(
        0, w.model, w.optimizer, tuple(p for _, p in named), tuple(n for n, _ in named),
        weights_before=taken.weights_before,
    )  # fmt: skip
    rows = Rows()
    rows.add(0, w.watch.update_ratio(state))
    row = rows.to_host()[0][1]
    change = torch.cat([(p - q).flatten() for (_, p), q in zip(named, before, strict=True)])
    start = torch.cat([q.flatten() for q in before])
    assert row["updates/ratio"] == pytest.approx((change.norm() / start.norm()).item(), rel=1e-5)
    assert set(row) == {"updates/ratio", "updates/ratio/0", "updates/ratio/2"}


def test_a_watched_model_can_be_copied_and_pickled() -> None:
    w = watched(Transformer())
    backward(w, batches("transformer", 1)[0])
    w.optimizer.step()
    copied = copy.deepcopy(w.model)
    restored = pickle.loads(pickle.dumps(w.model))
    w.watch.take()
    for other in (copied, restored):
        other(batches("transformer", 1)[0][0]).sum().backward()
    assert w.watch.take() is None


def test_detaching_leaves_no_hook() -> None:
    w = watched(Transformer())
    backward(w, batches("transformer", 1)[0])
    w.optimizer.step()
    w.watch.detach()
    for module in w.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in w.model.parameters())
    assert not w.optimizer._optimizer_step_pre_hooks
    assert not w.optimizer._optimizer_step_post_hooks
