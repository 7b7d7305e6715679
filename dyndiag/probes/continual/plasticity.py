"""How well a network still learns: a trained one against fresh ones, on a new task."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dyndiag.batches import Batch, LossFunction, batch_size, check_scalar_loss, tensors
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace
from dyndiag.probes.forward import unwatched

_SEED = 20260117


@dataclass(frozen=True)
class Plasticity:
    """Losses on the new task after `steps` steps: means over all its batches, eval mode."""

    loss: float
    """Of the copy of the trained network."""
    fresh_losses: tuple[float, ...]
    """Of each fresh network."""
    steps: int
    course: tuple[float, ...]
    """The copy's training loss at each step."""
    fresh_courses: tuple[tuple[float, ...], ...]

    @property
    def fresh_loss(self) -> float:
        return math.fsum(self.fresh_losses) / len(self.fresh_losses)

    @property
    def standard_error(self) -> float:
        """Of `fresh_loss`, by the spread over fresh networks; NaN for one."""
        n = len(self.fresh_losses)
        if n < 2:
            return math.nan
        squares = math.fsum((loss - self.fresh_loss) ** 2 for loss in self.fresh_losses)
        return math.sqrt(squares / (n - 1) / n)

    @property
    def lost(self) -> float:
        """By how much the trained network ends higher than fresh ones: positive where plasticity
        was lost, in the unit of the loss; to be compared with the spread of `fresh_losses`."""
        return self.loss - self.fresh_loss


def plasticity(
    model: nn.Module,
    make_fresh_model: Callable[[], nn.Module],
    loss_fn: LossFunction,
    batches: Iterable[Batch],
    steps: int,
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    fresh: int = 3,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Plasticity:
    """Train a copy of `model` and `fresh` new networks for `steps` steps on a task new to all.

    The loss after a fixed number of steps on a fresh task, against a fresh network (Lyle et al.
    2023, arXiv 2303.01486; Dohare et al. 2024, doi 10.1038/s41586-024-07711-7). All take the same
    `batches` in the same order, over and over, in train mode, each with an optimizer of its own
    from `make_optimizer(parameters)`: take the training's, because what one cannot learn another
    may. `loss_fn(model, batch)` is the mean over a batch. `generator` seeds the fresh networks and
    whatever draws at random while they train; without one, the same answer at every call.

    Works on copies: the model, `loss_fn`'s own modules and all global random streams are left as
    they were. A progress bar comes after two seconds, unless `progress` is False.

    Cost: (1 + fresh) · steps gradients, and a forward of each batch. On demand.

    Misleads: with fewer `steps` than a fresh network needs, it tells how far away the start is (a
    trained network is sure of the old labels) more than what can be learned; with many more,
    everything is learned by then. What the new task shares with the old ones hides the loss.
    """
    batches = list(batches)
    if not batches or steps < 1 or fresh < 1:
        raise DyndiagError(
            f"plasticity needs at least one batch, one step and one fresh network, but got "
            f"{len(batches)} batches, {steps} steps and {fresh} fresh networks"
        )
    generator = generator or torch.Generator().manual_seed(_SEED)
    seeds = torch.randint(
        2**31, (1 + fresh,), generator=generator, device=generator.device
    ).tolist()
    courses, losses = [], []
    # A copy made inside the guard has no backward hooks of the training's.
    with unwatched(), no_trace(model, None, loss_fn), _bar(len(seeds) * steps, progress) as bar:
        learner = model
        for i, seed in enumerate(seeds):
            _seed(seed)
            before, learner = learner, make_fresh_model() if i else _copy(model)
            if learner is before or learner is model:
                raise DyndiagError(
                    "make_fresh_model must make a new network at each call, but it returned one "
                    "that was there before: build it inside, as in lambda: Net()"
                )
            learner.to(_device(model)).train()
            parameters = [p for p in learner.parameters() if p.requires_grad]
            optimizer = make_optimizer(parameters)
            courses.append(_train(learner, optimizer, loss_fn, batches, steps, bar))
            losses.append(_loss(learner, loss_fn, batches))
    return Plasticity(losses[0], tuple(losses[1:]), steps, courses[0], tuple(courses[1:]))


def _train(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    steps: int,
    bar: Any,
) -> tuple[float, ...]:
    seen: list[Tensor] = []
    for step in range(steps):
        loss = loss_fn(model, batches[step % len(batches)])
        check_scalar_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach().reshape(()))
        bar.update()
    return tuple(torch.stack(seen).tolist())


def _loss(model: nn.Module, loss_fn: LossFunction, batches: Sequence[Batch]) -> float:
    """Mean over all examples, in eval mode."""
    model.eval()
    sizes = [batch_size(batch) for batch in batches]
    total = math.fsum(
        size * loss_fn(model, batch).item() for size, batch in zip(sizes, batches, strict=True)
    )
    return total / sum(sizes)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps results with a graph (an attention map, a loss)."""
    kept = [tensor for module in model.modules() for tensor in tensors(vars(module))]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    return copy.deepcopy(model, memo)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _seed(seed: int) -> None:
    """All global streams, which the guard puts back."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # else it would be remembered until CUDA starts
        torch.cuda.manual_seed_all(seed)


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, desc="plasticity", unit="step", delay=2, leave=False, disable=not progress
    )
