"""Attention logits and entropies against full scores, however a model attends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyndiag.probes.forward import ForwardWatch
from dyndiag.probes.logits.attention import AttentionLogits
from dyndiag.probes.logits.attention_scores import FINDERS, Scores
from dyndiag.probes.logits.attention_statistics import entropies, maxima
from dyndiag.state import Measurements
from tests.models import Transformer, batches, mlp


def truth(z: Tensor, of: int) -> dict[str, Tensor]:
    """The series of full scores (sequences, heads, queries, keys), masked ones at −inf or at the
    dtype's lowest number; of `of` sequences the sampled ones."""
    lowest = torch.finfo(z.dtype).min / 2
    z = z.detach().double().masked_fill(z <= lowest, -torch.inf)
    sampled = z[:of]
    p = sampled.softmax(-1)
    rows = -torch.special.xlogy(p, p).sum(-1)
    visible = (sampled > -torch.inf).any(-1)
    rows = rows.where(visible, 0.0)
    return {
        "logit_max_sampled": sampled.amax(),
        "logit_max": z.amax(),
        "head_logit_max": z.amax((0, 2, 3)),
        "entropy": rows.sum() / visible.sum(),
        "head_entropy": rows.sum((0, 2)) / visible.sum((0, 2)),
    }


def tensors(seen: Measurements, area: str) -> dict[str, Tensor]:
    found = {}
    for name, value in seen.items():
        assert isinstance(name, str)
        if isinstance(value, float):  # a number at once, on a CPU
            value = torch.tensor(value, dtype=torch.float64)
        assert isinstance(value, Tensor)
        assert name.startswith(area)
        found[name.removeprefix(area)] = value
    return found


