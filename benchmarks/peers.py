"""Other people's tools on the problems, each called as its users call it.

Products are counted by wrapping what each tool multiplies with; nothing else of them is touched,
but for `torch.eig`, which PyHessian 0.1 still calls and torch no longer has.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problems import Floats, Problem
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import dyndiag.curvature as curvature

Solver = Callable[[Problem, int, int], "Answer"]
"""(problem, number of eigenvalues, seed) → answer."""


@dataclass(frozen=True)
class Answer:
    values: Floats
    """Descending as the tool orders them."""
    products: int


def available() -> bool:
    try:
        import curvlinops  # noqa: F401
        import pyhessian  # noqa: F401
    except ImportError as error:
        print(f"without PyHessian and curvlinops: {error}", file=sys.stderr)
        return False
    return True


# --- PyHessian -----------------------------------------------------------------------------------


class Oracle:
    """A tolerance for PyHessian that knows the truth.

    PyHessian stops a power iteration when `change < tol`. This stands in for `tol`: it answers yes
    as soon as the value that would be returned, the last but one, is within `error` of an
    eigenvalue not found before. No stop rule can do better.
    """

    def __init__(self, truth: Floats, error: float) -> None:
        self._wanted = list(truth)
        self._error = error
        self.quotients: list[float] = []

    def __gt__(self, change: float) -> bool:
        value = self.quotients[-2]
        nearest = min(self._wanted, key=lambda true: abs(value - true))
        if abs(value - nearest) > self._error * abs(nearest):
            return False
        self._wanted.remove(nearest)
        return True


@contextmanager
def _watched(oracle: Oracle | None) -> Iterator[list[None]]:
    """One entry a product of PyHessian's; what it computes as vᵀHv goes to the oracle."""
    module = importlib.import_module("pyhessian.hessian")
    product, inner = module.hessian_vector_product, module.group_product
    count: list[None] = []

    def counted(*arguments: Any) -> Any:
        count.append(None)
        return product(*arguments)

    def told(xs: Any, ys: Any) -> Tensor:
        value = inner(xs, ys)
        if oracle is not None:
            oracle.quotients.append(value.item())
        return value

    module.hessian_vector_product, module.group_product = counted, told
    try:
        yield count
    finally:
        module.hessian_vector_product, module.group_product = product, inner


def _pyhessian(problem: Problem) -> Any:
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward(create_graph=True) warns of a leak
        return hessian(problem.model, problem.criterion, data=problem.batch, cuda=False)


def pyhessian(problem: Problem, k: int, seed: int) -> Answer:
    """As its readme has it: 100 iterations at most, tolerance 1e-3."""
    torch.manual_seed(seed)
    with _watched(None) as count:
        values, _ = _pyhessian(problem).eigenvalues(top_n=k)
    return _forget(problem, Answer(np.array(values), len(count)))


def pyhessian_to(tolerance: float) -> Solver:
    """With a tolerance, and as many iterations as it takes."""

    def solve(problem: Problem, k: int, seed: int) -> Answer:
        torch.manual_seed(seed)
        with _watched(None) as count:
            values, _ = _pyhessian(problem).eigenvalues(maxIter=2000, tol=tolerance, top_n=k)
        return _forget(problem, Answer(np.array(values), len(count)))

    return solve


def driven_pyhessian(truth: Floats, most: int = 400) -> Solver:
    """PyHessian until each of its values is right to 1e-3, and no iteration longer."""

    def solve(problem: Problem, k: int, seed: int) -> Answer:
        torch.manual_seed(seed)
        oracle = Oracle(truth[:k], 1e-3)
        with _watched(oracle) as count:
            values, _ = _pyhessian(problem).eigenvalues(maxIter=most, tol=oracle, top_n=k)
        return _forget(problem, Answer(np.array(values), len(count)))

    return solve


