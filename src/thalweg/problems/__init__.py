"""Made-up problems whose answer is known exactly: the ground on which every estimator is tested."""

from thalweg.problems.bernoulli import BernoulliNet
from thalweg.problems.gaussian_mixture import GaussianMixture
from thalweg.problems.mixture_pair import MixturePair
from thalweg.problems.quadratic import Quadratic

__all__ = ["BernoulliNet", "GaussianMixture", "MixturePair", "Quadratic"]
