"""The gradient turned on the input: how far an input must be moved before the answer turns."""

from thalweg.attacks.losses import cross_entropy, margin
from thalweg.attacks.pgd import fgsm, pgd
from thalweg.attacks.report import AttackRow, RobustnessReport, robustness
from thalweg.attacks.square import square

__all__ = [
    "AttackRow",
    "RobustnessReport",
    "cross_entropy",
    "fgsm",
    "margin",
    "pgd",
    "robustness",
    "square",
]
