"""The operator is the Hessian of the loss that was asked for, and leaves no trace."""

from __future__ import annotations

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature import eigenpairs, hessian, loss_hessian, trace
from dyndiag.errors import DyndiagError
from tests.oracles.networks import (
    PROBLEMS,
    cnn,
    cross_entropy,
    dense_hessian,
    mlp,
    squared_error,
)
from tests.oracles.spectra import dense, seeded


def data(n: int = 10, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(n, *(shape or (6,)), generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def vector(size: int) -> Tensor:
    return torch.randn(size, generator=seeded(9), dtype=torch.float64)


class TestExactness:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_against_the_dense_hessian(self, name):
        problem = PROBLEMS[name]()
        matrix = dense(hessian(problem.model, problem.loss_fn, problem.batch))
        expected = dense_hessian(problem)
        assert (matrix - expected).abs().max() < 1e-8 * expected.abs().max()
        assert (matrix - matrix.T).abs().max() < 1e-14 * expected.abs().max()

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_loss_and_gradient_come_with_it(self, name):
        problem = PROBLEMS[name]()
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        loss = problem.loss_fn(problem.model, problem.batch)
        gradient = torch.autograd.grad(loss, list(problem.model.parameters()))
        flat = torch.cat([g.flatten() for g in gradient])
        assert operator.loss == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(operator.gradient, flat, rtol=1e-10, atol=1e-14)

    def test_softmax_regression_in_closed_form(self):
        """H = (1/n) Σ (diag p − p pᵀ) ⊗ x xᵀ, and tr H = mean ‖x‖² (1 − ‖p‖²)."""
        model = nn.Linear(6, 3, bias=False).double()
        x, y = data(20)
        operator = hessian(model, cross_entropy, (x, y))
        p = torch.softmax(model(x), 1).detach()
        outer = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        blocks = torch.einsum("nij,na,nb->iajb", outer, x, x) / len(x)
        torch.testing.assert_close(dense(operator), blocks.reshape(18, 18))
        exact = (x.square().sum(1) * (1 - p.square().sum(1))).mean()
        found = trace(operator, relative_error=1e-9, max_products=400)
        assert abs(found.value - exact) < 4 * found.standard_error + 1e-12

    def test_deep_scalar_network_in_closed_form(self):
        """½(∏w − 1)² where ∏w = 1: H = v vᵀ with v = 1/w, so λ₁ = tr H = Σ 1/w²."""
        w = nn.Parameter(torch.tensor([2.0, 0.5, 4.0, 0.25], dtype=torch.float64))
        operator = loss_hessian(lambda: (w.prod() - 1).square() / 2, [w])
        found = eigenpairs(operator)
        expected = float((1 / w.detach() ** 2).sum())
        assert found.values[0] == pytest.approx(expected, rel=1e-12)
        assert found.products == 2  # one for the vector, one to find nothing left

    def test_float32_products_are_float32_exact(self):
        problem = PROBLEMS["mlp, cross-entropy"]()
        expected = dense(hessian(problem.model, problem.loss_fn, problem.batch))
        model, (x, y) = problem.model.float(), problem.batch
        operator = hessian(model, cross_entropy, (x.float(), y))
        assert operator.dtype is torch.float32
        misfit = dense(operator).double() - expected
        assert misfit.norm() < 1e-6 * expected.norm()


class TestParameters:
    def test_frozen_ones_are_left_out(self):
        model = mlp()
        model[0].weight.requires_grad_(False)
        operator = hessian(model, cross_entropy, data())
        assert operator.size == 7 + 21 + 3
        assert not model[0].weight.requires_grad

    def test_unused_ones_have_zero_rows(self):
        used = nn.Parameter(torch.tensor([1.0, 2.0]))
        unused = nn.Parameter(torch.zeros(3))
        matrix = dense(loss_hessian(lambda: used.pow(3).sum(), [unused, used]))
        torch.testing.assert_close(matrix, torch.diag(torch.tensor([0, 0, 0, 6.0, 12.0])))

    def test_a_loss_linear_in_some_or_all_of_them(self):
        a, b = (nn.Parameter(torch.tensor([float(i)])) for i in (2, 3))
        matrix = dense(loss_hessian(lambda: (a * 5 + b**2).sum(), [a, b]))
        torch.testing.assert_close(matrix, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        assert not dense(loss_hessian(lambda: (a * 5 + b).sum(), [a, b])).any()

    def test_sparse_embedding_gradients(self):
        matrices = []
        for sparse in (False, True):
            table = nn.Embedding(4, 2, sparse=sparse)
            with torch.no_grad():
                table.weight.copy_(torch.arange(8.0).view(4, 2) / 8)
            matrices.append(
                dense(
                    loss_hessian(
                        lambda t=table: t(torch.tensor([1, 1, 3])).sin().sum(), [table.weight]
                    )
                )
            )
        torch.testing.assert_close(matrices[0], matrices[1])
        assert matrices[0].any()

    def test_16_bit_weights_have_float32_vectors(self):
        model = mlp()
        half = copy.deepcopy(model).bfloat16()
        x, y = data()
        operator = hessian(half, cross_entropy, (x.bfloat16(), y))
        assert operator.dtype is torch.float32
        exact = hessian(model, cross_entropy, (x, y))
        v = vector(operator.size)
        image = operator.product(v.float()).double()
        assert (image - exact.product(v)).norm() < 0.03 * exact.product(v).norm()


class TestBatches:
    def cut(self, *sizes: int, **options) -> DataLoader:
        x, y = data(sum(sizes), seed=4)
        edges = np.cumsum([0, *sizes])
        indices = [list(range(a, b)) for a, b in pairwise(edges)]
        return DataLoader(TensorDataset(x, y), batch_sampler=indices, **options)

    @pytest.mark.parametrize("sizes", [(10,), (8, 2), (5, 5), (1, 9), (3, 3, 3, 1)], ids=str)
    @pytest.mark.parametrize("loss_fn", [cross_entropy, squared_error])
    def test_any_cut_gives_the_same_operator(self, sizes, loss_fn):
        model = mlp()
        whole = hessian(model, loss_fn, data(10, seed=4))
        parts = hessian(model, loss_fn, self.cut(*sizes))
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-12, atol=1e-14)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)

    def test_losses_that_are_sums_add_up(self):
        def summed(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        model = mlp()
        whole = hessian(model, summed, data(10, seed=4))
        parts = hessian(model, summed, self.cut(7, 3), reduction="sum")
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-13)

    def test_size_says_what_a_batch_weighs(self):
        def of_positive(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)

        model = mlp()
        whole = hessian(model, of_positive, data(10, seed=4))
        parts = hessian(
            model, of_positive, self.cut(7, 3), size=lambda batch: int((batch[1] > 0).sum())
        )
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-14)

    def test_the_first_tensor_is_found_in_dicts(self):
        def of_dict(model, batch):
            return cross_entropy(model, (batch["x"], batch["y"]))

        x, y = data(10, seed=4)
        rows = [{"x": x[i], "y": y[i]} for i in range(10)]
        whole = hessian(mlp(), cross_entropy, (x, y))
        parts = hessian(mlp(), of_dict, DataLoader(rows, batch_size=8))
        v = vector(whole.size)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-14)

    def test_a_list_is_one_batch(self):
        x, y = data()
        v = vector(73 + 7)[: hessian(mlp(), cross_entropy, (x, y)).size]
        torch.testing.assert_close(
            hessian(mlp(), cross_entropy, [x, y]).product(v),
            hessian(mlp(), cross_entropy, (x, y)).product(v),
        )

    def test_a_shuffling_loader_gives_one_operator_and_keeps_its_generator(self):
        x, y = data(10, seed=4)
        generator = seeded(5)
        before = generator.get_state()
        loader = DataLoader(
            TensorDataset(x, y), batch_size=3, shuffle=True, drop_last=True, generator=generator
        )
        operator = hessian(mlp(), cross_entropy, loader)
        v = vector(operator.size)
        assert torch.equal(operator.product(v), operator.product(v))
        assert torch.equal(generator.get_state(), before)


