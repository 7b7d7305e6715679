"""The largest eigenvalue of an operator that changes little from one sample to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.eigenpairs import eigenpairs
from dyndiag.curvature.lanczos import ROUNDING, Floats, norms
from dyndiag.curvature.operator import Operator

_KEPT = 3
"""Ritz vectors that go from sample to sample: what overtakes the top was mostly next to it."""
_FEWEST_NEW, _MOST_NEW = 3, 10
"""Products beyond those of the kept vectors. A cold start with certificate takes 12 to 24."""
_GAP_BOUND = 1e-3
_OVERLAP = 0.5
_CERTIFIED_EVERY = 10
_RISE = 1.2


@dataclass(frozen=True)
class Followed:
    """One sample of a largest eigenvalue."""

    value: float
    """A Ritz value: never above the largest eigenvalue, but for rounding."""
    vector: Tensor
    """Of norm 1, (size,), on the operator's device, in its dtype."""
    error_bound: float
    """Some eigenvalue lies within value ± error_bound: ‖Av − λv‖ and what rounding may hide."""
    products: int
    """Operator products spent, those of a warm start that did not do included."""
    converged: bool
    """Residual within its tolerance, and certified: see `eigenpairs`."""
    provisional: bool
    """Residual within its tolerance, from a warm start: a larger eigenvalue may be missed."""
    upper_bound: float | None
    """No eigenvalue lies above, but for a risk of 1e-3. None if provisional."""


class Follower:
    """Follows the largest eigenvalue through the samples of one operator.

    Most samples are provisional: Rayleigh–Ritz on the last sample's three outermost Ritz vectors,
    then at least three more directions: the top's residual with an equal random part, the second
    pair's residual, the top's again and again. They end where the residual r is at most
    `relative_tolerance` · |value| and, with the gap to the second Ritz value, min(r, r²/gap) at
    most 1e-3 · |value|. That gap is no bound, so the error stated is r.

    Where ten directions do not do, or the new vector has less than half of its length in the span
    of the kept ones, nothing warm helps: the sample starts anew, from half its vector, and is
    certified. So are the first sample, every tenth since the last certified one, one that has
    risen by a fifth above it, and those that the caller asks for. A certified value above the
    provisional ones before it, by more than both errors, says that these may have missed it.

    Cost: at least 6 products and at most 13 if provisional, those of `eigenpairs` on top if a warm
    start did not do; in between 2 · 13 · size numbers, 3 · size kept. Randomness comes from
    `generator` alone.
    """

    def __init__(self, generator: torch.Generator, relative_tolerance: float = 1e-2) -> None:
        self._generator = generator
        self._tolerance = relative_tolerance
        self._kept: Tensor | None = None
        self._since = 0
        self._certified = math.nan

    def largest(self, operator: Operator, *, certify: bool = False) -> Followed:
        """The largest eigenpair now. A size other than the last sample's is a first sample."""
        kept = self._kept
        if kept is None or kept.shape[1] != operator.size:
            return self._anew(operator, None, 0)
        kept = kept.to(device=operator.device, dtype=operator.dtype)
        if certify or self._since + 1 >= _CERTIFIED_EVERY:
            return self._anew(operator, kept[0], 0)
        subspace = _Subspace(operator, kept)
        if not self._refined(subspace, len(kept)):
            start = subspace.ritz_vectors(1)[0] if subspace.finite else kept[0]
            return self._anew(operator, start, subspace.products)
        value = float(subspace.values[-1])
        if value > max(self._certified * _RISE, self._certified / _RISE):
            return self._anew(operator, subspace.ritz_vectors(1)[0], subspace.products)
        self._kept = subspace.ritz_vectors(_KEPT)
        self._since += 1
        return Followed(
            value=value,
            vector=self._kept[0].clone(),
            error_bound=subspace.residual(0)[1] + subspace.rounding,
            products=subspace.products,
            converged=False,
            provisional=True,
            upper_bound=None,
        )

    def _refined(self, subspace: _Subspace, kept: int) -> bool:
        """Extend until the top pair satisfies the rules; False if it does not persist."""
        z = gaussian(subspace.operator, self._generator) / math.sqrt(subspace.operator.size)
        while subspace.finite:
            new = subspace.products - kept
            if new >= _FEWEST_NEW or subspace.complete:
                if self._satisfied(subspace):
                    return subspace.overlap(kept) >= _OVERLAP
                if new >= _MOST_NEW or subspace.complete:
                    return False
            residual, norm = subspace.residual(1 if new == 1 and len(subspace.values) > 1 else 0)
            if new == 0:
                subspace.extend(residual / norm + z if norm > subspace.rounding else z)
                continue
            # Where a residual is as small as asked for, or below rounding, walk on from the random
            # part: what was far from the kept vectors is found that way alone.
            enough = self._tolerance * abs(float(subspace.values[-1])) if new < _FEWEST_NEW else 0.0
            tells = norm > max(enough, subspace.rounding)
            subspace.extend(residual if tells else subspace.last_image)
        return False

    def _satisfied(self, subspace: _Subspace) -> bool:
        values, rounding = subspace.values, subspace.rounding
        norm, size = subspace.residual(0)[1], abs(float(values[-1]))
        gap = float(values[-1] - values[-2]) if len(values) > 1 else math.inf
        likely = min(norm, norm**2 / gap) if gap > 0 else norm
        return norm + rounding <= max(self._tolerance * size, 2 * rounding) and (
            likely + rounding <= max(_GAP_BOUND * size, 2 * rounding)
        )

    def _anew(self, operator: Operator, start: Tensor | None, spent: int) -> Followed:
        listener = _Listener(operator)
        pairs = eigenpairs(
            Operator(listener.product, operator.size, operator.dtype, operator.device),
            start=start,
            relative_tolerance=self._tolerance,
            generator=self._generator,
        )
        value = float(pairs.values[0])
        kept = listener.ritz_vectors(_KEPT)
        if bool(kept.isfinite().all()):
            self._kept, self._since, self._certified = kept, 0, value
        return Followed(
            value=value,
            vector=pairs.vectors[0],
            error_bound=float(pairs.error_bounds[0]),
            products=spent + pairs.products,
            converged=pairs.converged,
            provisional=False,
            upper_bound=pairs.upper_bound,
        )


