"""The chapters of the report, always the same and always in this order."""

from __future__ import annotations

from dyndiag.reports.chapters.absences import absences
from dyndiag.reports.chapters.closing import cost, facts, missing, sure
from dyndiag.reports.chapters.items import Chapter
from dyndiag.reports.chapters.others import others
from dyndiag.reports.chapters.signals import gradients, logits, predictions
from dyndiag.reports.chapters.stability import spectrum, stability
from dyndiag.reports.chapters.tasks import continual
from dyndiag.reports.contents import Contents


def chapters(c: Contents) -> tuple[Chapter, ...]:
    """Every chapter; one without data keeps its place and says why."""
    absent = absences(c)
    return (
        stability(c, absent),
        spectrum(c, absent),
        gradients(c, absent),
        logits(c, absent),
        predictions(c, absent),
        continual(c, absent),
        others(c),
        sure(c),
        missing(absent),
        cost(c),
        facts(c),
    )


__all__ = ["chapters"]
