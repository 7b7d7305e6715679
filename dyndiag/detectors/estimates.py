"""Reading an estimate's columns: which values may be judged, and which may decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

_COLUMNS = (".error", ".products", ".converged", ".provisional", ".lower_bound", ".upper_bound")


class Sample(NamedTuple):
    value: float
    certified: bool
    """False: provisional. It enters medians and trends, but opens, tops and closes nothing."""


def sample(values: Mapping[str, float], name: str) -> Sample | None:
    """The estimate `name` of this row; None where it is absent, not finite or not converged.

    A series without status columns, such as an imported one, counts as certified.

    >>> sample({"x": 2.0, "x.converged": 0.0, "x.provisional": 1.0}, "x")
    Sample(value=2.0, certified=False)
    >>> sample({"x": 2.0, "x.converged": 0.0, "x.provisional": 0.0}, "x") is None
    True
    """
    value = values.get(name)
    if value is None or not math.isfinite(value):
        return None
    certified = values.get(f"{name}.converged", 1.0) == 1.0
    if not certified and values.get(f"{name}.provisional", 0.0) != 1.0:
        return None
    return Sample(value, certified)


def is_column(name: str) -> bool:
    """Whether this series describes an estimate (its error, its status) instead of being a value.

    >>> is_column("curvature/trace.error"), is_column("gradients/norm/blocks.3.attn")
    (True, False)
    """
    return name.endswith(_COLUMNS)