class Read:
    """A model in training, with what is read off it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.attention = AttentionLogits(model)
        self.watch = ForwardWatch(model, [self.attention])

    def step(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One forward, by series without their area."""
        self.model(*args, **kwargs)
        return self.collect()

    def collect(self) -> dict[str, Tensor]:
        _, _, seen = self.watch.collect()
        self.watch.step += 1
        return tensors(seen, "attention/")


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    """How many there are, on each module."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def check(seen: dict[str, Tensor], module: str, expected: dict[str, Tensor], rtol: float) -> None:
    for name, value in expected.items():
        found = seen[f"{name}/{module}"]
        torch.testing.assert_close(found.double(), value, rtol=rtol, atol=rtol)


# The scores themselves, and statistics of them by blocks


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def found_in(*args: Any, **kwargs: Any) -> Scores:
    scores = FINDERS[F.scaled_dot_product_attention](*args, **kwargs)
    assert scores is not None
    return scores


def read(scores: Scores, of: int, block: int) -> dict[str, Tensor]:
    highest = maxima(scores, scores.sequences, block)
    sums, counts = entropies(scores, of, block)
    return {
        "logit_max": highest.amax(),
        "head_logit_max": highest.amax(0),
        "entropy": sums.sum() / counts.sum(),
        "head_entropy": sums / counts,
        "logit_max_sampled": maxima(scores, of, block).amax(),
    }


BLOCKS = [1, 3, 16, 50, 10**6]  # 16 and 50 divide neither 7 queries nor 5 keys
SHAPES = {"causal": (9, 7), "plain": (7, 5)}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "bias", "rows", "lowest"])
def test_blocks_agree_with_full_scores(block: int, mask: str) -> None:
    q, k = draw(5, 2, 9, 4), draw(5, 2, 7, 4, seed=1)
    z = q @ k.transpose(-2, -1) / 2
    given: dict[str, Any] = {}
    shown = torch.rand(5, 1, 9, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    if mask == "causal":
        given["is_causal"] = True
        z = z.masked_fill(torch.ones(9, 7, dtype=torch.bool).triu(1), -torch.inf)
    elif mask == "bias":
        given["attn_mask"] = draw(2, 9, 7, seed=3)
        z = z + given["attn_mask"]
    elif mask != "none":
        shown[1] = False  # a sequence without a visible key
        shown[0, 0, 3] = False  # and a row
        lowest = -torch.inf if mask == "bool" else torch.finfo(torch.float64).min
        given["attn_mask"] = shown if mask != "lowest" else shown.double().sub(1).mul(-lowest)
        z = z.masked_fill(~shown, -torch.inf)
    seen = read(found_in(q, k, k, **given), 2, block)
    for name, value in truth(z, 2).items():
        torch.testing.assert_close(seen[name].double(), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["grouped", "one key head", "shared keys", "no heads", "five"])
def test_shapes_of_dot_product_attention(kind: str, block: int) -> None:
    q, k = draw(4, 6, 7, 4), draw(4, 6, 5, 4, seed=1)
    full = k
    given: dict[str, Any] = {}
    if kind == "grouped":
        k, given = draw(4, 2, 5, 4, seed=1), {"enable_gqa": True}
        full = k.repeat_interleave(3, 1)
    elif kind == "one key head":
        full = k = draw(4, 1, 5, 4, seed=1)
    elif kind == "shared keys":
        full = k = draw(1, 6, 5, 4, seed=1)
    elif kind == "no heads":
        q, k = q[:, 0], k[:, 0]
        full = k
    elif kind == "five":
        q, k = draw(4, 3, 6, 7, 4), draw(4, 3, 6, 5, 4, seed=1)
        full = k
    F.scaled_dot_product_attention(q, k, k, **given)  # is a call that PyTorch takes
    z = q @ full.transpose(-2, -1) / 2
    if kind == "no heads":
        z = z.unsqueeze(1)
    of = 2
    if kind == "five":
        z, of = z.flatten(0, 1), 6
    seen = read(found_in(q, k, k, **given), 2, block)
    for name, value in truth(z, of).items():
        torch.testing.assert_close(seen[name].double(), value, rtol=1e-10, atol=1e-10)


def test_entropy_in_closed_form() -> None:
    same = found_in(torch.zeros(1, 2, 6, 4), draw(1, 2, 8, 4).float(), None)
    sums, counts = entropies(same, 1)
    assert (sums / counts).tolist() == pytest.approx([math.log(8)] * 2)
    causal = found_in(torch.zeros(1, 1, 6, 4), draw(1, 1, 6, 4).float(), None, is_causal=True)
    sums, counts = entropies(causal, 1, block=4)
    assert float(sums / counts) == pytest.approx(sum(math.log(n) for n in range(1, 7)) / 6)
    one = torch.eye(4)[None, None] * 1e4  # ±1e8: one key takes all
    sums, _ = entropies(found_in(one, one, None), 1, block=2)
    assert float(sums) == pytest.approx(0.0, abs=1e-30)


@given(
    scale=st.floats(1e-3, 1e4), shift=st.floats(-1e4, 1e4), block=st.integers(1, 200),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_entropy_does_not_cancel_where_scores_are_large(
    scale: float, shift: float, block: int, seed: int
) -> None:
    z = (shift + scale * draw(2, 2, 5, 6, seed=seed)).float()
    scores = FINDERS[F.softmax](z, dim=-1)
    assert scores is not None
    sums, counts = entropies(scores, 2, block)
    expected = truth(z, 2)["head_entropy"]
    torch.testing.assert_close(sums / counts, expected, rtol=1e-5, atol=1e-5)
    assert ((sums / counts >= -1e-6) & (sums / counts <= math.log(6) + 1e-6)).all()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation has made anew."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("is_causal", [False, True])
def test_never_more_than_a_block_of_scores(is_causal: bool) -> None:
    q = draw(2, 4, 600, 8)
    with Largest() as largest:
        scores = found_in(q, q, q, is_causal=is_causal)
        maxima(scores, 2, block=10_000)
        entropies(scores, 2, block=10_000)
    # All scores are 2.9 million. Keys and queries are 38,400 numbers a sequence.
    assert largest.elements <= 40_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_keys(dtype: torch.dtype) -> None:
    q, k = draw(1, 1, 4, 3).abs().to(dtype), draw(1, 1, 4, 3, seed=1).to(dtype)
    k[0, 0, 3] = torch.inf  # seen by the last query only
    last_left_out = found_in(q[:, :, :3], k, k, is_causal=True)
    assert maxima(last_left_out, 1).isfinite().all()
    assert entropies(last_left_out, 1)[0].isfinite().all()
    assert maxima(found_in(q, k, k, is_causal=True), 1).item() == torch.inf
    k[0, 0, 3, 0] = torch.nan
    assert maxima(found_in(q, k, k, is_causal=True), 1).isnan().all()
    assert entropies(found_in(q, k, k, is_causal=True), 1)[0].isnan().all()


def test_half_precision_is_multiplied_in_float32() -> None:
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)
    assert maxima(found_in(q, q, q, scale=1.0), 1).item() == 64 * 3600  # above 65,504
    q, k = (draw(3, 2, 5, 8, seed=s).bfloat16() for s in (0, 1))
    z = q.double() @ k.double().transpose(-2, -1) / math.sqrt(8)
    seen = read(found_in(q, k, k), 1, 10**6)
    for name, value in truth(z, 1).items():
        torch.testing.assert_close(seen[name].double(), value, rtol=1e-5, atol=1e-5)
    for n in (2, 20):  # each alone, or all in one product
        q = draw(n, 2, 5, 8).float()
        with torch.autocast("cpu", torch.bfloat16):
            under = maxima(found_in(q, q, q), n)
        assert torch.equal(under, maxima(found_in(q, q, q), n))


# Modules


class Layer(nn.Module):
    """Attends in one of several ways; keeps its full scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.heads = kind, 2
        self.qkv = nn.Linear(8, 24, dtype=torch.float64)
        self.z = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        length = x.shape[1]
        z = q @ k.transpose(-2, -1) / 2
        bias = -torch.arange(length).abs().double()[:, None].expand(length, length)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.kind == "causal":
            z = z.masked_fill(hidden, -torch.inf)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.kind == "bias":
            z = z + bias
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        elif self.kind == "soft cap":
            z = 2 * torch.tanh(z / 2)
            y = torch.softmax(z, -1) @ v
        else:
            z = z.masked_fill(hidden, torch.finfo(z.dtype).min)
            ways: dict[str, Callable[[], Tensor]] = {
                "functional": lambda: F.softmax(z, dim=-1),
                "torch": lambda: torch.softmax(z, dim=3),
                "method": lambda: z.softmax(-1),
                "float32": lambda: F.softmax(z, dim=-1, dtype=torch.float32).double(),
            }
            y = ways[self.kind]() @ v
        self.z = z.detach()
        return y.transpose(1, 2).flatten(2)


