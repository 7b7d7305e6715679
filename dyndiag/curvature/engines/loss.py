"""A loss over batches as a function of the weights: the one place that runs the user's code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from dyndiag.curvature.data import chosen_parameters, fix_random_streams, pieces
from dyndiag.curvature.engines.surroundings import (
    converted,
    differentiable_checkpoints,
    standing_in,
    without_autocast,
)
from dyndiag.errors import DyndiagError
from dyndiag.guard import no_trace

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Loss:
    """Σ share · loss_fn(model, batch), and how to run it without a trace.

    With `dtype`, it runs on copies in that type: of the weights, whose derivatives are taken then,
    of the buffers, and of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Sequence[Any],
        shares: Sequence[float],
        parameters: Mapping[str, nn.Parameter],
        *,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.batches, self.shares = batches, shares
        self.parameters, self.progress = parameters, progress
        self.copied = dtype
        self.weights: list[Tensor] = list(parameters.values())
        if dtype is not None:
            self.weights = [p.detach().to(dtype).requires_grad_() for p in self.weights]
        self.size = sum(p.numel() for p in self.weights)
        self.dtype, self.device = vector_dtype(self.weights), self.weights[0].device
        self._built_at = self._state()
        _check_no_renormalising(model, parameters)

    def in_dtype(self, dtype: torch.dtype) -> Loss:
        return Loss(
            self.model,
            self.loss_fn,
            self.batches,
            self.shares,
            self.parameters,
            dtype=dtype,
            progress=self.progress,
        )

    def on(self, batch: Any) -> Loss:
        """The same loss of another batch alone."""
        return Loss(self.model, self.loss_fn, [batch], [1.0], self.parameters, dtype=self.copied)

    @contextmanager
    def running(self, substitutes: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Around every pass: no trace, full precision, one set of random masks."""
        self.require_unchanged()
        with (
            no_trace(self.model, loss_fn=self.loss_fn),
            without_autocast(),
            differentiable_checkpoints(),
            standing_in(self.model, {**self._copies(), **(substitutes or {})}),
        ):
            fix_random_streams()
            yield

    def require_unchanged(self) -> None:
        if self._state() != self._built_at:
            raise DyndiagError(
                "the parameters or the train/eval mode have changed since this operator was built: "
                "build it again at the new weights"
            )

    def each(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        """Each batch's share, and its loss: a tensor that holds one number."""
        pairs: Any = zip(self.shares, self.batches, strict=True)
        if self.progress:
            from tqdm import tqdm

            pairs = tqdm(pairs, total=len(self.batches), desc="batches", leave=False)
        for share, batch in pairs:
            yield share, partial(self._of, batch)

    def total(self, of: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
        """Σ share · of(loss), with one graph at a time. Call it while `running`."""
        total: Tensor | None = None
        for share, loss in self.each():
            term = of(loss)
            if total is None:
                total = term if share == 1.0 else term.mul_(share)
            else:
                total.add_(term, alpha=share)
        assert total is not None  # there is at least one batch
        return total

    def value_and_gradient(self, *, displaced: bool = False) -> Tensor:
        """(size + 1,): the gradient, then the loss. Call it while `running`. One gradient.

        A loss that is not finite raises; where the weights are `displaced`, it may be.
        """

        def of(loss: Callable[[], Tensor]) -> Tensor:
            value = loss() if displaced else finite(loss())
            gradient = torch.autograd.grad(value, self.weights, allow_unused=True)
            at_least_one(gradient)
            return torch.cat((flat(gradient, self.weights, self.dtype), _as_entry(value, self)))

        return self.total(of)

    def split(self, v: Tensor) -> list[Tensor]:
        """The vector as parts of the weights' shapes and dtypes."""
        sizes = [w.numel() for w in self.weights]
        return [p.view(w.shape).to(w) for p, w in zip(v.split(sizes), self.weights, strict=True)]

    def places(self, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """For `standing_in`: these in the place of the model's weights."""
        ours = zip(self.parameters.values(), self.weights, weights, strict=True)
        return {id(old): new for p, w, new in ours for old in (p, w)}

    def _of(self, batch: Any) -> Tensor:
        return one_number(self._raw(batch))

    def _raw(self, batch: Any) -> Any:
        batch = batch if self.copied is None else converted(batch, self.copied)
        return self.loss_fn(self.model, batch)

    def _copies(self) -> dict[int, Tensor]:
        if self.copied is None:
            return {}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        copies = {id(t): t.detach().to(self.copied) for t in tensors if t.is_floating_point()}
        ours = zip(self.parameters.values(), self.weights, strict=True)
        return {**copies, **{id(p): w for p, w in ours}}

    def _state(self) -> Any:
        modes = [module.training for module in self.model.modules()]
        return versions(list(self.parameters.values())), modes


def loss_over(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    parameters: str | Tensor | Iterable[str | Tensor] | None,
    *,
    micro_batch: int | None = None,
    reduction: str = "mean",
    size: Callable[[Any], int] | None = None,
    progress: bool = False,
) -> Loss:
    """The loss of the data as a function of the parameters asked for, as `hessian` takes them."""
    chosen = chosen_parameters(model, parameters)
    parts = pieces(model, loss_fn, data, micro_batch=micro_batch, reduction=reduction, size=size)
    batches, shares = zip(*parts, strict=True)
    return Loss(model, loss_fn, batches, shares, chosen, progress=progress)


def _check_no_renormalising(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    names = {id(p): name for name, p in parameters.items()}
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        if (name := names.get(id(module.weight))) is not None:
            raise DyndiagError(
                f"{name} is cut to max_norm={module.max_norm} in each forward pass, which changes "
                "the weights where the derivatives are taken: set the module's max_norm to None "
                "while you measure, or leave it out of parameters="
            )


def needs_copies(model: nn.Module) -> bool:
    """Whether weights or buffers have 16 bits, in which a product has a noise of one percent."""
    return any(t.dtype in _SIXTEEN_BITS for t in (*model.parameters(), *model.buffers()))


def in_full_precision(loss: Loss) -> tuple[Loss, str]:
    """The loss on copies of 32 bits if the model has 16 and runs in 32, and what to say of that."""
    if not needs_copies(loss.model):
        return loss, ""
    full = loss.in_dtype(loss.dtype)
    try:
        with full.running():
            full.value_and_gradient()
    except (RuntimeError, TypeError) as error:  # some of it insists on 16 bits
        why = f"for {loss.dtype} copies do not run: {first_sentence(error)}"
        return loss, f"; in the model's own 16 bits, {why}"
    return full, f"; on {loss.dtype} copies of 16-bit weights"


def first_sentence(error: Exception) -> str:
    """Of an error of torch, which may go on for a page."""
    return " ".join(re.split(r"\.\s", str(error))[0].split())[:200].rstrip(".")


def one_number(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise DyndiagError(
            f"the loss must be a tensor that holds one number, but it is a {type(loss).__name__}: "
            "return it before .item(), or the .loss of a model's output"
        )
    if loss.numel() != 1:
        raise DyndiagError(
            f"the loss must be one number, but it has shape {tuple(loss.shape)}: "
            "reduce it as your training loop does, for example with .mean()"
        )
    if not loss.requires_grad:
        raise DyndiagError(
            "the loss has no graph back to the parameters: compute it from the model's output, "
            "without no_grad() or .detach()"
        )
    return loss.reshape(())


def finite(loss: Tensor) -> Tensor:
    if not math.isfinite(loss.item()):
        raise DyndiagError(
            f"the loss must be finite to have curvature, but it is {loss.item()}: look at the "
            "batch and the weights first"
        )
    return loss


def versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Changes with every in-place change of a parameter, and when its storage is replaced."""
    return [(p._version, p.data_ptr()) for p in parameters]


def vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def flat(
    parts: Sequence[Tensor | None], parameters: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """One vector of all parts, in the parameters' order; zeros where a part is missing."""
    device = parameters[0].device
    with torch.no_grad():
        pieces = [
            torch.zeros(p.numel(), dtype=dtype, device=device)
            if part is None
            else (part.to_dense() if part.is_sparse else part).reshape(-1).to(device)
            for part, p in zip(parts, parameters, strict=True)
        ]
        return torch.cat(pieces).to(dtype)


def at_least_one(gradient: Sequence[Tensor | None]) -> None:
    if all(part is None for part in gradient):
        raise DyndiagError(
            "the loss depends on none of the trainable parameters: compute it with the model "
            "whose Hessian you ask for"
        )


def _as_entry(value: Tensor, loss: Loss) -> Tensor:
    return value.detach().reshape(1).to(device=loss.device, dtype=loss.dtype)
