"""The logits processor in the real generate()."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndiag.probes.language.generation import TraceInstability, trace_instability

transformers = pytest.importorskip("transformers")

from dyndiag.callbacks.generation import InstabilityLogitsProcessor  # noqa: E402

END, PAD, LENGTH, PROMPT = 3, 5, 24, 4


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def generate(model: Any, processor: Any = None, prompts: int = 3, **options: Any) -> Tensor:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 29, (prompts, PROMPT), generator=g)
    torch.manual_seed(7)
    processors = [] if processor is None else [processor]
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH,
        logits_processor=transformers.LogitsProcessorList(processors), **options,
    )  # fmt: skip
    return output


@torch.no_grad()
def truth(model: Any, sequence: Tensor) -> TraceInstability:
    """The trace of one finished sequence by one forward over it."""
    written = sequence[PROMPT:].tolist()
    steps = written.index(END) + 1 if END in written else len(written)
    logits = model(sequence[None]).logits[0, PROMPT - 1 : PROMPT - 1 + steps]
    return trace_instability(logits)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 7},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 4},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_changes_and_the_traces_are_the_sequences(model: Any, strategy: str) -> None:
    options = STRATEGIES[strategy]
    alone = generate(model, **options)
    after_alone = torch.get_rng_state()
    processor = InstabilityLogitsProcessor(model.generation_config.eos_token_id)
    sequences = generate(model, processor, **options)
    assert torch.equal(sequences, alone)
    assert torch.equal(torch.get_rng_state(), after_alone)
    traces = processor.result(sequences)
    assert len(traces) == len(sequences)
    for trace, sequence in zip(traces, sequences, strict=True):
        wanted = truth(model, sequence)
        assert trace.steps == wanted.steps
        for name in ("instability", "jsd", "entropy", "lower_bound", "upper_bound"):
            assert getattr(trace, name) == pytest.approx(getattr(wanted, name), abs=2e-4), name
    if "beams" not in strategy:
        own = processor.traces
        assert [trace.steps for trace in own] == [trace.steps for trace in traces]
        for one, other in zip(own, traces, strict=True):
            assert np.array_equal(one.instability, other.instability)


def test_the_cases_above_hold_early_ends_and_exchanged_beams(model: Any) -> None:
    ends = [END in row[PROMPT:-1].tolist() for row in generate(model, **STRATEGIES["several"])]
    assert any(ends)
    assert not all(ends)
    seen: list[Tensor] = []

    class Rows(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids.clone())
            return scores

    generate(model, Rows(), **STRATEGIES["beams"])
    followed = [torch.equal(now[:, :-1], before) for before, now in pairwise(seen)]
    assert not all(followed)


def test_scores_come_back_as_the_same_object() -> None:
    processor = InstabilityLogitsProcessor(None, k=3)
    scores = torch.randn(2, 9).half()
    scores[0, 0], scores[1, :8] = -torch.inf, -torch.inf
    before = scores.clone()
    assert processor(torch.zeros(2, 1, dtype=torch.long), scores) is scores
    assert torch.equal(scores, before)


def test_a_second_generation_begins_anew(model: Any) -> None:
    processor = InstabilityLogitsProcessor(END, k=5, weight=0.5)
    generate(model, processor, do_sample=True)
    sequences = generate(model, processor, prompts=2)
    again = InstabilityLogitsProcessor(END, k=5, weight=0.5)
    generate(model, again, prompts=2)
    for one, other in zip(processor.result(sequences), again.traces, strict=True):
        assert np.array_equal(one.instability, other.instability)


def test_a_trace_before_any_generation_is_empty(model: Any) -> None:
    processor = InstabilityLogitsProcessor(END)
    assert processor.traces == []
    generate(model, processor, max_length=None)
    stranger = torch.zeros(1, PROMPT + 3, dtype=torch.long)
    assert processor.result(stranger)[0].steps == 0


def test_without_a_prompt_of_tokens(model: Any) -> None:
    embedded = model.get_input_embeddings()(torch.tensor([[7, 8], [9, 10]])).detach()
    processor = InstabilityLogitsProcessor(END)
    written = model.generate(
        inputs_embeds=embedded, attention_mask=torch.ones(2, 2), max_new_tokens=5,
        logits_processor=[processor],
    )  # fmt: skip
    for i, trace in enumerate(processor.result(written)):
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([[7, 8], [9, 10]])[i], written[i]])[None]).logits
        wanted = trace_instability(logits[0, 1 : 1 + trace.steps])
        assert trace.instability == pytest.approx(wanted.instability, abs=2e-4)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "dyndiag.callbacks.generation")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dyndiag\[huggingface\]'"):
        importlib.import_module("dyndiag.callbacks.generation")