def pyhessian_density(problem: Problem, products: int, seed: int) -> tuple[Floats, Floats]:
    """Nodes and weights of one run, by `torch.eig` put back."""
    torch.manual_seed(seed)

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eig(matrix)
        return torch.view_as_real(values), vectors.real

    before = torch.eig
    torch.eig = eig
    try:
        nodes, weights = _pyhessian(problem).density(iter=products, n_v=1)
    finally:
        torch.eig = before
    _forget(problem, None)
    return np.array(nodes[0], dtype=np.float64), np.array(weights[0], dtype=np.float64)


def _forget(problem: Problem, answer: Any) -> Any:
    """It leaves gradients with their graphs on the parameters."""
    for p in problem.parameters:
        p.grad = None
    return answer


# --- SciPy, on our products and on curvlinops' ---------------------------------------------------


def eigsh_on_ours(problem: Problem, k: int, seed: int) -> Answer:
    operator = curvature.hessian(problem.model, problem.loss_fn, problem.batch)

    def product(v: Floats) -> Floats:
        image: Floats = operator.product(torch.from_numpy(v.reshape(-1))).numpy()
        return image

    return _eigsh(product, operator.size, k, seed)


def eigsh_on_curvlinops(problem: Problem, k: int, seed: int) -> Answer:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        problem.model, problem.criterion, problem.parameters, [problem.batch], progressbar=False
    ).to_scipy()
    return _eigsh(operator.matvec, problem.size, k, seed)


def _eigsh(product: Callable[[Floats], Floats], size: int, k: int, seed: int) -> Answer:
    count: list[None] = []

    def counted(v: Floats) -> Floats:
        count.append(None)
        return product(v.astype(np.float32))

    operator = LinearOperator((size, size), matvec=counted, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values = eigsh(operator, k, which="LA", tol=1e-3, v0=start, return_eigenvectors=True)[0]
    return Answer(np.sort(values)[::-1].astype(np.float64), len(count))


# --- ours ----------------------------------------------------------------------------------------


def ours(problem: Problem, k: int, seed: int) -> Answer:
    """Residual 1e-3 and certificate (1 %, 1e-3): the defaults."""
    operator = curvature.hessian(problem.model, problem.loss_fn, problem.batch)
    found = curvature.eigenpairs(operator, k, generator=torch.Generator().manual_seed(seed))
    return Answer(found.values.numpy(), found.products)


FAST = 3e-3
"""The residual's tolerance of the fast rule: the error is of its square. 1e-2 is too loose."""


def ours_fast(problem: Problem, k: int, seed: int) -> Answer:
    """The residual alone, from the gradient and an equal random part."""
    operator = curvature.hessian(problem.model, problem.loss_fn, problem.batch)
    found = curvature.eigenpairs(
        operator,
        k,
        start=operator.gradient,
        relative_tolerance=FAST,
        certificate_width=float("inf"),
        generator=torch.Generator().manual_seed(seed),
    )
    return Answer(found.values.numpy(), found.products)


def ours_from_a_part(problem: Problem, k: int, seed: int) -> Answer:
    """The fast rule, from the top vector of an eighth of the batch and an equal random part.

    Products count as what they cost: an eighth's as an eighth.
    """
    each = len(problem.targets) // len(problem.inputs)
    examples = max(1, len(problem.inputs) // 8)
    part = problem.inputs[:examples], problem.targets[: examples * each]
    draw = torch.Generator().manual_seed(seed)
    guess = curvature.eigenpairs(
        curvature.hessian(problem.model, problem.loss_fn, part),
        relative_tolerance=0.05,
        certificate_width=float("inf"),
        generator=draw,
    )
    found = curvature.eigenpairs(
        curvature.hessian(problem.model, problem.loss_fn, problem.batch),
        k,
        start=guess.vectors[0],
        relative_tolerance=FAST,
        certificate_width=float("inf"),
        generator=draw,
    )
    return Answer(found.values.numpy(), found.products + round(guess.products / 8))
