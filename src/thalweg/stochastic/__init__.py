"""A random or discrete unit between the loss and the parameters."""

from thalweg.stochastic.arm import ARM, DisARM
from thalweg.stochastic.enumeration import Enumeration
from thalweg.stochastic.minimum_variance import MinimumVariance
from thalweg.stochastic.neurons import BinaryNeuron, StraightThrough
from thalweg.stochastic.relax import REBAR, RELAX
from thalweg.stochastic.score_function import ScoreFunction

__all__ = [
    "ARM",
    "BinaryNeuron",
    "DisARM",
    "Enumeration",
    "MinimumVariance",
    "REBAR",
    "RELAX",
    "ScoreFunction",
    "StraightThrough",
]
