"""What a finding is, and the words and looks that all kinds share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dyndiag.reports import words
from dyndiag.reports.contents import Contents, Estimates
from dyndiag.reports.figures import Figure
from dyndiag.values import Event

COLOURED = (
    "progressive_sharpening", "edge_of_stability", "loss_spike", "divergence", "non_finite",
    "stability_gap",
)  # fmt: skip
URGENCY = {"act": "Act on this", "look": "Look at this", "know": "Worth knowing"}
SURE = ((0.95, "certain", "●●●"), (0.8, "likely", "●●○"), (0.5, "tentative", "●○○"))


@dataclass(frozen=True)
class Source:
    authors: str
    title: str
    year: int
    link: str


COHEN = Source(
    "Cohen, Kaur, Li, Kolter, Talwalkar",
    "Gradient descent on neural networks typically occurs at the edge of stability",
    2021,
    "https://arxiv.org/abs/2103.00065",
)
DAMIAN = Source(
    "Damian, Nichani, Lee", "Self-stabilization", 2022, "https://arxiv.org/abs/2209.15594"
)
WORTSMAN_PROXIES = Source(
    "Wortsman et al.",
    "Small-scale proxies for large-scale Transformer training instabilities",
    2023,
    "https://arxiv.org/abs/2309.14322",
)
BAI = Source(
    "Bai et al.",
    "Adaptive preconditioners trigger loss spikes in Adam",
    2025,
    "https://arxiv.org/abs/2506.04805",
)
WORTSMAN_LOW = Source(
    "Wortsman et al.",
    "Stable and low-precision training for large-scale vision-language models",
    2023,
    "https://arxiv.org/abs/2304.13013",
)
DE_LANGE = Source(
    "De Lange, van de Ven, Tuytelaars",
    "Continual evaluation for lifelong learning: identifying the stability gap",
    2023,
    "https://arxiv.org/abs/2205.13452",
)
HESS = Source(
    "Hess, Tuytelaars, van de Ven",
    "Two complementary perspectives to continual learning",
    2023,
    "https://arxiv.org/abs/2311.04898",
)


@dataclass(frozen=True)
class Finding:
    """One thing to tell. `sentence` is what the verdict would say of it."""

    event: Event
    urgency: str
    """act, look or know."""
    title: str
    when: str
    sure: str
    dots: str
    reason: str
    what: str
    people: tuple[str, ...]
    sources: tuple[Source, ...]
    figures: tuple[Figure, ...]
    window: tuple[int, int]
    """Steps to zoom to."""
    chapter: str
    sentence: str
    numbers: str
    """One or two sentences of numbers, for below the verdict."""
    label: str
    short: str
    notches: tuple[int, ...] = ()
    id: str = ""

    @property
    def urgency_text(self) -> str:
        return URGENCY[self.urgency]

    @property
    def kind_text(self) -> str:
        return self.event.kind.replace("_", " ")

    @property
    def colour(self) -> str:
        """The name of the event's colour."""
        return self.event.kind if self.event.kind in COLOURED else "other"


@dataclass(frozen=True)
class Told:
    """An event with what is told inside it: the jumps of the loss that it explains."""

    event: Event
    inside: tuple[Event, ...] = ()


def value(event: Event, key: str, missing: float = math.nan) -> float:
    """A number of the event's details; `missing` if it is not there, or is no number."""
    found = event.details.get(key)
    return float(found) if isinstance(found, int | float) else missing


def text(event: Event, key: str) -> str:
    found = event.details.get(key)
    return found if isinstance(found, str) else ""


def end_of(c: Contents, event: Event) -> int:
    """The event's end, or where the run stands."""
    return c.last if event.end is None else event.end


def span(c: Contents, event: Event) -> str:
    """When, in steps.

    A closed event: "steps 987 to 2,600"; an open one says so.
    """
    if event.end is not None:
        if event.end == event.start:
            return f"step {words.steps(event.start)}"
        return f"steps {words.steps(event.start)} to {words.steps(event.end)}"
    still = "still open" if c.alive else "still open when the run ended"
    return f"from step {words.steps(event.start)}, {still}"


def around(
    c: Contents, start: int, end: int, share: float = 0.35, least: int = 30
) -> tuple[int, int]:
    """Steps start … end with some room on both sides, within the run."""
    room = max(least, round(share * (end - start)))
    low, high = max(c.first, start - room), min(c.last, end + room)
    return (low, high) if high > low else (low, low + 1)


def surety(event: Event, best: str = "certain") -> tuple[str, str]:
    """Word and dots for the event's confidence, at most `best`."""
    names = [name for _, name, _ in SURE]
    for floor, word, dots in SURE:
        if event.confidence >= floor and names.index(word) >= names.index(best):
            return word, dots
    return SURE[-1][1], SURE[-1][2]


def statuses(c: Contents, name: str, start: int, end: int) -> tuple[int, int, int]:
    """How many samples of an estimate in start … end are certified, provisional, not converged;
    values without a status count as certified, because they are exact."""
    one = c.get(name)
    if one is None:
        return (0, 0, 0)
    if not isinstance(one, Estimates):
        return (len(one.within(start, end)), 0, 0)
    letters = one.statuses(start, end)
    return (letters.count("c"), letters.count("p"), letters.count("o"))


def judged(c: Contents, name: str, start: int, end: int) -> np.ndarray:
    """Values of an estimate in start … end that may be judged: certified or provisional."""
    one = c.get(name)
    if one is None:
        return np.empty(0)
    values = one.within(start, end)
    if isinstance(one, Estimates):
        letters = np.array(list(one.statuses(start, end)))
        values = values[letters != "o"] if len(letters) else values
    return values[np.isfinite(values)]


def first_and_last(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)


def evidence(*candidates: Figure | None) -> tuple[Figure, ...]:
    """Those figures that there is data for."""
    return tuple(figure for figure in candidates if figure is not None)


def safe(name: object, most: int = 60) -> str:
    """A name from the run, isolated, so that it cannot turn the sentence around it."""
    shown = str(name)
    if len(shown) > most:
        shown = shown[: most - 1] + "…"
    return f"\u2068{shown}\u2069" if any(ord(ch) > 0x58F for ch in shown) else shown


def module(name: str) -> str:
    """A module in a sentence; one that is only a number (of a `Sequential`) is said to be one.

    >>> module("blocks.0.mlp"), module("0"), module("3.1")
    ('blocks.0.mlp', 'module 0', 'module 3.1')
    """
    return safe(name) if any(ch.isalpha() for ch in name) else f"module {safe(name)}"


def details_text(details: Mapping[str, object]) -> str:
    """Details as they are, for a kind that the report does not know."""
    parts = []
    for key, found in details.items():
        shown = words.number(float(found)) if isinstance(found, int | float) else safe(found)
        parts.append(f"{key.replace('_', ' ')} {shown}")
    return ", ".join(parts)
