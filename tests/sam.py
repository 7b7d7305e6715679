"""A small sharpness-aware minimisation of our own, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SAM(Optimizer):
    """The base optimizer's step, with the gradient of θ + ρ∇L/‖∇L‖: two closures a step."""

    def __init__(
        self,
        params: Any,
        base: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        made = base if isinstance(base, Optimizer) else base(params, **options)
        super().__init__(made.param_groups, {"rho": rho, "normalize": normalize})
        self.base_optimizer = made
        self.param_groups = made.param_groups
        for group in self.param_groups:
            group.update(rho=rho, normalize=normalize)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        before = [p.clone() for p in held]
        for group in self.param_groups:
            radius = group["rho"] / norm if group["normalize"] else group["rho"]
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(radius * p.grad)
        closure()
        for p, old in zip(held, before, strict=True):
            p.copy_(old)
        self.base_optimizer.step()
        return loss


class USAM(SAM):
    """Un-normalised: the gradient of θ + ρ∇L."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, base, rho, normalize=False, **options)
