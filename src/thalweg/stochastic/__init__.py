"""A random or discrete unit between the loss and the parameters."""

from thalweg.stochastic.enumeration import Enumeration
from thalweg.stochastic.neurons import BinaryNeuron, StraightThrough
from thalweg.stochastic.score_function import ScoreFunction

__all__ = ["BinaryNeuron", "Enumeration", "ScoreFunction", "StraightThrough"]
