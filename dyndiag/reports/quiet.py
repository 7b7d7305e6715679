"""What is said of a run in which nothing was found."""

from __future__ import annotations

import numpy as np

from dyndiag.reports import figures, words
from dyndiag.reports.contents import Contents
from dyndiag.reports.findings import Findings
from dyndiag.reports.findings.finding import judged
from dyndiag.reports.findings.precursor import raised_text, raises

LONG = 100  # so many steps, and a loss is expected to have fallen
FIVE = 5  # losses in a row, whose median one hard batch does not move
LITTLE = 0.05  # a loss that fell by less has hardly fallen


def nothing(c: Contents, found: Findings) -> str:
    """The verdict where there is no finding: that nothing happened, or what did without one."""
    many = words.count(c.last - c.first + 1, "step")
    if c.loss is not None and len(c.loss) and not np.isfinite(c.loss.values).any():
        return f"The loss was never a finite number, in {many}."
    ratio = judged(c, "stability/edge_ratio", c.first, c.last)
    if found.undecided:
        return f"Nothing certain to report in {many}; what was too unsure to tell stands below."
    if _undecided(c, ratio):
        samples = words.count(len(ratio), "sample")
        return (
            f"The run may have been at the edge from its start; the {samples} are too few to tell "
            "that from a coincidence."
        )
    below = len(ratio) > 0 and ratio.max() < 1
    edge = f"the edge ratio never passed {words.number(float(ratio.max()), 2)}" if below else ""
    after = _after_raise(c)
    if after:
        return f"No event in {many}, but {after}."
    if no_progress(c):
        said = f"No event in {many}, but the loss hardly fell"
        return f"{said}; {edge}." if edge else f"{said}."
    return f"Nothing to report: no event in {many}{f', and {edge}' if edge else ''}."


def _after_raise(c: Contents) -> str:
    """A loss that rose where the learning rate was raised: the detector of spikes is quiet there.

    Its median of five, in the 20 steps after, stands 1.5 times above the level of the 24 before,
    and above each such median of the 128 before.
    """
    worst, said = 0.0, ""
    if c.loss is None:
        return said
    for step, factor in raises(c):
        before, after = c.loss.within(step - 128, step - 1), c.loss.within(step, step + 20)
        if len(before) < 24 or len(after) < FIVE:
            continue
        level, usual, high = float(np.median(before[-24:])), _highest(before), _highest(after)
        rose = float(np.max(after)) / level if level > 0 else 0.0
        if high > max(1.5 * level, usual) and rose > worst:
            worst = rose
            said = f"the loss rose {words.number(rose, 2)}-fold; {raised_text(step, factor)}"
    return said


def _highest(losses: np.ndarray) -> float:
    """The largest median of five in a row."""
    return float(np.median(np.lib.stride_tricks.sliding_window_view(losses, FIVE), axis=1).max())


def no_progress(c: Contents) -> bool:
    """Whether a positive loss ends, after a hundred steps or more, less than 5 % below where it
    began, by its first three values: the very first may be low by chance."""
    if c.loss is None or c.last - c.first + 1 < LONG:
        return False
    finite = c.loss.values[np.isfinite(c.loss.values)]
    began = float(np.median(finite[:3])) if len(finite) else 0.0
    return began > 0 and figures.final(c.loss) > (1 - LITTLE) * began


def _undecided(c: Contents, ratio: np.ndarray) -> bool:
    """Few samples, all of them near the edge: a run that may have been there from its start."""
    return 3 <= len(ratio) < 10 and ratio.min() >= 0.75 and 0.8 <= float(np.median(ratio)) <= 1.3
