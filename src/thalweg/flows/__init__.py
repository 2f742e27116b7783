"""A generative field: its path and predictions, sampling from it, and rewards through samplers."""

from thalweg.flows.adapters import from_denoiser, from_diffusers, to_denoiser, to_diffusers
from thalweg.flows.averaged_weights import average_weights_
from thalweg.flows.consistency import (
    ConsistencyModel,
    adaptive_decay,
    consistency_loss,
    progressive_intervals,
)
from thalweg.flows.consistency_trajectory import ConsistencyTrajectory, trajectory_loss
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
from thalweg.flows.flow_map import FlowMap, sample_map
from thalweg.flows.grids import time_grid
from thalweg.flows.guidance import autoguidance, classifier_free, classifier_guidance
from thalweg.flows.linear_steps import Solver
from thalweg.flows.losses import Noised, matching_loss, noised_batch
from thalweg.flows.mean_flow import MeanFlow, mean_flow_loss
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
from thalweg.flows.progressive_distillation import progressive_distillation_loss
from thalweg.flows.rectification_report import RectificationReport, rectification_report
from thalweg.flows.rectified import pseudo_huber, rectified_loss
from thalweg.flows.reflow import Reflowed, reflow, reflow_pairs
from thalweg.flows.samplers import sample
from thalweg.flows.solvers import AdamsBashforth, DPMSolver2, Euler, Heun, RungeKutta4
from thalweg.flows.stochastic_solvers import DDIM, EDM, DPMSolverPP2M, EulerMaruyama
from thalweg.flows.straightness import Trajectory, crossing, excess_transport_cost, follow, transport_cost
from thalweg.flows.tabulated import Tabulated
from thalweg.flows.teacher_step import flow_step
from thalweg.flows.time_laws import LogitNormal, LogNormalLevel, TimeLaw, UniformLevel, UniformTime, UShaped
from thalweg.flows.weights import WEIGHTS, Weight, data_weight, effective_weight

__all__ = [
    "AdamsBashforth",
    "ConsistencyModel",
    "ConsistencyTrajectory",
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
    "FlowMap",
    "GeometricVarianceExploding",
    "Heun",
    "Independent",
    "KINDS",
    "Kind",
    "LogNormalLevel",
    "LogitNormal",
    "MeanFlow",
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
    "adaptive_decay",
    "autoguidance",
    "average_weights_",
    "classifier_free",
    "classifier_guidance",
    "consistency_loss",
    "crossing",
    "data_weight",
    "distillation_loss",
    "edm_preconditioned",
    "effective_weight",
    "energy_distance",
    "excess_transport_cost",
    "flow_step",
    "follow",
    "from_denoiser",
    "from_diffusers",
    "log_likelihood",
    "matching_loss",
    "mean_flow_loss",
    "nearest_pairs_field",
    "noised_batch",
    "optimal_assignment",
    "probability_flow",
    "progressive_distillation_loss",
    "progressive_intervals",
    "pseudo_huber",
    "rectification_report",
    "rectified_loss",
    "reflow",
    "reflow_pairs",
    "sample",
    "sample_map",
    "shifted_clock",
    "through",
    "time_grid",
    "to_denoiser",
    "to_diffusers",
    "trajectory_loss",
    "transport_cost",
]
