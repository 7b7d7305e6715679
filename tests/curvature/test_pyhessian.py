"""PyHessian's numbers are PyHessian's, faults included; its traces are not left behind."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.util
import random
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyndiag import curvature
from dyndiag.curvature import pyhessian
from dyndiag.errors import DyndiagError
from tests.oracles.networks import cross_entropy, mlp
from tests.oracles.spectra import SPECTRA, dense, seeded

Batch = tuple[Tensor, Tensor]
CALLS: dict[str, Callable[..., Any]] = {
    "eigenpairs": pyhessian.eigenpairs,
    "trace": pyhessian.trace,
    "spectral_density": functools.partial(pyhessian.spectral_density, steps=6),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_without_it_the_extra_is_named(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dyndiag\[pyhessian\]"'):
        call(mlp(), cross_entropy, batch())


needs_pyhessian = pytest.mark.skipif(
    importlib.util.find_spec("pyhessian") is None, reason="PyHessian is not installed"
)


def batch(n: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    return torch.randn(n, 6, generator=seeded(0), dtype=torch.float64).to(dtype), torch.arange(
        n
    ) % 3


class Quadratic(nn.Module):
    """½ Σ λᵢ θᵢ²: a loss whose Hessian has these eigenvalues."""

    def __init__(self, *spectrum: float) -> None:
        super().__init__()
        self.spectrum = torch.tensor(spectrum, dtype=torch.float64)
        self.theta = nn.Parameter(torch.ones(len(spectrum), dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.spectrum * self.theta.square()).sum() / 2


def value(model: Quadratic, batch: object) -> Tensor:
    return model()


def bare(model: nn.Module, batch: Batch, seed: int) -> Any:
    """PyHessian as a script calls it."""
    library = importlib.import_module("pyhessian")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True")
        return library.hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)


@pytest.fixture
def streams() -> Any:
    """The global streams as they were, after a test that calls the library itself."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


