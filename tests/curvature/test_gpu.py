"""On a CUDA device: the same numbers, nothing leaves it, no sync beyond one a product."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dyndiag.curvature import Operator, eigenpairs, hessian, spectral_density, trace
from dyndiag.curvature.critical_learning_rate import critical_learning_rate, loss_along
from dyndiag.curvature.directional import batch_sharpness, curvature_along, directional_sharpness
from dyndiag.errors import DyndiagError
from tests.oracles.networks import PROBLEMS, Problem, cross_entropy
from tests.oracles.spectra import seeded

DEVICE = torch.device("cuda", 0)

_SYNC = "called a synchronizing CUDA operation"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_the_gpu(problem: Problem, dtype: torch.dtype = torch.float64) -> Problem:
    """The same weights and data there; the problem itself stays where it is."""
    batch = problem.batch

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE, dtype) if tensor.is_floating_point() else tensor.to(DEVICE)

    moved = there(batch) if isinstance(batch, Tensor) else tuple(map(there, batch))
    return Problem(copy.deepcopy(problem.model).to(DEVICE, dtype), problem.loss_fn, moved)


def vector(operator: Operator) -> Tensor:
    drawn = torch.randn(operator.size, generator=seeded(3), dtype=torch.float64)
    return drawn.to(operator.device, operator.dtype)


@contextmanager
def syncs() -> Iterator[list[str]]:
    """Fills a list with what made the host wait for the device."""
    torch.cuda.synchronize()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(w.message) for w in caught if _SYNC in str(w.message)]


def test_syncs_are_seen() -> None:
    """What the counts below rest on."""
    x = torch.ones(3, device=DEVICE)
    with syncs() as none:
        x.sum().sqrt()
    with syncs() as three:
        for _ in range(3):
            x.sum().item()
    assert (len(none), len(three)) == (0, 3)


@pytest.mark.parametrize("name", PROBLEMS)
class TestTheSameNumbers:
    def test_in_float64(self, name: str) -> None:
        here, there = PROBLEMS[name](), on_the_gpu(PROBLEMS[name]())
        found = eigenpairs(hessian(there.model, there.loss_fn, there.batch), 3)
        expected = eigenpairs(hessian(here.model, here.loss_fn, here.batch), 3)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-8, atol=1e-10)
        assert (found.products, found.outcome) == (expected.products, expected.outcome)
        assert found.vectors.device == DEVICE

    def test_in_float32(self, name: str) -> None:
        """Within the bounds that are stated, and TF32 has no part in it."""
        here, there = PROBLEMS[name](), on_the_gpu(PROBLEMS[name](), torch.float32)
        exact = eigenpairs(hessian(here.model, here.loss_fn, here.batch), relative_tolerance=1e-9)
        operator = hessian(there.model, there.loss_fn, there.batch)
        found = eigenpairs(operator)
        rounding = 1e-5 * exact.values[0].abs()  # of the float32 network, not of the solver
        assert found.converged
        assert abs(found.values[0] - exact.values[0]) <= found.error_bounds[0] + rounding
        assert operator.product(vector(operator)).device == DEVICE
        assert operator.gradient.device == DEVICE

    def test_of_the_cheap_kind(self, name: str) -> None:
        here, there = PROBLEMS[name](), on_the_gpu(PROBLEMS[name]())
        expected = hessian(here.model, here.loss_fn, here.batch)
        found = hessian(there.model, there.loss_fn, there.batch)
        for measure in (batch_sharpness, lambda h: directional_sharpness(h, h.gradient)):
            assert measure(found).device == DEVICE
            assert measure(found).item() == pytest.approx(measure(expected).item(), rel=1e-8)
        line = loss_along(there.model, there.loss_fn, there.batch, found.gradient)
        rate = critical_learning_rate(line)
        slow = loss_along(here.model, here.loss_fn, here.batch, expected.gradient)
        assert rate.value == pytest.approx(critical_learning_rate(slow).value, rel=1e-8)


class TestSyncs:
    def operator(self) -> Operator:
        scales = torch.linspace(-1, 1, 10_000, device=DEVICE).pow(3)
        return Operator(lambda v: scales * v, 10_000, torch.float32, DEVICE)

    def test_one_a_product_in_the_solver(self) -> None:
        operator = self.operator()
        eigenpairs(operator)
        with syncs() as found:
            pairs = eigenpairs(operator, max_products=40, relative_tolerance=1e-6)
        # The start goes to the device, and the coefficients of the vectors; no more is the same
        # whatever the number of products.
        assert len(found) <= pairs.products + 4, found

    def test_one_a_product_in_trace_and_density(self) -> None:
        operator = self.operator()
        estimates: list[tuple[Callable[[Operator], Any], int]] = [(trace, 2), (spectral_density, 1)]
        for estimate, each in estimates:
            estimate(operator)
            with syncs() as found:
                products = estimate(operator).products
            # A probe that is drawn on the CPU goes to the device: a second one.
            assert len(found) <= each * products + 16, found

    def test_none_in_a_product_nor_along_a_direction(self) -> None:
        problem = on_the_gpu(PROBLEMS["mlp, cross-entropy"](), torch.float32)
        operator = hessian(problem.model, problem.loss_fn, problem.batch)
        v = vector(operator)
        measures: list[Callable[[], Tensor]] = [
            lambda: operator.product(v),
            lambda: curvature_along(operator, v),
            lambda: batch_sharpness(operator),
            lambda: directional_sharpness(operator, v),
        ]
        for measure in measures:
            measure()
            with syncs() as found:
                measure()
            assert not found

    def test_one_a_forward_pass_of_the_critical_rate(self) -> None:
        problem = on_the_gpu(PROBLEMS["mlp, cross-entropy"](), torch.float32)
        update = hessian(problem.model, problem.loss_fn, problem.batch).gradient
        line = loss_along(problem.model, problem.loss_fn, problem.batch, update)
        critical_learning_rate(line)
        with syncs() as found:
            forwards = critical_learning_rate(line).forwards
        assert len(found) <= forwards


class TestMemory:
    SIZE = 1 << 22
    VECTOR = 4 * SIZE

    def operator(self) -> Operator:
        scales = torch.linspace(0, 1, self.SIZE, device=DEVICE)
        return Operator(lambda v: scales * v, self.SIZE, torch.float32, DEVICE)

    @pytest.mark.parametrize("basis", [8, 24])
    def test_of_the_eigenpairs_is_what_was_said(self, basis: int) -> None:
        operator = self.operator()
        eigenpairs(operator, max_products=2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pairs = eigenpairs(operator, max_products=60, relative_tolerance=1e-7, max_basis=basis)
        used = torch.cuda.max_memory_allocated() - before
        assert pairs.products > basis + 4  # so that it was full
        assert used <= (basis + 1 + 3 + 1) * self.VECTOR  # one more, for small blocks

    def test_nothing_is_left_allocated(self) -> None:
        operator = self.operator()
        eigenpairs(operator, max_products=2)
        before = torch.cuda.memory_allocated()
        pairs = eigenpairs(operator, max_products=10)
        assert torch.cuda.memory_allocated() - before <= 1.1 * self.VECTOR  # its one vector
        del pairs
        assert torch.cuda.memory_allocated() == before

    def test_what_cannot_fit_is_refused_before_it_is_allocated(self) -> None:
        size = torch.cuda.mem_get_info(DEVICE)[0] // 4  # one vector takes all that is free
        products: list[Tensor] = []

        def product(v: Tensor) -> Tensor:
            products.append(v)
            return v

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with pytest.raises(DyndiagError, match=r"GiB.*free"):
            eigenpairs(Operator(product, size, torch.float32, DEVICE))
        assert torch.cuda.max_memory_allocated() == before
        assert not products


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.qkv, self.head = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.inputs(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(-2).mean(1))


def agrees_with_the_cpu(model: nn.Module, x: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """A product on the GPU in `dtype` and on the CPU in float64, of the same (rounded) weights."""
    model, y = model.to(dtype), torch.arange(len(x)) % 3
    exact = copy.deepcopy(model).double()
    expected = hessian(exact, cross_entropy, (x.to(dtype).double(), y))
    there = hessian(model.to(DEVICE), cross_entropy, (x.to(DEVICE, dtype), y.to(DEVICE)))
    image = there.product(vector(there)).double().cpu()
    truth = expected.product(vector(expected))
    assert (image - truth).norm() <= tolerance * truth.norm(), there.engine


@pytest.fixture
def drawn() -> Iterator[None]:
    """Weights from a seed, and the global stream back where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("drawn")
