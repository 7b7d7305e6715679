"""What is read off the optimizer step itself, without a pass of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dyndiag.batches import MicroBatches
from dyndiag.probes.forward import Boundary, ForwardWatch
from dyndiag.probes.gradients.norm import GradientNorm
from dyndiag.probes.logits.attention import AttentionLogits
from dyndiag.probes.logits.output import OutputLogits
from dyndiag.probes.passing import PassingStep, StepProbe
from dyndiag.probes.weights.updates import UpdateRatio
from dyndiag.state import Measurements, TrainState


@dataclass
class Step:
    """An optimizer step that was taken, and what was seen of it."""

    learning_rates: tuple[float, ...] = ()
    batch: MicroBatches | None = None
    loss: Tensor | None = None
    weights_before: tuple[Tensor, ...] | None = None
    clip_coefficients: tuple[Tensor, ...] = ()
    seen: Measurements = field(default_factory=dict)

    @property
    def rate_series(self) -> Measurements:
        """`train/learning_rate`, the first group's, and one a group where they differ."""
        rates = self.learning_rates
        if len(rates) == 1:
            return {"train/learning_rate": rates[0]} if rates[0] == rates[0] else {}  # NaN: none
        found: Measurements = {"train/learning_rate": rates[0]} if rates else {}
        if len(set(rates)) > 1:
            found |= {f"train/learning_rate/{i}": rate for i, rate in enumerate(rates)}
        return {name: rate for name, rate in found.items() if rate == rate}


def learning_rates(optimizer: Optimizer) -> tuple[float, ...]:
    """Of each parameter group as it is now; NaN for one without."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return tuple(math.nan if rate is None else float(rate) for rate in rates)


class StepWatch:
    """Hooks on the optimizer, the model and a few gradients.

    `step` is the number of the step being prepared. `begins` is called when a forward or an
    optimizer step of the training begins, with True for the latter. `probes` are asked besides,
    at the steps at which they are due.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        names: tuple[str, ...],
        parameters: tuple[nn.Parameter, ...],
        boundary: Boundary,
        begins: Callable[[bool], None],
        probes: Sequence[StepProbe] = (),
    ) -> None:
        self._model, self._names, self._parameters = model, names, parameters
        self._begins = begins
        self._boundary = boundary
        self._probes = probes
        self._passing: PassingStep | None = None
        self.cost: dict[str, dict[str, float]] = {}
        """Of each of `probes` by name: seconds of the training's thread, samples."""
        self._attention = AttentionLogits(model, boundary)
        self._forward = ForwardWatch(model, [OutputLogits(), self._attention], boundary)
        self._forward.before = lambda: begins(False)
        self._gradients = GradientNorm(names, parameters, boundary) if parameters else None
        self._updates = UpdateRatio(names)
        self._step: Step | None = None
        self._taken: Step | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def step(self) -> int:
        return self._forward.step

    @step.setter
    def step(self, step: int) -> None:
        self._forward.step = step

    @property
    def pending(self) -> bool:
        """Whether a step was taken that nobody has asked for yet."""
        return self._taken is not None

    def take(self) -> Step | None:
        """The step taken since the last call; None if the optimizer has not stepped."""
        taken, self._taken = self._taken, None
        if taken is None:
            with self._boundary("StepWatch"):
                batch, loss, seen = self._forward.collect()
                if batch is not None:
                    taken = Step(batch=batch, loss=loss, seen=seen | {"train/skipped": 1.0})
        return taken

    def detach(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._forward.detach()
        self._attention.detach()
        if self._gradients is not None:
            self._gradients.detach()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with self._boundary("StepWatch"):
            self._begins(True)
            step = Step(learning_rates(optimizer))
            self._step = step
            if self._parameters:
                step.weights_before = self._updates.before(self.step, self._parameters)
            # A closure computes the gradients inside the step: they are read after it.
            if not args[1:] and kwargs.get("closure") is None:
                self._passing = passing = self._pass(optimizer)
                self._read_gradients(passing, step)
                self._ask("before", passing, step)

    def _read_gradients(self, passing: PassingStep, step: Step) -> None:
        if self._gradients is not None:
            step.seen |= self._gradients.measure(passing)
            step.clip_coefficients = self._gradients.coefficients

    def _pass(self, optimizer: Optimizer) -> PassingStep:
        scale = getattr(optimizer, "grad_scale", None)
        return PassingStep(
            self.step,
            self._model,
            optimizer,
            self._parameters,
            self._names,
            scale if isinstance(scale, Tensor) else None,
        )

    def _ask(self, when: Literal["before", "after"], passing: PassingStep, step: Step) -> None:
        """Ask the probes that are due what they see of the step, before it or after it."""
        for probe in self._probes:
            if not probe.due.due(self.step):
                continue
            began = time.perf_counter()
            with self._boundary(probe.name), torch.no_grad():
                step.seen |= getattr(probe, when)(passing)
            cost = self.cost.setdefault(probe.name, {"seconds": 0.0, "samples": 0, "products": 0})
            cost["seconds"] += time.perf_counter() - began
            cost["samples"] += when == "after"

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with self._boundary("StepWatch"):
            step, self._step = self._step, None
            if step is None:
                return
            passing, self._passing = self._passing, None
            if passing is None:
                passing = self._pass(optimizer)
                self._read_gradients(passing, step)
            passing.scale = None  # a fused optimizer has divided the gradients themselves by it
            self._ask("after", passing, step)
            step.batch, step.loss, seen = self._forward.collect(trained=True)
            step.seen |= seen
            self._taken = step

    def update_ratio(self, state: TrainState) -> Measurements:
        """Of a step whose weights before were kept; overwrites these."""
        return self._updates.measure(state)
