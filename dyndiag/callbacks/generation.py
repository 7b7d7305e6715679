"""Record the instability of what `generate()` writes: `logits_processor=[processor]`."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.probes.language.generation import TraceInstability, check_settings, instability_of
from dyndiag.probes.language.token_log_probabilities import top_log_probabilities

try:
    from transformers import LogitsProcessor
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "the Hugging Face logits processor needs one more package: "
        "pip install 'dyndiag[huggingface]'"
    ) from missing


class InstabilityLogitsProcessor(LogitsProcessor):
    """Keeps the k likeliest tokens of every decoding step; changes nothing in the scores.

        processor = InstabilityLogitsProcessor(model.generation_config.eos_token_id)
        output = model.generate(**inputs, logits_processor=[processor])
        strengths = [trace.strength for trace in processor.result(output)]

    `eos_token_id`: what ends a sequence (one token or several; None if nothing does): steps after
    it, where a batch waits for its longest sequence, do not belong to the trace. `k`, `weight`:
    see `trace_instability`.

    The trace is of the scores as they come here: before temperature, top-k and top-p, after the
    processors that generation itself puts first (repetition penalty, minimum length). One
    `generate()` at a time: another one begins anew. Greedy search, sampling and beam search;
    not assisted decoding, where the assistant's scores come here too.

    Cost a step: one top-k and one logsumexp of the scores; keeps 2 k numbers a sequence and step
    on the device. No host sync before the traces are asked for.
    """

    def __init__(
        self, eos_token_id: int | list[int] | None, k: int = 20, weight: float = 1.0
    ) -> None:
        check_settings(k, weight)
        ends = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
        self._ends = [token for token in ends if token is not None]
        self._k, self._weight = k, weight
        self._factors = torch.empty(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(0)
        self._begin(torch.empty(0, 0, dtype=torch.int64), 0)

    def _begin(self, input_ids: Tensor, vocabulary: int) -> None:
        self._last, self._prompt, self._vocabulary = input_ids, input_ids.shape[1], vocabulary
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each step and row: a hash of what is written so far, tokens, log-probabilities."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        follows = (len(self._last), self._last.shape[1] + 1) == tuple(input_ids.shape)
        if not (self._steps and follows):
            self._begin(input_ids, scores.shape[-1])
        with torch.no_grad():
            tokens, log_p = top_log_probabilities(scores, self._k)
            self._steps.append((self._hashed(input_ids).sum(dim=1), tokens, log_p))
        self._last = input_ids.clone()
        return scores

    @property
    def traces(self) -> list[TraceInstability]:
        """One trace for each sequence of the last `generate()`, in order.

        With beam search these are the beams that were open at the last step, not all of which
        are returned: see `result`.
        """
        return self.result(self._last)

    def result(self, sequences: Tensor) -> list[TraceInstability]:
        """The traces of these sequences: what `generate()` returned, prompt included.

        Each step's distribution is looked up by what the sequence had written until then (in the
        nearest row), so that a beam's trace is that of the sequence it became, whichever row it
        stood in. A trace ends with the step that chose the end token, or where no row goes on.
        """
        written = self._hashed(sequences.to(self._last.device)).cumsum(dim=1).cpu()
        written = torch.cat([torch.zeros_like(written[:, :1]), written], dim=1)[:, self._prompt :]
        hashes = [known.cpu() for known, _, _ in self._steps]
        rows_each = len(self._last) / max(1, len(sequences))
        return [
            self._trace(ids[self._prompt :], _nearest(hashes, written[i], i * rows_each))
            for i, ids in enumerate(sequences.cpu())
        ]

    def _trace(self, tokens: Tensor, rows: list[int]) -> TraceInstability:
        ends = [i + 1 for i, token in enumerate(tokens.tolist()) if token in self._ends]
        rows = rows[: ends[0]] if ends else rows
        steps = list(zip(rows, self._steps, strict=False))
        if not steps:
            none = torch.empty(0, 1, dtype=torch.int64)
            return instability_of(none, none.double(), self._weight, self._vocabulary)
        listed = torch.stack([found[row] for row, (_, found, _) in steps])
        log_p = torch.stack([values[row] for row, (_, _, values) in steps])
        return instability_of(listed, log_p, self._weight, self._vocabulary)

    def _hashed(self, ids: Tensor) -> Tensor:
        """Numbers whose sum over a beginning (it wraps around) is a 64-bit hash of it."""
        missing = ids.shape[1] - len(self._factors)
        if missing > 0:
            size = (max(1024, missing),)
            more = torch.randint(-(2**62), 2**62, size, generator=self._generator)
            self._factors = torch.cat([self._factors, more.to(self._factors.device)])
        self._factors = self._factors.to(ids.device)
        return (ids.long() + 1) * self._factors[: ids.shape[1]]


def _nearest(hashes: list[Tensor], written: Tensor, place: float) -> list[int]:
    """At each step the row with this hash that is nearest to `place`, as long as there is one."""
    rows: list[int] = []
    for known, wanted in zip(hashes, written, strict=False):
        found = (known == wanted).nonzero().flatten().tolist()
        if not found:
            break
        rows.append(min(found, key=lambda row: abs(row - place)))
    return rows
