"""A generative field: its path and predictions, sampling from it, and rewards through samplers."""

from thalweg.flows.adapters import from_denoiser, from_diffusers, to_denoiser, to_diffusers
from thalweg.flows.averaged_weights import average_weights_
from thalweg.flows.conservativity_report import ConservativityReport, conservativity_report
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
from thalweg.flows.fokker_planck import continuity_residual, score_residual
from thalweg.flows.free_energy import (
    FreeEnergy,
    descent_clock,
    descent_velocity,
    free_energy,
    matched_velocity,
    reference_variance,
)
from thalweg.flows.gauge import ErrorSplit, gauged, gradient_part
from thalweg.flows.grids import time_grid
from thalweg.flows.guidance import autoguidance, classifier_free, classifier_guidance
from thalweg.flows.jacobian_asymmetry import (
    JacobianAsymmetry,
    asymmetry_penalty,
    jacobian,
    jacobian_asymmetry,
)
from thalweg.flows.line_integrals import Circulation, PathGap, circulation, line_integral, path_gap
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
from thalweg.flows.potential import denoising_potential, energy, potential_field, projection_loss
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
    "Circulation",
    "ConservativityReport",
    "ConsistencyModel",
    "ConsistencyTrajectory",
    "Cosine",
    "Coupling",
    "Custom",
    "DDIM",
    "DPMSolver2",
    "DPMSolverPP2M",
    "EDM",
    "ErrorSplit",
    "Euler",
    "EulerMaruyama",
    "Field",
    "FlowMap",
    "FreeEnergy",
    "GeometricVarianceExploding",
    "Heun",
    "Independent",
    "JacobianAsymmetry",
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
    "PathGap",
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
    "asymmetry_penalty",
    "autoguidance",
    "average_weights_",
    "circulation",
    "classifier_free",
    "classifier_guidance",
    "conservativity_report",
    "consistency_loss",
    "continuity_residual",
    "crossing",
    "data_weight",
    "denoising_potential",
    "descent_clock",
    "descent_velocity",
    "distillation_loss",
    "edm_preconditioned",
    "effective_weight",
    "energy",
    "energy_distance",
    "excess_transport_cost",
    "flow_step",
    "follow",
    "free_energy",
    "from_denoiser",
    "from_diffusers",
    "gauged",
    "gradient_part",
    "jacobian",
    "jacobian_asymmetry",
    "line_integral",
    "log_likelihood",
    "matched_velocity",
    "matching_loss",
    "mean_flow_loss",
    "nearest_pairs_field",
    "noised_batch",
    "optimal_assignment",
    "path_gap",
    "potential_field",
    "probability_flow",
    "progressive_distillation_loss",
    "progressive_intervals",
    "projection_loss",
    "pseudo_huber",
    "rectification_report",
    "rectified_loss",
    "reference_variance",
    "reflow",
    "reflow_pairs",
    "sample",
    "sample_map",
    "score_residual",
    "shifted_clock",
    "through",
    "time_grid",
    "to_denoiser",
    "to_diffusers",
    "trajectory_loss",
    "transport_cost",
]
