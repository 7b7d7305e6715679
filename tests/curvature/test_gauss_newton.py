"""The operator is Jᵀ (∂²L/∂z²) J of the loss that was asked for, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import eigenpairs, hessian
from dyndiag.curvature.gauss_newton import GaussNewton, gauss_newton
from dyndiag.curvature.operator import shifted
from dyndiag.errors import DyndiagError
from tests.oracles.jacobians import jacobian, output_of, softmax_blocks
from tests.oracles.networks import PROBLEMS, cross_entropy, mlp, squared_error
from tests.oracles.spectra import dense, seeded


def data(n: int = 10, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(n, *(shape or (6,)), generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def vector(size: int) -> Tensor:
    return torch.randn(size, generator=seeded(9), dtype=torch.float64)


@cache
def truth(name: str) -> Tensor:
    """Jᵀ H J with J by differences and H in closed form."""
    problem = PROBLEMS[name]()
    z = output_of(problem)
    rows = z.reshape(-1, z.shape[-1])
    outer = (
        2 / z.numel() * torch.eye(z.numel(), dtype=z.dtype)
        if problem.loss_fn is squared_error
        else softmax_blocks(rows, 1 / len(rows))
    )
    j = jacobian(problem.model, lambda: output_of(problem))
    return j.T @ outer @ j


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


class TestExactness:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_against_dense_truth(self, name):
        problem = PROBLEMS[name]()
        matrix = dense(gauss_newton(problem.model, problem.loss_fn, problem.batch))
        assert close(matrix, truth(name))
        assert close(matrix, matrix.T, 1e-14)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-14 * values[-1]

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_loss_and_gradient_come_with_it(self, name):
        problem = PROBLEMS[name]()
        operator = gauss_newton(problem.model, problem.loss_fn, problem.batch)
        loss = problem.loss_fn(problem.model, problem.batch)
        gradient = torch.autograd.grad(loss, list(problem.model.parameters()))
        flat = torch.cat([g.flatten() for g in gradient])
        assert operator.loss == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(operator.gradient, flat, rtol=1e-10, atol=1e-14)

    def test_it_is_the_hessian_of_a_linear_model(self):
        model = nn.Linear(6, 3).double()
        matrix = dense(gauss_newton(model, cross_entropy, data()))
        assert close(matrix, dense(hessian(model, cross_entropy, data())), 1e-14)

    def test_and_of_an_interpolating_one_but_not_else(self):
        model, (x, _) = mlp(), data()
        target = model(x).detach()

        def loss_to(target: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
            return lambda model, x: F.mse_loss(model(x), target)

        fits, misses = loss_to(target), loss_to(target + 1)
        matrix = dense(gauss_newton(model, fits, x))
        assert close(matrix, dense(hessian(model, fits, x)), 1e-13)
        assert close(dense(gauss_newton(model, misses, x)), matrix, 1e-13)
        assert not close(dense(hessian(model, misses, x)), matrix, 0.1)

    def test_float32_products_are_float32_exact(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        model, (x, y) = problem.model.float(), problem.batch
        operator = gauss_newton(model, cross_entropy, (x.float(), y))
        assert operator.dtype is operator.gradient.dtype is torch.float32
        expected = truth("mlp, cross-entropy")
        assert (dense(operator).double() - expected).norm() < 1e-6 * expected.norm()

    def test_16_bit_weights_are_seen_in_float32(self):
        model, (x, y) = mlp().bfloat16(), data()
        operator = gauss_newton(model, cross_entropy, (x.bfloat16(), y))
        rounded = gauss_newton(
            copy.deepcopy(model).double(), cross_entropy, (x.bfloat16().double(), y)
        )
        assert operator.dtype is torch.float32
        expected = dense(rounded)
        assert (dense(operator).double() - expected).norm() < 1e-5 * expected.norm()
        assert all(p.dtype is torch.bfloat16 for p in model.parameters())

    def test_solvers_take_it(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        found = eigenpairs(gauss_newton(problem.model, problem.loss_fn, problem.batch))
        expected = torch.linalg.eigvalsh(truth("mlp, cross-entropy"))[-1]
        assert found.values[0] == pytest.approx(float(expected), rel=1e-3)


class TestParameters:
    @pytest.mark.parametrize("asked", [["2"], ["0.bias", "2.weight"]], ids=str)
    def test_a_subset_is_a_block_of_the_whole(self, asked):
        problem = PROBLEMS["mlp, cross-entropy"]()
        whole = gauss_newton(problem.model, problem.loss_fn, problem.batch)
        part = gauss_newton(problem.model, problem.loss_fn, problem.batch, parameters=asked)
        assert list(part.parts) == [n for n in whole.parts if n in asked or n[0] in asked]
        index = torch.cat([torch.arange(whole.size)[whole.parts[name]] for name in part.parts])
        torch.testing.assert_close(dense(part), truth("mlp, cross-entropy")[index][:, index])
        assert torch.equal(part.gradient, whole.gradient[index])

    def test_parts_name_where_each_parameter_stands(self):
        problem = PROBLEMS["attention"]()
        operator = gauss_newton(problem.model, problem.loss_fn, problem.batch)
        for name, p in problem.model.named_parameters():
            (g,) = torch.autograd.grad(problem.loss_fn(problem.model, problem.batch), p)
            torch.testing.assert_close(operator.gradient[operator.parts[name]], g.flatten())

    def test_frozen_ones_are_left_out(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        problem.model[0].weight.requires_grad_(False)
        matrix = dense(gauss_newton(problem.model, problem.loss_fn, problem.batch))
        assert close(matrix, truth("mlp, cross-entropy")[42:, 42:])
        assert not problem.model[0].weight.requires_grad

    def test_unused_ones_have_zero_rows(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        model = nn.ModuleDict({"spare": nn.Linear(1, 1).double(), "net": problem.model})
        model.forward = model["net"].forward  # type: ignore[method-assign]
        matrix = dense(gauss_newton(model, problem.loss_fn, problem.batch))
        assert close(matrix[2:, 2:], truth("mlp, cross-entropy"))
        assert not matrix[:2].any()

    @pytest.mark.parametrize("sparse", [False, True])
    def test_embeddings(self, sparse):
        model = nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Tanh(), nn.Linear(3, 3))
        model = model.double()
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1 + i, p.numel()).view_as(p))
        batch = torch.tensor([1, 1, 3]), torch.tensor([0, 1, 2])
        j = jacobian(model, lambda: model(batch[0]))
        expected = j.T @ softmax_blocks(model(batch[0]).detach(), 1 / 3) @ j
        operator = gauss_newton(model, cross_entropy, batch)
        assert close(dense(operator), expected)
        parts, v = gauss_newton(model, cross_entropy, batch, micro_batch=2), vector(len(expected))
        assert close(parts.product(v), expected @ v)


def batches(sizes: tuple[int, ...], seed: int = 4) -> DataLoader:
    edges = np.cumsum([0, *sizes])
    indices = [list(range(a, b)) for a, b in pairwise(edges)]
    return DataLoader(TensorDataset(*data(sum(sizes), seed=seed)), batch_sampler=indices)


class TestCuts:
    @settings(max_examples=20)
    @given(
        cuts=st.sets(st.integers(1, 9)),
        micro_batch=st.none() | st.integers(1, 12),
        loss_fn=st.sampled_from([cross_entropy, squared_error]),
        reduction=st.sampled_from(["mean", "sum"]),
    )
    def test_any_cut_gives_the_same_operator(self, cuts, micro_batch, loss_fn, reduction):
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return loss_fn(model, batch) * (len(batch[0]) if reduction == "sum" else 1)

        model = mlp()
        sizes = tuple(b - a for a, b in pairwise([0, *sorted(cuts), 10]))
        whole = gauss_newton(model, loss, data(10, seed=4))
        parts = gauss_newton(
            model, loss, batches(sizes), micro_batch=micro_batch, reduction=reduction
        )
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-12, atol=1e-13)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)

    def test_size_says_what_a_batch_weighs(self):
        def of_positive(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)

        model, v = mlp(), vector(73)
        expected = gauss_newton(model, of_positive, data(10, seed=4)).product(v)

        def labels(batch: Any) -> int:
            return int((batch[1] > 0).sum())

        for loader, micro_batch in ((batches((7, 3)), None), (batches((7, 3)), 2)):
            parts = gauss_newton(model, of_positive, loader, size=labels, micro_batch=micro_batch)
            torch.testing.assert_close(parts.product(v), expected, rtol=1e-12, atol=1e-14)
        with pytest.raises(DyndiagError, match="size= with the number of labels"):
            gauss_newton(model, of_positive, data(10, seed=4), micro_batch=3)

    def test_one_graph_is_kept_of_one_batch_and_one_made_anew_of_several(self):
        calls: list[int] = []

        def counting(model: nn.Module, batch: Any) -> Tensor:
            calls.append(len(batch[0]))
            return cross_entropy(model, batch)

        for loader, built, each in (
            (data(10), [10], []),
            (batches((7, 3)), [7, 3], [7, 3]),
        ):
            calls.clear()
            operator = gauss_newton(mlp(), counting, loader)
            assert calls == built
            for _ in range(2):
                calls.clear()
                operator.product(vector(73))
                assert calls == each

    def test_progress(self, capsys):
        operator = gauss_newton(mlp(), cross_entropy, batches((7, 3)), progress=True)
        capsys.readouterr()
        operator.product(vector(73))
        assert "/2 [" in capsys.readouterr().err
        gauss_newton(mlp(), cross_entropy, batches((7, 3))).product(vector(73))
        assert capsys.readouterr().err == ""


class Wrapped(nn.Module):
    """Returns its logits in a package of the caller's making."""

    def __init__(self, package: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.package = mlp(), package

    def forward(self, x: Tensor) -> Any:
        return self.package(self.net(x))


@dataclass
class Answer:
    logits: Tensor
    note: str = ""


class TestOutputs:
    @pytest.mark.parametrize(
        ("package", "unpack"),
        [
            (lambda z: {"n": 3, "logits": z, "aux": None}, lambda o: o["logits"]),
            (lambda z: (z, z.detach()), lambda o: o[0]),
            (lambda z: [[z.argmax(1), z]], lambda o: o[0][1]),
            (lambda z: Answer(z), lambda o: o.logits),
            (lambda z: SimpleNamespace(z=z), lambda o: o.z),
            (lambda z: (z, z.tanh(), z.sum()), lambda o: o[0]),
            (lambda z: (z * 2, z), lambda o: o[1]),
        ],
        ids=["dict", "tuple", "nested", "dataclass", "object", "with what follows", "second"],
    )
    def test_whatever_they_come_in(self, package, unpack):
        problem = PROBLEMS["mlp, cross-entropy"]()

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(unpack(model(batch[0])), batch[1])

        assert close(dense(gauss_newton(Wrapped(package), loss_fn, problem.batch)),
                     truth("mlp, cross-entropy"))  # fmt: skip

    def test_several_are_one_long_one(self):
        """Two heads with a loss each: the sum of both matrices."""

        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.a, self.b = (
                    mlp(),
                    nn.Linear(3, 3).double(),
                    nn.Linear(3, 2).double(),
                )

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                h = self.body(x).tanh()
                return {"a": self.a(h), "b": self.b(h)}

        def both(model: nn.Module, batch: Any) -> Tensor:
            z = model(batch[0])
            return F.cross_entropy(z["a"], batch[1]) + z["b"].square().sum(1).mean() / 2

        model, (x, y) = Heads(), data()
        ja = jacobian(model, lambda: model(x)["a"])
        jb = jacobian(model, lambda: model(x)["b"])
        expected = ja.T @ softmax_blocks(model(x)["a"].detach(), 1 / len(x)) @ ja + jb.T @ jb / 10
        assert close(dense(gauss_newton(model, both, (x, y))), expected)
        parts, v = gauss_newton(model, both, (x, y), micro_batch=4), vector(len(expected))
        assert close(parts.product(v), expected @ v)

    def test_those_of_two_calls_too_even_where_the_loss_couples_them(self):
        def distance(model: nn.Module, batch: Any) -> Tensor:
            return (model(batch[0]) - model(batch[0].flip(0))).square().mean()

        model, (x, y) = mlp(), data()
        j = jacobian(model, lambda: model(x) - model(x.flip(0)))
        assert close(dense(gauss_newton(model, distance, (x, y))), 2 / 30 * j.T @ j)

    def test_a_model_that_computes_its_loss_itself(self):
        class WithLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = mlp()

            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                hidden = self.net[1](self.net[0](x))
                logits = self.net[2](hidden)
                return {"loss": F.cross_entropy(logits, y), "hidden": hidden, "logits": logits}

        problem = PROBLEMS["mlp, cross-entropy"]()
        operator = gauss_newton(WithLoss(), lambda m, b: m(*b)["loss"], problem.batch)
        assert close(dense(operator), truth("mlp, cross-entropy"))

    def test_one_number_is_an_output_like_any(self):
        """½(w₁w₂w₃ − 1)²: J = ∏w / w."""

        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64))

            def forward(self) -> Tensor:
                return self.w.prod()

        model = Product()
        j = 4 / model.w.detach()
        operator = gauss_newton(model, lambda m, _: (m() - 1).square() / 2, None)
        torch.testing.assert_close(dense(operator), j[:, None] * j)


