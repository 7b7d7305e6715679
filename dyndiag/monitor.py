"""The order in which things happen, and nothing else."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from dyndiag.batches import (
    Batch,
    LossFunction,
    MicroBatches,
    as_micro_batches,
    check_scalar_loss,
    copy_batch,
    own_loss,
)
from dyndiag.boundary import Boundary
from dyndiag.door import check_arguments, check_probes, check_values, trainable
from dyndiag.facts import describe_batch, facts, now
from dyndiag.keeping import Keeper
from dyndiag.probes import (
    Probe,
    Step,
    StepProbe,
    StepWatch,
    learning_rates,
    sampled_probes,
)
from dyndiag.probes.forward import is_compiled
from dyndiag.rows import Rows
from dyndiag.sampling import Sampler, tell_notices
from dyndiag.state import Measurements, Task, TrainState, Value
from dyndiag.values import Event

_FLUSH_SECONDS = 1.0
_LOOK_AGAIN = 11  # steps
_SEARCH_AGAIN = 3 * _LOOK_AGAIN  # for new parameters: walking through the modules takes a while
_LONG_SKIPPED = 50  # steps; a loss scaler finds its scale within some twenty


class Monitor:
    """Rides along a training run: measures, keeps, judges, shows; changes nothing.

    Parameters
    ----------
    model, optimizer
        As trained. The trainable parameters are watched, also where they change.
    loss_fn
        `loss_fn(model, batch) -> scalar tensor`, the mean over the batch, with its graph.
        Without one the output's own `.loss` is used; where there is none, no curvature.
    run
        Folder of the run. The same folder again goes on after its last row.
    probe_batch
        What curvature and predictions are measured on, fixed; default: the first batch seen.
    budget
        Share of training time for what needs passes of its own (2 s, if that is more).
    probes
        What to measure besides (`dyndiag.probes`); each states its cost and keeps its own budget.
    first_step
        Number of the first step; rows of the folder from there on are replaced.
    on_event
        Called with each Event as it opens, peaks and closes, at the flush.
    tensorboard
        Whether to write `run/tensorboard`.

    Raises DyndiagError for arguments that cannot work, before anything is touched. Afterwards
    nothing is raised: what fails is told once, and missing from the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction | None = None,
        *,
        run: str | Path,
        probe_batch: Batch = None,
        budget: float = 0.05,
        probes: Sequence[Probe | StepProbe] = (),
        first_step: int | None = None,
        on_event: Callable[[Event], object] | None = None,
        tensorboard: bool = True,
    ) -> None:
        check_arguments(model, optimizer, loss_fn, run, probe_batch, budget)
        self._continual, sampled = sampled_probes(budget)
        check_probes(probes, sampled)
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._probe: MicroBatches | None = None
        self._described: dict[str, Any] | None = None  # in words
        if probe_batch is not None:
            self._measure_on(as_micro_batches(probe_batch))
        self._boundary = Boundary()
        self._keeper = Keeper(Path(run), first_step, self._boundary, on_event, tensorboard)
        self._first = self._next = self._keeper.next_step
        self._rows = Rows()
        self._step_probes = [probe for probe in probes if isinstance(probe, StepProbe)]
        sampled += [probe for probe in probes if isinstance(probe, Probe)]
        self._sampler = Sampler(sampled, budget, model, optimizer, loss_fn, self._boundary)
        self._recorded: Measurements = {}
        self._task_starts: dict[str, int] = {
            task: start
            for task, start in self._keeper.before.get("task_starts", {}).items()
            if start < self._next
        }
        self._own_loss = True  # as far as is known
        self._user_steps = self._closed = False
        self._skipped = 0  # steps in a row
        self._flushed = time.perf_counter()
        self._begin_watching()
        if any(is_compiled(module) for module in model.modules()):
            self._boundary.note(
                "AttentionLogits",
                "the model, or a part of it, is compiled, and attention inside compiled code is "
                "not seen",
            )
        if not self._parameters:
            self._boundary.tell(
                "Monitor",
                "the model has no trainable parameter (all are frozen), so only the loss is kept "
                "until some are unfrozen",
            )
        self._keeper.keep(
            [],
            facts(model, optimizer, loss_fn)
            | {"budget": budget, "detectors": self._keeper.detector_parameters, "finished": None}
            | self._progress(),
        )
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def step(self, loss: Tensor | float | None = None, batch: Batch = None) -> None:
        """One optimizer step has been taken, or skipped: call it after `optimizer.step()`.

        `loss`: the step's loss; `batch`: what it was taken on, as `loss_fn` takes it (several
        micro-batches as `dyndiag.batches.MicroBatches`). Both may be left out.
        """
        if self._is_over():
            return
        taken = self._watch.take()
        if taken is None and not self._user_steps and self._next > self._first:
            self._rows.add(self._next - 1, self._loss(loss))  # ended by a second forward
        else:
            self._finish(taken or Step(seen={"train/skipped": 1.0}), loss, batch)
        self._user_steps = True

    def record(self, values: Mapping[str, Value]) -> None:
        """Keep values of your own in the row of the step under way: before `monitor.step`.

        `values`: series name (`area/quantity[/part]`) → number, 0-d tensor, `Estimate`, or an
        array. An accelerator is not waited for. Raises DyndiagError for names and values that
        cannot be kept.
        """
        if self._is_over():
            return
        check_values(values)
        self._recorded.update(values)

    def start_task(self, name: str, eval_batches: Iterable[Batch]) -> None:
        """From the next step on the training is on task `name` (continual learning).

        `eval_batches`: the batches on which the task's accuracy is measured from now on (a list,
        or a DataLoader, which is then run through each time).
        Raises DyndiagError for a name used before, and for evaluation batches that are empty.
        """
        if self._is_over():
            return
        self._training_goes_on(optimizer_steps=True)
        if isinstance(eval_batches, Iterator):  # can be run through only once
            with self._sampler.guarded():
                eval_batches = list(eval_batches)
        start = self._task_starts.get(name, self._next)  # known where a run is gone on with
        index = [*self._task_starts, name].index(name)
        self._continual.start(Task(name, eval_batches), start, index)
        self._task_starts[name] = start
        last = start - 1
        if last >= self._first:  # what the switch is judged by: the accuracies just before it
            state = self._state(last, Step(), None)
            self._sampler.measure(self._continual, state, lambda seen: self._rows.add(last, seen))
            self._rows.add(last, {"continual/task": float(index - 1)})

    def flush(self) -> bool:
        """Judge, keep and show everything measured so far; True if all of it is on disk now."""
        self._flushed = time.perf_counter()
        return self._keeper.keep(self._rows.to_host(), self._progress()) == 0

    def close(self) -> None:
        """Flush, let go of model and optimizer, close the run. Calling it twice is allowed."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._training_goes_on(optimizer_steps=True)
        self._watch.detach()
        if self._recorded:
            self._keep_recorded(max(self._next - 1, self._first))
        metadata = self._progress() | {"finished": now()}
        missing = self._keeper.keep(self._rows.to_host(), metadata)
        if missing:
            self._boundary.tell("Store", f"the last {missing} steps could not be written")
        self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            said = f": {error}" if str(error) else ""
            self._boundary.note("training", f"it ended with {type(error).__name__}{said}")
        self.close()

    def _begin_watching(self) -> None:
        self._names, self._parameters = trainable(self._model)
        self._known = [(p, p.requires_grad) for p in self._model.parameters()]
        self._watch = StepWatch(
            self._model,
            self._optimizer,
            self._names,
            self._parameters,
            self._boundary,
            self._training_goes_on,
            self._step_probes,
        )
        self._watch.step = self._next

    def _follow_freezing(self, step: int) -> None:
        as_before = all(p.requires_grad == required for p, required in self._known)
        if as_before and step % _SEARCH_AGAIN:
            return
        _, now_trainable = trainable(self._model)
        if [id(p) for p in now_trainable] != [id(p) for p in self._parameters]:
            self._watch.detach()
            self._begin_watching()
            self._boundary.tell(
                "Monitor",
                f"other parameters are trainable since about step {self._next - 1} (now "
                f"{len(now_trainable)} tensors): norms and curvature are of these from here on",
            )

    def _is_over(self) -> bool:
        if self._closed:
            self._boundary.tell("Monitor", "the monitor is closed: what comes after is not kept")
        return self._closed

    def _training_goes_on(self, optimizer_steps: bool) -> None:
        # Where nobody calls `step`, a step is over when the next forward or step begins.
        if self._watch.pending and (optimizer_steps or not self._user_steps):
            taken = self._watch.take()
            assert taken is not None
            self._finish(taken, None, None)

    def _finish(self, taken: Step, loss: Tensor | float | None, batch: Batch) -> None:
        step, self._next = self._next, self._next + 1
        self._boundary.step = step
        self._skipped = self._skipped + 1 if "train/skipped" in taken.seen else 0
        if self._skipped == _LONG_SKIPPED:
            self._boundary.tell(
                "Monitor",
                f"the optimizer has taken none of the last {_LONG_SKIPPED} steps, so their rows "
                "hold no gradients and no updates: where another optimizer trains the model by "
                "now, close this monitor and make one with it and the same run=",
            )
        with self._boundary("Monitor"):
            seen = taken.seen | taken.rate_series
            seen |= self._loss(taken.loss if loss is None else loss)
            self._rows.add(step, seen)
            if self._recorded:
                self._keep_recorded(step)
            state = self._state(step, taken, batch)
            self._sampler.measure_due(state, lambda seen: self._rows.add(step, seen))
            if taken.weights_before is not None:
                with self._boundary("UpdateRatio"):
                    self._rows.add(step, self._watch.update_ratio(state))
            for probe in self._step_probes:
                tell_notices(probe, self._boundary)
            failed = self._boundary.failed()
            if failed:
                self._rows.add(step, {f"failures/{name}": 1.0 for name in failed})
        self._watch.step = self._next
        if step % _LOOK_AGAIN == 0:
            self._follow_freezing(step)
        if time.perf_counter() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _keep_recorded(self, step: int) -> None:
        recorded, self._recorded = self._recorded, {}
        with self._boundary("record"):
            self._rows.add(step, recorded)

    def _loss(self, loss: Tensor | float | None) -> Measurements:
        if loss is not None:
            with self._boundary("train/loss"):
                if isinstance(loss, Tensor):
                    check_scalar_loss(loss)
                    return {"train/loss": loss.detach().reshape(())}
                return {"train/loss": float(loss)}
        return {}

    def _state(self, step: int, taken: Step, batch: Batch) -> TrainState:
        loss_fn: LossFunction | None = self._loss_fn
        training = None if batch is None else as_micro_batches(batch)
        if loss_fn is None:
            training = taken.batch or training
            if taken.batch is not None:
                self._own_loss = taken.loss is not None
            loss_fn = own_loss if self._own_loss else None
        if self._probe is None and training is not None and not self._boundary.failures["Batch"]:
            with self._boundary("Batch"):
                self._measure_on(training)
        if loss_fn is None or self._probe is None:
            self._boundary.tell("Monitor", _no_curvature(loss_fn))
        rates = taken.learning_rates
        if len(rates) < len(self._optimizer.param_groups):  # skipped, or groups were added since
            rates += learning_rates(self._optimizer)[len(rates) :]
        return TrainState(
            step=step,
            model=self._model,
            optimizer=self._optimizer,
            parameters=self._parameters,
            names=self._names,
            loss_fn=loss_fn,
            probe=self._probe,
            batch=training,
            learning_rates=rates,
            weights_before=taken.weights_before,
            clip_coefficients=taken.clip_coefficients,
        )

    def _measure_on(self, batch: MicroBatches) -> None:
        self._probe = copy_batch(batch)
        self._described = describe_batch(self._probe)

    def _progress(self) -> dict[str, Any]:
        return {
            "cost": self._sampler.cost | self._watch.cost,
            "training_seconds": self._sampler.training_seconds,
            "notices": self._boundary.notices,
            "tasks": list(self._task_starts),
            "task_starts": self._task_starts,
            "probe_batch": self._described,
        }


def _close(alive: weakref.ref[Monitor]) -> None:
    monitor = alive()
    if monitor is not None:
        monitor.close()


def _no_curvature(loss_fn: LossFunction | None) -> str:
    if loss_fn is None:
        return (
            "no loss_fn was given and the model's output has no .loss that is trained on, so there "
            "is no curvature: pass loss_fn(model, batch) -> scalar"
        )
    return (
        "no batch to measure on, so there is no curvature and there are no predictions: pass "
        "probe_batch=… to the monitor or batch=… to monitor.step"
    )