@needs_pyhessian
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
class TestItsNumbers:
    def test_eigenpairs_bit_for_bit(self, dtype: torch.dtype) -> None:
        model, data = mlp().to(dtype), batch(dtype=dtype)
        values, vectors = bare(copy.deepcopy(model), data, 7).eigenvalues(top_n=3)
        found = pyhessian.eigenpairs(model, cross_entropy, data, 3, generator=seeded(7))
        assert found.values.tolist() == values
        flat = torch.stack([torch.cat([p.flatten() for p in parts]) for parts in vectors])
        assert torch.equal(found.vectors, flat)
        assert found.vectors.dtype is dtype

    def test_trace_bit_for_bit(self, dtype: torch.dtype) -> None:
        model, data = mlp().to(dtype), batch(dtype=dtype)
        samples = bare(copy.deepcopy(model), data, 7).trace(maxIter=40, tol=1e-6)
        found = pyhessian.trace(
            model, cross_entropy, data, max_iterations=40, tolerance=1e-6, generator=seeded(7)
        )
        assert found.samples.tolist() == samples
        assert found.value == pytest.approx(np.mean(samples))

    def test_density_bit_for_bit_but_for_eig(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(matrix)
            return torch.stack([values, 0 * values], 1), vectors

        model, data = mlp().to(dtype), batch(dtype=dtype)
        found = pyhessian.spectral_density(
            model, cross_entropy, data, probes=2, steps=9, generator=seeded(7)
        )
        run = bare(copy.deepcopy(model), data, 7)
        with pytest.raises(RuntimeError, match="now removed"):
            run.density(iter=9, n_v=2)
        monkeypatch.setattr(torch, "eig", eig)
        nodes, weights = bare(copy.deepcopy(model), data, 7).density(iter=9, n_v=2)
        np.testing.assert_array_equal(found.nodes.numpy(), np.array(nodes, dtype=np.float64))
        np.testing.assert_array_equal(found.weights.numpy(), np.array(weights, dtype=np.float64))


@needs_pyhessian
class TestResults:
    def test_a_density_in_closed_form(self) -> None:
        """From ±1 on a diagonal matrix each eigenvalue has the same weight."""
        found = pyhessian.spectral_density(Quadratic(-5, 3, 1), value, None, probes=3, steps=3)
        expected = torch.tensor([[-5.0, 1.0, 3.0]] * 3, dtype=torch.float64)
        torch.testing.assert_close(found.nodes, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.weights, torch.full((3, 3), 1 / 3).double(), atol=1e-5, rtol=0
        )
        assert found.products == 9

    def test_where_it_works_it_agrees_with_ours(self) -> None:
        model, data = mlp(), batch()
        ours = curvature.eigenpairs(curvature.hessian(model, cross_entropy, data))
        theirs = pyhessian.eigenpairs(model, cross_entropy, data, tolerance=1e-9)
        assert theirs.values[0].item() == pytest.approx(ours.values[0].item(), rel=1e-3)
        assert torch.dot(theirs.vectors[0], ours.vectors[0]).abs() > 0.99

    @every_call
    def test_none_is_called_converged(self, call: Callable[..., Any]) -> None:
        assert not call(Quadratic(4, 1), value, None).converged

    @pytest.mark.parametrize(
        "options", [{"k": 1}, {"k": 3}, {"k": 2, "max_iterations": 4}], ids=str
    )
    def test_products_are_those_spent(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inner, calls = sys_module().hessian_vector_product, list[int]()

        def counted(*arguments: Any) -> Any:
            calls.append(1)
            return inner(*arguments)

        monkeypatch.setattr(sys_module(), "hessian_vector_product", counted)
        found = pyhessian.eigenpairs(mlp(), cross_entropy, batch(), **options)
        assert found.products == len(calls) > options["k"]

    def test_products_over_a_loader(self) -> None:
        loader, forwards = DataLoader(TensorDataset(*batch()), batch_size=5), []

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            forwards.append(len(batch[0]))
            return cross_entropy(model, batch)

        found = pyhessian.trace(mlp(), loss_fn, loader, max_iterations=4, tolerance=1e-9)
        assert forwards == [5, 5, 2] * found.products
        assert found.products == len(found.samples) == 4

    @every_call
    def test_any_cut_of_the_data_gives_the_same(self, call: Callable[..., Any]) -> None:
        whole = call(mlp(), cross_entropy, batch())
        loader = DataLoader(TensorDataset(*batch()), batch_size=5)
        cut = call(mlp(), cross_entropy, loader)
        for name in ("values", "samples", "weights"):
            if hasattr(whole, name):
                torch.testing.assert_close(
                    getattr(cut, name), getattr(whole, name), rtol=0.02, atol=0.02
                )

    def test_batches_and_losses_of_any_kind(self) -> None:
        model, (x, y) = mlp(), batch()
        expected = pyhessian.trace(model, cross_entropy, (x, y))
        found = pyhessian.trace(
            model,
            lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["labels"]),
            {"x": x, "labels": y},
        )
        assert found.value == expected.value

    @every_call
    def test_the_same_answer_at_every_call_and_another_with_each_draw(
        self, call: Callable[..., Any]
    ) -> None:
        def answer(**options: Any) -> list[float]:
            found = call(mlp(), cross_entropy, batch(), **options)
            return next(
                getattr(found, n) for n in ("vectors", "samples", "nodes") if hasattr(found, n)
            ).flatten().tolist()  # fmt: skip

        assert answer() == answer()
        generator = seeded(1)
        first, second = answer(generator=generator), answer(generator=generator)
        assert first != second
        assert first == answer(generator=seeded(1))


def sys_module() -> Any:
    """The module pyhessian.hessian, which the package hides behind its class of that name."""
    importlib.import_module("pyhessian")
    return sys.modules["pyhessian.hessian"]


@needs_pyhessian
class TestItsFaultsBesideOurs:
    def test_the_largest_magnitude_for_the_largest(self) -> None:
        model = Quadratic(-5, 3, 1)
        theirs = pyhessian.eigenpairs(model, value, None)
        ours = curvature.eigenpairs(curvature.hessian(model, value, None))
        assert theirs.values[0].item() == pytest.approx(-5, rel=1e-2)
        assert ours.values[0].item() == pytest.approx(3)
        assert ours.converged

    def test_the_wrong_sign_for_a_network_that_is_sure_and_wrong(self) -> None:
        """Its curvature is most negative: -4.65 is returned where the sharpness is 2.62."""
        model, (x, _) = mlp(), batch()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(10)
        data = (x, model(x).argmin(1))
        theirs = pyhessian.eigenpairs(model, cross_entropy, data)
        operator = curvature.hessian(model, cross_entropy, data)
        ours = curvature.eigenpairs(operator, which="both")
        exact = torch.linalg.eigvalsh(dense(operator))
        assert ours.converged and ours.upper_bound is not None
        assert ours.values[0].item() == pytest.approx(exact[-1].item(), rel=1e-3)
        assert 0 < exact[-1] <= ours.upper_bound < -exact[0]
        assert theirs.values[0].item() == pytest.approx(exact[0].item(), rel=1e-2)

    def test_between_the_ends_of_a_saddle(self) -> None:
        """Where ±3 are the ends, its iterate stays a mixture of both."""
        model = Quadratic(*SPECTRA["saddle"])
        ours = curvature.eigenpairs(curvature.hessian(model, value, None))
        assert ours.converged and ours.values[0].item() == pytest.approx(3, rel=1e-3)
        for seed in range(10):
            theirs = pyhessian.eigenpairs(model, value, None, generator=seeded(seed))
            assert -2.99 < theirs.values[0] < 2.99

    def test_an_end_before_the_top(self) -> None:
        """4.9 below 5.0: its Rayleigh quotient stops moving on the way."""
        model = Quadratic(*SPECTRA["pair 4.9/5.0 over a bulk"])
        operator = curvature.hessian(model, value, None)
        off = []
        for seed in range(20):
            theirs = pyhessian.eigenpairs(model, value, None, generator=seeded(seed))
            ours = curvature.eigenpairs(operator, generator=seeded(seed))
            off.append(abs(theirs.values[0].item() / 5 - 1) > 1e-3)
            assert ours.converged
            assert abs(ours.values[0].item() / 5 - 1) < 1e-3
        assert sum(off) >= 15

    def test_a_negative_trace_ends_after_two_probes(self) -> None:
        spectrum = np.linspace(-3, 1, 40)
        generator = seeded(0)
        mix = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q

        class Mixed(Quadratic):
            def forward(self) -> Tensor:
                return (self.spectrum * (mix @ self.theta).square()).sum() / 2

        model = Mixed(*spectrum)
        errors = []
        for seed in range(20):
            theirs = pyhessian.trace(model, value, None, generator=seeded(seed))
            assert theirs.products == 2
            errors.append(abs(theirs.value / spectrum.sum() - 1))
        assert np.median(errors) > 0.05
        ours = curvature.trace(curvature.hessian(model, value, None), relative_error=0.02)
        assert abs(ours.value - spectrum.sum()) <= 4 * ours.standard_error + 1e-9


class Noisy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.4), nn.Linear(7, 3)
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)  # type: ignore[no-untyped-call]


