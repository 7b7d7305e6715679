"""Gradient norms against their own past, as clipping rules that adapt to it would see them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.by_module import ByModule, by_module
from dyndiag.probes.passing import PassingStep, StepSchedule
from dyndiag.schedule import Every
from dyndiag.state import Measurements

_WARM_UP, _FACTOR, _MEMORY = 100, 1.05, 0.98
_FIRST_NORMS, _GLOBAL_MEMORY, _LIMIT = 25, 0.97, 2.5


def adapted(gamma: Tensor, norm: Tensor) -> Tensor:
    """AdaGC's running norm after the warm-up: γ ← βγ + (1−β) min(‖g‖, λγ), β = .98, λ = 1.05.

    >>> adapted(torch.tensor(0.5), torch.tensor(5.0))
    tensor(0.5005)
    """
    return _MEMORY * gamma + (1 - _MEMORY) * torch.minimum(norm, _FACTOR * gamma)


class Running(NamedTuple):
    """ZClip's running mean and variance of the global norm."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, norms: Tensor) -> Running:
        """Of the first norms, (n,): mean and population variance of those that are finite."""
        norms = torch.where(norms.isfinite(), norms, torch.nan)
        mean = norms.nanmean()
        return cls(mean, (norms - mean).square().nanmean())

    def z_score(self, norm: Tensor) -> Tensor:
        """z = (‖g‖ − μ) / (σ + 1e-6)."""
        return (norm - self.mean) / (self.variance.sqrt() + 1e-6)

    def fed(self, norm: Tensor) -> Tensor:
        """What the rule keeps of a norm: μ + 2.5² σ/z where z > 2.5, else all of it."""
        z = self.z_score(norm)
        kept = self.mean + _LIMIT**2 * self.variance.sqrt() / z
        return torch.where(z > _LIMIT, kept, norm)

    def next(self, norm: Tensor) -> Running:
        """With memory .97: first the mean, then the variance about the new mean."""
        fed = self.fed(norm)
        mean = _GLOBAL_MEMORY * self.mean + (1 - _GLOBAL_MEMORY) * fed
        spread = (fed - mean).square()
        variance = _GLOBAL_MEMORY * self.variance + (1 - _GLOBAL_MEMORY) * spread
        usable = norm.isfinite()
        return Running(
            torch.where(usable, mean, self.mean), torch.where(usable, variance, self.variance)
        )


