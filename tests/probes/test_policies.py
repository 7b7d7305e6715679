"""Entropy, clipping and distance of a policy, from a trainer's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from torch import Tensor, nn

import dyndiag
from dyndiag.errors import DyndiagError
from dyndiag.probes.language.policies import PolicySignals, policy_statistics, token_entropy

F64 = torch.float64


def floats(seen: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in seen.items()}


def statistics(**tensors: Any) -> dict[str, float]:
    return floats(policy_statistics(**tensors))


def random(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


# Entropy.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 50_000), (40_000, 11)])
def test_entropy_of_every_token(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = (3 * random(*shape, dtype=F64)).to(dtype)
    expected = scipy_entropy(logits.double().softmax(-1).numpy(), axis=-1)
    found = token_entropy(logits)
    assert found.shape == shape[:-1]
    assert found.double().numpy() == pytest.approx(expected, abs=1e-12 if dtype == F64 else 2e-5)


def test_entropy_where_tokens_are_ruled_out_and_where_logits_are_broken() -> None:
    logits = torch.tensor(
        [[0.0, 0.0, -math.inf], [7.0, -math.inf, -math.inf], [0.0, math.nan, 0.0]]
    )
    assert token_entropy(logits).tolist() == pytest.approx(
        [math.log(2), 0.0, math.nan], nan_ok=True
    )
    assert token_entropy(logits.half())[0].item() == pytest.approx(math.log(2))
    assert token_entropy(torch.tensor([[0, 0, 0, 0]])).item() == pytest.approx(math.log(4))
    assert token_entropy(torch.empty(0, 4)).shape == (0,)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), classes=st.integers(2, 9))
def test_entropy_moves_by_its_first_order_formula(seed: int, classes: int) -> None:
    """dH = −Σ p (ln p + H) dz; and for a policy-gradient step dz = ηA(1_a − p) on action a."""
    z, dz = random(2, classes, seed=seed, dtype=F64)
    log_p = z.log_softmax(-1)
    p, entropy = log_p.exp(), token_entropy(z)
    step = 1e-6

    def derivative(direction: Tensor) -> float:
        ahead, behind = token_entropy(z + step * direction), token_entropy(z - step * direction)
        return ((ahead - behind) / (2 * step)).item()

    assert derivative(dz) == pytest.approx(-(p * (log_p + entropy) * dz).sum().item(), abs=1e-8)
    taken = torch.eye(classes, dtype=F64)[seed % classes]
    expected = -(p * (log_p + entropy) * (taken - p)).sum().item()
    assert derivative(taken - p) == pytest.approx(expected, abs=1e-8)


def test_mean_over_the_tokens_that_count() -> None:
    entropy = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 7.0]])
    for mask in (torch.tensor([[1, 1, 0], [1, 0, 0]]), entropy < 5):
        assert statistics(entropy=entropy, mask=mask) == {"policy/entropy": pytest.approx(7 / 3)}
    nothing = statistics(entropy=entropy, mask=torch.zeros(2, 3))
    assert math.isnan(nothing["policy/entropy"])


def test_from_logits_as_from_entropies() -> None:
    logits, mask = random(4, 6, 9), random(4, 6, seed=1) > 0
    assert statistics(logits=logits, mask=mask) == pytest.approx(
        statistics(entropy=token_entropy(logits), mask=mask)
    )


# Ratios and clipping.


def test_which_tokens_are_clipped() -> None:
    """Truth table: above 1 + high with A > 0, below 1 − low with A < 0; masked ones never."""
    ratio = torch.tensor([[1.5, 1.25, 0.5, 0.9], [1.5, 0.5, 0.75, 9.0]], dtype=F64)
    tensors = {
        "log_probabilities": ratio.log() - 3,
        "old_log_probabilities": torch.full((2, 4), -3.0, dtype=F64),
        "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "clip_range": (0.2, 0.28),
    }
    by_sequence = statistics(**tensors, advantages=torch.tensor([1.0, -1.0]))
    assert by_sequence == pytest.approx(
        {
            "policy/ratio_max": 1.5,
            "policy/clip_share": 3 / 7,
            "policy/clip_share_low": 2 / 7,  # .5 and .75 of the second sequence
            "policy/clip_share_high": 1 / 7,  # 1.5 of the first: 1.25 < 1.28
        }
    )
    spread = torch.tensor([[1.0], [-1.0]])
    assert statistics(**tensors, advantages=spread) == by_sequence
    assert statistics(**tensors, advantages=spread.expand(2, 4)) == by_sequence
    by_token = statistics(**tensors, advantages=torch.tensor([[0.0, 0, -1, 0], [1.0, 0, 0, 1]]))
    assert by_token["policy/clip_share_low"] == pytest.approx(1 / 7)
    assert by_token["policy/clip_share_high"] == pytest.approx(1 / 7)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), low=st.floats(0, 0.9), high=st.floats(0, 2))
def test_clipped_tokens_are_those_without_a_gradient(seed: int, low: float, high: float) -> None:
    """PPO's objective min(rA, clip(r)A) as the oracle: its derivative is zero just there."""
    log_ratio, advantages = random(2, 5, 8, seed=seed, dtype=F64)
    log_ratio.requires_grad_(True)
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    found = statistics(
        log_probabilities=log_ratio,
        old_log_probabilities=torch.zeros(5, 8, dtype=F64),
        advantages=advantages,
        clip_range=(low, high),
    )
    assert found["policy/clip_share"] == pytest.approx((gradient == 0).double().mean().item())
    parts = found["policy/clip_share_low"] + found["policy/clip_share_high"]
    assert found["policy/clip_share"] == pytest.approx(parts)
    assert found["policy/ratio_max"] == pytest.approx(ratio.max().item())


