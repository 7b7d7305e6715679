"""Events and contents → findings, worst first; one file an event kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dyndiag.reports import words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings.divergence import divergence
from dyndiag.reports.findings.early_overshoot import early_overshoot
from dyndiag.reports.findings.edge_of_stability import edge_of_stability
from dyndiag.reports.findings.entropy_collapse import entropy_collapse
from dyndiag.reports.findings.entropy_explosion import entropy_explosion
from dyndiag.reports.findings.finding import Finding, Told, end_of, value
from dyndiag.reports.findings.loss_spike import loss_spike
from dyndiag.reports.findings.non_finite import non_finite
from dyndiag.reports.findings.other import other
from dyndiag.reports.findings.probe_failed import probe_failed
from dyndiag.reports.findings.progressive_sharpening import progressive_sharpening
from dyndiag.reports.findings.stability_gap import stability_gap
from dyndiag.values import Event

KINDS: Mapping[str, Callable[[Told, Contents], Finding]] = {
    "progressive_sharpening": progressive_sharpening,
    "edge_of_stability": edge_of_stability,
    "early_overshoot": early_overshoot,
    "loss_spike": loss_spike,
    "divergence": divergence,
    "non_finite": non_finite,
    "stability_gap": stability_gap,
    "entropy_collapse": entropy_collapse,
    "entropy_explosion": entropy_explosion,
    "probe_failed": probe_failed,
}
ORDER = ("act", "look", "know")
MOST = 12  # findings told in full; the rest is a table
LATER = 60  # steps by which a loss that left comes before one that is no number
TENFOLD = 10  # a jump above this is no usual one at the edge of stability
UNDECIDED = 0.5  # confidence below which an event is no finding


@dataclass(frozen=True)
class Findings:
    told: tuple[Finding, ...]
    more: tuple[Finding, ...]
    """Those that only a line is given to."""
    undecided: tuple[str, ...]
    """Events with too little to go on, in words."""
    lead: str


def findings(c: Contents) -> Findings:
    """What there is to tell, worst first: by urgency, by kind, by severity, by start."""
    tellings = folded(c.events, c)
    sure = [told for told in tellings if told.event.confidence >= UNDECIDED]
    doubtful = [told.event for told in tellings if told.event.confidence < UNDECIDED]
    found = [KINDS.get(told.event.kind, other)(told, c) for told in sure]
    found.sort(key=_rank)
    found = [replace(one, id=f"finding-{i}") for i, one in enumerate(found, 1)]
    return Findings(
        told=tuple(found[:MOST]),
        more=tuple(found[MOST:]),
        undecided=_undecided(doubtful),
        lead=_lead(c, found, len(doubtful)),
    )


def _rank(finding: Finding) -> tuple[int, int, float, int]:
    kinds = list(KINDS)
    worst = ("non_finite", "divergence", "stability_gap", "loss_spike", "edge_of_stability")
    kind = finding.event.kind
    order = worst.index(kind) if kind in worst else len(worst) + (kind in kinds[-1:])
    return (ORDER.index(finding.urgency), order, -finding.event.severity, finding.event.start)


def folded(events: Sequence[Event], c: Contents) -> list[Told]:
    """Each event with those told inside it, which are no findings of their own.

    Jumps of the loss that came back, within a stay at the edge, unless they were more than tenfold
    (what stands so far above the usual ones is worth a finding whatever its cause); those at a
    switch of tasks, within a stability gap; and the jumps with which a divergence begins. A
    divergence that is a loss become NaN is told with the first non-finite value, or the other way
    round where the loss had left long before. Probes that fail on non-finite values are told with
    these.
    """
    inside: dict[int, list[Event]] = {}
    for event in events:
        host = _host(event, events, c)
        if host is not None:
            inside.setdefault(id(host), []).append(event)
    hidden = {id(event) for group in inside.values() for event in group}
    return [
        Told(event, tuple(e for e in inside.get(id(event), ()) if e.kind == "loss_spike"))
        for event in events
        if id(event) not in hidden
    ]


def _host(event: Event, events: Sequence[Event], c: Contents) -> Event | None:
    """The event in which this one is told; None if it stands for itself."""
    for other_event in events:
        if other_event is event or other_event.confidence < UNDECIDED:
            continue
        start, end = other_event.start, end_of(c, other_event)
        within = start <= event.start <= end
        if event.kind == "loss_spike":
            usual = event.end is not None and value(event, "factor", event.severity) <= TENFOLD
            switch = event.details.get("in_doubt") == "task switch"
            if other_event.kind == "edge_of_stability" and within and usual:
                return other_event
            if other_event.kind == "stability_gap" and switch and start - 30 <= event.start <= end:
                return other_event
            if other_event.kind == "divergence" and start - 60 <= event.start <= end:
                return _host(other_event, events, c) or other_event
        if (
            event.kind == "divergence"
            and other_event.kind == "stability_gap"
            and event.end is not None
            and abs(event.start - start) <= 30
        ):
            return other_event  # the loss of a new task is high at first
        if (
            event.kind == "divergence"
            and other_event.kind == "non_finite"
            and "non_finite_at" in event.details
            and event.start >= start - LATER
        ):
            return other_event
        if (
            event.kind == "non_finite"
            and other_event.kind == "divergence"
            and "non_finite_at" in other_event.details
            and start + LATER < event.start <= end
        ):
            return other_event
        if event.kind == "probe_failed" and other_event.kind == "non_finite" and within:
            return _host(other_event, events, c) or other_event
    return None


def _undecided(events: Sequence[Event]) -> tuple[str, ...]:
    most = 8
    shown = tuple(_doubt(event) for event in events[:most])
    more = len(events) - most
    return (*shown, words.count(more, "more event")) if more > 0 else shown


def _doubt(event: Event) -> str:
    kind = event.kind.replace("_", " ")
    why = event.details.get("in_doubt")
    at = f"{kind} from step {words.steps(event.start)}"
    if event.kind == "loss_spike":
        at = f"a single high loss at step {words.steps(event.start)}"
    return f"{at} ({why})" if isinstance(why, str) and why else at


def _lead(c: Contents, found: Sequence[Finding], doubtful: int) -> str:
    if not c.rows:
        return "There is nothing to judge yet."
    if not found:
        looked = "No event in " + words.count(c.last - c.first + 1, "step") + "."
        return looked if not doubtful else f"{looked} What was too unsure to tell stands below."
    many = words.capital(words.count(len(found), "event"))
    if all(one.urgency == "know" for one in found):
        harmless = {1: "a harmless one", 2: "neither of them harmful"}
        return f"{many}, {harmless.get(len(found), 'none of them harmful; worst first')}."
    return f"{many}, worst first." if len(found) > 1 else f"{many}."


__all__ = ["Finding", "Findings", "findings", "folded"]
