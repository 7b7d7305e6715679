"""Training-dynamics diagnostics for PyTorch: what is happening in a training, and how sure that is.

Importing this package imports nothing heavy: torch comes with `Monitor`, `curvature`, `probes` and
`landscape`, pandas with `Run`, the report's tools with `report`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyndiag import continual, curvature, landscape, probes
    from dyndiag.boundary import DyndiagWarning
    from dyndiag.errors import DyndiagError
    from dyndiag.monitor import Monitor
    from dyndiag.reports import report
    from dyndiag.store import Run
    from dyndiag.values import Estimate, Event

__version__ = "0.1.0"

_HOMES = {
    "DyndiagError": "dyndiag.errors",
    "DyndiagWarning": "dyndiag.boundary",
    "Estimate": "dyndiag.values",
    "Event": "dyndiag.values",
    "Monitor": "dyndiag.monitor",
    "Run": "dyndiag.store",
    "continual": "dyndiag",
    "curvature": "dyndiag",
    "landscape": "dyndiag",
    "probes": "dyndiag",
    "report": "dyndiag.reports",
}

__all__ = [
    "DyndiagError",
    "DyndiagWarning",
    "Estimate",
    "Event",
    "Monitor",
    "Run",
    "continual",
    "curvature",
    "landscape",
    "probes",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dyndiag' has no attribute {name!r}")
    if _HOMES[name] == "dyndiag":  # a room
        return importlib.import_module(f"dyndiag.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