class TestHuggingFace:
    def test_a_language_model_with_padding(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        model = model.double().eval()
        tokens = torch.randint(7, (3, 6), generator=seeded(1))
        mask = torch.ones_like(tokens)
        mask[0, 4:] = mask[2, 3:] = 0
        labels = torch.where(mask > 0, tokens, -100)
        batch = transformers.BatchEncoding(
            {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        )
        seen = labels[:, 1:].flatten() >= 0

        def shown() -> Tensor:
            return model(input_ids=tokens, attention_mask=mask).logits[:, :-1].flatten(0, 1)[seen]

        trained = list(model.parameters())
        v = vector(sum(p.numel() for p in trained))
        weights = nn.utils.parameters_to_vector(trained).detach()

        @torch.no_grad()
        def along(h: float) -> Tensor:
            nn.utils.vector_to_parameters(weights + h * v, trained)
            return shown().flatten()

        slopes = [(along(h) - along(-h)) / (2 * h) for h in (1e-4, 5e-5)]
        nn.utils.vector_to_parameters(weights, trained)
        u = softmax_blocks(shown().detach(), 1 / int(seen.sum())) @ (4 * slopes[1] - slopes[0]) / 3
        expected = torch.autograd.grad(shown().flatten(), trained, u)
        expected = torch.cat([part.flatten() for part in expected])
        operator = gauss_newton(model, lambda m, b: m(**b).loss, batch)
        # The model is float64, but computes its loss in float32.
        assert close(operator.product(v), expected, 1e-4)

        def predicted(batch: Any) -> int:
            return int((batch["labels"][:, 1:] >= 0).sum())

        parts = gauss_newton(model, lambda m, b: m(**b).loss, batch, micro_batch=2, size=predicted)
        v = vector(operator.size)
        torch.testing.assert_close(parts.product(v), operator.product(v), rtol=1e-4, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest tensor had that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return out


def test_memory_is_that_of_the_logits_at_a_language_models_vocabulary():
    """50,000 classes: one class × class block would have 2.5e9 entries."""
    vocabulary, width, tokens = 50_000, 8, torch.arange(12).view(2, 6)
    model = nn.Sequential(nn.Embedding(20, width), nn.Tanh(), nn.Linear(width, vocabulary))

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    with LargestTensor() as seen:
        operator = gauss_newton(model, loss_fn, tokens)
        product = operator.product(torch.ones(operator.size))
    # 10 positions × 50,000 logits; a vector has 450,000 + 20 · 8 entries.
    assert seen.entries <= 10 * vocabulary
    assert product.isfinite().all()
    assert product.any()


class TestTrainMode:
    def model(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)
        ).double()

    @pytest.mark.parametrize("batch_size", [10, 4], ids=["one batch", "several"])
    def test_every_product_sees_the_same_masks(self, batch_size):
        loader = DataLoader(TensorDataset(*data(10)), batch_size=batch_size)
        model = self.model().train()
        operator = gauss_newton(model, cross_entropy, loader)
        v, w = torch.randn(2, operator.size, generator=seeded(9), dtype=torch.float64)
        image = operator.product(v)
        torch.testing.assert_close(w @ image, v @ operator.product(w), rtol=1e-12, atol=1e-13)
        torch.rand(7)
        assert torch.equal(image, gauss_newton(model, cross_entropy, loader).product(v))
        evaluated = gauss_newton(model.eval(), cross_entropy, loader).product(v)
        assert (image - evaluated).norm() > 1e-3 * evaluated.norm()  # the masks were there

    @pytest.mark.parametrize("options", [{}, {"micro_batch": 4}], ids=["one batch", "cut"])
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_no_trace_is_left(self, options, checkpointed):
        class Checkpointed(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inner, x, use_reentrant=False)

        def careless(model: nn.Module, batch: Any) -> Tensor:
            random.random()
            np.random.rand()
            return cross_entropy(model, batch)

        model = self.model().train()
        if options:
            model[1].eval()  # in train mode it couples the examples, so that no cut is right
        expected = gauss_newton(model, cross_entropy, data(), **options).product(vector(99))
        if checkpointed:
            model = Checkpointed(model)
        hooks: list[str] = []
        next(model.parameters()).register_hook(lambda g: hooks.append("tensor"))
        cross_entropy(model, data()).backward()
        hooks.clear()
        state = copy.deepcopy(model.state_dict())
        gradients = [p.grad.clone() for p in model.parameters()]
        streams = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        forward_hooks = len(model._forward_hooks)
        operator = gauss_newton(model, careless, data(), **options)
        for _ in range(2):
            torch.testing.assert_close(operator.product(vector(operator.size)), expected)
        assert model.training
        assert len(model._forward_hooks) == forward_hooks
        assert hooks == []
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, g)
        assert random.getstate() == streams[0]
        assert (np.random.get_state()[1] == streams[1]).all()
        assert torch.equal(torch.get_rng_state(), streams[2])

    def test_a_hook_is_taken_off_when_the_loss_fails(self):
        def failing(model: nn.Module, batch: Any) -> Tensor:
            model(batch[0])
            raise KeyError("labels")

        model = mlp()
        with pytest.raises(KeyError):
            gauss_newton(model, failing, data())
        assert not model._forward_hooks


class TestSurroundings:
    @pytest.mark.parametrize(
        "surroundings",
        [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)],
        ids=["no_grad", "inference_mode", "autocast"],
    )
    def test_modes_around_the_call_do_not_matter(self, surroundings):
        problem = PROBLEMS["mlp, cross-entropy"]()
        expected = gauss_newton(problem.model, problem.loss_fn, problem.batch).product(vector(73))
        with surroundings:
            operator = gauss_newton(problem.model, problem.loss_fn, problem.batch)
            assert torch.equal(operator.product(vector(73)), expected)

    def test_compiled_modules(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        compiled = torch.compile(problem.model, backend="eager")
        compiled(problem.batch[0])
        operator = gauss_newton(compiled, problem.loss_fn, problem.batch)
        assert close(dense(operator), truth("mlp, cross-entropy"))
        assert list(operator.parts) == ["0.weight", "0.bias", "2.weight", "2.bias"]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_on_a_gpu(self, name):
        problem = PROBLEMS[name]()
        model = problem.model.cuda()
        batch = problem.batch
        batch = batch.cuda() if isinstance(batch, Tensor) else tuple(t.cuda() for t in batch)
        operator = gauss_newton(model, problem.loss_fn, batch)
        assert operator.gradient.is_cuda
        assert close(dense(operator).cpu(), truth(name), 1e-10)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


class TestAtTheDoor:
    @pytest.mark.parametrize(
        ("loss_fn", "sentence"),
        [
            (penalised, r"depends on \S+ by another way.*penalty out.*shifted"),
            (lambda m, b: F.cross_entropy(m[2](m[1](m[0](b[0]))), b[1]), "did not call the model"),
            (lambda m, b: m(b[0]).mean(), "linear in what the model returns.*logits as well"),
            (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), r"shape \(10,\)"),
            (lambda m, b: cross_entropy(m, b).item(), "but it is a float"),
            (lambda m, b: cross_entropy(m, b) * float("nan"), "must be finite"),
            (lambda m, b: (m(b[0]), cross_entropy(mlp(), b))[1], "none of the trainable"),
            (
                lambda m, b: F.cross_entropy(m(b[0]) @ m[2].weight[:, :3], b[1]),
                "depends on 2.weight by another way",
            ),
        ],
    )
    def test_a_loss_that_is_no_function_of_the_output(self, loss_fn, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            gauss_newton(mlp(), loss_fn, data())

    def test_a_penalty_is_found_even_where_its_gradient_is_zero(self):
        model = mlp()
        anchor = [p.detach().clone() for p in model.parameters()]

        def anchored(model: nn.Module, batch: Any) -> Tensor:
            pairs = zip(model.parameters(), anchor, strict=True)
            return cross_entropy(model, batch) + sum((p - a).square().sum() for p, a in pairs)

        with pytest.raises(DyndiagError, match="by another way than the model's output"):
            gauss_newton(model, anchored, data())

    def test_but_only_if_it_is_on_the_parameters_asked_for(self):
        def on_the_first(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch) + model[0].weight.square().sum()

        last = gauss_newton(mlp(), on_the_first, data(), parameters="2")
        expected = gauss_newton(mlp(), cross_entropy, data(), parameters="2")
        assert torch.equal(dense(last), dense(expected))

    def test_a_penalty_comes_in_as_a_shift(self):
        model = mlp().requires_grad_(False)
        model[2].requires_grad_(True)  # linear in its last layer: Gauss–Newton is the Hessian
        whole = dense(hessian(model, penalised, data()))
        assert close(dense(shifted(gauss_newton(model, cross_entropy, data()), 0.2)), whole, 1e-13)

    def test_outputs_of_which_one_follows_from_the_other(self):
        model = Wrapped(lambda z: (z, z.tanh()))

        def of_both(model: nn.Module, batch: Any) -> Tensor:
            z, squashed = model(batch[0])
            return F.cross_entropy(z, batch[1]) + squashed.square().mean()

        with pytest.raises(DyndiagError, match="one was computed from the other"):
            gauss_newton(model, of_both, data())

    def test_a_model_that_returns_nothing_but_its_loss(self):
        class OnlyLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = mlp()

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(self.net(x), y)

        with pytest.raises(DyndiagError, match="let it return the logits as well"):
            gauss_newton(OnlyLoss(), lambda m, b: m(*b), data())

    def test_parameters_that_the_loss_does_not_need(self):
        model = nn.ModuleDict({"spare": nn.Linear(1, 1).double(), "net": mlp()})
        model.forward = model["net"].forward  # type: ignore[method-assign]
        with pytest.raises(DyndiagError, match="depends on none of the parameters asked for"):
            gauss_newton(model, cross_entropy, data(), parameters="spare")

    @pytest.mark.parametrize("wrong", [False, True])
    def test_a_layer_whose_backward_pass_has_no_derivative(self, wrong):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return 2 * x * (g.detach() + g / 2 - g.detach() / 2 if wrong else g)

        class Layer(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Square.apply(x)

        model = nn.Sequential(nn.Linear(6, 7), Layer(), nn.Linear(7, 3)).double()
        if wrong:
            with pytest.raises(DyndiagError, match=r"cannot be differentiated.*autograd.Function"):
                gauss_newton(model, cross_entropy, data())
        else:
            gauss_newton(model, cross_entropy, data())

    @pytest.mark.parametrize("loader", [data(), batches((7, 3))], ids=["one batch", "several"])
    @pytest.mark.parametrize("before", [0, 2])
    def test_weights_that_moved_on(self, loader, before):
        model = mlp()
        operator: GaussNewton = gauss_newton(model, cross_entropy, loader)
        for _ in range(before):
            operator.product(vector(73))
        with torch.no_grad():
            model[0].bias.add_(1)
        with pytest.raises(DyndiagError, match=r"have changed since.*build it again"):
            operator.product(vector(73))


def test_what_the_hessian_has_more_is_the_models_own_curvature():
    """H − G = Σ ∂L/∂z · ∂²z/∂θ²: zero within the last layer, in which the model is linear."""
    problem = PROBLEMS["mlp, cross-entropy"]()
    whole = hessian(problem.model, problem.loss_fn, problem.batch)
    rest = whole - gauss_newton(problem.model, problem.loss_fn, problem.batch)
    matrix, last = dense(rest), rest.parts["2.weight"].start
    assert matrix[last:, last:].abs().max() < 1e-14
    assert matrix[:last, :last].abs().max() > 1e-3