class _Subspace:
    """Rayleigh–Ritz on a growing orthonormal basis Q, (m, size), with the images W = A Q.

    Two host–device syncs a product.
    """

    def __init__(self, operator: Operator, first: Tensor) -> None:
        """`first`: (n, size), orthonormal up to rounding. Costs n products."""
        capacity = min(len(first) + _MOST_NEW, operator.size)
        self.operator = operator
        self.products = 0
        self.finite = True
        self.values: Floats = np.empty(0)
        """Ritz values (m,), ascending."""
        self.rounding = 0.0
        """What rounding may hide in a Ritz value or residual."""
        self._scale = 0.0
        self._projected: Floats = np.empty((0, 0))
        self._mixing: Floats = np.empty((0, 0))
        self._basis, self._images = (
            torch.empty(capacity, operator.size, dtype=operator.dtype, device=operator.device)
            for _ in range(2)
        )
        for vector in first:
            if self.finite:
                self.extend(vector)

    @property
    def complete(self) -> bool:
        """The basis spans the whole space."""
        return self.products == self.operator.size

    @property
    def last_image(self) -> Tensor:
        return self._images[self.products - 1]

    def extend(self, vector: Tensor) -> None:
        """One product with what is new in `vector`. Sets `finite` False if it held NaN or inf."""
        m = self.products
        basis = self._basis[:m]
        for _ in range(2):
            vector = vector / norms(vector).to(vector.dtype)
            vector = vector - (basis @ vector) @ basis
        torch.div(vector, norms(vector).to(vector.dtype), out=self._basis[m])
        self._images[m] = self.operator.product(self._basis[m])
        self.products += 1
        column = self._basis[: m + 1] @ self._images[m]
        size = norms(self._images[m])
        *entries, length = torch.cat((column.to(size.dtype), size[None])).tolist()
        self.finite = bool(np.isfinite(entries).all() and math.isfinite(length))
        if not self.finite:
            return
        projected = np.zeros((m + 1, m + 1))
        projected[:m, :m] = self._projected
        projected[m, :] = projected[:, m] = entries
        self._projected = projected
        self.values, self._mixing = np.linalg.eigh(projected)
        self._scale = max(self._scale, length, float(np.abs(self.values).max()))
        self.rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * self._scale

    def ritz_vectors(self, count: int) -> Tensor:
        """The outermost of them, the largest value's first, (≤ count, size), orthonormal."""
        mixing = self._mixing[:, ::-1][:, :count].T.copy()
        basis = self._basis[: len(self.values)]
        vectors: Tensor = torch.from_numpy(mixing).to(basis) @ basis
        return vectors / norms(vectors)[:, None].to(vectors.dtype)

    def residual(self, rank: int) -> tuple[Tensor, float]:
        """A v − θ v of the Ritz pair `rank` places from the largest, and its norm."""
        m = len(self.values)
        mixing = torch.from_numpy(self._mixing[:, -1 - rank].copy()).to(self._basis)
        value = float(self.values[-1 - rank])
        residual: Tensor = mixing @ self._images[:m] - value * (mixing @ self._basis[:m])
        return residual, float(norms(residual))

    def overlap(self, first: int) -> float:
        """The part of the top Ritz vector's length that lies in the first `first` directions."""
        return float(np.linalg.norm(self._mixing[:first, -1]))


@dataclass
class _Listener:
    """Reads a Lanczos run's Ritz vectors from the products that it asks for, at no further one.

    `eigenpairs` returns one pair and certifies it; what follows needs its neighbours too.
    """

    operator: Operator
    _basis: list[Tensor] = field(default_factory=list)
    """Views into the run's own block."""
    _diagonal: list[Tensor] = field(default_factory=list)
    _couplings: list[Tensor] = field(default_factory=list)
    _image: Tensor | None = None

    def product(self, v: Tensor) -> Tensor:
        image = self.operator.product(v)
        if self._image is not None:
            self._couplings.append(v.dot(self._image))
        self._basis.append(v)
        self._diagonal.append(v.dot(image))
        self._image = image
        return image

    def ritz_vectors(self, count: int) -> Tensor:
        """The outermost, the largest value's first, (≤ count, size); NaN if a product was."""
        basis = torch.stack(self._basis)
        diagonal, couplings = (
            np.array([float(x) for x in coefficients])
            for coefficients in (self._diagonal, self._couplings)
        )
        if not (np.isfinite(diagonal).all() and np.isfinite(couplings).all()):
            return torch.full_like(basis[:1], math.nan)
        tridiagonal = np.diag(diagonal) + np.diag(couplings, 1) + np.diag(couplings, -1)
        mixing = np.linalg.eigh(tridiagonal)[1][:, ::-1][:, :count].T.copy()
        return torch.from_numpy(mixing).to(basis) @ basis
