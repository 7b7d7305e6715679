"""The gradient norm of each parameter."""

from __future__ import annotations

from dyndiag.probes.by_module import ByModule, by_module
from dyndiag.probes.modules import MOST_PARTS
from dyndiag.probes.passing import PassingStep, StepSchedule
from dyndiag.schedule import Every
from dyndiag.state import Measurements


class ParameterNorms:
    """`gradients/parameter_norm/<parameter>`: ‖g‖₂ of each parameter's gradient.

    Of the averaged, unscaled gradient as the optimizer uses it: clipped, if the loop clips. The
    squares add up to the module's and the model's. A parameter without a gradient has no row. With
    more than 128 parameters there is one array instead, `gradients/parameter_norms`, in model
    order, NaN where there is no gradient.

    Range: ≥ 0. Cost: nothing beyond the norms, which are read once for all. By default every 11th
    step. Misleads between parameters, as norms grow with a tensor's size: compare a parameter
    with its own past.
    """

    name = "ParameterNorms"

    def __init__(self, due: StepSchedule | None = None) -> None:
        self.due = due or Every(11)
        self._read = False
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
        if len(step.names) > MOST_PARTS:
            return {"gradients/parameter_norms": norms}
        which = self._which = by_module(self._which, step.names, step.present, norms.device)
        names = [name for name, here in zip(step.names, step.present, strict=True) if here]
        return {tuple(f"gradients/parameter_norm/{name}" for name in names): which.kept(norms)}
