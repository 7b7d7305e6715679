"""Runge–Kutta–Chebyshev steps: explicit, and stable over long ones where curvature is steep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Field = Callable[[Tensor], Tensor]

_DAMPING = 2 / 13
_MOST_STAGES = 200


@dataclass(frozen=True)
class Step:
    """One step tried."""

    y: Tensor
    slope: Tensor
    """The field at `y`."""
    error: Tensor
    """Of `y`, like it: the leading term."""
    stages: int
    """Evaluations of the field, the one at `y` included."""


def longest(radius: float) -> float:
    """The longest step that the largest number of stages keeps stable."""
    return math.inf if radius <= 0 else _reach(_MOST_STAGES) / radius


def step(field: Field, y: Tensor, slope: Tensor, h: float, radius: float) -> Step:
    """A step of length h of y' = field(y), of second order, for a symmetric Jacobian.

    `slope`: the field at y; `radius`: of the Jacobian's spectrum, whose negative part may reach
    −radius. The stages grow with √(h · radius); other explicit methods take steps of 2/radius.

    Source: Sommeijer, Shampine & Verwer (1998), "RKC: an explicit solver for parabolic PDEs",
    J. Comput. Appl. Math. 88, 315–326.
    """
    s = min(max(2, math.ceil(math.sqrt(h * radius / 0.65 + 1))), _MOST_STAGES)
    w0 = 1 + _DAMPING / s**2
    t, dt, ddt = _chebyshev(w0, s)
    w1 = dt[s] / ddt[s]
    b = [ddt[j] / dt[j] ** 2 if j > 1 else 0.0 for j in range(s + 1)]
    b[0] = b[1] = b[2]
    before, now = y, y + h * b[1] * w1 * slope
    for j in range(2, s + 1):
        mu, nu = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2]
        of_now = 2 * b[j] * w1 / b[j - 1]
        of_first = -(1 - b[j - 1] * t[j - 1]) * of_now
        new = (1 - mu - nu) * y + mu * now + nu * before
        new += h * of_now * field(now)
        new += h * of_first * slope
        before, now = now, new
    end = field(now)
    error = 0.8 * (y - now) + 0.4 * h * (slope + end)
    return Step(now, end, error, s)


def _reach(stages: int) -> float:
    """h · radius up to which so many stages are stable."""
    return 0.65 * (stages**2 - 1)


def _chebyshev(x: float, degree: int) -> tuple[list[float], list[float], list[float]]:
    """T_j(x) and its first two derivatives, j = 0 … degree."""
    t, dt, ddt = [1.0, x], [0.0, 1.0], [0.0, 0.0]
    for j in range(2, degree + 1):
        t.append(2 * x * t[j - 1] - t[j - 2])
        dt.append(2 * t[j - 1] + 2 * x * dt[j - 1] - dt[j - 2])
        ddt.append(4 * dt[j - 1] + 2 * x * ddt[j - 1] - ddt[j - 2])
    return t, dt, ddt
