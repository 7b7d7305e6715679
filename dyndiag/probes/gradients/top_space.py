"""How much of the gradient lies in the few directions of highest curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.curvature import eigenpairs
from dyndiag.errors import DyndiagError
from dyndiag.probes.curvature.checked_hessian import CheckedHessian
from dyndiag.probes.curvature.estimates import can_measure_loss
from dyndiag.probes.modules import MOST_PARTS, module_names
from dyndiag.schedule import Budget, Schedule
from dyndiag.state import Measurements, TrainState
from dyndiag.values import Estimate

_TOLERANCE = 1e-2
"""Residual over eigenvalue."""


class TopSpace:
    """The gradient in the top-k eigenspace U of the Hessian (Gur-Ari, Roberts & Dyer 2018).

    Both of the probe batch's loss, in eval mode, at the weights after the step. U holds the vectors
    of the k algebraically largest eigenvalues; P is the number of trainable parameters.

    - `gradients/top_space_share`: f_k = ‖Uᵀg‖² / ‖g‖². Published for k = number of classes, where
      it comes close to 1 in training.
    - `gradients/top_space_chance`: k/P, what a random direction would have.
    - `curvature/top_space_overlap`: ‖U(t)ᵀU(s)‖_F² / k with the space of the last sample, s: 1 if
      it has not turned, k/P if it is another one. Absent at the first sample.
    - `curvature/participation/<module>`: Σ u₁ᵢ² over the module's parameters, u₁ the top
      eigenvector; they sum to 1. Of more than 128 modules one array, `curvature/participation`, in
      model order.

    Range: 0…1. The share's and the overlap's `.converged` is 1 where every residual is below 1 % of
    its eigenvalue and, but for a risk of 1e-3, no further eigenvalue lies above or between by more
    than .3 %; else the products ran out (136 for k = 10) and U may hold what belongs below it.

    Cost: one gradient and, for k = 10, 26 to 36 Hessian-vector products on a small network, 84 on
    a GPT of 1 M parameters at its start; 2k vectors of P numbers beside those of the run. 1 % of
    training time. Misleads at the edge of stability, where most of f_k is the oscillation along
    u₁; and where λ_k and λ_k+1 lie close, as the space then turns with nothing changed.
    """

    name = "TopSpace"

    def __init__(self, k: int = 10, due: Schedule | None = None) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise DyndiagError(
                f"k must be a number of eigenvectors, 1 or more, but it is {k!r}: pass a schedule "
                "as TopSpace(due=…)"
            )
        self.due = due or Budget(0.01, gradients=250)
        self.applies = can_measure_loss
        self._hessian = CheckedHessian()
        self.notices = self._hessian.notices
        self._k = k
        self._names: tuple[str, ...] = ()
        self._last: Tensor | None = None
        self._last_converged = False
        self._generator = torch.Generator().manual_seed(3)

    def measure(self, state: TrainState) -> Measurements:
        state.model.eval()
        hessian = self._hessian.of_probe(state)
        k = min(self._k, hessian.size)
        last = self._last if state.names == self._names else None
        if last is not None and last.shape != (k, hessian.size):
            last = None
        if last is not None:
            last = last.to(hessian.device, hessian.dtype)
        found = eigenpairs(
            hessian,
            k,
            start=None if last is None else last.sum(0),
            relative_tolerance=_TOLERANCE,
            generator=self._generator,
        )
        space, gradient = found.vectors, hessian.gradient
        share = torch.linalg.vector_norm(space @ gradient) / torch.linalg.vector_norm(gradient)
        seen: Measurements = {
            "gradients/top_space_share": Estimate(
                share.square().item(), products=found.products, converged=found.converged
            ),
            "gradients/top_space_chance": k / hessian.size,
        }
        if not bool(space.isfinite().all()):
            self._last = None
            return seen
        if last is not None:
            overlap = (space @ last.T).square().sum().item() / k
            both = found.converged and self._last_converged
            seen["curvature/top_space_overlap"] = Estimate(overlap, converged=both)
        self._names, self._last, self._last_converged = state.names, space, found.converged
        return seen | _participation(space[0], state)


def _participation(vector: Tensor, state: TrainState) -> Measurements:
    owners = module_names(state.names)
    modules = {module: i for i, module in enumerate(dict.fromkeys(owners))}
    pieces = vector.double().square().split([p.numel() for p in state.parameters])
    shares = [0.0] * len(modules)
    for owner, piece in zip(owners, torch.stack([p.sum() for p in pieces]).tolist(), strict=True):
        shares[modules[owner]] += piece
    if len(modules) > MOST_PARTS:
        return {"curvature/participation": torch.tensor(shares, dtype=torch.float64)}
    names = tuple(f"curvature/participation/{module}" for module in modules)
    return {names: torch.tensor(shares, dtype=torch.float64)}