# Distance from the reference.

POLICY, REFERENCE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=F64).log()


def test_both_estimators_have_the_divergence_as_their_mean() -> None:
    """Tokens just as often as the policy draws them: KL = Σ π ln(π/π_ref) = .085123."""
    tokens = torch.tensor([0] * 7 + [1] * 2 + [2])
    found = statistics(
        log_probabilities=POLICY[tokens], reference_log_probabilities=REFERENCE[tokens]
    )
    assert found["policy/kl_reference"] == pytest.approx(0.085123, abs=5e-7)
    assert found["policy/kl_reference_k1"] == pytest.approx(0.085123, abs=5e-7)
    d = REFERENCE - POLICY
    assert math.isclose((POLICY.exp() * -d).sum().item(), found["policy/kl_reference"])


def test_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    """Sequences whose tokens are all alike: the error must count sequences, not tokens."""
    g = torch.Generator().manual_seed(0)
    runs, inside = 400, 0
    for _ in range(runs):
        draws = torch.multinomial(POLICY.exp(), 64, True, generator=g)[:, None].expand(64, 5)
        found = statistics(
            log_probabilities=POLICY[draws], reference_log_probabilities=REFERENCE[draws]
        )
        error = found["policy/kl_reference_k1.error"]
        inside += abs(found["policy/kl_reference_k1"] - 0.085123) < 1.96 * error
    # binomial: 95 % of 400 ± 3 · 4.4; with tokens for sequences it would be about 62 %
    assert inside >= 0.95 * runs - 3 * math.sqrt(runs * 0.95 * 0.05)


def test_standard_error_of_equally_long_sequences_is_that_of_their_means() -> None:
    now, reference = random(2, 6, 4, dtype=F64)
    found = statistics(log_probabilities=now, reference_log_probabilities=reference)
    means = (now - reference).mean(dim=1)
    assert found["policy/kl_reference_k1.error"] == pytest.approx(
        means.std().item() / math.sqrt(6), rel=1e-9
    )
    alone = statistics(log_probabilities=now[:1], reference_log_probabilities=reference[:1])
    assert math.isnan(alone["policy/kl_reference.error"])


