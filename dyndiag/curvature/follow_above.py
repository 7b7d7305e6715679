"""All eigenvalues above a level, of an operator that changes little between samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.certificate import needed
from dyndiag.curvature.complement import Complement, complement_of, usable
from dyndiag.curvature.draws import random_start
from dyndiag.curvature.follow import BUDGET, CERTIFIED_EVERY, RISK, SMALL, WIDTH
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.subspace import Subspace
from dyndiag.errors import DyndiagError

_MOST = 14
"""Products of a provisional sample besides those of the kept vectors, at most."""


@dataclass(frozen=True)
class FollowedAbove:
    """One sample of all eigenvalues above a level."""

    values: Tensor
    """(k,), descending, float64, on the CPU: Ritz values above the level. k may be 0."""
    vectors: Tensor
    """(k, size), orthonormal, on the operator's device, in its dtype."""
    error_bounds: Tensor
    """(k,), like `values`: some eigenvalue lies within values[i] ± error_bounds[i]."""
    products: int
    """Operator products spent."""
    converged: bool
    """All residuals within their tolerance and, but for a risk of 1e-3, no more than k eigenvalues,
    copies counted, lie more than 1 % of |level| above the level."""
    provisional: bool
    """All residuals within their tolerance, from a warm start: more may have been missed."""
    all_of_them: bool
    """False: more than the asked number were found, and the smallest of them are left out."""


