"""A generative field: its path and predictions, sampling from it, and rewards through samplers."""

from thalweg.flows.adapters import from_denoiser, from_diffusers, to_denoiser, to_diffusers
from thalweg.flows.couplings import (
    Coupling,
    Independent,
    MinibatchTransport,
    Pair,
    Paired,
    optimal_assignment,
)
from thalweg.flows.distillation import distillation_loss
from thalweg.flows.energy_distance import energy_distance
from thalweg.flows.field import Field, edm_preconditioned
from thalweg.flows.grids import time_grid
from thalweg.flows.guidance import autoguidance, classifier_free, classifier_guidance
from thalweg.flows.linear_steps import Solver
from thalweg.flows.losses import Noised, matching_loss, noised_batch
from thalweg.flows.named_paths import (
    Cosine,
    GeometricVarianceExploding,
    OffsetCosine,
    Straight,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from thalweg.flows.nearest_pairs import nearest_pairs_field
from thalweg.flows.path import Custom, Path, Rescaled, Retimed, shifted_clock
from thalweg.flows.pipeline import through
from thalweg.flows.prediction import KINDS, Kind
from thalweg.flows.probability_flow import log_likelihood, probability_flow
from thalweg.flows.rectification_report import RectificationReport, rectification_report
from thalweg.flows.rectified import pseudo_huber, rectified_loss
from thalweg.flows.reflow import Reflowed, reflow, reflow_pairs
from thalweg.flows.samplers import sample
from thalweg.flows.solvers import AdamsBashforth, DPMSolver2, Euler, Heun, RungeKutta4
from thalweg.flows.stochastic_solvers import DDIM, EDM, DPMSolverPP2M, EulerMaruyama
from thalweg.flows.straightness import Trajectory, crossing, excess_transport_cost, follow, transport_cost
from thalweg.flows.tabulated import Tabulated
from thalweg.flows.time_laws import LogitNormal, LogNormalLevel, TimeLaw, UniformLevel, UniformTime, UShaped
from thalweg.flows.weights import WEIGHTS, Weight, data_weight, effective_weight

__all__ = [
    "AdamsBashforth",
    "Cosine",
    "Coupling",
    "Custom",
    "DDIM",
    "DPMSolver2",
    "DPMSolverPP2M",
    "EDM",
    "Euler",
    "EulerMaruyama",
    "Field",
    "GeometricVarianceExploding",
    "Heun",
    "Independent",
    "KINDS",
    "Kind",
    "LogNormalLevel",
    "LogitNormal",
    "MinibatchTransport",
    "Noised",
    "OffsetCosine",
    "Pair",
    "Paired",
    "Path",
    "RectificationReport",
    "Reflowed",
    "Rescaled",
    "Retimed",
    "RungeKutta4",
    "Solver",
    "Straight",
    "SubVariancePreserving",
    "Tabulated",
    "TimeLaw",
    "Trajectory",
    "UShaped",
    "UniformLevel",
    "UniformTime",
    "VarianceExploding",
    "VariancePreserving",
    "WEIGHTS",
    "Weight",
    "autoguidance",
    "classifier_free",
    "classifier_guidance",
    "crossing",
    "data_weight",
    "distillation_loss",
    "edm_preconditioned",
    "effective_weight",
    "energy_distance",
    "excess_transport_cost",
    "follow",
    "from_denoiser",
    "from_diffusers",
    "log_likelihood",
    "matching_loss",
    "nearest_pairs_field",
    "noised_batch",
    "optimal_assignment",
    "probability_flow",
    "pseudo_huber",
    "rectification_report",
    "rectified_loss",
    "reflow",
    "reflow_pairs",
    "sample",
    "shifted_clock",
    "through",
    "time_grid",
    "to_denoiser",
    "to_diffusers",
    "transport_cost",
]
