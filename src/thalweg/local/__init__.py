"""Learning without a global backward: each block has a loss of its own, and no gradient leaves it."""

from thalweg.local.alignment import align
from thalweg.local.bidirectional import Adversarial, Bidirectional, Reconstruct, uniform_prior
from thalweg.local.bidirectional_net import BidirectionalNet, bidirectional_mlp
from thalweg.local.feedback import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry
from thalweg.local.forward_forward import ForwardForward
from thalweg.local.goodness import Goodness, hybrid_images
from thalweg.local.graph import GraphStack
from thalweg.local.graph_adjacency import gcn_adjacency, mean_adjacency
from thalweg.local.graph_backprop import BackpropGraph
from thalweg.local.graph_convolution import GCN, SAGE, TwoPart, convolutions, two_parts
from thalweg.local.graph_forward_forward import LabelGoodness
from thalweg.local.graph_tasks import LabelledGraph, LinkBatch, LinkTask, VirtualNodes
from thalweg.local.graph_top_down import TopToInput, TopToLoss
from thalweg.local.graph_training import Fitted, area_under_curve, fit_layers, fit_together, node_accuracy
from thalweg.local.layer_parallel import LayerParallel
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
from thalweg.local.predictive_coding import PredictiveCoding
from thalweg.local.readout import LocalLoss, Readout, unit_length, unit_mean_square
from thalweg.local.stack import BlockPhase, LocalPhase, LocalStack

__all__ = [
    "Adversarial",
    "BackpropGraph",
    "BackpropNoProp",
    "Bidirectional",
    "BidirectionalNet",
    "BlockPhase",
    "ContinuousNoProp",
    "ContinuousSchedule",
    "DenoisingBlock",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "Fitted",
    "FlowNoProp",
    "ForwardForward",
    "GCN",
    "Goodness",
    "GraphStack",
    "LabelEmbedding",
    "LabelGoodness",
    "LabelledGraph",
    "LatentReadout",
    "LayerParallel",
    "LearnedSchedule",
    "LinkBatch",
    "LinkTask",
    "LocalLoss",
    "LocalPhase",
    "LocalStack",
    "NoProp",
    "NoiseLevels",
    "PredictiveCoding",
    "Readout",
    "Reconstruct",
    "SAGE",
    "SignSymmetry",
    "TopToInput",
    "TopToLoss",
    "TwoPart",
    "VirtualNodes",
    "align",
    "area_under_curve",
    "bidirectional_mlp",
    "convolutions",
    "cosine",
    "fit_layers",
    "fit_together",
    "gcn_adjacency",
    "hybrid_images",
    "learned_labels",
    "mean_adjacency",
    "node_accuracy",
    "one_hot_labels",
    "prototype_labels",
    "two_parts",
    "uniform_prior",
    "unit_length",
    "unit_mean_square",
]
