"""The whole spectrum of the probe batch's Hessian."""

from __future__ import annotations

import torch

from dyndiag.curvature import spectral_density
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.estimates import can_measure_loss
from dyndiag.schedule import Schedule
from dyndiag.state import Measurements, TrainState


class Density:
    """`curvature/density`: the spectrum of the probe batch's Hessian, by Lanczos quadrature.

    An array (3, points): grid, mean density, half the spread between probes; and
    `curvature/density_nodes` (2, nodes): eigenvalue and mass. Cost: one gradient and
    100 products, whenever its share of the budget has paid for it.
    """

    name = "Density"

    def __init__(self, due: Schedule, hessian: CheckedHessian | None = None) -> None:
        self.due = due
        self._hessian = hessian or CheckedHessian()
        self.notices = self._hessian.notices
        self.applies = can_measure_loss
        self._generator = torch.Generator().manual_seed(2)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        found = spectral_density(hessian, probes=2, steps=50, generator=self._generator)
        half_spread = (found.highest - found.lowest) / 2
        return {
            "curvature/density": torch.stack([found.grid, found.density, half_spread]),
            "curvature/density_nodes": torch.stack(
                [found.nodes.flatten(), found.weights.flatten() / len(found.weights)]
            ),
        }
