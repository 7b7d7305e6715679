"""The largest eigenvalues of an operator that changes little from one sample to the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyndiag.curvature.certificate import effective_size, needed
from dyndiag.curvature.complement import Complement, gram, room_below
from dyndiag.curvature.draws import gaussian
from dyndiag.curvature.lanczos import Floats
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.subspace import Subspace
from dyndiag.errors import DyndiagError

_KEPT = 3
"""Ritz vectors that go from sample to sample: what overtakes the top was mostly next to it."""
_CLOSE = 0.85
"""A second value of at least this share of the first may overtake it: it gets its own product."""
_FEWEST_TURNED, _MOST = 8, 14
"""Products of a provisional sample: at least where its vector turns; at most."""
_TURNED, _OVERLAP = 0.9, 0.5
_GAP_BOUND, _TURNED_RESIDUAL = 5e-4, 4e-3
_CERTIFIED_EVERY = 10
_RISE = 1.2
_WIDTH, _RISK = 0.01, 1e-3
_ROOM, _LITTLE_ROOM = 0.05, 0.005
"""What known pairs may take of the certificate's reach, as a share of the value: first, and when
a run in their complement has come upon an eigenvalue that lies within that room."""
_BUDGET = 64
_SMALL = 16
"""Up to this size every sample is certified: exhausting the space costs as little."""


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
    """Residual within its tolerance, and certified: no eigenvalue lies 1 % above."""
    provisional: bool
    """Residual within its tolerance, from a warm start: a larger eigenvalue may be missed."""
    upper_bound: float | None
    """No eigenvalue lies above, but for a risk of 1e-3. None if provisional."""
    missed: bool = False
    """The certificate's run found more, by more than both errors, than this sample's own warm
    start: provisional values back to the last certified one may have missed it too."""


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


class Follower:
    """Follows the largest eigenvalues through the samples of one operator.

    `largest` and `above` keep separate vectors. Most samples are provisional. For the largest one:
    a product with the last sample's top Ritz vector, one with its second where that was at least
    0.85 of the first, and one with the sum of what is left: the other kept vectors, the top's
    residual and a random part, each of norm 1, so that Rayleigh–Ritz sees a neighbour that has
    overtaken, a turn, and a stranger far above for one product together. Residuals follow, at least
    three products in all, until the residual r is at most `relative_tolerance` · |value| and, with
    the gap to the second value (the smaller of now and then), min(r, r²/gap) at most 5e-4 of it.
    That gap is no bound, so the error stated is r. Where the vector has less than 0.9 of its length
    along the last one, or had in the sample before, it takes at least eight products and 4e-3.

    A sample is certified if it is the first, the tenth since the last certified one, risen by a
    fifth above it, the caller's wish, or if its vector has less than half of its length along the
    last one: that is another vector, which only a certificate can place. It then goes on where the
    provisional one ended, in the complement of what is known (`complement`). A warm start that is
    not done after fourteen products starts anew.

    Cost: 3 to 14 products if provisional; a certificate adds the products of a cold start less one
    to three for each known vector; in between 2 · 14 · size numbers and the run's products · size,
    3 · size kept. Randomness comes from `generator` alone.
    """

    def __init__(self, generator: torch.Generator, relative_tolerance: float = 1e-2) -> None:
        self._generator = generator
        self._tolerance = relative_tolerance
        self._kept: Tensor | None = None
        self._second = -math.inf
        """The second Ritz value over the first, at the last sample."""
        self._turned = False
        self._since = 0
        self._certified = math.nan
        self._above: Tensor | None = None
        self._since_above = 0

    def largest(
        self, operator: Operator, *, certify: bool | Callable[[float], bool] = False
    ) -> Followed:
        """The largest eigenpair now. A size other than the last sample's is a first sample.

        `certify`: whether to certify this sample, or a function of the provisional value that says
        so, which costs nothing where it says no.
        """
        kept = self._kept
        if kept is None or kept.shape[1] != operator.size or operator.size <= _SMALL:
            return self._certify(operator, None, None, 0)
        kept = kept.to(device=operator.device, dtype=operator.dtype)
        subspace = Subspace(operator)
        satisfied = self._refined(subspace, kept)
        if not (satisfied and subspace.finite):
            guess = subspace.vectors(1)[0] if subspace.finite else kept[0]
            return self._certify(operator, None, guess, len(subspace))
        vectors, value = subspace.vectors(_KEPT), float(subspace.values[0])
        along = _overlap(kept[0], vectors[0])
        if (
            self._since + 1 >= _CERTIFIED_EVERY
            or value > max(self._certified * _RISE, self._certified / _RISE)
            or along < _OVERLAP
            or (certify(value) if callable(certify) else certify)
        ):
            return self._certify(operator, subspace, None, len(subspace))
        self._keep(vectors, subspace.values)
        self._turned = along < _TURNED
        self._since += 1
        return Followed(
            value=value,
            vector=vectors[0].clone(),
            error_bound=float(subspace.residuals(0, 1)[1][0]) + subspace.rounding,
            products=len(subspace),
            converged=False,
            provisional=True,
            upper_bound=None,
        )

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
        kept, subspace = self._above, Subspace(operator)
        warm = kept is not None and kept.shape[1] == operator.size and operator.size > _SMALL
        if warm and kept is not None:
            self._spread(subspace, kept.to(device=operator.device, dtype=operator.dtype), level)
        count = int((subspace.values > level).sum())
        due = certify or not warm or self._since_above + 1 >= _CERTIFIED_EVERY
        if due or not subspace.finite or not self._tell(subspace, level) or count > most:
            return self._certify_above(operator, subspace, level, most)
        self._above = subspace.vectors(count + 1)
        self._since_above += 1
        bounds = subspace.residuals(0, count)[1] + subspace.rounding
        return FollowedAbove(
            values=torch.from_numpy(subspace.values[:count].copy()),
            vectors=self._above[:count].clone(),
            error_bounds=torch.from_numpy(bounds),
            products=len(subspace),
            converged=False,
            provisional=True,
            all_of_them=True,
        )

    def _refined(self, subspace: Subspace, kept: Tensor) -> bool:
        """Extend until the top pair satisfies the rules; False if that takes too many products."""
        random = self._random(subspace.operator)
        alone = 2 if self._second >= _CLOSE and len(kept) > 1 else 1
        for vector in kept[:alone]:
            subspace.extend(vector)
            if not subspace.finite:
                return False
        (residual,), (norm,) = subspace.residuals(0, 1)
        together = random + kept[alone:].sum(dim=0)
        subspace.extend(together + residual / norm if norm > subspace.rounding else together)
        while subspace.finite:
            (residual,), (norm,) = subspace.residuals(0, 1)
            turned = _overlap(kept[0], subspace.vectors(1)[0]) < _TURNED
            done = self._satisfied(subspace, float(norm), turned)
            if done and len(subspace) >= max(
                alone + 2, _FEWEST_TURNED if turned or self._turned else 0
            ):
                return True
            if len(subspace) >= _MOST:
                return False
            if done:  # left to learn: what is mixed together, and then the second pair
                others, norms = subspace.residuals(1, len(subspace.values))
                rank = int(norms.argmax()) if len(subspace) == alone + 1 else 0
                residual, norm = others[rank], norms[rank]
            subspace.extend(residual if norm > subspace.rounding else subspace.last_image)
        return False

    def _satisfied(self, subspace: Subspace, norm: float, turned: bool) -> bool:
        value, rounding = float(subspace.values[0]), subspace.rounding
        second = max(float(subspace.values[1]), min(self._second * value, value))
        likely = min(norm, norm**2 / (value - second)) if second < value else norm
        tolerance = min(self._tolerance, _TURNED_RESIDUAL) if turned else self._tolerance
        return norm + rounding <= max(tolerance * abs(value), 2 * rounding) and (
            likely + rounding <= max(_GAP_BOUND * abs(value), 2 * rounding)
        )

    def _certify(
        self, operator: Operator, subspace: Subspace | None, guess: Tensor | None, spent: int
    ) -> Followed:
        """Go on from the subspace's pairs, from a guess, or from nothing, to a certificate."""
        warm = math.inf
        if subspace is not None:
            warm = float(subspace.values[0] + subspace.residuals(0, 1)[1][0]) + subspace.rounding
        for room in (_ROOM, _LITTLE_ROOM):
            known = 0
            if subspace is not None:
                value = float(subspace.values[0])
                known = _usable(subspace, _KEPT, 0, value + _WIDTH * abs(value), room)
                guess = None if known else subspace.vectors(1)[0]
            random = self._random(operator)
            start = random if guess is None else guess + random
            both = _complement(operator, subspace, known, start)
            need = needed(effective_size(operator.size, 0.0 if guess is None else 1.0), _RISK)
            converged, blocked = self._run(both, need)
            run = both.run
            spent += run.products
            if not blocked:
                break
            if room == _ROOM:
                subspace = Subspace(operator)
                for vector in both.combined(both.pairs()[2][:, :_KEPT]):
                    subspace.extend(vector)
                spent += len(subspace)
        if not len(run):
            return Followed(
                value=math.nan,
                vector=torch.full_like(random, math.nan),
                error_bound=math.inf,
                products=spent,
                converged=False,
                provisional=False,
                upper_bound=math.inf,
            )
        values, residuals, mixing = both.pairs()
        vectors, error = both.combined(mixing[:, :_KEPT]), float(residuals[0] + both.rounding)
        if run.finite:
            self._keep(vectors, values)
            self._turned, self._since, self._certified = False, 0, float(values[0])
        return Followed(
            value=float(values[0]),
            vector=vectors[0].clone(),
            error_bound=error,
            products=spent,
            converged=converged,
            provisional=False,
            upper_bound=both.upper_bound(need),
            missed=float(values[0]) - error > warm,
        )

    def _run(self, both: Complement, need: float) -> tuple[bool, bool]:
        """Extend until certified, or until an eigenvalue blocks that: (certified, blocked)."""
        while True:
            both.run.extend()
            if not both.run.finite:
                return False, False
            x = both.largest + max(_WIDTH * abs(both.largest), 2 * both.rounding)
            if both.blocked(0, x):
                return False, True
            if both.at_most(0, x, need):
                values, residuals, _ = both.pairs()
                error = float(residuals[0]) + both.rounding
                if error <= max(self._tolerance * abs(float(values[0])), 2 * both.rounding):
                    return True, False
            if both.exhausted or both.run.products >= _BUDGET:
                return False, False

    def _spread(self, subspace: Subspace, kept: Tensor, level: float) -> None:
        """Multiply every kept vector, a random part, and residuals until all pairs tell enough."""
        for vector in kept:
            if subspace.finite:
                subspace.extend(vector)
        if subspace.finite:
            (residual,), (norm,) = subspace.residuals(0, 1)
            random = self._random(subspace.operator)
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
        reach = values + np.minimum(norms, norms**2 / np.maximum(level - values, 1e-300))
        unclear = (norms + subspace.rounding > allowed) & ((values > level) | (reach > level))
        return int(unclear.argmax()) if unclear.any() else None

    def _tell(self, subspace: Subspace, level: float) -> bool:
        return self._unclear(subspace, level) is None

    def _certify_above(
        self, operator: Operator, subspace: Subspace, level: float, most: int
    ) -> FollowedAbove:
        """Runs in the complement of what is known, until one of them brings nothing new."""
        need = needed(operator.size, _RISK)
        spent = len(subspace)
        x = level + max(_WIDTH * abs(level), 2 * subspace.rounding)
        while True:
            usable = len(subspace) > 0 and subspace.finite
            count = int((subspace.values > level).sum()) if usable else 0
            if usable and subspace.complete:
                return self._whole(subspace, count, most, spent)
            known = _usable(subspace, count + 1, count, x) if usable else 0
            both = _complement(operator, subspace, known, self._random(operator))
            converged = self._run_above(both, level, x, need, _BUDGET + 8 * most - spent)
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
            if converged or not both.run.finite or spent >= _BUDGET + 8 * most or count > most:
                break
            subspace = Subspace(operator)
            for vector in vectors[:count]:
                subspace.extend(vector)
            spent += len(subspace)
        if both.run.finite:
            self._above, self._since_above = vectors, 0
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
        self._above, self._since_above = vectors, 0
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

    def _keep(self, vectors: Tensor, values: Floats) -> None:
        self._kept = vectors
        self._second = float(values[1] / values[0]) if len(values) > 1 and values[0] > 0 else 1.0

    def _random(self, operator: Operator) -> Tensor:
        """A Gaussian vector of unit expected norm."""
        return gaussian(operator, self._generator) / math.sqrt(operator.size)


def _overlap(before: Tensor, vector: Tensor) -> float:
    """The part of the vector's length along the last one."""
    return abs(float(before @ vector))


def _usable(subspace: Subspace, most: int, count: int, x: float, room: float = _LITTLE_ROOM) -> int:
    """How many of the largest Ritz pairs a certificate at x should take as known."""
    most = min(most, len(subspace.values))
    residuals = gram(subspace.residuals(0, most)[0])
    for known in range(most, count, -1):
        values = subspace.values[:known]
        if room_below(x, count, values, residuals[:known, :known]) <= room * abs(x):
            return known
    return min(count, most)


def _complement(
    operator: Operator, subspace: Subspace | None, known: int, start: Tensor
) -> Complement:
    if subspace is None or known == 0:
        nothing = start.new_empty(0, operator.size)
        return Complement(operator, nothing, np.empty(0), nothing, start)
    vectors, residuals = subspace.vectors(known), subspace.residuals(0, known)[0]
    return Complement(operator, vectors, subspace.values[:known].copy(), residuals, start)
