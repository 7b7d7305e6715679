"""Which blocks and unit layers are found, in which models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndiag.batches import own_loss
from dyndiag.probes.activations.blocks import blocks, thinned
from dyndiag.probes.activations.features import feature_axis, hidden_of, samples, spread
from dyndiag.probes.activations.hidden import Followed, follow
from tests.models import model_of
from tests.probes.sampled import state_of


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def shapes(model: nn.Module, *data: Any, loss_fn: Any = mean_square) -> Followed[Any, Any]:
    """The shape of (samples, features) at every call, of every block and unit layer."""
    model.eval()
    return follow(
        state_of(model, *data, loss_fn=loss_fn),
        blocks(model),
        lambda rows, call: tuple(rows.shape),
        lambda rows, call, two_sided: (*rows.shape, two_sided),
    )


class Residual(nn.Module):
    """A residual block that calls one ReLU twice, as ResNets do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm(self.two(self.relu(self.one(x)))))


class Looped(nn.Module):
    """An MLP whose activation is a function, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return torch.tanh(self.head(x))


def seq(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


def test_blocks_of_stacks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert blocks(encoder) == ("layers.0", "layers.1")
    resnet = seq(nn.Conv2d(1, 4, 3), seq(Residual(4), Residual(4)), nn.Flatten(), nn.Linear(4, 2))
    assert blocks(resnet) == ("1.0", "1.1")
    stages = seq(seq(nn.Conv2d(1, 4, 3), nn.ReLU()), seq(nn.Conv2d(4, 4, 3), nn.ReLU()))
    assert blocks(stages) == ("0", "1")
    assert blocks(model_of("transformer")) == ("attend.0", "attend.1")


class Wrapped(nn.Module):
    """Around a module, as a compiled one is: it has a length only if what it wraps has one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __len__(self) -> int:
        raise TypeError(f"{type(self.inner).__name__} does not support len()")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_members_are_not_asked_for_their_length() -> None:
    stack = nn.ModuleList(Wrapped(seq(nn.Linear(6, 6), nn.ReLU(), nn.Sequential())) for _ in "ab")
    assert blocks(stack) == ("0", "1")
    assert blocks(seq(Wrapped(nn.ReLU()), nn.Linear(6, 6))) == ("0.inner",)
    assert blocks(nn.ModuleList([seq(nn.Sequential()), nn.Linear(2, 2)])) == ("0",)
    found = shapes(seq(*stack), torch.rand(3, 6))
    assert found.units == {"0.inner.1": [(3, 6, False)], "1.inner.1": [(3, 6, False)]}


def test_blocks_without_stacks() -> None:
    assert blocks(seq(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU())) == ("1", "3")
    assert blocks(seq(seq(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))) == ("0.1",)
    assert blocks(Looped()) == ("layers.0", "layers.1", "layers.2", "head")
    assert blocks(model_of("lstm")) == ("lstm", "head")
    assert blocks(model_of("conv")) == ("conv", "head")
    assert blocks(nn.Linear(2, 2)) == ("model",)
    assert blocks(nn.LayerNorm(2)) == ()


def test_a_shared_block_is_named_once() -> None:
    block = seq(nn.Linear(4, 4), nn.ReLU())
    assert blocks(nn.ModuleList([block] * 3)) == ("0",)


def test_many_blocks_are_thinned_evenly() -> None:
    deep = nn.ModuleList(seq(nn.Linear(1, 1)) for _ in range(300))
    found = blocks(deep)
    assert (len(found), found[0], found[-1]) == (128, "0", "299")
    steps = {int(b) - int(a) for a, b in itertools.pairwise(found)}
    assert steps <= {2, 3}
    assert thinned([1, 2], 2) == [1, 2]


def test_blocks_of_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    cases = {
        "h": transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8)
        ),
        "layers": transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=2, **small)),
        "encoder.layer": transformers.BertModel(
            transformers.BertConfig(num_hidden_layers=2, **small)
        ),
    }
    for stack, model in cases.items():
        assert blocks(model) == (f"{stack}.0", f"{stack}.1")
        ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        seen = shapes(
            model,
            {"input_ids": ids, "attention_mask": mask},
            loss_fn=lambda model, batch: model(**batch).last_hidden_state.mean(),
        )
        assert seen.blocks == {f"{stack}.0": [(10, 8)], f"{stack}.1": [(10, 8)]}  # 2 are masked
        hidden = [calls for name, calls in seen.units.items() if name.startswith(stack)]
        assert len(hidden) == 2
        assert all(calls[0][0] == 10 for calls in hidden)


