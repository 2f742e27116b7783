"""How an error gets back: through fixed random weights, step by step or at once, or by signs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thalweg.errors import ArgumentTypeError, require_choice, require_positive
from thalweg.noise import Key

_FIRST = Key(0)


@dataclass(frozen=True, slots=True)
class FeedbackAlignment:
    """Send the error back through fixed random weights in place of the transposed forward weights.

    Choose it to ask how much of backpropagation rests on symmetric weights: small dense networks learn to
    align with the random feedback, deep convolutional ones hardly. Costs what backpropagation costs.

    Args:
        key: names the random weights; each layer draws its own from its name.
        scale: their standard deviation over that of torch's initial weights, 1 / sqrt(3 fan-in); above 0.

    Paper:
        Lillicrap and others: Random synaptic feedback weights support error backpropagation for deep
        learning. Nature Communications 2016.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> import torch
        >>> from thalweg.local import align
        >>> layer = align(torch.nn.Linear(4, 3), gradient=FeedbackAlignment(Key(7)))
        >>> layer.feedback.shape
        torch.Size([3, 4])
    """

    key: Key = _FIRST
    scale: float = 1.0

    def __post_init__(self) -> None:
        _require_fields(self.key, self.scale)


@dataclass(frozen=True, slots=True)
class DirectFeedbackAlignment:
    """Send the error at the output straight to every layer through fixed random weights.

    Choose it where layers must not wait for those above: all errors are known as soon as the output's is. It
    takes an `nn.Sequential`; what gets the error is the output of each group of a layer with parameters and
    the activations after it.

    Args:
        key: names the random weights.
        scale: their standard deviation times sqrt(number of outputs); above 0.

    Paper:
        Nøkland: Direct Feedback Alignment Provides Learning in Deep Neural Networks. NeurIPS 2016,
        arXiv 1609.01596.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> import torch
        >>> from thalweg.local import align
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> align(net, gradient=DirectFeedbackAlignment())(torch.ones(2, 4)).sum().backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """

    key: Key = _FIRST
    scale: float = 1.0

    def __post_init__(self) -> None:
        _require_fields(self.key, self.scale)


@dataclass(frozen=True, slots=True)
class SignSymmetry:
    """Send the error back through weights that share only the signs of the forward weights.

    Choose it as the mildest break of symmetry: it trains deep convolutional networks nearly as well as
    backpropagation does.

    Args:
        magnitude: "mean" gives every weight its layer's mean absolute value, "one" the value 1 (then use
            normalisation layers), "random" fixed absolute values of normal draws.
        key: of "random".

    Paper:
        Liao, Leibo, Poggio: How Important is Weight Symmetry in Backpropagation? AAAI 2016,
        arXiv 1510.05067; at scale: Xiao and others. ICLR 2019, arXiv 1811.03567.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> import torch
        >>> from thalweg.local import align
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -1.5]]))
        >>> align(layer, gradient=SignSymmetry())(x).backward()
        >>> x.grad
        tensor([[ 1., -1.]])
    """

    magnitude: Literal["mean", "one", "random"] = "mean"
    key: Key = _FIRST

    def __post_init__(self) -> None:
        require_choice("magnitude", self.magnitude, ("mean", "one", "random"))
        _require_fields(self.key, 1.0)


def _require_fields(key: object, scale: object) -> None:
    if not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key")
    require_positive("scale", scale)