class TestTrainMode:
    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)
        ).double()

    @pytest.mark.parametrize("batch_size", [10, 4], ids=["one batch", "several"])
    def test_every_product_sees_the_same_masks(self, batch_size):
        loader = DataLoader(TensorDataset(*data(10)), batch_size=batch_size)
        model = self.model().train()
        operator = hessian(model, cross_entropy, loader)
        matrix = dense(operator)
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-13)
        torch.rand(7)
        random.random()
        again = dense(hessian(model, cross_entropy, loader))
        assert torch.equal(matrix, again)
        evaluated = dense(hessian(model.eval(), cross_entropy, loader))
        assert (matrix - evaluated).norm() > 1e-3 * evaluated.norm()  # the masks were there

    @pytest.mark.parametrize("batch_size", [10, 4], ids=["one batch", "several"])
    def test_no_trace_is_left(self, batch_size):
        def careless(model, batch):
            random.random()
            np.random.rand()
            return cross_entropy(model, batch)

        model = self.model().train()
        cross_entropy(model, data(10)).backward()
        state = copy.deepcopy(model.state_dict())
        gradients = [p.grad.clone() for p in model.parameters()]
        streams = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        operator = hessian(
            model, careless, DataLoader(TensorDataset(*data(10)), batch_size, shuffle=True)
        )
        operator.product(vector(operator.size))
        assert model.training
        assert all(
            torch.equal(a, b)
            for a, b in zip(state.values(), model.state_dict().values(), strict=True)
        )
        assert all(
            torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)
        )
        assert random.getstate() == streams[0]
        assert (np.random.get_state()[1] == streams[1]).all()
        assert torch.equal(torch.get_rng_state(), streams[2])

    def test_no_trace_is_left_by_layers_that_run_again_in_the_backward_pass(self):
        class Checkpointed(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inner, x, use_reentrant=False)

        plain = self.model().train()
        model = Checkpointed(plain)
        v = vector(sum(p.numel() for p in model.parameters()))
        expected = hessian(plain, cross_entropy, data()).product(v)
        state = copy.deepcopy(model.state_dict())
        operator = hessian(model, cross_entropy, data())
        torch.testing.assert_close(operator.product(v), expected)
        torch.testing.assert_close(operator.product(v), expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(state.values(), model.state_dict().values(), strict=True)
        )