def test_a_vision_transformer_with_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=16,
        )
    )  # fmt: skip
    data = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 1])}
    seen = shapes(model, data, loss_fn=own_loss)
    assert list(seen.blocks.values()) == [[(15, 8)], [(15, 8)]]  # 4 patches and the class token
    assert list(seen.units.values()) == [[(15, 16, False)], [(15, 16, False)]]


def test_units_of_modules_functions_and_recurrent_layers() -> None:
    x = torch.randn(5, 6)
    assert shapes(seq(nn.Linear(6, 3), nn.Tanh()), x).units == {"1": [(5, 3, True)]}
    looped = shapes(Looped(), x)
    assert looped.units == {name: [(5, 6, False)] for name in ("relu", "relu.2", "relu.3")}
    assert shapes(model_of("conv"), torch.randn(2, 1, 8, 8)).units == {"relu": [(128, 6, False)]}
    assert shapes(model_of("lstm"), torch.randn(2, 5, 8)).units == {"lstm": [(10, 12, True)]}


def test_units_of_fused_encoder_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, hidden = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    seen = shapes(
        encoder, x, loss_fn=lambda m, b: m(b, src_key_padding_mask=hidden).nan_to_num().mean()
    )
    assert seen.units == {f"layers.{i}.relu": [(10, 16, False)] for i in range(2)}
    assert seen.blocks == {f"layers.{i}": [(10, 8)] for i in range(2)}


def test_a_mask_that_the_loss_function_passes_on() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(3, 4), nn.ReLU()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.act(self.layer(x)) * attention_mask[..., None]

    batch = (torch.randn(2, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    seen = shapes(Masked(), batch, loss_fn=lambda m, b: m(b[0], attention_mask=b[1]).mean())
    assert seen.units == {"act": [(3, 4, False)]}


def test_a_shared_activation_is_a_layer_after_each_layer() -> None:
    seen = shapes(seq(Residual(4), Residual(4)), torch.randn(2, 4, 3, 3))
    assert seen.units == {f"{b}.relu{n}": [(18, 4, False)] for b in (0, 1) for n in ("", ".2")}


def test_time_steps_of_one_layer_are_calls_of_one_unit_layer() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.keep = nn.Linear(3, 4), nn.Linear(4, 4)
            self.cell, self.head = nn.GRUCell(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = g = torch.zeros(len(x), 4)
            for t in range(x.shape[1]):
                h = torch.tanh(self.read(x[:, t]) + self.keep(h))
                g = self.cell(h, g)
            return self.head(g)

    seen = shapes(ByHand(), torch.randn(2, 5, 3))
    assert seen.units == {"tanh": [(2, 4, True)] * 5, "cell": [(2, 4, True)] * 5}


def test_activations_that_are_spelt_out() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))

    model = seq(nn.Linear(3, 4), Swish(), nn.Linear(4, 4), Gelu(), nn.PReLU(4), nn.Linear(4, 1))
    seen = follow(
        state_of(model, torch.randn(2, 3), loss_fn=mean_square),
        (),
        lambda rows, call: None,
        lambda rows, call, two_sided: rows,
    )
    assert list(seen.units) == ["1", "3", "4"]
    assert bool((seen.units["1"][0] > -0.3).all())  # the swish, not its sigmoid


def test_what_is_no_unit_layer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
            scores = torch.tanh(q @ q.transpose(-2, -1) / 30)  # soft-capped attention
            x = x * torch.sigmoid(self.gate(x)) + scores.softmax(-1).mean((1, 2))[:, :, None]
            return torch.tanh(self.out(x))

    assert shapes(Gated(), torch.randn(2, 5, 4)).units == {}
    assert shapes(seq(nn.Linear(4, 4), nn.Sigmoid()), torch.randn(2, 4)).units == {}


def test_a_model_of_bare_parameters() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w).relu() @ self.v

    seen = shapes(Bare(), torch.randn(2, 3))
    assert seen.units == {"relu": [(2, 4, False)]}
    assert seen.blocks == {"model": [(2, 1)]}


