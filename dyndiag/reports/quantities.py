"""What series are called in the report, and their units; any other is told by its own name."""

from __future__ import annotations

QUANTITIES: dict[str, tuple[str, str]] = {
    "activations/cka": (
        "Similarity of activations to the last sample",
        "linear CKA, 1: same",
    ),
    "activations/dead": ("Dead units", "share, zero on the whole probe batch"),
    "activations/dormant_0.025": ("Dormant units, τ = 0.025", "share"),
    "activations/dormant_0.1": ("Dormant units, τ = 0.1", "share"),
    "activations/effective_rank": ("Effective rank of activations", "exp of the entropy of σ/Σσ"),
    "activations/effective_rank_share": ("Effective rank over its largest value", "share"),
    "activations/low_use": ("Units active on fewer than 1 % of samples", "share"),
    "activations/massive": ("Massive activations", "count, above 100 and 1,000 medians"),
    "activations/max": ("Largest activation", "absolute"),
    "activations/rms": ("RMS of activations", ""),
    "activations/rms_growth": ("Growth of the RMS from block to block", "factor"),
    "activations/variance": ("Variance of activations", ""),
    "attention/entropy": ("Entropy of attention", "nats, mean over rows"),
    "continual/period": ("Steps between evaluations of the tasks", "steps"),
    "curvature/frobenius_norm": ("Frobenius norm of the Hessian", "loss per squared parameter"),
    "curvature/participation": ("Share of the top eigenvector in each module", "sums to 1"),
    "curvature/top_space_overlap": ("Overlap of the top eigenspace with the last one", "share"),
    "gradients/above_threshold": ("Parameters above their adaptive threshold", "share"),
    "gradients/clip_coefficient": ("Clip coefficient", "norm after over norm before"),
    "gradients/clipped_share": ("Clipped steps", "share of the last 100"),
    "gradients/cosine_previous": ("Cosine with the gradient before", ""),
    "gradients/epsilon_share": ("Adam's √v̂ against ε", "√v̂ / (√v̂ + ε), smallest tensor"),
    "gradients/nlm_cosine": ("Gradient along the weights", "cos(−g, θ)"),
    "gradients/nlm_share": ("Share of the gradient that only scales the logits", "share of ‖g‖²"),
    "gradients/noise_scale": ("Gradient noise scale", "examples"),
    "gradients/norm_zscore": ("Gradient norm against its history", "standard deviations"),
    "gradients/parameter_norm": ("Gradient norm of each parameter", "L2"),
    "gradients/rms": ("RMS of the gradient", ""),
    "gradients/rms_ratio": ("Gradient over Adam's second moment", "RMS ratio, largest tensor"),
    "gradients/spike_ratio_max": ("Largest g² over Adam's v̂", ""),
    "gradients/spike_ratio_p999": ("g² over Adam's v̂, 99.9th percentile", ""),
    "gradients/threshold_excess": (
        "Gradient norm over its adaptive threshold",
        "largest parameter",
    ),
    "gradients/top_space_share": ("Share of the gradient in the top eigenspace", "share of ‖g‖²"),
    "logits/collapse": ("Softmax collapse", "share of samples"),
    "logits/mean": ("Mean logit", "nats"),
    "logits/smallest_gap": ("Smallest gap between the two largest logits", "nats"),
    "neural_collapse/nc1": ("Within-class over between-class variability", "NC1"),
    "neural_collapse/vci": ("Variability collapse index", "0: collapsed"),
    "neural_collapse/vci_of_noise": ("The same index of pure noise", "0 to 1"),
    "policy/clip_share": ("Clipped tokens", "share"),
    "policy/entropy": ("Entropy of the policy", "nats per token"),
    "policy/kl_reference": ("Divergence from the reference policy", "nats per token, k3"),
    "policy/ratio_max": ("Largest ratio of new to old policy", ""),
    "predictions/accuracy": ("Accuracy on the probe batch", "share"),
    "predictions/calibration_error": ("Calibration error", "15 bins, probe batch"),
    "predictions/confidence": ("Mean largest probability", ""),
    "predictions/flips": ("Predictions that changed", "share since the last sample"),
    "predictions/gradient_share_by_class": ("Gradient of each class", "share of ‖g‖²"),
    "predictions/input_jacobian_norm": ("Norm of the input Jacobian", "Frobenius"),
    "predictions/instability_peak": ("Peak of the instability so far", "nats"),
    "predictions/instability_peak_step": ("Step of that peak", "steps"),
    "predictions/loss_by_class": ("Loss by class", "probe batch"),
    "predictions/loss_by_frequency": ("Loss by token frequency", "01: most frequent decile"),
    "predictions/loss_quantile": ("Quantiles of the examples' losses", "probe batch"),
    "predictions/low_loss_share": ("Examples with a loss below 0.01", "share"),
    "predictions/opposing_cosine": ("Cosine of opposing groups' gradients", ""),
    "predictions/opposing_fall": ("Loss of the examples that fell most", "mean change"),
    "predictions/opposing_rise": ("Loss of the examples that rose most", "mean change"),
    "stability/batch_sharpness_ratio": ("Batch sharpness over 2/η", "1: said to hover there"),
    "stability/clipped_edge_ratio": ("Edge ratio as clipped", "comes to 1 by itself"),
    "stability/frobenius_ratio": ("Frobenius norm over its bound for SGD", "above 1: unstable"),
    "stability/sam_base_ratio": ("Edge ratio of SAM's base optimizer", "1: its edge"),
    "stability/sam_ratio": ("Edge ratio of SAM", "1: its edge"),
    "stability/sam_threshold": ("Sharpness at SAM's edge", "loss per squared parameter"),
    "stability/trace_ratio": ("Trace over its bound for SGD", "above 1: unstable in mean square"),
    "updates/cosine_descent": ("Cosine of the update with steepest descent", ""),
    "weights/condition_number": ("Condition number", "σ max over σ min"),
    "weights/distance_from_last": ("Distance from the last sample's weights", "L2"),
    "weights/distance_from_start": ("Distance from the first weights", "L2"),
    "weights/effective_learning_rate": ("Learning rate over squared weight norm", "η / ‖θ‖²"),
    "weights/effective_rank": ("Effective rank of weights", "exp of the entropy of σ/Σσ"),
    "weights/norm": ("Weight norm", "L2"),
    "weights/rank_99": ("Singular values that hold 99 % of the sum", "count"),
    "weights/spectral_norm": ("Spectral norm", "σ max"),
    "weights/stable_rank": ("Stable rank", "‖W‖²_F / σ² max"),
}


def title(quantity: str) -> str:
    """Of `area/quantity`, as a heading.

    >>> title("activations/dead"), title("mine/reward")
    ('Dead units', 'Mine: reward')
    """
    if quantity in QUANTITIES:
        return QUANTITIES[quantity][0]
    area, _, rest = quantity.partition("/")
    return f"{area[:1].upper()}{area[1:]}: {rest.replace('_', ' ').replace('/', ', ')}"


def unit(quantity: str) -> str:
    """Empty for a number without unit, and for one that is not known."""
    return QUANTITIES[quantity][1] if quantity in QUANTITIES else ""
