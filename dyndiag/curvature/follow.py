"""The largest eigenvalue of an operator that changes little from one sample to the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndiag.curvature.certificate import effective_size, needed
from dyndiag.curvature.complement import LITTLE_ROOM, Complement, complement_of, usable
from dyndiag.curvature.draws import random_start
from dyndiag.curvature.lanczos import Floats
from dyndiag.curvature.operator import Operator
from dyndiag.curvature.subspace import Subspace

_KEPT = 3
"""Ritz vectors that go from sample to sample: what overtakes the top was mostly next to it."""
_CLOSE = 0.85
"""A second value of at least this share of the first may overtake it: it gets its own product."""
_FEWEST_TURNED, _MOST = 8, 14
"""Products of a provisional sample: at least where its vector turns; at most."""
_TURNED, _OVERLAP = 0.9, 0.5
_CROWDED, _FALL = 0.8, 0.1
_GAP_BOUND, _TIGHT = 5e-4, 4e-3
CERTIFIED_EVERY = 10
_RISE = 1.2
WIDTH, RISK = 0.01, 1e-3
_ROOM = 0.05
"""What known pairs may take of the certificate's reach, as a share of the value, at first: less
where a run in their complement has come upon an eigenvalue that lies within that room."""
BUDGET = 64
SMALL = 16
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


class Follower:
    """Follows the largest eigenvalue through the samples of one operator.

    Most samples are provisional: a product with the last sample's top Ritz vector, one with its
    second where that was at least 0.85 of the first, and one with the sum of what is left: the
    other kept vectors, the top's residual and a random part, each of norm 1, so that Rayleigh–Ritz
    sees a neighbour that has overtaken, a turn, and a stranger far above for one product together.
    Residuals follow, at least three products in all, until the residual r is at most
    `relative_tolerance` · |value| and, with the gap to the second value (the smaller of now and
    then), min(r, r²/gap) at most 5e-4 of it. That gap is no bound, so the error stated is r. Where
    eigenvalues may cross, which makes a mixture of two vectors look like one, r is at most 4e-3:
    where the second value was at least 0.8 of the first at the last certificate, or the value has
    fallen by more than a tenth since the last sample, or the vector has less than 0.9 of its
    length along the last one. In that case, and if it had in the sample before, it takes at least
    eight products.

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
        self._turned = self._crowded = False
        self._since = 0
        self._value = self._certified = math.nan

    def largest(
        self, operator: Operator, *, certify: bool | Callable[[float], bool] = False
    ) -> Followed:
        """The largest eigenpair now. A size other than the last sample's is a first sample.

        `certify`: whether to certify this sample, or a function of the provisional value that says
        so, which costs nothing where it says no.
        """
        kept = self._kept
        if kept is None or kept.shape[1] != operator.size or operator.size <= SMALL:
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
            self._since + 1 >= CERTIFIED_EVERY
            or value > max(self._certified * _RISE, self._certified / _RISE)
            or along < _OVERLAP
            or (certify(value) if callable(certify) else certify)
        ):
            return self._certify(operator, subspace, None, len(subspace))
        self._keep(vectors, subspace.values)
        self._turned, self._value = along < _TURNED, value
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

    def _refined(self, subspace: Subspace, kept: Tensor) -> bool:
        """Extend until the top pair satisfies the rules; False if that takes too many products."""
        random = random_start(subspace.operator, self._generator)
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
        fallen = self._value - value > _FALL * abs(self._value)
        crossing = turned or self._crowded or fallen
        tolerance = min(self._tolerance, _TIGHT) if crossing else self._tolerance
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
        for room in (_ROOM, LITTLE_ROOM):
            known = 0
            if subspace is not None:
                value = float(subspace.values[0])
                known = usable(subspace, _KEPT, 0, value + WIDTH * abs(value), room)
                guess = None if known else subspace.vectors(1)[0]
            random = random_start(operator, self._generator)
            start = random if guess is None else guess + random
            both = complement_of(operator, subspace, known, start)
            need = needed(effective_size(operator.size, 0.0 if guess is None else 1.0), RISK)
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
            self._turned, self._crowded = False, self._second >= _CROWDED
            self._since, self._value = 0, float(values[0])
            self._certified = self._value
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
            x = both.largest + max(WIDTH * abs(both.largest), 2 * both.rounding)
            if both.blocked(0, x):
                return False, True
            if both.at_most(0, x, need):
                values, residuals, _ = both.pairs()
                error = float(residuals[0]) + both.rounding
                if error <= max(self._tolerance * abs(float(values[0])), 2 * both.rounding):
                    return True, False
            if both.exhausted or both.run.products >= BUDGET:
                return False, False

    def _keep(self, vectors: Tensor, values: Floats) -> None:
        self._kept = vectors
        self._second = float(values[1] / values[0]) if len(values) > 1 and values[0] > 0 else 1.0


def _overlap(before: Tensor, vector: Tensor) -> float:
    """The part of the vector's length along the last one."""
    return abs(float(before @ vector))