KINDS = ["causal", "bias", "soft cap", "functional", "torch", "method", "float32"]


@pytest.mark.parametrize("kind", KINDS)
def test_series_of_a_model(kind: str) -> None:
    torch.manual_seed(0)
    layers = {"0": Layer(kind), "2": Layer(kind)}
    model = nn.Sequential(layers["0"], nn.Linear(8, 8, dtype=torch.float64), layers["2"])
    found = Read(model)
    for step in range(12):
        seen = found.step(draw(17, 6, 8, seed=step))
        for name, layer in layers.items():
            expected = truth(layer.z, 3)
            if step % 11:
                expected = {"logit_max_sampled": expected["logit_max_sampled"]}
            check(seen, name, expected, 1e-10)
        assert len(seen) == (2 if step % 11 else 10)


@pytest.mark.parametrize("alone", ["the model itself", "a part that is called without the model"])
def test_an_attending_module_that_is_called_first(alone: str) -> None:
    """Its own hooks are being run when it is found out whether the forward is followed."""
    torch.manual_seed(0)
    layer = Layer("causal")
    model, name = (layer, "model") if alone == "the model itself" else (nn.Sequential(layer), "0")
    found = Read(model)
    for step in range(12):
        layer(draw(17, 6, 8, seed=step))
        seen = found.collect()
        assert set(seen) >= {f"logit_max_sampled/{name}"}
        assert float(seen[f"logit_max_sampled/{name}"]) == pytest.approx(
            float(truth(layer.z, 3)["logit_max_sampled"]), rel=1e-12
        )


def test_micro_batches_and_modules_that_are_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.idle = Layer("causal"), Layer("causal")
            self.all: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.layer(x)
                self.all.append(self.layer.z)
            return x

    torch.manual_seed(0)
    model = Twice()
    found = Read(model)
    for step in range(2):
        model.all.clear()
        for seed in range(3):
            model(draw(8, 6, 8, seed=seed))
        seen = found.collect()
        expected = truth(torch.cat([z[:1] for z in model.all]), 6)  # a sequence of each call
        if step:
            assert list(seen) == ["logit_max_sampled/layer"]
            expected = {"logit_max_sampled": expected["logit_max_sampled"]}
        else:
            of_all = truth(torch.cat(model.all), 1)
            expected |= {name: of_all[name] for name in ("logit_max", "head_logit_max")}
            assert len(seen) == 5
        check(seen, "layer", expected, 1e-10)
    assert model(draw(8, 6, 8)) is not None
    assert found.collect()


def test_modules_that_begin_to_attend_later_are_found_at_a_full_reading() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer("causal"), Layer("causal")
            self.both = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x) if self.both else x

    model = Late()
    found = Read(model)
    names = []
    for step in range(13):
        model.both = step >= 5
        names.append({name.rpartition("/")[2] for name in found.step(draw(2, 3, 8))})
    assert names == [{"first"}] * 11 + [{"first", "second"}] * 2