def test_modules_that_are_called_often_not_at_all_or_give_no_activations() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(seq(nn.Linear(3, 3), nn.ReLU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.blocks[0](x))
            self.blocks[2](x[:0])  # no sample
            return x

    seen = shapes(Odd(), torch.randn(2, 3))
    assert seen.blocks == {"blocks.0": [(2, 3)] * 2}
    assert seen.units == {"blocks.0.1": [(2, 3, False)] * 2}
    assert shapes(seq(nn.Linear(3, 3), nn.Flatten(0)), torch.randn(2, 3)).units == {}


def test_a_loss_that_is_made_of_derivatives_is_seen_once() -> None:
    def penalised(model: nn.Module, x: Any) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    model = seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        seen = shapes(model, torch.randn(2, 3), torch.randn(5, 3), loss_fn=penalised)
    assert seen.units == {"1": [(2, 4, True), (5, 4, True)]}


def hooks(model: nn.Module) -> list[int]:
    return [
        len(table)
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]


def test_hooks_come_off_whatever_happens() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError("no more")

    model = seq(nn.Linear(3, 4), nn.ReLU(), Failing())
    before = hooks(model)
    with pytest.raises(MemoryError, match="no more"):
        shapes(model, torch.randn(2, 3))
    assert hooks(model) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_an_error_that_the_model_catches_itself() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.small = nn.Linear(9, 4), nn.Linear(3, 4)
            self.act, self.head = nn.ReLU(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.big(x)
            except RuntimeError:
                x = self.small(x)
            return self.head(self.act(x))

    assert shapes(Catching(), torch.randn(2, 3)).units == {"act": [(2, 4, False)]}


@pytest.mark.parametrize(
    ("shape", "after", "axis"),
    [
        ((2, 3), None, 1),
        ((2, 6, 5, 5), nn.Conv2d(3, 6, 1), 1),
        ((2, 5, 5, 6), nn.Linear(3, 6), -1),
        ((2, 6, 5, 5), nn.Linear(3, 6), 1),  # turned back after a linear layer on channels
        ((2, 25, 6), nn.Conv2d(3, 6, 1), -1),  # patches that became tokens
        ((2, 6, 25), nn.Conv1d(3, 6, 1), 1),
        ((2, 6, 25), nn.BatchNorm1d(6), 1),
        ((2, 25, 6), nn.Linear(3, 12), -1),  # half of it: a gate was cut off
        ((2, 6, 25), nn.Linear(3, 12), None),
        ((2, 25, 6), nn.LayerNorm(6), -1),
        ((2, 4, 5, 5), nn.Linear(3, 6), None),  # attention scores
        ((2, 6, 5, 5), None, 1),
    ],
)
def test_where_features_are(shape: tuple[int, ...], after: Any, axis: int | None) -> None:
    assert feature_axis(torch.Size(shape), after) == axis


def test_samples_are_tokens_and_places() -> None:
    image = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    rows = samples(image, 1)
    assert rows.shape == (8, 3)
    assert rows[5].tolist() == image[1, :, 0, 1].tolist()
    tokens = torch.arange(12).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert samples(tokens, -1, mask)[:, 0].tolist() == [0, 2, 8, 10]
    assert len(samples(tokens, -1, mask.T)) == 6  # does not fit: not of these tokens


def test_activations_in_outputs_of_every_form() -> None:
    h, ids = torch.randn(2, 3), torch.arange(6).view(2, 3)
    assert hidden_of((ids, h)) is h
    assert hidden_of({"cache": [torch.randn(1, 1)], "last_hidden_state": h}) is h
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 4, 3), torch.tensor([4, 2]), True)
    assert hidden_of(packed) is packed.data
    nested = torch.nested.nested_tensor([h, h], layout=torch.jagged)
    for nothing in (None, ids, h[0], h[:0], h.to_sparse(), nested, h.to("meta"), "text", 3):
        assert hidden_of(nothing) is None


@given(count=st.integers(1, 5000), most=st.integers(1, 300))
def test_rows_are_spread_over_all(count: int, most: int) -> None:
    rows = spread(count, most).tolist()
    assert len(rows) == min(count, most)
    assert rows == sorted(set(rows))
    assert rows[0] >= 0
    assert rows[-1] < count
    gaps = [b - a for a, b in zip([-1, *rows], [*rows, count], strict=True)]
    assert max(gaps) <= 2 * -(-count // most)  # no stretch without one


def test_spread_rows_do_not_all_begin_a_sequence() -> None:
    length = 256
    first = sum(row % length == 0 for row in spread(256 * length, 256).tolist())
    assert first <= 2  # every 256th would take the first token of each
