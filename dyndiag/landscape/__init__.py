"""The loss landscape on demand: lines, planes, paths between checkpoints, SAM's sharpness.

Every function takes a model, `loss_fn(model, batch)` and data (a batch or a DataLoader), reads the
loss at other weights, and leaves model, gradients and random streams as they were.

>>> import torch
>>> from dyndiag import landscape
>>> class Point(torch.nn.Module):
...     def __init__(self, t: float) -> None:
...         super().__init__()
...         self.t = torch.nn.Parameter(torch.tensor([t]))
>>> def double_well(model, batch):
...     return ((model.t**2 - 1) ** 2).sum()
>>> path = landscape.interpolate(Point(0.0), Point(-1.0), Point(1.0), double_well, torch.zeros(1))
>>> path.barrier, path.barrier_at
(1.0, 0.5)
>>> figure = landscape.plot(path)  # a second argument is the file that the picture goes to
>>> line = landscape.line(Point(1.0), double_well, torch.zeros(1), along=torch.ones(1), points=5)
>>> line.losses.tolist()
[1.0, 0.5625, 0.0, 1.5625, 9.0]
"""

from __future__ import annotations

from dyndiag.landscape.butterfly import Butterfly, butterfly
from dyndiag.landscape.components import PrincipalComponents, principal_components
from dyndiag.landscape.directions import (
    Direction,
    difference,
    gradient_direction,
    random_direction,
)
from dyndiag.landscape.distances import Distance, ParameterDistance, parameter_distance
from dyndiag.landscape.paths import LinearPath, interpolate
from dyndiag.landscape.plots import plot
from dyndiag.landscape.sharpness import AscentSharpness, ascent_sharpness
from dyndiag.landscape.slices import Line, Plane, line, plane

__all__ = [
    "AscentSharpness",
    "Butterfly",
    "Direction",
    "Distance",
    "Line",
    "LinearPath",
    "ParameterDistance",
    "Plane",
    "PrincipalComponents",
    "ascent_sharpness",
    "butterfly",
    "difference",
    "gradient_direction",
    "interpolate",
    "line",
    "parameter_distance",
    "plane",
    "plot",
    "principal_components",
    "random_direction",
]