def test_a_token_that_the_reference_rules_out_is_infinitely_far() -> None:
    now, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -math.inf]])
    found = statistics(log_probabilities=now.half(), reference_log_probabilities=reference.half())
    assert found["policy/kl_reference"] == math.inf
    assert found["policy/kl_reference_k1"] == math.inf


# Steps.


def test_change_against_the_step_before() -> None:
    signals = PolicySignals()
    seen = [floats(signals(entropy=torch.tensor([[value]]))) for value in (2.0, 1.5, 1.75)]
    assert seen[0] == {"policy/entropy": 2.0}
    assert [one["policy/entropy_change"] for one in seen[1:]] == [-0.5, 0.25]


def test_micro_batches_of_a_step_are_pooled() -> None:
    signals = PolicySignals(clip_range=(0.2, 0.2))
    now, old, reference, advantages = random(4, 6, 5, dtype=F64)
    mask = random(6, 5, seed=1) > 0
    tensors = {
        "log_probabilities": now, "old_log_probabilities": old, "advantages": advantages,
        "reference_log_probabilities": reference, "mask": mask, "entropy": old.exp(),
    }  # fmt: skip
    signals(step=0, entropy=torch.ones(1, 1))
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        seen = floats(signals(step=1, **{name: tensor[part] for name, tensor in tensors.items()}))
    whole = statistics(**tensors, clip_range=(0.2, 0.2))
    assert seen == pytest.approx({**whole, "policy/entropy_change": whole["policy/entropy"] - 1})


# What users get wrong.


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "nothing to measure of the policy: pass logits, entropy or log_prob"),
        ({"log_probabilities": torch.zeros(2, 3)}, "pass logits or entropy, or log_prob"),
        (
            {"log_probabilities": torch.zeros(2, 3), "entropy": torch.zeros(2, 4)},
            r"entropy must .* shape \(2, 3\) as log_probabilities has, but its shape is \(2, 4\)",
        ),
        (
            {"logits": torch.zeros(2, 4, 5), "mask": torch.ones(2, 3)},
            r"logits must have one number .* \(2, 3\) as mask has, but its shape is \(2, 4\)",
        ),
        (
            {
                "log_probabilities": torch.zeros(2, 3),
                "old_log_probabilities": torch.zeros(2, 3),
                "advantages": torch.zeros(3),
                "clip_range": (0.2, 0.2),
            },
            r"advantages must .* \(2, 3\), .* or \(2,\), .* but their shape is \(3,\)",
        ),
        (
            {
                "log_probabilities": torch.zeros(2, 3),
                "old_log_probabilities": torch.zeros(2, 3),
                "advantages": torch.zeros(2),
                "clip_range": (-0.2, 0.2),
            },
            r"clip_range is \(low, high\)",
        ),
    ],
)
def test_wrong_shapes_are_told_in_one_sentence(tensors: Mapping[str, Any], says: str) -> None:
    with pytest.raises(DyndiagError, match=says):
        policy_statistics(**tensors)


def test_an_empty_batch_has_no_mean() -> None:
    nothing = torch.empty(0, 3)
    found = statistics(
        entropy=nothing, log_probabilities=nothing, old_log_probabilities=nothing,
        reference_log_probabilities=nothing, advantages=nothing[:, 0], clip_range=(0.2, 0.2),
    )  # fmt: skip
    assert all(math.isnan(value) for value in found.values()) and len(found) == 9


def test_no_graph_is_kept_and_nothing_is_changed() -> None:
    logits = random(2, 3, 4).requires_grad_(True)
    before = logits.detach().clone()
    for value in policy_statistics(logits=2 * logits).values():
        assert not value.requires_grad and value.ndim == 0
    assert torch.equal(logits, before) and logits.grad is None