class FollowerAbove:
    """Follows all eigenvalues above a level through the samples of one operator.

    Randomness comes from `generator` alone. Keeps one vector more than there are values.
    """

    def __init__(self, generator: torch.Generator, relative_tolerance: float = 1e-2) -> None:
        self._generator = generator
        self._tolerance = relative_tolerance
        self._kept: Tensor | None = None
        self._since = 0

    def above(
        self, operator: Operator, level: float, *, most: int = 16, certify: bool = False
    ) -> FollowedAbove:
        """All eigenpairs above `level`, at most the `most` largest of them.

        Follows those of the last sample, and the one below, so that it sees it rise; adds vectors
        until the smallest falls below the level. First, at every tenth sample and with `certify`
        the number is certified, copies of multiple eigenvalues counted. All, for example, that
        central flows follow: `level` 0.75 of the threshold (Cohen et al. 2025).

        Cost: provisional one product a followed pair and two or more; else a cold start's as well.
        """
        if not (math.isfinite(level) and most >= 1):
            raise DyndiagError(
                "above needs a finite level and room for at least one value, but level is "
                f"{level} and most is {most}"
            )
        kept, subspace = self._kept, Subspace(operator)
        warm = kept is not None and kept.shape[1] == operator.size and operator.size > SMALL
        if warm and kept is not None:
            self._spread(subspace, kept.to(device=operator.device, dtype=operator.dtype), level)
        count = int((subspace.values > level).sum())
        due = certify or not warm or self._since + 1 >= CERTIFIED_EVERY
        if due or not subspace.finite or not self._tell(subspace, level) or count > most:
            return self._certify_above(operator, subspace, level, most)
        self._kept = subspace.vectors(count + 1)
        self._since += 1
        bounds = subspace.residuals(0, count)[1] + subspace.rounding
        return FollowedAbove(
            values=torch.from_numpy(subspace.values[:count].copy()),
            vectors=self._kept[:count].clone(),
            error_bounds=torch.from_numpy(bounds),
            products=len(subspace),
            converged=False,
            provisional=True,
            all_of_them=True,
        )

    def _spread(self, subspace: Subspace, kept: Tensor, level: float) -> None:
        """Multiply every kept vector, a random part, and residuals until all pairs tell enough."""
        for vector in kept:
            if subspace.finite:
                subspace.extend(vector)
        if subspace.finite:
            (residual,), (norm,) = subspace.residuals(0, 1)
            random = random_start(subspace.operator, self._generator)
            subspace.extend(random + residual / norm if norm > subspace.rounding else random)
        while subspace.finite and len(subspace) < len(kept) + _MOST and not subspace.complete:
            unclear = self._unclear(subspace, level)
            if unclear is None:
                return
            subspace.extend(subspace.residuals(unclear, unclear + 1)[0][0])

    def _unclear(self, subspace: Subspace, level: float) -> int | None:
        """The first pair that is above the level, or may be, with too large a residual."""
        values, norms = subspace.values, subspace.residuals(0, len(subspace.values))[1]
        allowed = np.maximum(self._tolerance * np.abs(values), 2 * subspace.rounding)
        reach = values + norms * (norms / np.maximum(np.maximum(norms, level - values), 1e-300))
        unclear = (norms + subspace.rounding > allowed) & ((values > level) | (reach > level))
        return int(unclear.argmax()) if unclear.any() else None

    def _tell(self, subspace: Subspace, level: float) -> bool:
        return self._unclear(subspace, level) is None

    def _certify_above(
        self, operator: Operator, subspace: Subspace, level: float, most: int
    ) -> FollowedAbove:
        """Runs in the complement of what is known, until one of them brings nothing new."""
        need = needed(operator.size, RISK)
        spent = len(subspace)
        x = level + max(WIDTH * abs(level), 2 * subspace.rounding)
        while True:
            warm = len(subspace) > 0 and subspace.finite
            count = int((subspace.values > level).sum()) if warm else 0
            if warm and subspace.complete:
                return self._whole(subspace, count, most, spent)
            known = usable(subspace, count + 1, count, x) if warm else 0
            both = complement_of(operator, subspace, known, random_start(operator, self._generator))
            converged = self._run_above(both, level, x, need, BUDGET + 8 * most - spent)
            spent += both.run.products
            if not len(both.run):
                empty = torch.empty(0, dtype=torch.float64)
                vectors = torch.empty(
                    0, operator.size, dtype=operator.dtype, device=operator.device
                )
                return FollowedAbove(empty, vectors, empty, spent, False, False, False)
            values, residuals, mixing = both.pairs()
            count = int((values > level).sum())
            vectors = both.combined(mixing[:, : min(count, most) + 1])
            if converged or not both.run.finite or spent >= BUDGET + 8 * most or count > most:
                break
            subspace = Subspace(operator)
            for vector in vectors[:count]:
                subspace.extend(vector)
            spent += len(subspace)
        if both.run.finite:
            self._kept, self._since = vectors, 0
        shown = min(count, most)
        return FollowedAbove(
            values=torch.from_numpy(values[:shown].copy()),
            vectors=vectors[:shown].clone(),
            error_bounds=torch.from_numpy(residuals[:shown] + both.rounding),
            products=spent,
            converged=converged and count <= most,
            provisional=False,
            all_of_them=count <= most,
        )

    def _whole(self, subspace: Subspace, count: int, most: int, spent: int) -> FollowedAbove:
        """The basis spans the whole space, so that nothing is left to certify."""
        shown = min(count, most)
        vectors, bounds = subspace.vectors(shown + 1), subspace.residuals(0, shown)[1]
        self._kept, self._since = vectors, 0
        return FollowedAbove(
            values=torch.from_numpy(subspace.values[:shown].copy()),
            vectors=vectors[:shown].clone(),
            error_bounds=torch.from_numpy(bounds + subspace.rounding),
            products=spent,
            converged=count <= most,
            provisional=False,
            all_of_them=count <= most,
        )

    def _run_above(
        self, both: Complement, level: float, x: float, need: float, budget: int
    ) -> bool:
        """Extend until certified (True), or until everything new above the level is clear."""
        while True:
            both.run.extend()
            if not both.run.finite:
                return False
            values, residuals, _ = both.pairs()
            count = int((values > level).sum())
            allowed = np.maximum(self._tolerance * np.abs(values[:count]), 2 * both.rounding)
            clear = bool((residuals[:count] + both.rounding <= allowed).all())
            if clear and both.at_most(count, x, need):
                return True
            news = float(both.run.ritz()[0][-1]) > level
            if both.exhausted or both.run.products >= budget or (clear and news):
                return False
