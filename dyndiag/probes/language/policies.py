"""A policy in RL fine-tuning: entropy, clipping, distance from the reference.

The trainer has every tensor at hand, so nothing is run; its values go to `monitor.record`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyndiag.errors import DyndiagError
from dyndiag.probes.language.token_means import (
    Tokens,
    largest,
    mean,
    real,
    standard_error,
    sums_over,
)

_ENTROPY, _LARGEST = "policy/entropy", "policy/ratio_max"
_NUMBERS = 2**16
"""Logits worked on at a time, so that a block stays in the cache of a CPU: at a vocabulary of
50,000 whole arrays cost 3.5 times as much."""
_NUMBERS_OF_AN_ACCELERATOR = 2**25
"""Few enough to hold besides the logits, enough to keep it busy."""


class PolicySignals:
    """Calls `policy_statistics` at every step and adds `policy/entropy_change`.

    The change is this step's mean entropy less that of the step before (nats). It is also that
    of the prompts: compare steps on the same prompts, or look at its mean over many. Calls with
    the same `step` (the micro-batches of a gradient accumulation) are pooled: each returns the
    statistics of the step so far, so the last one recorded is the whole step's. Without `step`
    every call is a step of its own.

    In TRL's `GRPOTrainer` (run with TRL 1.16.0), with the Hugging Face callback. The tensors come
    from the method that computes them for the loss, the last thing it does in `compute_loss`::

        callback = DyndiagCallback(run="runs/x")

        class Trainer(GRPOTrainer):
            signals = PolicySignals(clip_range=(0.2, 0.28))  # epsilon, epsilon_high

            def _get_per_token_logps_and_entropies(self, *args, **kwargs):
                self.per_token = super()._get_per_token_logps_and_entropies(*args, **kwargs)
                return self.per_token

            def compute_loss(self, model, inputs, *args, **kwargs):
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                log_probabilities, entropy, *_ = self.per_token
                if model.training:  # not in an evaluation
                    callback.monitor.record(
                        self.signals(
                            step=self.state.global_step,
                            log_probabilities=log_probabilities,
                            entropy=entropy,
                            old_log_probabilities=inputs.get("old_per_token_logps"),
                            reference_log_probabilities=inputs.get("ref_per_token_logps"),
                            advantages=inputs["advantages"],
                            mask=inputs["completion_mask"],  # with tools: times "tool_mask"
                        )
                    )
                return loss

        trainer = Trainer(..., callbacks=[callback])

    Entropy and clip shares are then those that TRL logs, with tokens weighing alike over the
    micro-batches; so is the KL with `use_bias_correction_kl=False`, else TRL weighs k3 by the
    ratio. Old log-probabilities are there only where samples are used again (`num_iterations` > 1,
    or more `steps_per_generation` than are accumulated), those of the reference with `beta` > 0.
    There is no `train/loss` and no curvature in such a run: the output of TRL's model has a `.loss`
    of its own, the mean −ln π of the completions, but that is not what is trained on.

    >>> signals = PolicySignals()
    >>> _ = signals(entropy=torch.tensor([[1.0, 0.5]]))
    >>> seen = signals(entropy=torch.tensor([[0.5, 0.5]]))
    >>> {name: value.item() for name, value in seen.items()}
    {'policy/entropy': 0.5, 'policy/entropy_change': -0.25}
    """

    def __init__(self, clip_range: tuple[float, float] | None = None) -> None:
        self._clip_range = clip_range
        self._step: int | None = None
        self._sums: dict[str, Tensor] = {}
        self._before: Tensor | None = None

    def __call__(self, step: int | None = None, **tensors: Tensor | None) -> dict[str, Tensor]:
        """`tensors`: as `policy_statistics` takes them, by name."""
        sums = _sums_of(clip_range=self._clip_range, **tensors)
        if step is not None and step == self._step:
            sums = self._sums | {
                name: _pooled(name, one, self._sums[name]) if name in self._sums else one
                for name, one in sums.items()
            }
        else:
            self._before = mean(self._sums[_ENTROPY]) if _ENTROPY in self._sums else None
        self._step, self._sums = step, sums
        seen = _statistics(sums)
        if self._before is not None and _ENTROPY in sums:
            seen["policy/entropy_change"] = mean(sums[_ENTROPY]) - self._before
        return seen


def policy_statistics(
    *,
    log_probabilities: Tensor | None = None,
    old_log_probabilities: Tensor | None = None,
    reference_log_probabilities: Tensor | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    logits: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_range: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """Statistics of one batch of generated tokens, for `monitor.record`; what can be computed.

    Tensors are (batch, length), of the generated tokens alone: `log_probabilities` ln π(token) of
    the tokens that were taken, `old_…` of the policy that generated them, `reference_…` of the
    reference policy, `mask` (true or 1 where a token counts; all, without it), `advantages`
    (batch, length) or (batch,). `logits` (batch, length, vocabulary), divided by the temperature
    as the trainer does, or each token's `entropy`.

    - `policy/entropy`: mean over tokens of H = −Σ p ln p (0 … ln vocabulary, nats).
    - `policy/clip_share_low`: share of tokens with ratio < 1 − low and advantage < 0, ratio
      π/π_old = exp(ln π − ln π_old); `policy/clip_share_high`: with ratio > 1 + high and
      advantage > 0; `policy/clip_share`: both (0…1). These are the tokens whose gradient PPO's
      objective (Schulman et al. 2017, arXiv 1707.06347) cuts off. `clip_range` is (low, high):
      (0.2, 0.2) in PPO, (0.2, 0.28) in the STEER code.
    - `policy/ratio_max`: largest ratio.
    - `policy/kl_reference`: KL(π ‖ π_ref) in nats by k3 = e^d − 1 − d ≥ 0, and
      `policy/kl_reference_k1` by k1 = −d, d = ln π_ref − ln π (Schulman 2020, "Approximating KL
      divergence"): means over tokens, each with `.error`, its standard error with sequences
      (not tokens, which depend on each other) as the sample; NaN for a single sequence.

    Cost: no forward. Entropy from logits, in blocks, 2 ns a logit on a CPU core (.1 ms a token at
    a vocabulary of 50,000; a log-softmax takes as long); all else together .5 ms for 16 × 512
    tokens. No host–device sync, no graph. Cadence: every step.

    Misleads: both KL estimates are unbiased only for tokens sampled from π itself; after
    several updates on one batch, or with tokens generated at another temperature, they are not.
    k1 and k3 far apart say that the sample is too small (k3 has heavy tails) or off the policy.
    Entropy also changes with the prompts and the lengths. A clip share of 0 at the first of several
    updates on one batch is by construction: the ratio is 1. In distributed training the values are
    of this process's share of the batch.

    No token that counts: NaN. Raises DyndiagError for shapes that do not fit together.

    >>> ratio = torch.tensor([[1.5, 1.1, 0.5]])
    >>> seen = policy_statistics(
    ...     log_probabilities=ratio.log(), old_log_probabilities=torch.zeros(1, 3),
    ...     advantages=torch.tensor([1.0]), clip_range=(0.2, 0.28),
    ... )
    >>> round(seen["policy/clip_share"].item(), 4)  # 0.5 is below 0.8, but its advantage is not < 0
    0.3333
    """
    return _statistics(
        _sums_of(
            log_probabilities=log_probabilities,
            old_log_probabilities=old_log_probabilities,
            reference_log_probabilities=reference_log_probabilities,
            advantages=advantages,
            mask=mask,
            logits=logits,
            entropy=entropy,
            clip_range=clip_range,
        )
    )


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """H = −Σ p ln p of p = softmax(logits), (…, classes) → (…), nats, float32 at least.

    Logits of −∞ (tokens that are ruled out) count as p = 0. A block of rows at a time: what is
    held besides the result is one block.

    >>> token_entropy(torch.zeros(2, 4)).tolist()  # ln 4
    [1.3862943649291992, 1.3862943649291992]
    """
    numbers = _NUMBERS if logits.device.type == "cpu" else _NUMBERS_OF_AN_ACCELERATOR
    rows = logits.detach().reshape(-1, logits.shape[-1])
    parts = []
    for block in rows.split(max(1, numbers // max(1, rows.shape[-1]))):
        # p · ln p is 0 at p = 0: any finite ln p does, where −∞ would give NaN.
        log_p = real(block).log_softmax(dim=-1).clamp_min_(-1e4)
        parts.append(-torch.linalg.vecdot(log_p.exp(), log_p))
    return torch.cat(parts).clamp_min_(0.0).reshape(logits.shape[:-1])


@torch.no_grad()
def _sums_of(
    *,
    log_probabilities: Tensor | None = None,
    old_log_probabilities: Tensor | None = None,
    reference_log_probabilities: Tensor | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    logits: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_range: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """What each statistic is made of, by its series: `sums_over`, or the largest value."""
    given = "logits" if entropy is None else "entropy"
    if entropy is None and logits is not None:
        entropy = token_entropy(logits)
    tokens = Tokens.like(log_probabilities=log_probabilities, mask=mask, **{given: entropy})
    counts = tokens.mask(mask)
    found: dict[str, Tensor] = {}
    if entropy is not None:
        found[_ENTROPY] = sums_over(tokens.rows(given, entropy), counts)
    if log_probabilities is not None:
        now = tokens.rows("log_probabilities", log_probabilities)
        if old_log_probabilities is not None:
            old = tokens.rows("old_log_probabilities", old_log_probabilities)
            ratio = (now - old).exp()
            found[_LARGEST] = largest(ratio, counts)
            if advantages is not None and clip_range is not None:
                found |= _clipped(ratio, tokens.advantages(advantages), counts, clip_range)
        if reference_log_probabilities is not None:
            d = tokens.rows("reference_log_probabilities", reference_log_probabilities) - now
            found["policy/kl_reference"] = sums_over(d.expm1() - d, counts)
            found["policy/kl_reference_k1"] = sums_over(-d, counts)
    if not found:
        raise DyndiagError(
            "nothing to measure of the policy: pass logits or entropy, or log_probabilities with "
            "old_log_probabilities or reference_log_probabilities"
        )
    return found


def _clipped(
    ratio: Tensor, advantages: Tensor, counts: Tensor, clip_range: tuple[float, float]
) -> dict[str, Tensor]:
    low, high = clip_range
    if not (low >= 0 and high >= 0):
        raise DyndiagError(
            f"clip_range is (low, high), how far the ratio may go below and above 1, as in "
            f"(0.2, 0.28), but it is {clip_range}"
        )
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    return {
        "policy/clip_share": sums_over((below | above).double(), counts),
        "policy/clip_share_low": sums_over(below.double(), counts),
        "policy/clip_share_high": sums_over(above.double(), counts),
    }


def _pooled(name: str, one: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(one, other) if name == _LARGEST else one + other


def _statistics(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name, one in sums.items():
        if name == _LARGEST:
            seen[name] = one.where(one != -torch.inf, torch.nan)
            continue
        seen[name] = mean(one)
        if "kl" in name:
            seen[f"{name}.error"] = standard_error(one)
    return seen
