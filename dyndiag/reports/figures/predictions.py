"""Entropy of the predictions, and how they change."""

from __future__ import annotations

from dyndiag.reports.contents import Contents
from dyndiag.reports.figures.figure import Figure, plain_line


def entropy(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/entropy", "Predictive entropy", "nats, fixed probe batch", "entropy",
        id="entropy", height=120, cls="s1", log=False, says="Mean entropy of the predictions.",
    )  # fmt: skip


def divergence(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/jsd", "Change of predictions",
        "Jensen–Shannon divergence between samples in nats; at most ln 2 = 0.69",
        "change of predictions",
        id="jsd", height=120, cls="s4", says="How much the predictions changed between samples.",
    )  # fmt: skip


def instability(c: Contents) -> Figure | None:
    return plain_line(
        c, "predictions/instability", "Instability", "JSD + entropy, nats", "instability",
        id="instability", height=120, cls="s5", log=False,
        says="Change of the predictions plus their entropy.",
    )  # fmt: skip