def test_no_number_is_asked_of_the_device() -> None:
    """Tensors without data: whoever asks for a number of them fails."""
    signals = PolicySignals(clip_range=(0.2, 0.28))
    tokens = torch.empty(4, 6, device="meta")
    for step in (0, 1, 1):
        seen = signals(
            step=step, log_probabilities=tokens, old_log_probabilities=tokens,
            reference_log_probabilities=tokens, advantages=tokens[:, 0], mask=tokens,
            logits=torch.empty(4, 6, 50, device="meta"),
        )  # fmt: skip
    assert len(seen) == 10 and all(value.is_meta for value in seen.values())
    with pytest.raises(RuntimeError):
        seen["policy/entropy"].item()


# A policy that is trained.


class Policy(nn.Module):
    """Next-token logits of a bigram model."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.scores = nn.Embedding(vocabulary + 1, vocabulary)
        nn.init.zeros_(self.scores.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(tokens)


def reinforce(folder: Path, bonus: float, rounds: int = 60, vocabulary: int = 8) -> dyndiag.Run:
    """Two PPO steps on each round of sequences; the reward is the mean rank of their tokens."""
    policy = Policy(vocabulary)
    optimizer = torch.optim.SGD(policy.parameters(), lr=4.0)
    g = torch.Generator().manual_seed(0)
    signals = PolicySignals(clip_range=(0.2, 0.28))
    with dyndiag.Monitor(
        policy, optimizer, lambda model, batch: model(batch).logsumexp(-1).mean(),
        run=folder, tensorboard=False, budget=1e-9,
    ) as monitor:  # fmt: skip
        for _ in range(rounds):
            tokens = torch.full((32, 1), vocabulary)
            with torch.no_grad():
                for _ in range(5):
                    p = policy.scores(tokens[:, -1]).softmax(-1)
                    tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=g)], dim=1)
            reward = tokens[:, 1:].double().mean(dim=1) / vocabulary
            advantages = (reward - reward.mean()) / (reward.std() + 1e-6)
            old: Tensor | None = None
            for _ in range(2):
                logits = policy(tokens[:, :-1])
                log_p = logits.log_softmax(-1)
                taken = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
                old = taken.detach() if old is None else old
                ratio, advantage = (taken - old).exp(), advantages[:, None]
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                entropy = -(log_p.exp() * log_p).sum(-1)
                loss = -gain.mean() - bonus * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.record(
                    signals(
                        logits=logits, log_probabilities=taken, old_log_probabilities=old,
                        reference_log_probabilities=torch.full_like(taken, -math.log(vocabulary)),
                        advantages=advantages,
                    )
                )  # fmt: skip
                monitor.step(loss=loss, batch=tokens[:, :-1])
    return dyndiag.Run(folder)


def test_entropy_collapses_without_a_bonus_and_stays_with_one(tmp_path: Path) -> None:
    collapsed = reinforce(tmp_path / "collapse", bonus=0.0)
    entropy = collapsed["policy/entropy"]
    assert entropy.iloc[0] == pytest.approx(math.log(8))
    (event,) = [e for e in collapsed.event_list() if e.kind.startswith("entropy")]
    assert event.kind == "entropy_collapse" and event.end is None and event.confidence == 0.95
    assert entropy.iloc[-1] < 0.1 * entropy.iloc[:10].mean()
    assert collapsed["policy/kl_reference_k1"].iloc[-1] > 0.9 * math.log(8)  # certain: ln 8
    assert collapsed["policy/clip_share"].max() > 0.05
    assert (collapsed["policy/clip_share"].iloc[::2] == 0).all()  # on the policy: the ratio is 1

    kept = reinforce(tmp_path / "bonus", bonus=0.5)
    assert kept["policy/entropy"].min() > 0.5 * math.log(8)
    assert not [e for e in kept.event_list() if e.kind.startswith("entropy")]
