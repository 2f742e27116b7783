"""Thalweg: choose the path your gradients take, and see what it costs."""

from thalweg.noise import Key
from thalweg.parameters import all_reduce_gradients_
from thalweg.step import Backprop, Estimate, Learner, Phase, Rule, Step, backward

__version__ = "0.1.0"
__all__ = [
    "Backprop",
    "Estimate",
    "Key",
    "Learner",
    "Phase",
    "Rule",
    "Step",
    "all_reduce_gradients_",
    "backward",
]
