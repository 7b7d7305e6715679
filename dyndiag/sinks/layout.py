"""The Custom Scalars page of a run: which series are drawn together."""

from __future__ import annotations

from tensorboard.plugins.custom_scalar import layout_pb2

SHARPNESS = "curvature/sharpness"
PRECONDITIONED = "curvature/preconditioned_sharpness"
EDGE_RATIO = "stability/edge_ratio"
EDGE = "stability/edge"
"""The constant 1 beside each edge ratio."""


def layout(preconditioned: bool) -> bytes:
    """The page, as TensorBoard's own message.

    The threshold belongs to the preconditioned sharpness where the run has one.
    """
    judged, prefix = (PRECONDITIONED, "preconditioned ") if preconditioned else (SHARPNESS, "")
    categories = {
        "Stability": [
            _lines(f"{prefix}sharpness and threshold", judged, "stability/threshold"),
            _lines("edge ratio", EDGE_RATIO, EDGE),
            *(
                _margin(name)
                for name in ((SHARPNESS, PRECONDITIONED) if preconditioned else (SHARPNESS,))
            ),
        ],
        "Loss": [_lines("loss", "train/loss"), _lines("learning rate", "train/learning_rate")],
        "Warnings": [
            _lines("attention logits", "attention/logit_max/.+"),
            _lines("gradient norm", "gradients/norm", "gradients/norm_clipped"),
            _lines("prediction instability", "predictions/instability"),
        ],
        "Layers": [
            _lines("gradient norm by layer", "gradients/norm/.+"),
            _lines("update over weight by layer", "updates/ratio/.+"),
        ],
        "Tasks": [_lines("accuracy by task", "continual/accuracy/.+")],
    }
    page = layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=charts) for title, charts in categories.items()
        ]
    )
    return bytes(page.SerializeToString())


def margins(name: str) -> tuple[str, str]:
    """The tags of an estimate's lower and upper end."""
    return f"{name}/lower", f"{name}/upper"


def _lines(title: str, *tags: str) -> layout_pb2.Chart:
    # A tag here is a regular expression that matches from the start of a name.
    content = layout_pb2.MultilineChartContent(tag=[f"{tag}$" for tag in tags])
    return layout_pb2.Chart(title=title, multiline=content)


def _margin(name: str) -> layout_pb2.Chart:
    lower, upper = margins(name)
    series = layout_pb2.MarginChartContent.Series(value=name, lower=lower, upper=upper)
    title = f"{name.partition('/')[2].replace('_', ' ')} and how far it may be off"
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[series]))