class TestSurroundings:
    def expected(self) -> tuple[nn.Module, Tensor, Tensor]:
        model = mlp().float()
        operator = hessian(model, cross_entropy, self.batch())
        v = vector(operator.size).float()
        return model, v, operator.product(v)

    def batch(self) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x.float(), y

    @pytest.mark.parametrize(
        "surroundings",
        [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)],
        ids=["no_grad", "inference_mode", "autocast"],
    )
    def test_modes_around_the_call_do_not_matter(self, surroundings):
        model, v, expected = self.expected()
        batch = self.batch()
        with surroundings:
            image = hessian(model, cross_entropy, batch).product(v)
            bare = loss_hessian(lambda: cross_entropy(model, batch), list(model.parameters()))
            assert torch.equal(bare.product(v), expected)
        assert torch.equal(image, expected)

    def test_the_users_gradient_hooks_stay_silent(self):
        model, v, expected = self.expected()
        calls: list[str] = []
        model[0].weight.register_hook(lambda g: calls.append("tensor") or g * 0)
        model[2].register_full_backward_hook(lambda *_: calls.append("module"))
        operator = hessian(model, cross_entropy, self.batch())
        assert torch.equal(operator.product(v), expected)
        assert calls == []
        cross_entropy(model, self.batch()).backward()
        assert sorted(calls) == ["module", "tensor"]

    def test_eval_mode_keeps_batchnorm_still(self):
        model = cnn()
        state = copy.deepcopy(model.state_dict())
        operator = hessian(model, cross_entropy, data(8, 2, 5, 5))
        operator.product(vector(operator.size))
        assert all(
            torch.equal(a, b)
            for a, b in zip(state.values(), model.state_dict().values(), strict=True)
        )
        assert not model.training


class TestAtTheDoor:
    @pytest.mark.parametrize(
        ("loss_fn", "sentence"),
        [
            (
                lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
                r"one number, but it has shape \(10,\).*\.mean\(\)",
            ),
            (lambda m, b: cross_entropy(m, b).item(), "but it is a float: return it before"),
            (lambda m, b: cross_entropy(m, b).detach(), "no graph back to the parameters"),
            (lambda m, b: cross_entropy(m, b) * float("nan"), "must be finite.*but it is nan"),
            (lambda m, b: cross_entropy(m, b) / 0, "must be finite.*but it is inf"),
            (lambda m, b: cross_entropy(mlp(), b), "depends on none of the trainable parameters"),
        ],
    )
    def test_a_loss_that_has_no_hessian(self, loss_fn, sentence):
        with pytest.raises(DyndiagError, match=sentence):
            hessian(mlp(), loss_fn, data())

    def test_nothing_to_train(self):
        with pytest.raises(DyndiagError, match="none of the parameters requires a gradient"):
            hessian(mlp().requires_grad_(False), cross_entropy, data())

    def test_an_empty_loader(self):
        loader = DataLoader(TensorDataset(*data(3)), batch_size=4, drop_last=True)
        with pytest.raises(DyndiagError, match="no batch: with drop_last=True"):
            hessian(mlp(), cross_entropy, loader)

    def test_batches_without_a_length(self):
        x, y = data(4)
        loader = DataLoader([0, 1], batch_size=1, collate_fn=lambda i: f"rows {i}")
        with pytest.raises(DyndiagError, match=r"of type str does not show.*pass size="):
            hessian(mlp(), lambda m, b: cross_entropy(m, (x, y)), loader)

    def test_an_unknown_reduction(self):
        with pytest.raises(DyndiagError, match="'mean' or 'sum', not 'max'"):
            hessian(mlp(), cross_entropy, data(), reduction="max")

    @pytest.mark.parametrize("change", ["step", "move"])
    def test_weights_that_moved_on(self, change):
        model = mlp()
        operator = hessian(model, cross_entropy, data())
        if change == "step":
            with torch.no_grad():
                model[0].bias.add_(1)
        else:
            model.float()
        with pytest.raises(DyndiagError, match=r"have changed since.*build it again"):
            operator.product(vector(operator.size))