class GradientHistory:
    """Each step's gradient norms over what they have been lately. Nothing is clipped.

    `gradients/threshold_excess`, `…/<module>`: the largest ‖g_p‖ / (λ γ_p) over parameters p,
    λ = 1.05; above 1, adaptive clipping (AdaGC; Wang et al. 2025) would have clipped parameter p.
    γ_p is the smallest ‖g_p‖ of the parameter's first 100 steps, then γ ← .98 γ + .02 min(‖g_p‖,
    λγ). `gradients/above_threshold`: share of the parameters with ‖g_p‖ > λ γ_p.

    `gradients/norm_zscore`: z of the global norm, as ZClip has it (Kumar et al. 2025): (‖g‖ − μ) /
    (σ + 1e-6), with mean and variance of the first 25 norms, then running ones with memory .97
    that take in μ + 2.5² σ/z instead of a norm with z > 2.5.

    AdaGC clips the global norm at 1 in its warm-up. Here the norms are those that the optimizer
    uses, so that it is the same where the loop clips at 1; `warmup_max_norm=1.0` does it where the
    loop does not. A norm of exactly zero, which would hold γ at zero for good, is passed over, and
    so is one that is not finite: it shows in its own step only.

    Range: excess ≥ 0, share 0…1, z real. Cost: some vector operations on the norms, which are read
    once for all: .3 % of a step of a GPT of 1 M parameters. By default every step. Absent in the
    warm-ups; a parameter unfrozen later has its own.

    Misleads: γ starts at a minimum and rises by at most .1 % a step, so norms that scatter by a
    factor of two stay above it for some 700 steps, and a lasting rise by ten for 2,300: look for
    a jump of the excess, not for 1. Global clipping by the loop hides a spike from z (the excess of
    single parameters still shows it).
    """

    name = "GradientHistory"

    def __init__(
        self, due: StepSchedule | None = None, *, warmup_max_norm: float | None = None
    ) -> None:
        if warmup_max_norm is not None and not warmup_max_norm > 0:
            raise DyndiagError(
                f"warmup_max_norm must be a norm above 0, or None, but it is {warmup_max_norm!r}: "
                "AdaGC's own is 1.0"
            )
        self.due = due or Every(1)
        self._max_norm = warmup_max_norm
        self._read = False
        self._names: tuple[str, ...] = ()
        self._gamma = torch.empty(0, dtype=torch.float64)
        self._count = torch.empty(0, dtype=torch.float64)
        self._samples = 0
        self._first: list[Tensor] = []
        self._running: Running | None = None
        self._which: ByModule | None = None

    def before(self, step: PassingStep) -> Measurements:
        self._read = True
        return self._measure(step)

    def after(self, step: PassingStep) -> Measurements:
        """Only where a closure computes the gradients inside the step."""
        read, self._read = self._read, False
        return {} if read else self._measure(step)

    def _measure(self, step: PassingStep) -> Measurements:
        if not any(step.present):
            return {}
        norms = step.gradient_norms
        self._align(step.names, norms.device)
        self._which = by_module(self._which, step.names, step.present, norms.device)
        whole = torch.linalg.vector_norm(self._which.kept(norms))
        self._samples += 1
        return self._against_thresholds(norms, whole, self._which) | self._against_mean(whole)

    def _against_thresholds(self, norms: Tensor, whole: Tensor, which: ByModule) -> Measurements:
        settled = self._count >= _WARM_UP
        threshold = _FACTOR * self._gamma
        seen: Measurements = {}
        if self._samples > _WARM_UP:
            excess = torch.where(settled, norms / threshold, -torch.inf)
            most = which.over(which.kept(excess), "largest")
            most = torch.where(most == -torch.inf, torch.nan, most)
            above = which.kept(settled & ((norms > threshold) | norms.isnan())).sum()
            names = (*which.names("gradients/threshold_excess"), "gradients/above_threshold")
            share = above / which.kept(settled).sum()
            seen = {names: torch.cat((most, share.double().reshape(1)))}
        usable = norms.isfinite() & (norms > 0)
        clipped = norms
        if self._max_norm is not None:
            clipped = norms * (self._max_norm / whole).clamp(max=1)
        lowest = torch.minimum(self._gamma, clipped)
        gamma = torch.where(settled, adapted(self._gamma, norms), lowest)
        self._gamma = torch.where(usable, gamma, self._gamma)
        self._count = self._count + usable
        return seen

    def _against_mean(self, whole: Tensor) -> Measurements:
        if self._running is None:
            self._first.append(whole)
            if len(self._first) == _FIRST_NORMS:
                self._running = Running.of(torch.stack(self._first))
                self._first = []
            return {}
        running = Running(*(part.to(whole.device) for part in self._running))
        self._running = running.next(whole)
        return {"gradients/norm_zscore": running.z_score(whole)}

    def _align(self, names: tuple[str, ...], device: torch.device) -> None:
        """Give every parameter the history that goes by its name."""
        if names != self._names:
            old = {name: i for i, name in enumerate(self._names)}
            places = torch.tensor([old.get(name, len(old)) for name in names])
            pad = torch.nn.functional.pad
            places = places.to(self._gamma.device)
            self._gamma = pad(self._gamma, (0, 1), value=math.inf).take(places)
            self._count = pad(self._count, (0, 1)).take(places)
            self._names = names
        self._gamma, self._count = self._gamma.to(device), self._count.to(device)
