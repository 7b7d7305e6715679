"""True and empirical Fisher matrices, against their definitions as sums of outer products."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dyndiag.curvature.fisher import fisher
from dyndiag.curvature.gauss_newton import gauss_newton
from dyndiag.errors import DyndiagError
from tests.oracles.jacobians import jacobian
from tests.oracles.networks import PROBLEMS, cross_entropy, mlp, next_token, squared_error, tokens
from tests.oracles.spectra import dense, seeded

Loss = Callable[[nn.Module, Any], Tensor]


def data(n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def batches(*sizes: int) -> DataLoader:
    edges = np.cumsum([0, *sizes])
    indices = [list(range(a, b)) for a, b in pairwise(edges)]
    return DataLoader(TensorDataset(*data(sum(sizes))), batch_sampler=indices)


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])


def expected_outer(model: nn.Module, rows: Tensor, weights: Tensor) -> Tensor:
    """Σᵢ cᵢ Σ_y p(y|zᵢ) ∇log p(y|zᵢ) ∇log p(y|zᵢ)ᵀ, label by label."""
    total = torch.tensor(0.0).double()
    for row, c in zip(torch.log_softmax(rows, -1), weights, strict=True):
        for log_p in row:
            g = gradient(model, log_p)
            total = total + c * log_p.exp().detach() * torch.outer(g, g)
    return total


def outer_of_examples(model: nn.Module, losses: list[Tensor]) -> Tensor:
    g = torch.stack([gradient(model, loss) for loss in losses])
    return g.T @ g


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def focal(model: nn.Module, batch: Any) -> Tensor:
    p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])
    return -((1 - p).square() * p.log()).mean()


def z_loss(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return F.cross_entropy(z, batch[1]) + z.logsumexp(1).square().mean()


def coupled(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return (z.square().sum(1) + 0.01 * z[:, 0] * z[:, 1]).mean()


def margin(model: nn.Module, batch: Any) -> Tensor:
    return F.multi_margin_loss(model(batch[0]), batch[1])


class TestTrue:
    def test_by_its_definition(self):
        model, (x, y) = mlp(), data()
        matrix = dense(fisher(model, cross_entropy, (x, y)))
        assert close(
            matrix, expected_outer(model, model(x), torch.full((10,), 0.1, dtype=torch.float64))
        )
        assert close(matrix, matrix.T, 1e-14)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-14 * values[-1]

    def test_labels_do_not_matter(self):
        x, y = data()
        matrices = [dense(fisher(mlp(), cross_entropy, (x, labels))) for labels in (y, 0 * y)]
        assert close(*matrices, 1e-14)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_of_sequences_with_padding_each_position_counts_as_in_the_loss(self, reduction):
        model = PROBLEMS["attention"]().model
        batch = tokens()[:3, :4]

        def padded(model: nn.Module, tokens: Tensor) -> Tensor:
            logits = model(tokens[:, :-1])
            return F.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=2, reduction=reduction
            )

        seen = (batch[:, 1:] != 2).flatten()
        assert 0 < seen.sum() < len(seen)
        weights = seen.double() / (seen.sum() if reduction == "mean" else 1)
        matrix = dense(fisher(model, padded, batch, reduction=reduction))
        assert close(matrix, expected_outer(model, model(batch[:, :-1]).flatten(0, 1), weights))

    def test_class_weights_weigh_examples(self):
        model, (x, y) = mlp(), data()
        of_class = torch.tensor([1.0, 3.0, 0.0]).double()
        matrix = dense(fisher(model, lambda m, b: F.cross_entropy(m(b[0]), b[1], of_class), (x, y)))
        weights = of_class[y] / of_class[y].sum()
        assert close(matrix, expected_outer(model, model(x), weights))

    @pytest.mark.parametrize(
        "loss_fn",
        [
            lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1),
            lambda m, b: F.cross_entropy(m(b[0]), F.one_hot(b[1], 3).double().cos().softmax(1)),
            lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
            lambda m, b: -torch.distributions.Categorical(logits=m(b[0])).log_prob(b[1]).mean(),
            lambda m, b: F.cross_entropy(m(b[0]) + 100, b[1]),
        ],
        ids=["smoothed", "soft", "nll_loss", "distribution", "shifted"],
    )
    def test_however_the_likelihood_is_written(self, loss_fn):
        expected = dense(fisher(mlp(), cross_entropy, data()))
        assert close(dense(fisher(mlp(), loss_fn, data())), expected)

    def test_classes_may_be_the_second_dimension(self):
        model = nn.Conv2d(2, 3, 2).double()
        x = torch.randn(4, 2, 3, 3, generator=seeded(1), dtype=torch.float64)
        y = torch.randint(3, (4, 2, 2), generator=seeded(2))
        rows = model(x).movedim(1, -1).flatten(0, 2)
        matrix = dense(fisher(model, cross_entropy, (x, y)))
        assert close(matrix, expected_outer(model, rows, torch.full((16,), 1 / 16)))

    def test_bernoulli(self):
        model, (x, _) = mlp(), data()
        y = torch.rand(10, 3, generator=seeded(3)).round().double()
        weights = torch.rand(10, 3, generator=seeded(4)).double()

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], weights)

        expected = torch.tensor(0.0).double()
        for z, c in zip(model(x).flatten(), weights.flatten(), strict=True):
            for log_p in (F.logsigmoid(z), F.logsigmoid(-z)):
                g = gradient(model, log_p)
                expected = expected + c / 30 * log_p.exp().detach() * torch.outer(g, g)
        operator = fisher(model, loss_fn, (x, y), likelihood="bernoulli")
        assert close(dense(operator), expected)

    @pytest.mark.parametrize(
        ("loss_fn", "variance"),
        [
            (squared_error, 1.5),
            (lambda m, b: (m(b[0]) - 1).square().sum(1).mean() / 2, 1.0),
            (lambda m, b: 3 * F.gaussian_nll_loss(m(b[0]), b[0][:, :3], 0.7), 0.7),
        ],
        ids=["mse_loss", "half the sum", "given variance"],
    )  # fmt: skip
    def test_gaussian(self, loss_fn, variance):
        """E_y[∇log p ∇log pᵀ] = JᵀJ / σ² for y normal around z with variance σ²."""
        model, (x, y) = mlp(), data()
        j = jacobian(model, lambda: model(x))
        matrix = dense(fisher(model, loss_fn, (x, y), likelihood="gaussian"))
        assert close(matrix, j.T @ j / (10 * variance), 1e-11)

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_it_is_the_gauss_newton_matrix(self, name):
        problem = PROBLEMS[name]()
        likelihood = "gaussian" if problem.loss_fn is squared_error else "categorical"
        args = problem.model, problem.loss_fn, problem.batch
        found, other = fisher(*args, likelihood=likelihood), gauss_newton(*args)
        v = torch.randn(found.size, generator=seeded(5), dtype=torch.float64)
        assert torch.equal(found.product(v), other.product(v))
        assert torch.equal(found.gradient, other.gradient)
        assert (found.loss, found.parts) == (other.loss, other.parts)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_likelihood_is_recognised_in_low_precision_and_when_almost_certain(self, dtype):
        x, y = data(64)
        for scale in (1, 30):
            model = mlp()
            with torch.no_grad():
                model[2].weight *= scale
            fisher(model.to(dtype), cross_entropy, (x.to(dtype), y))

    @pytest.mark.parametrize(
        ("loss_fn", "likelihood"),
        [
            (focal, "categorical"),
            (z_loss, "categorical"),
            (lambda m, b: cross_entropy(m, b).exp(), "categorical"),
            (lambda m, b: F.cross_entropy(m(b[0]), b[1], torch.tensor([1.0, 1, -1]).double()),
             "categorical"),
            (squared_error, "categorical"),
            (squared_error, "bernoulli"),
            (cross_entropy, "bernoulli"),
            (cross_entropy, "gaussian"),
            (lambda m, b: F.huber_loss(m(b[0]), torch.full((10, 3), 2.0).double(), delta=2.0),
             "gaussian"),
            (lambda m, b: m(b[0]).cosh().log().mean(), "gaussian"),
            (lambda m, b: m(b[0]).mean(), "gaussian"),
            (coupled, "gaussian"),
        ],
        ids=["focal", "z-loss", "exp", "negative weight", "squared", "squared, bernoulli",
             "softmax, bernoulli", "softmax, gaussian", "huber", "log cosh", "linear",
             "coupled"],
    )  # fmt: skip
    def test_what_is_no_such_likelihood(self, loss_fn, likelihood):
        with pytest.raises(DyndiagError, match=f"no weighted sum of negative.*a {likelihood}"):
            fisher(mlp(), loss_fn, data(), likelihood=likelihood)


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]


class TestEmpirical:
    def test_by_its_definition(self):
        model, (x, y) = mlp(), data()
        matrix = dense(fisher(model, cross_entropy, (x, y), kind="empirical"))
        expected = outer_of_examples(model, per_example(model, x, y)) / 10
        assert close(matrix, expected)
        assert close(matrix, matrix.T, 1e-14)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-14 * values[-1]
        assert int((values > 1e-12 * values[-1]).sum()) <= 10
        assert not close(dense(fisher(model, cross_entropy, (x, y))), expected, 0.1)

    def test_of_one_example_it_is_the_gradients_outer_product(self):
        operator = fisher(mlp(), cross_entropy, data(1), kind="empirical")
        assert close(dense(operator), torch.outer(operator.gradient, operator.gradient))

    def test_of_sums_it_is_the_sum(self):
        def summed(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        model, (x, y) = mlp(), data()
        expected = outer_of_examples(model, per_example(model, x, y))
        v = torch.randn(73, generator=seeded(5), dtype=torch.float64)
        for loader in ((x, y), batches(7, 3)):
            operator = fisher(model, summed, loader, kind="empirical", reduction="sum")
            assert close(operator.product(v), expected @ v)

    def test_an_example_is_a_whole_sequence(self):
        model, batch = PROBLEMS["attention"]().model, tokens()
        matrix = dense(fisher(model, next_token, batch, kind="empirical"))
        losses = [next_token(model, batch[i : i + 1]) for i in range(len(batch))]
        assert close(matrix, outer_of_examples(model, losses) / len(batch))

    def test_sequences_of_unequal_length_weigh_as_in_the_loss(self):
        """ℓᵢ = N/T times the summed loss of a sequence, T labels in all: their mean is the loss."""

        def padded(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
            logits = model(tokens[:, :-1]).flatten(0, 1)
            return F.cross_entropy(
                logits, tokens[:, 1:].flatten(), ignore_index=2, reduction=reduction
            )

        def labels(tokens: Tensor) -> int:
            return int((tokens[:, 1:] != 2).sum())

        model, batch = PROBLEMS["attention"]().model, tokens()
        scale = len(batch) / labels(batch)
        losses = [scale * padded(model, row[None], "sum") for row in batch]
        assert sum(loss.item() for loss in losses) / 4 == pytest.approx(padded(model, batch).item())
        expected = outer_of_examples(model, losses) / len(batch)
        assert close(dense(fisher(model, padded, batch, kind="empirical")), expected)
        cut = fisher(model, padded, batch, kind="empirical", micro_batch=3, size=labels)
        v = torch.randn(cut.size, generator=seeded(5), dtype=torch.float64)
        assert close(cut.product(v), expected @ v)

    def test_outputs_in_several_tensors(self):
        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.a = mlp(), nn.Linear(3, 3).double()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                h = self.body(x)
                return self.a(h.tanh()), h.sin()

        def both(model: nn.Module, batch: Any) -> Tensor:
            a, b = model(batch[0])
            return F.cross_entropy(a, batch[1]) + b.square().mean()

        model, (x, y) = Heads(), data()
        losses = [both(model, (x[i : i + 1], y[i : i + 1])) for i in range(10)]
        matrix = dense(fisher(model, both, (x, y), kind="empirical"))
        assert close(matrix, outer_of_examples(model, losses) / 10)

    def test_a_loss_need_not_be_a_likelihood_nor_curved(self):
        model, (x, y) = mlp(), data()
        matrix = dense(fisher(model, lambda m, b: m(b[0]).abs().mean(), (x, y), kind="empirical"))
        losses = [model(x[i : i + 1]).abs().mean() for i in range(10)]
        assert close(matrix, outer_of_examples(model, losses) / 10)

    def test_nor_have_a_second_derivative(self):
        model, (x, y) = mlp(), data()
        matrix = dense(fisher(model, margin, (x, y), kind="empirical"))
        losses = [margin(model, (x[i : i + 1], y[i : i + 1])) for i in range(10)]
        assert close(matrix, outer_of_examples(model, losses) / 10)
        with pytest.raises(DyndiagError, match="does not have: derivative for aten::multi_margin"):
            fisher(model, margin, (x, y))

    @pytest.mark.parametrize(
        "norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()], ids=str
    )
    def test_batch_statistics_are_refused(self, norm):
        model = nn.Sequential(mlp(), norm.double())
        with pytest.raises(DyndiagError, match=r"1 takes its statistics from the batch.*eval\(\)"):
            fisher(model, cross_entropy, data(), kind="empirical")

    def test_running_statistics_are_not(self):
        model = nn.Sequential(mlp(), nn.BatchNorm1d(3).double()).eval()
        x, y = data()
        expected = outer_of_examples(model, per_example(model, x, y)) / 10
        assert close(dense(fisher(model, cross_entropy, (x, y), kind="empirical")), expected)

    def test_a_loss_that_couples_examples_is_refused(self):
        def contrastive(model: nn.Module, batch: Any) -> Tensor:
            z = F.normalize(model(batch[0]))
            return F.cross_entropy(z @ z.T, torch.arange(len(z)))

        with pytest.raises(DyndiagError, match="couples the examples"):
            fisher(mlp(), contrastive, data(), kind="empirical")

    def test_an_output_whose_first_dimension_is_not_the_examples(self):
        def by_time(model: nn.Module, tokens: Tensor) -> Tensor:
            return F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())

        model = nn.Sequential(PROBLEMS["attention"]().model, nn.Flatten(0, 1))
        with pytest.raises(DyndiagError, match="has 24 rows in all where the data has 4 examples"):
            fisher(model, by_time, tokens(), kind="empirical")


class TestBoth:
    @settings(max_examples=12)
    @given(
        cuts=st.sets(st.integers(1, 9)),
        micro_batch=st.none() | st.integers(1, 12),
        kind=st.sampled_from(["true", "empirical"]),
        reduction=st.sampled_from(["mean", "sum"]),
    )
    def test_any_cut_gives_the_same_operator(self, cuts, micro_batch, kind, reduction):
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

        options: Any = {"kind": kind, "reduction": reduction}
        sizes = [b - a for a, b in pairwise([0, *sorted(cuts), 10])]
        whole = fisher(mlp(), loss, data(), **options)
        parts = fisher(mlp(), loss, batches(*sizes), micro_batch=micro_batch, **options)
        v = torch.randn(73, generator=seeded(9), dtype=torch.float64)
        torch.testing.assert_close(parts.product(v), whole.product(v), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-12, atol=1e-13)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)

    @pytest.mark.parametrize("kind", ["true", "empirical"])
    def test_parameters_progress_and_no_trace(self, kind, capsys):
        model = nn.Sequential(mlp(), nn.Dropout(0.3)).train()
        state, streams = next(model.parameters()).clone(), torch.get_rng_state()
        operator = fisher(
            model, cross_entropy, batches(7, 3), kind=kind, parameters="0.2", progress=True
        )
        assert list(operator.parts) == ["0.2.weight", "0.2.bias"]
        capsys.readouterr()
        operator.product(operator.gradient)
        assert "/2 [" in capsys.readouterr().err
        assert torch.equal(torch.get_rng_state(), streams)
        assert torch.equal(next(model.parameters()), state)
        assert all(p.grad is None for p in model.parameters())
        assert model.training

    def test_what_is_unknown(self):
        with pytest.raises(DyndiagError, match="kind must be 'true' or 'empirical', not 'mc'"):
            fisher(mlp(), cross_entropy, data(), kind="mc")
        with pytest.raises(DyndiagError, match="one of categorical, bernoulli, gaussian, not 'ce'"):
            fisher(mlp(), cross_entropy, data(), likelihood="ce")

    @pytest.mark.parametrize("kind", ["true", "empirical"])
    def test_what_gauss_newton_refuses(self, kind):
        def penalised(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch) + model[0].weight.square().sum()

        with pytest.raises(DyndiagError, match=r"depends on \S+ by another way"):
            fisher(mlp(), penalised, data(), kind=kind)