class TestKernels:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_cudnn_rnn(self, kind: Callable[..., nn.RNNBase], training: bool) -> None:
        """cuDNN has no second derivative, and in eval mode not even a first."""
        x = torch.randn(6, 7, 4, generator=seeded(0))
        agrees_with_the_cpu(Recurrent(kind).train(training), x, torch.float32, 1e-4)

    @pytest.mark.parametrize(
        "backend",
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
    )
    def test_fused_attention_is_what_the_training_uses(self, backend: SDPBackend) -> None:
        """Weights of 16 bits, so that every fused kernel may be chosen; products in float32."""
        x = torch.randn(6, 16, 6, generator=seeded(0))
        with sdpa_kernel([backend, SDPBackend.MATH]):
            agrees_with_the_cpu(Attention(), x, torch.bfloat16, 1e-3)

    def test_default_attention(self) -> None:
        x = torch.randn(6, 16, 6, generator=seeded(0))
        agrees_with_the_cpu(Attention(), x, torch.float32, 1e-4)

    def test_autocast_around_the_loss(self) -> None:
        x = torch.randn(6, 16, 6, generator=seeded(0)).to(DEVICE)
        model, y = Attention().to(DEVICE), torch.arange(6, device=DEVICE) % 3
        exact = hessian(model, cross_entropy, (x, y))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = hessian(model, cross_entropy, (x, y))
        v = vector(exact)
        torch.testing.assert_close(found.product(v), exact.product(v), rtol=1e-4, atol=1e-5)


