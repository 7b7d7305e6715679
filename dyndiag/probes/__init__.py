"""What is measured; one folder an area, one file a family.

`StepWatch` reads the training step itself, always; the probes of `sampled_probes` take passes of
their own, each on its share of the budget. The others a user asks for, `Monitor(..., probes=[…])`:
each states its series, its cost and how often it measures.
"""

from __future__ import annotations

from dyndiag.probes.activations.neural_collapse import NeuralCollapse
from dyndiag.probes.activations.similarity import Similarity
from dyndiag.probes.activations.statistics import Activations
from dyndiag.probes.continual.accuracy import ContinualAccuracy
from dyndiag.probes.continual.plasticity import Plasticity, plasticity
from dyndiag.probes.curvature.sam import SAMRatio
from dyndiag.probes.forward import unwatched
from dyndiag.probes.gradients.adam_moments import AdamMoments
from dyndiag.probes.gradients.cosines import Cosines
from dyndiag.probes.gradients.history import GradientHistory
from dyndiag.probes.gradients.noise_scale import NoiseScale
from dyndiag.probes.gradients.parameter_norms import ParameterNorms
from dyndiag.probes.gradients.top_space import TopSpace
from dyndiag.probes.language.generation import TraceInstability, trace_instability
from dyndiag.probes.language.policies import PolicySignals, policy_statistics
from dyndiag.probes.passing import PassingStep, StepProbe
from dyndiag.probes.predictions.class_imbalance import ClassImbalance
from dyndiag.probes.predictions.input_jacobian import InputJacobian
from dyndiag.probes.predictions.opposing_signals import LossQuantiles, OpposingSignals
from dyndiag.probes.predictions.token_frequency import TokenFrequency
from dyndiag.probes.sampled import Probe, sampled_probes
from dyndiag.probes.step import Step, StepWatch, learning_rates
from dyndiag.probes.weights.distances import WeightDistances
from dyndiag.probes.weights.matrices import WeightMatrices
from dyndiag.state import Measurements

__all__ = [
    "Activations",
    "AdamMoments",
    "ClassImbalance",
    "ContinualAccuracy",
    "Cosines",
    "GradientHistory",
    "InputJacobian",
    "LossQuantiles",
    "Measurements",
    "NeuralCollapse",
    "NoiseScale",
    "OpposingSignals",
    "ParameterNorms",
    "PassingStep",
    "Plasticity",
    "PolicySignals",
    "Probe",
    "SAMRatio",
    "Similarity",
    "Step",
    "StepProbe",
    "StepWatch",
    "TokenFrequency",
    "TopSpace",
    "TraceInstability",
    "WeightDistances",
    "WeightMatrices",
    "learning_rates",
    "plasticity",
    "policy_statistics",
    "sampled_probes",
    "trace_instability",
    "unwatched",
]
