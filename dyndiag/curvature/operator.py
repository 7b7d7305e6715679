"""The one thing a solver knows: a product with a symmetric matrix; and what operators make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dyndiag.errors import DyndiagError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Operator:
    """A symmetric linear map on flat vectors: all that a solver may know.

    Operators add up, `A + B` and `A - B`, take numbers, `2.0 * A` and `-A`, and multiply vectors,
    `A @ v`. What comes out is an operator again, costs the products of what went in, and keeps the
    names of its parts.
    """

    product: Callable[[Tensor], Tensor]
    """(size,) → (size,), in `dtype`, on `device`."""
    size: int
    dtype: torch.dtype
    device: torch.device
    parts: Mapping[str, slice] = field(default_factory=dict, kw_only=True)
    """Parameter name → where it stands in a vector; empty where there are no parameters."""

    __array_ufunc__ = None  # or NumPy's numbers would try to multiply by themselves

    def __matmul__(self, v: Tensor) -> Tensor:
        _check_vector(self, v, "the vector")
        return self.product(v)

    def __neg__(self) -> Operator:
        return _with_product(self, lambda v: -self.product(v))

    def __add__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        parts = _common_parts(self, other)
        return _with_product(self, lambda v: self.product(v) + other.product(v), parts)

    def __sub__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        parts = _common_parts(self, other)
        return _with_product(self, lambda v: self.product(v) - other.product(v), parts)

    def __mul__(self, number: float) -> Operator:
        if not isinstance(number, Real):
            return NotImplemented
        factor = _finite(number)
        return _with_product(self, lambda v: factor * self.product(v))

    __rmul__ = __mul__

    def to_scipy(self) -> LinearOperator:
        """The operator for SciPy, such as `scipy.sparse.linalg.eigsh(A.to_scipy(), which="LA")`.

        Shape (size, size), NumPy arrays of the operator's precision (float64 or float32) in and
        out; symmetric, so that it is its own adjoint. A product costs one, and a copy to the
        operator's device and back.
        """
        from scipy.sparse.linalg import LinearOperator

        precision = np.float64 if self.dtype is torch.float64 else np.float32

        def matvec(x: Any) -> Any:
            v = torch.tensor(np.asarray(x, dtype=precision).reshape(-1))
            image = self.product(v.to(device=self.device, dtype=self.dtype))
            return image.detach().cpu().numpy().astype(precision, copy=False)

        return LinearOperator((self.size, self.size), matvec, matvec, dtype=np.dtype(precision))


def require_operator(operator: object) -> None:
    if not isinstance(operator, Operator):
        raise DyndiagError(
            f"an operator is needed, such as hessian(model, loss_fn, data), but a "
            f"{type(operator).__name__} came: make one of a matrix by "
            "Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, matrix.device)"
        )


def shifted(operator: Operator, number: float) -> Operator:
    """A + number · I, such as the weight decay that a loss leaves out. One product of A each."""
    shift = _finite(number)
    return _with_product(operator, lambda v: operator.product(v) + shift * v)


def scaled(operator: Operator, root: Tensor, shift: Tensor | None = None) -> Operator:
    """R A R + diag(shift), with R = diag(root). Both have shape (size,); one product of A each.

    Scaling from both sides keeps the operator symmetric, which P⁻¹A is not.
    """
    _check_vector(operator, root, "root")
    if shift is not None:
        _check_vector(operator, shift, "shift")

    def product(v: Tensor) -> Tensor:
        image = root * operator.product(root * v)
        return image if shift is None else image + shift * v

    return _with_product(operator, product)


def deflated(operator: Operator, vectors: Tensor, values: Any = None) -> Operator:
    """The operator without what it does along some directions, the rows of `vectors`, Qᵀ.

    Without `values`, (I − QQᵀ) A (I − QQᵀ): the directions become null vectors, whatever they were.
    That is for looking at the rest alone, at its eigenpairs or its trace.

    With `values`, A − Q diag(values) Qᵀ: what was taken and what is left add up to A, even if the
    pairs are inexact, whose misfit stays behind. That is for sums, a trace or a density of which
    some pairs are counted already.

    Either way the eigenvalue of an exact pair moves to 0, which is no end of an indefinite
    spectrum's rest.

    `vectors`: (k, size), orthonormal to half the digits of the operator's dtype, on its device,
    such as `Eigenpairs.vectors`; `values`: k numbers. Cost: one product of A, and two passes over
    the vectors (four without `values`).
    """
    if vectors.dim() != 2 or len(vectors) == 0:
        raise DyndiagError(
            f"vectors must be rows, of shape (k, {operator.size}), but have shape "
            f"{tuple(vectors.shape)}"
        )
    _check_vector(operator, vectors[0], "each of the vectors")
    one = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    misfit = float((vectors @ vectors.T - one).abs().max())
    if not misfit <= math.sqrt(torch.finfo(operator.dtype).eps):
        raise DyndiagError(
            f"vectors must be orthonormal rows, but their inner products are off by {misfit:.1g}: "
            "take torch.linalg.qr(vectors.T).Q.T"
        )

    def rest(v: Tensor) -> Tensor:
        return v - vectors.T @ (vectors @ v)

    if values is None:
        return _with_product(operator, lambda v: rest(operator.product(rest(v))))
    known = torch.as_tensor(values, dtype=operator.dtype, device=operator.device)
    if known.shape != (len(vectors),):
        raise DyndiagError(
            f"values must be {len(vectors)} numbers, one for each vector, but have shape "
            f"{tuple(known.shape)}"
        )
    return _with_product(
        operator, lambda v: operator.product(v) - vectors.T @ (known * (vectors @ v))
    )


def block_diagonal(
    operator: Operator, blocks: int | Sequence[slice] | Sequence[str] | None = None
) -> Operator:
    """The operator without what couples one block of parameters to another.

    `blocks`: slices of the flat vector; or names of modules or parameters, as they stand in
    `operator.parts`; or a number n, for modules n levels deep (1: the model's children); None for
    one block a module, in which a parameter's name less its last component says where it belongs.
    Each entry of a vector must be in exactly one block.

    Cost: one product of A for each block. (No exact way is cheaper for a map that is known by its
    products alone: one product of all blocks together mixes their images.)
    """
    named = _blocks(operator, blocks)
    _check_each_once(operator, sorted(p.indices(operator.size)[:2] for _, b in named for p in b))

    def product(v: Tensor) -> Tensor:
        image = torch.zeros_like(v)
        for _, block in named:
            inside = torch.zeros_like(v)
            for part in block:
                inside[part] = v[part]
            reply = operator.product(inside)
            for part in block:
                image[part] = reply[part]
        return image

    return _with_product(operator, product)


def _blocks(
    operator: Operator, blocks: int | Sequence[slice] | Sequence[str] | None
) -> list[tuple[str, list[slice]]]:
    """A name and the slices of each block."""
    given = [] if blocks is None or isinstance(blocks, int) else list(blocks)
    if given and all(isinstance(block, slice) for block in given):
        steps = [block.indices(operator.size)[2] for block in given if isinstance(block, slice)]
        if set(steps) != {1}:
            raise DyndiagError("slices that are blocks must have step 1")
        return [(str(block), [block]) for block in given if isinstance(block, slice)]
    if not operator.parts:
        raise DyndiagError(
            "the operator's parts have no names, so its modules are unknown: pass blocks as slices"
        )
    if given:
        found = []
        for name in given:
            own = [s for n, s in operator.parts.items() if n == name or n.startswith(f"{name}.")]
            if not own:
                raise DyndiagError(
                    f"{name!r} is no module or parameter of the operator: operator.parts lists them"
                )
            found.append((str(name), own))
        return found
    if blocks is not None and (not isinstance(blocks, int) or blocks < 1):
        raise DyndiagError(
            f"blocks must be slices, names, or a depth of 1 or more, but is {blocks!r}"
        )
    grouped: dict[str, list[slice]] = {}
    for name, part in operator.parts.items():
        path = name.split(".")[:-1]
        grouped.setdefault(".".join(path[:blocks]), []).append(part)
    return list(grouped.items())


def _check_each_once(operator: Operator, spans: Sequence[tuple[int, int]]) -> None:
    """`spans`: first and last + 1 of each block's slices, in order."""

    def name(entry: int) -> str:
        found = (n for n, s in operator.parts.items() if s.start <= entry < s.stop)
        return next(found, f"entry {entry}")

    ends = [0, *(stop for _, stop in spans)]
    for reached, start in zip(ends, [*(start for start, _ in spans), operator.size], strict=True):
        if start < reached:
            raise DyndiagError(f"blocks must not overlap, but {name(start)} is in two of them")
        if start > reached:
            raise DyndiagError(
                f"{name(reached)} is in no block: name one for it, or build the operator with "
                "parameters= of those that you want"
            )


def _with_product(
    operator: Operator,
    product: Callable[[Tensor], Tensor],
    parts: Mapping[str, slice] | None = None,
) -> Operator:
    """An operator on the same vectors."""
    return Operator(
        product,
        operator.size,
        operator.dtype,
        operator.device,
        parts=operator.parts if parts is None else parts,
    )


def _common_parts(a: Operator, b: Operator) -> Mapping[str, slice]:
    """The names of the parts of two operators that act on the same vectors, or an error."""
    for what in ("size", "dtype", "device"):
        ours, theirs = getattr(a, what), getattr(b, what)
        if ours != theirs:
            raise DyndiagError(
                f"operators add up only on the same vectors, but one has {what} {ours} and the "
                f"other {theirs}"
            )
    if a.parts and b.parts and a.parts != b.parts:
        raise DyndiagError(
            "operators add up only over the same parameters in the same order, but their parts "
            "have other names or places: build both with the same parameters="
        )
    return a.parts or b.parts


def _check_vector(operator: Operator, v: Tensor, name: str) -> None:
    wanted = (operator.size,), operator.dtype, operator.device
    if (tuple(v.shape), v.dtype, v.device) != wanted:
        raise DyndiagError(
            f"{name} must have shape ({operator.size},), {operator.dtype} on {operator.device}, as "
            f"the operator, but has shape {tuple(v.shape)}, {v.dtype} on {v.device}"
        )


def _finite(number: Real | float) -> float:
    if not isinstance(number, Real) or not math.isfinite(number):
        raise DyndiagError(f"an operator takes finite numbers, not {number!r}")
    return float(number)
