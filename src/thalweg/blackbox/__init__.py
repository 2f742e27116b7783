"""No derivative: gradients from the values of the loss, or from one forward derivative."""

from thalweg.blackbox.evolution_strategies import EvolutionStrategies
from thalweg.blackbox.forward_gradient import ForwardGradient
from thalweg.blackbox.spsa import SPSA

__all__ = ["SPSA", "EvolutionStrategies", "ForwardGradient"]
