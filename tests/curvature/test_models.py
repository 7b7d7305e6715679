"""What people train with, each against a Hessian made without second derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dyndiag.curvature import hessian
from dyndiag.errors import DyndiagError
from tests.oracles.networks import (
    Attention,
    Problem,
    Recurrent,
    cross_entropy,
    mlp,
    next_token,
    tokens,
)
from tests.oracles.networks import _data as data
from tests.oracles.networks import _drawn as drawn
from tests.oracles.spectra import dense, seeded


class Queries(nn.Module):
    """Attention in which groups of query heads share key heads, with a mask of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(4, 8), nn.Linear(4, 4)
        self.head, self.options = nn.Linear(8, 3), options

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (part.unflatten(-1, (1, 2)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return self.head(mixed.transpose(1, 2).flatten(-2).mean(1))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 2, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Twice(nn.Module):
    """One layer used twice, in-place operations, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        hidden.tanh_()
        hidden = self.layer(hidden).mul_(0.7)
        hidden[:, 0] += 1
        return self.head(F.softplus(hidden))


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=sparse, padding_idx=0)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens).mean(1)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(6, 5), nn.Linear(5, 3), reentrant
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)
        return self.head(hidden)


def of_each_example(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weights = dict(model.named_parameters())

    def one(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, x[None]), y[None])

    return torch.vmap(one)(*batch).mean()


def with_gradient_penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = batch[0].detach().requires_grad_()
    value = F.cross_entropy(model(x), batch[1])
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    return value + slope.square().sum()


def over_several_passes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return sum((F.cross_entropy(model(x * c), y) for c in (0.5, 1.0, 2.0)), torch.zeros(()))


def words() -> tuple[Tensor, Tensor]:
    generator = seeded(3)
    return (
        torch.randint(7, (6, 4), generator=generator),
        torch.randint(3, (6,), generator=generator),
    )


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def made(model: nn.Module, seed: int = 5) -> nn.Module:
    return drawn(model.double(), seed)


def hugging_face(kind: str) -> Problem:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(1, 9, (2, 5), generator=seeded(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    small: dict[str, Any] = {"vocab_size": 9}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=4, n_layer=1, n_head=2, n_positions=6, **small)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=8, **small
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
            max_position_embeddings=6, **small
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        batch["labels"] = torch.tensor([0, 1])

    return Problem(made(model), from_logits, transformers.BatchEncoding(batch))


def from_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """In float64: the models' own loss is computed in float32."""
    logits, labels = model(**batch).logits, batch["labels"]
    if labels.dim() > 1:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels)


def own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


def digits() -> tuple[Tensor, Tensor]:
    return data(8, 6, classes=3)


def sequences(width: int) -> tuple[Tensor, Tensor]:
    return data(4, 5, width, classes=3)


CASES: dict[str, Callable[[], Problem]] = {
    "causal attention, tied weights": lambda: Problem(made(Attention()), next_token, tokens()),
    "grouped queries": lambda: Problem(made(Queries()), cross_entropy, sequences(4)),
    "grouped queries, causal": lambda: Problem(
        made(Queries(is_causal=True)), cross_entropy, sequences(4)
    ),
    "attention with a mask": lambda: Problem(
        made(Queries(attn_mask=torch.eye(5).double())), cross_entropy, sequences(4)
    ),
    "lstm": lambda: Problem(made(Recurrent()), cross_entropy, sequences(2)),
    "gru, two layers both ways": lambda: Problem(made(Gru()), cross_entropy, sequences(2)),
    "batchnorm in train mode": lambda: Problem(made(normalised()).train(), cross_entropy, digits()),
    "batchnorm in eval mode": lambda: Problem(made(normalised()), cross_entropy, digits()),
    "one layer twice, in place, unused weights": lambda: Problem(
        made(Twice()), cross_entropy, digits()
    ),
    "embeddings": lambda: Problem(made(Words(sparse=False)), cross_entropy, words()),
    "sparse embeddings": lambda: Problem(made(Words(sparse=True)), cross_entropy, words()),
    "checkpoints": lambda: Problem(made(Checkpointed(False)).train(), cross_entropy, digits()),
    "reentrant checkpoints": lambda: Problem(
        made(Checkpointed(True)).train(), cross_entropy, digits()
    ),
    "a loss that uses vmap": lambda: Problem(mlp(), of_each_example, digits()),
    "a loss with a gradient penalty": lambda: Problem(mlp(), with_gradient_penalty, digits()),
    "a loss of several passes": lambda: Problem(mlp(), over_several_passes, digits()),
    "hugging face gpt2": lambda: hugging_face("gpt2"),
    "hugging face llama": lambda: hugging_face("llama"),
    "hugging face bert": lambda: hugging_face("bert"),
}
ENGINES = ["auto", "forward_over_reverse", "finite_differences"]
TOLERANCES = {"hugging face llama": 2e-3}
"""Its normalisation is in float32, so differences are no better."""
NO_FORWARD_DERIVATIVE = {"hugging face llama": "silu_backward"}


def true_product(problem: Problem, v: Tensor, step: float = 1e-4) -> Tensor:
    """From first derivatives by `.backward()` alone; the error of second order cancels."""
    model = copy.deepcopy(problem.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = nn.utils.parameters_to_vector(trained).detach()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # A padding row is held still: the operator is that of all other weights.
            [place] = [i for i, p in enumerate(trained) if p is module.weight]
            start = sum(p.numel() for p in trained[:place])
            v = v.clone()
            v[start : start + module.embedding_dim] = 0

    def gradient_at(flat: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(flat, trained)
        model.zero_grad()
        problem.loss_fn(model, problem.batch).backward()
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained)
        return torch.cat([part.flatten() for part in zeros])

    def along(h: float) -> Tensor:
        return (gradient_at(weights + h * v) - gradient_at(weights - h * v)) / (2 * h)

    return (4 * along(step) - along(2 * step)) / 3


def vector(size: int, seed: int = 9) -> Tensor:
    v = torch.randn(size, generator=seeded(seed), dtype=torch.float64)
    return v / v.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_loss(name, engine):
    problem = CASES[name]()
    if engine == "forward_over_reverse" and name in NO_FORWARD_DERIVATIVE:
        kernel = NO_FORWARD_DERIVATIVE[name]
        with pytest.raises(DyndiagError, match=f"cannot multiply.*{kernel}.*engine='auto'"):
            hessian(problem.model, problem.loss_fn, problem.batch, engine=engine)
        return
    operator = hessian(problem.model, problem.loss_fn, problem.batch, engine=engine)
    assert operator.engine.name == {"auto": "cached"}.get(engine, engine)
    assert operator.engine.check.outcome == "agrees"
    u, v = vector(operator.size), vector(operator.size, 10)
    coarse = TOLERANCES.get(name)
    image, expected = operator.product(v), true_product(problem, v, 2e-2 if coarse else 1e-4)
    assert operator.size == len(expected)
    assert (image - expected).norm() < (coarse or 2e-8) * expected.norm()
    mirrored = operator.product(u) @ v
    exact = 1e-7 if coarse else 1e-14
    rounding = (coarse or 1e-8) if engine == "finite_differences" else exact
    assert abs(u @ image - mirrored) < rounding * expected.norm()
    assert torch.equal(operator.product(v), image)


@pytest.mark.parametrize("engine", [*ENGINES, "linearised"])
@pytest.mark.parametrize("module", [True, False], ids=["a tied module", "the weight itself"])
def test_a_padding_row_that_the_output_layer_uses_too(module, engine):
    """Looked up, the row is a constant, as to the backward pass; as an output it is a weight."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, padding_idx=0)
            self.head = nn.Linear(3, 5, bias=False)
            if module:
                self.head.weight = self.table.weight
            nn.init.normal_(self.table.weight, generator=seeded(3))

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = torch.tanh(self.table(tokens)).cumsum(1)
            return self.head(hidden) if module else hidden @ self.table.weight.T

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    model = Tied().double()
    tokens = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 4, 1]])
    labels = torch.tensor([[2, 0, 1], [0, 3, 3], [4, 1, 2]])
    operator = hessian(model, loss_fn, (tokens, labels), engine=engine, parameters="table.weight")
    weight = model.table.weight.detach()

    def by_hand(flat: Tensor) -> Tensor:
        table = flat.view(5, 3)
        looked_up = torch.cat((weight[:1], table[1:]))[tokens]
        scores = torch.tanh(looked_up).cumsum(1) @ table.T
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten())

    expected = torch.func.hessian(by_hand)(weight.flatten())
    assert operator.engine.name == {"auto": "cached"}.get(engine, engine)
    assert operator.engine.check.outcome == "agrees"
    assert (dense(operator) - expected).norm() < 1e-6 * expected.norm()


def test_weights_that_the_forward_pass_renormalises():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 3))
    batch = (torch.tensor([1, 2, 4]), torch.tensor([0, 1, 2]))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(DyndiagError, match=r"0\.weight is cut to max_norm=1\.0 in each forward"):
        hessian(model, loss_fn, batch)
    operator = hessian(model, loss_fn, batch, parameters="1")
    v = vector(operator.size).float()
    assert operator.product(v).norm() > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_the_loss_of_a_hugging_face_model(kind):
    problem = hugging_face(kind)
    own = hessian(problem.model, own_loss, problem.batch)
    ours = hessian(problem.model, from_logits, problem.batch)
    v = vector(own.size)
    assert own.engine.name == "cached"
    assert own.engine.check.outcome == "agrees"  # though float64 weights end in a float32 loss
    assert (own.product(v) - ours.product(v)).norm() < 1e-5 * ours.product(v).norm()
    if kind == "gpt2":
        assert own.parts["transformer.wte.weight"] == slice(0, 36)
        assert "lm_head.weight" not in own.parts  # tied


def test_a_frozen_half():
    problem = CASES["one layer twice, in place, unused weights"]()
    problem.model.layer.weight.requires_grad_(False)
    for engine in ENGINES:
        operator = hessian(problem.model, problem.loss_fn, problem.batch, engine=engine)
        assert list(operator.parts) == ["unused", "layer.bias", "head.weight", "head.bias"]
        v = vector(operator.size)
        expected = true_product(problem, v)
        assert (operator.product(v) - expected).norm() < 1e-8 * expected.norm()
        assert not operator.product(v)[operator.parts["unused"]].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_of_named_parameters(engine):
    problem = CASES["causal attention, tied weights"]()
    full = hessian(problem.model, problem.loss_fn, problem.batch)
    chosen = hessian(
        problem.model, problem.loss_fn, problem.batch, parameters=["qkv", "norm"], engine=engine
    )
    assert list(chosen.parts) == ["norm.weight", "norm.bias", "qkv.weight", "qkv.bias"]
    rows = [i for name in chosen.parts for i in range(full.size)[full.parts[name]]]
    v = torch.zeros(full.size, dtype=torch.float64)
    v[rows] = vector(chosen.size)
    expected = full.product(v)[rows]
    assert (chosen.product(v[rows]) - expected).norm() < 1e-8 * expected.norm()


class TestDropout:
    def model(self) -> nn.Module:
        return made(
            nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))
        ).train()

    @pytest.mark.parametrize("engine", [*ENGINES, "linearised"])
    def test_every_product_of_every_engine_sees_the_same_mask(self, engine):
        model = self.model()
        operator = hessian(model, cross_entropy, digits(), engine=engine)
        v = vector(operator.size)
        expected = hessian(model, cross_entropy, digits(), engine="cached").product(v)
        for _ in range(3):
            torch.rand(3)
            assert (operator.product(v) - expected).norm() < 1e-8 * expected.norm()
        evaluated = hessian(copy.deepcopy(model).eval(), cross_entropy, digits()).product(v)
        assert (expected - evaluated).norm() > 1e-2 * evaluated.norm()


class TestPrecision:
    """Products are in float32 whatever the weights and the user's autocast are in."""

    def single(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        x, y = digits()
        return made(normalised()).bfloat16().float(), (x.bfloat16().float(), y)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_weights_of_16_bits(self, dtype, engine):
        model, batch = self.single()
        expected = hessian(model.to(dtype).float(), cross_entropy, batch, engine=engine)
        half = copy.deepcopy(model).to(dtype)
        found = hessian(half, cross_entropy, (batch[0].to(dtype), batch[1]), engine=engine)
        v = vector(found.size).float()
        assert found.dtype is torch.float32
        assert torch.equal(found.product(v), expected.product(v))
        assert "on torch.float32 copies of 16-bit weights" in found.engine.reason
        assert all(t.dtype in (dtype, torch.int64) for t in half.state_dict().values())

    def test_weights_of_16_bits_in_rnns_and_under_checkpoints(self):
        for name in (
            "lstm",
            "checkpoints",
            "reentrant checkpoints",
            "causal attention, tied weights",
        ):
            problem = CASES[name]()
            problem.model.bfloat16()
            found = hessian(problem.model, problem.loss_fn, problem.batch)
            exact = copy.deepcopy(problem.model).double()
            expected = hessian(exact, problem.loss_fn, problem.batch)
            v = vector(found.size)
            image = found.product(v.float()).double()
            # The batch is rounded by nothing but float32.
            assert (image - expected.product(v)).norm() < 1e-5 * expected.product(v).norm()
            assert torch.equal(found.product(v.float()).double(), image)

    def test_batches_that_are_dataclasses(self):
        @dataclass
        class Batch:
            x: Tensor
            y: Tensor

        x, y = digits()
        model, batch = mlp().bfloat16(), Batch(x.bfloat16(), y)
        found = hessian(model, lambda m, b: cross_entropy(m, (b.x, b.y)), batch)
        expected = hessian(model, cross_entropy, (batch.x, batch.y))
        assert found.engine == expected.engine
        assert "on torch.float32 copies" in found.engine.reason
        v = vector(found.size).float()
        assert torch.equal(found.product(v), expected.product(v))
        assert batch.x.dtype is torch.bfloat16

    def test_a_model_that_insists_on_16_bits(self):
        class Insists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = mlp().bfloat16()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.bfloat16()).float()

        model = Insists()
        found = hessian(model, cross_entropy, digits())
        expected = hessian(copy.deepcopy(model.inner).double(), cross_entropy, digits())
        v = vector(found.size)
        assert "in the model's own 16 bits" in found.engine.reason
        assert found.engine.check.outcome == "inconclusive"
        misfit = found.product(v.float()).double() - expected.product(v)
        assert misfit.norm() < 0.05 * expected.product(v).norm()

    @pytest.mark.parametrize("engine", ENGINES)
    def test_autocast_inside_the_loss(self, engine):
        def mixed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                assert model(batch[0]).dtype is torch.float32
                return cross_entropy(model, batch)

        model, batch = self.single()
        enter = torch.autocast.__enter__
        found = hessian(model, mixed, batch, engine=engine)
        expected = hessian(model, cross_entropy, batch, engine=engine)
        v = vector(found.size).float()
        assert torch.equal(found.product(v), expected.product(v))
        assert torch.autocast.__enter__ is enter
        with torch.autocast("cpu", torch.bfloat16):
            assert model(batch[0]).dtype is torch.bfloat16

    @pytest.mark.parametrize("engine", ENGINES)
    def test_mixed_dtypes(self, engine):
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.low, self.high = nn.Linear(6, 4), nn.Linear(4, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.high(torch.tanh(self.low(x.float())).double())

        model = drawn(Mixed(), 3)
        found = hessian(model, cross_entropy, digits(), engine=engine)
        double = copy.deepcopy(model)
        double.low.double()
        double.forward = lambda x: double.high(torch.tanh(double.low(x)))
        expected = hessian(double, cross_entropy, digits())
        v = vector(found.size)
        assert found.dtype is torch.float64
        tolerance = 2e-3 if engine == "finite_differences" else 1e-5
        misfit = found.product(v) - expected.product(v)
        assert misfit.norm() < tolerance * expected.product(v).norm()


class TestCompiled:
    @pytest.mark.parametrize("engine", ["auto", "rebuilt"])
    def test_a_compiled_module_runs_eagerly(self, engine):
        model = mlp().float()
        batch = (digits()[0].float(), digits()[1])
        compiled = torch.compile(model, backend="aot_eager")
        cross_entropy(compiled, batch).backward()  # compiled before, as in training
        found = hessian(compiled, cross_entropy, batch, engine=engine)
        expected = hessian(model, cross_entropy, batch, engine=engine)
        v = vector(found.size).float()
        assert torch.equal(found.product(v), expected.product(v))
        assert list(found.parts) == ["0.weight", "0.bias", "2.weight", "2.bias"]


class TestRefused:
    def test_complex_parameters(self):
        model = nn.Linear(6, 3, dtype=torch.complex64)
        with pytest.raises(DyndiagError, match=r"weight is complex.*view_as_real"):
            hessian(model, cross_entropy, digits())

    def test_several_devices(self):
        model = mlp()
        model[2].to("meta")
        with pytest.raises(DyndiagError, match=r"0\.weight is on cpu and 2\.weight on meta"):
            hessian(model, cross_entropy, digits())
        assert hessian(model[:2], cross_entropy, digits(), parameters="0").size == 49


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("name", ["lstm", "gru, two layers both ways", "grouped queries"])
    def test_rnns_and_attention(self, name, engine):
        problem = CASES[name]()
        v = vector(sum(p.numel() for p in problem.model.parameters()))
        expected = true_product(problem, v)
        batch = tuple(part.cuda().float() if part.is_floating_point() else part.cuda()
                      for part in problem.batch)  # fmt: skip
        model = problem.model.float().cuda()
        operator = hessian(model, problem.loss_fn, batch, engine=engine)
        image = operator.product(v.float().cuda()).cpu().double()
        assert operator.device.type == "cuda"
        tolerance = 1e-2 if engine == "finite_differences" else 1e-4
        assert (image - expected).norm() < tolerance * expected.norm()