def test_tf32_has_no_part_in_the_basis() -> None:
    """A training that allows TF32 in matrix products must not lose the basis its orthogonality."""
    spectrum = torch.linspace(0, 1, 4096, device=DEVICE)
    operator = Operator(lambda v: spectrum * v, 4096, torch.float32, DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        vectors = eigenpairs(operator, 4, max_products=60).vectors
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    gram = vectors.double() @ vectors.double().T
    assert (gram - torch.eye(4, device=DEVICE)).abs().max() < 1e-5


class TestTraces:
    def noisy(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        ).to(DEVICE)
        x = torch.randn(12, 6, generator=seeded(0)).to(DEVICE)
        return model.train(), (x, torch.arange(12, device=DEVICE) % 3)

    @pytest.mark.usefixtures("drawn")
    def test_one_dropout_mask_and_no_trace(self) -> None:
        model, batch = self.noisy()
        cross_entropy(model, batch).backward()
        before = [t.clone() for t in model.state_dict().values()]
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        stream = torch.cuda.get_rng_state(DEVICE)
        operator = hessian(model, cross_entropy, batch)
        v = vector(operator)
        assert torch.equal(operator.product(v), operator.product(v))
        line = loss_along(model, cross_entropy, batch, operator.gradient)
        assert line(0.0).item() == pytest.approx(operator.loss, rel=1e-5)
        critical_learning_rate(line)
        assert torch.equal(torch.cuda.get_rng_state(DEVICE), stream)
        assert all(map(torch.equal, model.state_dict().values(), before))
        now = [p.grad for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(now, gradients, strict=True) if a is not None)

    @pytest.mark.usefixtures("drawn")
    @pytest.mark.skipif(
        importlib.util.find_spec("pyhessian") is None, reason="PyHessian is not installed"
    )
    def test_pyhessian(self) -> None:
        from dyndiag.curvature import pyhessian

        calls: list[Callable[..., object]] = [
            pyhessian.eigenpairs,
            pyhessian.trace,
            pyhessian.spectral_density,
        ]
        model, batch = self.noisy()
        stream = torch.cuda.get_rng_state(DEVICE)
        for call in calls:
            call(model, cross_entropy, batch)
        found = pyhessian.eigenpairs(model, cross_entropy, batch, tolerance=1e-7)
        ours = eigenpairs(hessian(model.eval(), cross_entropy, batch), which="magnitude")
        assert found.vectors.device == DEVICE
        assert found.values[0].item() == pytest.approx(ours.values[0].item(), rel=1e-2)
        assert torch.equal(torch.cuda.get_rng_state(DEVICE), stream)
