"""An inner problem solved to rest, and how the rest state is differentiated."""

from thalweg.equilibria.activations import half_clip, scaled_sigmoid, smooth_clip, unit_clip
from thalweg.equilibria.convergence import ConvergenceError, ConvergenceWarning, Status
from thalweg.equilibria.costs import Cost, CrossEntropy, SquaredError
from thalweg.equilibria.coupled import CoupledLearning
from thalweg.equilibria.energy import EnergyNetwork, convergent, even_odd, hopfield
from thalweg.equilibria.fixed_point import fixed_point
from thalweg.equilibria.implicit import Implicit, OneStep
from thalweg.equilibria.links import SoftMaxPool2d, conv_links, dense_links
from thalweg.equilibria.minimize import minimize
from thalweg.equilibria.nudged import Nudged
from thalweg.equilibria.propagation import EquilibriumPropagation
from thalweg.equilibria.relaxation import Activation, Descent

__all__ = [
    "Activation",
    "ConvergenceError",
    "ConvergenceWarning",
    "Cost",
    "CoupledLearning",
    "CrossEntropy",
    "Descent",
    "EnergyNetwork",
    "EquilibriumPropagation",
    "Implicit",
    "Nudged",
    "OneStep",
    "SoftMaxPool2d",
    "SquaredError",
    "Status",
    "conv_links",
    "convergent",
    "dense_links",
    "even_odd",
    "fixed_point",
    "half_clip",
    "hopfield",
    "minimize",
    "scaled_sigmoid",
    "smooth_clip",
    "unit_clip",
]
