"""PyHessian's own algorithms, for those who must reproduce a number that was published with them.

    from dyndiag.curvature import eigenpairs, hessian, pyhessian

    theirs = pyhessian.eigenpairs(model, loss_fn, batch)     # unverified
    ours = eigenpairs(hessian(model, loss_fn, batch))        # with error bounds and a certificate

PyHessian 0.1 (Yao, Gholami, Keutzer & Mahoney 2020, arXiv 1912.07145; needs the extra `pyhessian`)
runs here as it is. Its numbers say nothing of their errors, and `converged` is never True of them:

- Power iteration ends when the Rayleigh quotient stops moving. It finds the largest magnitude, so
  that on diag(-5, 3, 1) the top eigenvalue comes out as -5; it may end near another eigenvalue, and
  where the two ends are ±s, between them.
- The trace ends when the running mean moves by less than `tolerance` times it; where the first
  sample is negative, after two probes, whatever they say.
- The density calls `torch.eig`, which torch removed in 1.13; here `torch.linalg.eigh` answers that
  one call, which returns the same for a symmetric matrix. It is float32 whatever the model is.

It measures in eval mode, weighs batches by their sizes, and needs a loss that depends on every
trainable parameter, not linearly. What it does to its surroundings (`.grad` left at None, eval mode
left on, draws from torch's global random streams) is undone here.
"""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import batch_weights, fix_random_streams, read_once
from dyndiag.curvature.draws import fixed_generator
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Unverified:
    products: int
    """Hessian-vector products spent."""

    @property
    def converged(self) -> bool:
        """Never: PyHessian states no error bound and no certificate."""
        return False


@dataclass(frozen=True)
class PyHessianEigenpairs(_Unverified):
    values: Tensor
    """(k,), in the order found: by magnitude, if all went well. Float64, on the CPU."""
    vectors: Tensor
    """One row a value, (k, size), on the parameters' device: PyHessian's iterate after `values`."""


@dataclass(frozen=True)
class PyHessianTrace(_Unverified):
    value: float
    """The mean of the samples, which is what PyHessian's users report."""
    samples: Tensor
    """(products,): zᵀHz of each probe. Float64, on the CPU."""


@dataclass(frozen=True)
class PyHessianDensity(_Unverified):
    nodes: Tensor
    """(probes, steps): the Ritz values of each probe, ascending. Float64, on the CPU."""
    weights: Tensor
    """(probes, steps): the mass on each node."""


def eigenpairs(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    k: int = 1,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    size: Callable[[Any], int] | None = None,
    generator: torch.Generator | None = None,
) -> PyHessianEigenpairs:
    """`eigenvalues(maxIter=max_iterations, tol=tolerance, top_n=k)`: power iteration, deflated.

    `model`, `loss_fn`, `data` and `size` as for `dyndiag.curvature.hessian`. The draws are those of
    `generator`, on the CPU, in place of torch's global stream: with `Generator().manual_seed(s)`,
    one batch and a CPU model, the answer is bit for bit that of a script after
    `torch.manual_seed(s)`. Without one, the same answer at every call. Raises ModuleNotFoundError
    without PyHessian, and DyndiagError where PyHessian cannot measure the loss.

    Cost: at most `max_iterations` products a pair, one gradient for the first of a single batch;
    over a DataLoader each product builds its graphs again.
    """
    with _library(model, loss_fn, data, size, generator) as (run, counted):
        values, vectors = run.eigenvalues(maxIter=max_iterations, tol=tolerance, top_n=k)
        return PyHessianEigenpairs(
            products=counted(),
            values=torch.tensor(values, dtype=torch.float64),
            vectors=torch.stack([torch.cat([p.reshape(-1) for p in parts]) for parts in vectors]),
        )


def trace(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    size: Callable[[Any], int] | None = None,
    generator: torch.Generator | None = None,
) -> PyHessianTrace:
    """`trace(maxIter=max_iterations, tol=tolerance)`: Hutchinson's estimator with ±1 probes.

    Arguments, draws and errors as for `eigenpairs`. Cost: at most `max_iterations` products.
    """
    with _library(model, loss_fn, data, size, generator) as (run, counted):
        samples = torch.tensor(
            run.trace(maxIter=max_iterations, tol=tolerance), dtype=torch.float64
        )
        return PyHessianTrace(products=counted(), value=samples.mean().item(), samples=samples)


