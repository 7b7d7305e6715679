"""Charts as plain data: which series, which scale, which marks; one file a subject."""

from __future__ import annotations

from dyndiag.reports.figures.figure import (
    COLOURS,
    MEDIAN,
    Drawn,
    Figure,
    Mark,
    Note,
    plain_line,
    scale,
    timeline,
    wide,
)
from dyndiag.reports.figures.layers import MOST_ROWS, by_part, gradient_norm, heat, joined
from dyndiag.reports.figures.logits import (
    LOGITS,
    attention,
    attention_names,
    largest_attention,
    logits,
)
from dyndiag.reports.figures.loss import final, first, loss, loss_unit
from dyndiag.reports.figures.predictions import divergence, entropy, instability
from dyndiag.reports.figures.spectrum import (
    density,
    density_data,
    density_grid,
    probes_of,
    spectrum,
)
from dyndiag.reports.figures.stability import (
    capital_title,
    edge_ratio,
    formula,
    main_sharpness,
    rates,
    sharpness,
    sharpness_name,
    trace,
)
from dyndiag.reports.figures.tasks import accuracy, samples_text, task_accuracy, wilson

__all__ = [
    "COLOURS",
    "LOGITS",
    "MEDIAN",
    "MOST_ROWS",
    "Drawn",
    "Figure",
    "Mark",
    "Note",
    "accuracy",
    "attention",
    "attention_names",
    "by_part",
    "capital_title",
    "density",
    "density_data",
    "density_grid",
    "divergence",
    "edge_ratio",
    "entropy",
    "final",
    "first",
    "formula",
    "gradient_norm",
    "heat",
    "instability",
    "joined",
    "largest_attention",
    "logits",
    "loss",
    "loss_unit",
    "main_sharpness",
    "plain_line",
    "probes_of",
    "rates",
    "samples_text",
    "scale",
    "sharpness",
    "sharpness_name",
    "spectrum",
    "task_accuracy",
    "timeline",
    "trace",
    "wide",
    "wilson",
]
