"""Learning without a global backward: each block has a loss of its own, and no gradient leaves it."""

from thalweg.local.readout import LocalLoss, Readout, unit_length
from thalweg.local.stack import BlockPhase, LocalPhase, LocalStack

__all__ = [
    "BlockPhase",
    "LocalLoss",
    "LocalPhase",
    "LocalStack",
    "Readout",
    "unit_length",
]