def spectral_density(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    *,
    probes: int = 1,
    steps: int = 100,
    size: Callable[[Any], int] | None = None,
    generator: torch.Generator | None = None,
) -> PyHessianDensity:
    """`density(iter=steps, n_v=probes)`: stochastic Lanczos quadrature, with `torch.eig` answered.

    Arguments, draws and errors as for `eigenpairs`. Cost: probes · steps products, also where fewer
    exhaust the space; memory steps · size numbers.
    """
    with _library(model, loss_fn, data, size, generator) as (run, counted):
        original = type(run).density
        names = {**original.__globals__, "torch": _TorchWithEig()}
        density = types.FunctionType(original.__code__, names, "density", original.__defaults__)
        nodes, weights = (
            torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
            for rows in density(run, iter=steps, n_v=probes)
        )
        nodes, order = nodes.sort(dim=1)
        return PyHessianDensity(products=counted(), nodes=nodes, weights=weights.gather(1, order))


class _TorchWithEig:
    """torch, with the `eig` that it had before 1.13, for symmetric matrices."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        """Eigenvalues as (real, imaginary) rows, and eigenvectors in columns."""
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack((values, torch.zeros_like(values)), dim=1), vectors


class _Loss(nn.Module):
    """The loss in the shape that PyHessian takes: a module of one input, and a criterion."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.cleared = 0

    def forward(self, batch: _Batch) -> Tensor:
        return self.loss_fn(self.model, batch.content)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """PyHessian calls it once a product, and twice more for each batch of a loader."""
        self.cleared += 1
        super().zero_grad(set_to_none)


def _criterion(loss: Tensor, batch: object) -> Tensor:
    return loss


@dataclass(frozen=True)
class _Batch:
    """A batch of any type in the shape that PyHessian takes: a tensor of so many examples."""

    content: Any
    weight: float

    def size(self, dim: int) -> float:
        return self.weight

    def to(self, device: object) -> _Batch:
        return self


@contextmanager
def _library(
    model: Model,
    loss_fn: Callable[[Model, Any], Tensor],
    data: Any,
    size: Callable[[Any], int] | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Any, Callable[[], int]]]:
    """PyHessian's object for this loss, and the count of its products; gone without a trace."""
    try:
        library = importlib.import_module("pyhessian")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            'PyHessian as a reference needs one more package: pip install "dyndiag[pyhessian]"'
        ) from missing
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise DyndiagError(
            "none of the parameters requires a gradient, so there is no Hessian: unfreeze the "
            "parameters that you train before measuring"
        )
    if generator is not None and generator.device.type != "cpu":
        raise DyndiagError(
            f"PyHessian draws on the CPU, but the generator lives on {generator.device}: pass a "
            "CPU generator"
        )
    generator = generator or fixed_generator()
    batches = read_once(model, data)
    loss = _Loss(model, loss_fn)
    whole = len(batches) == 1
    # A dataloader's batches weigh by their sizes, of which only the ratios count.
    wrapped = [
        _Batch(batch, weight)
        for batch, weight in zip(batches, batch_weights(batches, "mean", size), strict=True)
    ]
    source = {"data": (wrapped[0], None)} if whole else {"dataloader": [(b, b) for b in wrapped]}

    def counted() -> int:
        return loss.cleared // (1 if whole else 1 + 2 * len(batches))

    with no_trace(model, loss_fn=loss_fn), warnings.catch_warnings():
        # PyHessian's backward pass leaves graphs on .grad, until the guard puts .grad back.
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        model.zero_grad(set_to_none=True)
        with _draws_of(generator, trained[0].device):
            try:
                run = library.hessian(loss, _criterion, cuda=False, **source)
                run.device = trained[0].device
                yield run, counted
            except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
                raise DyndiagError(
                    f"PyHessian cannot measure this loss ({error}); dyndiag.curvature.hessian may: "
                    "it asks less of the model"
                ) from error


@contextmanager
def _draws_of(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """The global stream goes on from where the generator is, and the generator goes with it."""
    fix_random_streams()
    if device.type != "cpu":  # where probes of ±1 are drawn on the device
        seed = int(torch.randint(2**31, (), generator=generator))
        getattr(torch, device.type).manual_seed(seed)
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
