"""Spiking neuron: a threshold forward, a surrogate slope backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.errors import require_choice, require_floating, require_positive
from thalweg.gates import straight_through
from thalweg.gates.straight_through import SLOPES, Slope
from thalweg.stochastic.neurons import above, annealed, checked_threshold


class SpikingNeuron(nn.Module):
    """Turn membrane potentials u into spikes: 1 where u lies above the threshold, else 0; no randomness.

    Choose it for deterministic hard units, in particular those of spiking networks: the same in training and
    evaluation mode, differentiated as if its derivative were the surrogate, with x = u - threshold and
    k = steepness: "atan" k/2 / (1 + (pi k x / 2)^2), "fast_sigmoid" 1 / (1 + k|x|)^2, "triangle"
    max(0, 1 - k|x|), "sigmoid" k sigmoid(kx) (1 - sigmoid(kx)), "identity" 1. None of them overflows,
    whatever the potential. It keeps no state between time steps: the membrane is the caller's recurrence.

    Supports `vmap`, second derivatives and forward mode (those of the surrogate's integral), autocast,
    checkpointing and `compile(fullgraph=True)`. A potential that is nan comes out as nan.

    Args:
        slope: one of the surrogates above.
        steepness: k, above 0; kept as a buffer, so in `state_dict`, and changed by `anneal`.
        threshold: above which the neuron fires, any number but nan.

    Shape:
        Input and output any shape, floating point, the same dtype.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument, or potentials that are not floating point.

    Paper:
        Neftci, Mostafa, Zenke: Surrogate Gradient Learning in Spiking Neural Networks. IEEE Signal
        Processing Magazine 36, 2019. "atan": Fang et al., ICCV 2021; "fast_sigmoid": Zenke, Ganguli:
        SuperSpike. Neural Computation 30, 2018.

    Example:
        >>> potential = torch.tensor([0.5, 1.5], requires_grad=True)
        >>> spikes = SpikingNeuron("fast_sigmoid", steepness=2.0, threshold=1.0)(potential)
        >>> spikes.sum().backward()
        >>> spikes.tolist(), potential.grad.tolist()
        ([0.0, 1.0], [0.25, 0.25])
    """

    steepness: Tensor

    def __init__(self, slope: Slope = "atan", steepness: float = 2.0, threshold: float = 0.0) -> None:
        super().__init__()
        require_choice("slope", slope, SLOPES)
        require_positive("steepness", steepness)
        self.slope = slope
        self.threshold = checked_threshold(threshold)
        self.register_buffer("steepness", torch.tensor(float(steepness)))

    def forward(self, potential: Tensor) -> Tensor:
        """Fire; `potential` and the result have the same shape and dtype."""
        require_floating("potential", potential)
        hard = above(potential, self.threshold)
        shifted = potential - self.threshold if self.threshold else potential
        return straight_through(shifted, hard, self.slope, self.steepness)

    def anneal(self, epoch: float, *, rate: float = 0.04, limit: float = 5.0) -> None:
        """Set `steepness` to min(limit, 1 + rate * epoch), as in `BinaryNeuron.anneal`."""
        self.steepness.fill_(annealed(epoch, rate, limit))

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"slope={self.slope!r}, steepness={self.steepness.item():g}, threshold={self.threshold}"