def test_a_model_without_attention_is_left_alone() -> None:
    model = mlp()
    found = Read(model)
    found.step(torch.rand(2, 8))
    bare = hooks(model)
    for step in range(1, 30):
        assert found.step(torch.rand(2, 8)) == {}
        assert hooks(model) == bare
        given_up = found.attention._calls._traces_left == 0
        assert given_up == (step >= 15)


def test_heads_that_change_within_a_step_are_not_told_apart() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor, heads: int) -> Tensor:
            y = x.unflatten(-1, (heads, -1)).transpose(1, 2).requires_grad_()
            return F.scaled_dot_product_attention(y, y, y)

    found = Read(Changing())
    x = draw(8, 5, 8)
    found.model(x, 2)
    seen = found.step(x, 4)
    assert {name.partition("/")[0] for name in seen} == {
        "logit_max", "logit_max_sampled", "entropy",
    }  # fmt: skip
    each = []
    for heads in (2, 4):
        y = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        each.append(truth(y @ y.transpose(-2, -1) / math.sqrt(8 // heads), 1))
    two, four = each
    torch.testing.assert_close(seen["entropy/model"], (two["entropy"] + 2 * four["entropy"]) / 3)
    torch.testing.assert_close(
        seen["logit_max/model"], torch.maximum(two["logit_max"], four["logit_max"])
    )


def test_many_modules_come_in_arrays() -> None:
    layers = [Layer("causal") for _ in range(130)]
    seen = Read(nn.Sequential(*layers)).step(draw(1, 2, 8))
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "logit_max_sampled": (130,), "logit_max": (130,), "entropy": (130,),
    }  # fmt: skip
    assert seen["logit_max"].tolist() == pytest.approx([float(layer.z.amax()) for layer in layers])


# nn.MultiheadAttention


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the model gives to `F.softmax`."""
    given: list[Tensor] = []
    softmax = F.softmax

    def recording(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.append(x.detach().clone())
        return softmax(x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "softmax", recording)
        yield given


MULTI_HEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "zero key and masks": ({"add_zero_attn": True}, {"attn_mask": 2, "key_padding_mask": True}),
    "other widths": ({"kdim": 5, "vdim": 3}, {}),
    "padding": ({}, {"key_padding_mask": True}),
    "mask": ({}, {"attn_mask": 2}),
    "mask of each head": ({}, {"attn_mask": 3, "key_padding_mask": True}),
    "bias and padding": ({}, {"attn_mask": 2, "key_padding_mask": True, "floating": True}),
    "causal": ({}, {"causal": True}),
}


class CrossAttends(nn.Module):
    def __init__(self, batch_first: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(
            8, 2, batch_first=batch_first, dtype=torch.float64, **options
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return self.inner(q, k, v, **masks)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", MULTI_HEAD)
def test_multihead_attention(
    kind: str, need_weights: bool, batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, given = MULTI_HEAD[kind]
    torch.manual_seed(0)
    model = CrossAttends(batch_first, options)
    if model.inner.bias_k is not None:
        model.inner.bias_k.data.mul_(5)
    n, queries, keys = 9, 4, 4 if given.get("causal") else 6
    q = draw(n, queries, 8, seed=1)
    k, v = (draw(n, keys, options.get(d, 8), seed=s) for d, s in (("kdim", 2), ("vdim", 3)))
    masks: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(4)
    if "attn_mask" in given:
        shape = (n * 2, queries, keys) if given["attn_mask"] == 3 else (queries, keys)
        masks["attn_mask"] = torch.rand(shape, generator=generator) < 0.3
        masks["attn_mask"][..., 0] = False
    if given.get("floating"):
        masks["attn_mask"] = masks["attn_mask"].double() * -1.5
    if "key_padding_mask" in given:
        masks["key_padding_mask"] = torch.arange(keys) >= 1 + torch.arange(n)[:, None] % keys
        if given.get("floating"):
            masks["key_padding_mask"] = masks["key_padding_mask"].double() * -1e30
    if given.get("causal"):
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        masks |= {"attn_mask": hidden, "is_causal": True}
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    with recorded(monkeypatch) as scores, torch.no_grad():
        model(q, k, v, need_weights=True, **masks)
    expected = truth(scores[0].unflatten(0, (n, 2)), 2)
    seen = Read(model).step(q, k, v, need_weights=need_weights, **masks)
    assert len(seen) == 5
    check(seen, "inner", expected, 1e-10)


# Models of transformers


def language_model(name: str, implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 30,
        "max_position_embeddings": 16, "pad_token_id": 0,
    }  # fmt: skip
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=implementation,
        )  # fmt: skip
    else:
        if name == "Gemma2":
            size |= {"attn_logit_softcapping": 0.01, "query_pre_attn_scalar": 4}
        config = getattr(transformers, f"{name}Config")(**size, attn_implementation=implementation)
    torch.manual_seed(0)
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "implementation", "path"),
    [
        ("GPT2", "eager", "transformer.h.{}.attn"),
        ("GPT2", "sdpa", "transformer.h.{}.attn"),
        ("Llama", "eager", "model.layers.{}.self_attn"),  # rotary, grouped queries
        ("Llama", "sdpa", "model.layers.{}.self_attn"),
        ("Gemma2", "eager", "model.layers.{}.self_attn"),  # soft cap
    ],
)
def test_language_models(
    name: str, implementation: str, path: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model(name, implementation)
    tokens = torch.randint(1, 30, (9, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[:, -1] = 0
        mask[0, -3:] = 0
    given = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    eager = language_model(name, "eager")
    with recorded(monkeypatch) as scores, torch.no_grad():
        eager(**given)
    assert len(scores) == 2
    if name == "Gemma2":
        assert max(float(z.max()) for z in scores) <= 0.01
    seen = Read(model).step(**given)
    assert len(seen) == 10
    for layer in range(2):
        check(seen, path.format(layer), truth(scores[layer], 2), 2e-5)


# When it is read, and what that costs


@pytest.mark.parametrize("stacks", [True, False])
def test_layers_read_together_are_those_read_alone(
    stacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndiag.probes.logits.attention._stacks", lambda device: stacks)
    torch.manual_seed(0)
    layers = [Layer(kind) for kind in ("causal", "bias", "causal", "torch", "causal")]
    model = nn.Sequential(*layers, layers[0])  # the first is called twice
    found = Read(model)
    firsts: list[Tensor] = []
    layers[0].register_forward_hook(lambda m, *_: firsts.append(m.z[:3]))
    for _ in range(2):
        firsts.clear()
        seen = found.step(draw(17, 6, 8))
    expected = [torch.cat(firsts), *(layer.z[:3] for layer in layers[1:])]
    assert [float(seen[f"logit_max_sampled/{i}"]) for i in range(5)] == pytest.approx(
        [float(z.amax()) for z in expected], rel=1e-12
    )
    assert len(seen) == 5


def test_steps_that_are_not_due_intercept_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndiag.schedule.GRACE", 0.0)
    torch.manual_seed(0)
    model = Transformer()
    found = Read(model)
    tokens = batches("transformer", 1)[0][0]
    found.step(tokens)
    assert found.step(tokens)  # the first was paid from the other share
    read = [bool(found.step(tokens)) for _ in range(40)]
    assert all(hook == (0, 0) for hook in hooks(model)[1:])
    assert sum(read) < 20  # a reading takes a good part of such a step


def test_a_short_run_is_read_at_every_step() -> None:
    torch.manual_seed(0)
    model = Transformer()
    found = Read(model)
    tokens = batches("transformer", 1)[0][0]
    for step in range(100):
        seen = found.step(tokens)
        assert "logit_max_sampled/attend.0" in seen
        assert ("entropy/attend.0" in seen) == (step % 11 == 0)


# The phenomenon


class Small(nn.Module):
    """Two layers of causal attention, with or without layer norms of queries and keys."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(32, 32), nn.Embedding(32, 32)
        self.layers = nn.ModuleList(SmallLayer(normed) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class SmallLayer(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norms = nn.ModuleList(
            nn.LayerNorm(8, bias=False) if normed else nn.Identity() for _ in range(2)
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        q, k = self.norms[0](q), self.norms[1](k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def largest_logit(rate: float, normed: bool, seed: int, steps: int = 60) -> float:
    """The largest attention logit of a run on a Markov chain of order one."""
    torch.manual_seed(seed)
    chain = (2 * torch.randn(32, 32)).softmax(-1)
    model = Small(normed)
    found = Read(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    largest = -math.inf
    for step in range(steps):
        tokens = [torch.randint(32, (8,))]
        for _ in range(32):
            tokens.append(torch.multinomial(chain[tokens[-1]], 1)[:, 0])
        data = torch.stack(tokens, 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen = found.collect()
        tops = [float(z) for name, z in seen.items() if "logit_max" in name and z.dim() == 0]
        largest = max(largest, *tops)
    return largest


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_explode_at_a_high_rate_unless_queries_and_keys_are_normed(seed: int) -> None:
    high, normed = (largest_logit(0.3, normed, seed) for normed in (False, True))
    assert high > 300
    assert normed < 10
    assert largest_logit(1e-3, False, seed, steps=30) < 10