def in_training() -> Noisy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Noisy()
        cross_entropy(model, batch(dtype=torch.float32)).backward()
    return model


def everything(model: Noisy) -> list[Tensor]:
    return [
        *(t.clone() for t in model.state_dict().values()),
        *(torch.tensor(0.0) if p.grad is None else p.grad.clone() for p in model.parameters()),
        torch.get_rng_state(),
        torch.tensor([model.calls, *(module.training for module in model.modules())]),
    ]


def same(now: list[Tensor], then: list[Tensor]) -> bool:
    return all(map(torch.equal, now, then))


@needs_pyhessian
class TestItsTraces:
    @every_call
    @pytest.mark.parametrize("loader", [False, True], ids=["batch", "loader"])
    def test_none_are_left(self, call: Callable[..., Any], loader: bool) -> None:
        model, data = in_training(), batch(dtype=torch.float32)
        gradients, before = [p.grad for p in model.parameters()], everything(model)
        python, numpy = random.getstate(), np.random.get_state(legacy=True)[1].copy()  # type: ignore[index]
        call(model, cross_entropy, DataLoader(TensorDataset(*data), 5) if loader else data)
        assert same(everything(model), before)
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert random.getstate() == python
        assert np.array_equal(np.random.get_state(legacy=True)[1], numpy)  # type: ignore[index]

    @pytest.mark.usefixtures("streams")
    def test_that_would_be_left_by_itself(self) -> None:
        """What the guard is for; and so these tests can fail."""
        model = in_training()
        before = everything(model)
        bare(model, batch(dtype=torch.float32), 0).eigenvalues()
        assert not any(map(torch.equal, everything(model)[-7:], before[-7:]))

    @every_call
    def test_none_are_left_by_an_error(self, call: Callable[..., Any]) -> None:
        model = in_training()
        before = everything(model)

        def broken(model: nn.Module, batch: Batch) -> Tensor:
            cross_entropy(model, batch)
            raise KeyError("labels")

        with pytest.raises(KeyError):
            call(model, broken, batch(dtype=torch.float32))
        assert same(everything(model), before)

    def test_no_optimizer_steps_in_its_backward_pass(self) -> None:
        model, steps = in_training(), list[Tensor]()
        weight = next(model.parameters())
        handle = weight.register_post_accumulate_grad_hook(steps.append)
        weight.register_hook(steps.append)
        pyhessian.eigenpairs(model, cross_entropy, batch(dtype=torch.float32))
        assert not steps
        cross_entropy(model, batch(dtype=torch.float32)).backward()
        assert len(steps) == 2
        handle.remove()

    @every_call
    def test_no_graph_is_kept_alive(self, call: Callable[..., Any]) -> None:
        kept: list[weakref.ref[Any]] = []

        class Watched(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * 1

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            out = Watched.apply(model(batch[0]))  # type: ignore[no-untyped-call]
            kept.append(weakref.ref(out.grad_fn))
            return nn.functional.cross_entropy(out, batch[1])

        call(mlp(), loss_fn, batch())
        gc.collect()
        assert kept and all(reference() is None for reference in kept)

    def test_nothing_of_torch_is_replaced(self) -> None:
        before, module = vars(torch)["eig"], vars(sys_module()).copy()
        pyhessian.spectral_density(Quadratic(4, 1), value, None, steps=2)
        assert vars(torch)["eig"] is before
        assert all(vars(sys_module())[name] is held for name, held in module.items())


@needs_pyhessian
class TestErrors:
    @every_call
    def test_a_parameter_that_the_loss_does_not_use(self, call: Callable[..., Any]) -> None:
        model = mlp()
        model.unused = nn.Linear(2, 2).double()
        with pytest.raises(DyndiagError, match=r"PyHessian cannot measure .*hessian may"):
            call(model, lambda m, b: cross_entropy(nn.Sequential(*list(m)[:3]), b), batch())

    def test_nothing_to_train(self) -> None:
        with pytest.raises(DyndiagError, match="unfreeze"):
            pyhessian.trace(mlp().requires_grad_(False), cross_entropy, batch())

    def test_frozen_parameters_are_left_out(self) -> None:
        model = mlp()
        next(model.parameters()).requires_grad_(False)
        assert pyhessian.eigenpairs(model, cross_entropy, batch()).vectors.shape == (1, 31)
