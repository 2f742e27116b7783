"""A random or discrete unit between the loss and the parameters."""

from thalweg.stochastic.arm import ARM, DisARM
from thalweg.stochastic.categorical import CategoricalNeuron, ReinMax, StraightThroughGumbel
from thalweg.stochastic.conditional import ConditionalLinear
from thalweg.stochastic.enumeration import Enumeration
from thalweg.stochastic.estimator_report import EstimatorReport, EstimatorRow, estimator_report
from thalweg.stochastic.minimum_variance import MinimumVariance
from thalweg.stochastic.neurons import BinaryNeuron, Concrete, StraightThrough
from thalweg.stochastic.noisy_rectifier import NoisyRectifier
from thalweg.stochastic.relax import REBAR, RELAX
from thalweg.stochastic.score_function import ScoreFunction
from thalweg.stochastic.sparsity import AdaptiveL1Sparsity, KLSparsity
from thalweg.stochastic.spiking import SpikingNeuron
from thalweg.stochastic.stochastic_times_smooth import StochasticTimesSmooth

__all__ = [
    "AdaptiveL1Sparsity",
    "ARM",
    "BinaryNeuron",
    "CategoricalNeuron",
    "Concrete",
    "ConditionalLinear",
    "DisARM",
    "Enumeration",
    "EstimatorReport",
    "EstimatorRow",
    "MinimumVariance",
    "KLSparsity",
    "NoisyRectifier",
    "REBAR",
    "RELAX",
    "ReinMax",
    "ScoreFunction",
    "SpikingNeuron",
    "StochasticTimesSmooth",
    "StraightThrough",
    "StraightThroughGumbel",
    "estimator_report",
]
