"""Thalweg: choose the path your gradients take, and see what it costs."""

from typing import TYPE_CHECKING, Any

from thalweg import gates
from thalweg.blackbox import (
    PGPE,
    SPSA,
    Budget,
    Decorrelation,
    Distributed,
    EvolutionStrategies,
    ForwardGradient,
    MeZO,
    NodePerturbation,
    OnePoint,
    OrnsteinUhlenbeck,
    Streamed,
)
from thalweg.equilibria import (
    CoupledLearning,
    EquilibriumPropagation,
    Implicit,
    Nudged,
    OneStep,
    fixed_point,
    minimize,
)
from thalweg.ledger import cost, fidelity, price
from thalweg.noise import Key
from thalweg.parameters import all_reduce_gradients_
from thalweg.rollouts import (
    Backsolve,
    Checkpointed,
    Discrete,
    Reversible,
    Route,
    Skipped,
    Truncated,
    integrate,
    rollout,
)
from thalweg.step import Backprop, Estimate, Learner, Phase, Rule, Step, backward
from thalweg.stochastic import (
    ARM,
    REBAR,
    RELAX,
    BinaryNeuron,
    CategoricalNeuron,
    Concrete,
    ConditionalLinear,
    DisARM,
    Enumeration,
    MinimumVariance,
    NoisyRectifier,
    ReinMax,
    ScoreFunction,
    SpikingNeuron,
    StochasticTimesSmooth,
    StraightThrough,
    StraightThroughGumbel,
    estimator_report,
)

if TYPE_CHECKING:
    from thalweg import attacks, doctor, flows, local, problems
    from thalweg.comparison import compare

__version__ = "0.1.0"
__all__ = [
    "ARM",
    "Backprop",
    "Backsolve",
    "BinaryNeuron",
    "Budget",
    "CategoricalNeuron",
    "Checkpointed",
    "Concrete",
    "ConditionalLinear",
    "CoupledLearning",
    "Decorrelation",
    "DisARM",
    "Discrete",
    "Distributed",
    "Enumeration",
    "EquilibriumPropagation",
    "Estimate",
    "EvolutionStrategies",
    "ForwardGradient",
    "Implicit",
    "Key",
    "Learner",
    "MeZO",
    "MinimumVariance",
    "NodePerturbation",
    "NoisyRectifier",
    "Nudged",
    "OnePoint",
    "OneStep",
    "OrnsteinUhlenbeck",
    "PGPE",
    "Phase",
    "REBAR",
    "RELAX",
    "ReinMax",
    "Reversible",
    "Route",
    "Rule",
    "SPSA",
    "ScoreFunction",
    "Skipped",
    "SpikingNeuron",
    "Step",
    "StochasticTimesSmooth",
    "StraightThrough",
    "StraightThroughGumbel",
    "Streamed",
    "Truncated",
    "all_reduce_gradients_",
    "attacks",
    "backward",
    "compare",
    "cost",
    "doctor",
    "estimator_report",
    "fidelity",
    "fixed_point",
    "flows",
    "gates",
    "integrate",
    "local",
    "minimize",
    "price",
    "problems",
    "rollout",
]


def __getattr__(name: str) -> Any:
    # the upper floors are loaded at first use, so that the import stays as quick as torch's
    from importlib import import_module

    if name in ("attacks", "doctor", "flows", "local", "problems"):
        return import_module(f"thalweg.{name}")
    if name == "compare":
        return import_module("thalweg.comparison").compare
    raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
