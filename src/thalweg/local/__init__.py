"""Learning without a global backward: each block has a loss of its own, and no gradient leaves it."""

from thalweg.local.alignment import align
from thalweg.local.feedback import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry
from thalweg.local.forward_forward import ForwardForward
from thalweg.local.goodness import Goodness, hybrid_images
from thalweg.local.noprop import NoProp
from thalweg.local.noprop_blocks import BackpropNoProp, DenoisingBlock
from thalweg.local.noprop_continuous import ContinuousNoProp
from thalweg.local.noprop_flow import FlowNoProp
from thalweg.local.noprop_labels import (
    LabelEmbedding,
    LatentReadout,
    learned_labels,
    one_hot_labels,
    prototype_labels,
)
from thalweg.local.noprop_schedule import ContinuousSchedule, LearnedSchedule, NoiseLevels, cosine
from thalweg.local.readout import LocalLoss, Readout, unit_length, unit_mean_square
from thalweg.local.stack import BlockPhase, LocalPhase, LocalStack

__all__ = [
    "BackpropNoProp",
    "BlockPhase",
    "ContinuousNoProp",
    "ContinuousSchedule",
    "DenoisingBlock",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "FlowNoProp",
    "ForwardForward",
    "Goodness",
    "LabelEmbedding",
    "LatentReadout",
    "LearnedSchedule",
    "LocalLoss",
    "LocalPhase",
    "LocalStack",
    "NoProp",
    "NoiseLevels",
    "Readout",
    "SignSymmetry",
    "align",
    "cosine",
    "hybrid_images",
    "learned_labels",
    "one_hot_labels",
    "prototype_labels",
    "unit_length",
    "unit_mean_square",
]
