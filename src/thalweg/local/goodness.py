"""What forward-forward pushes up on real examples and down on false ones, and a way to make false ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.noise import Key, uniform


class Goodness(nn.Module):
    """The local loss of forward-forward: squared activity above a threshold for positives, else below.

    Args:
        threshold: above 0.
        reduce: "mean" or "sum" of squared activities; with a mean one threshold serves layers of any width.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> local = Goodness(threshold=4.0)
        >>> local(torch.full((2, 3), 2.0), torch.tensor([True, False]))  # at the threshold: 2 log 2
        tensor(1.3863)
    """

    def __init__(self, threshold: float = 1.0, *, reduce: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        require_positive("threshold", threshold)
        require_choice("reduce", reduce, ("mean", "sum"))
        self.threshold = threshold
        self.reduce = reduce

    def goodness(self, output: Tensor) -> Tensor:
        """Of each example, shape (batch,)."""
        squares = output.flatten(1).square()
        return squares.mean(1) if self.reduce == "mean" else squares.sum(1)

    def forward(self, output: Tensor, positive: Tensor) -> Tensor:
        """The mean logistic loss of positives plus that of negatives; `positive` is bool, (batch,)."""
        away = self.goodness(output) - self.threshold
        # a mask and not an index: its shape does not depend on data
        share = positive.to(away.dtype)
        likes, doubts = F.softplus(-away) * share, F.softplus(away) * (1 - share)
        return likes.sum() / share.sum().clamp(min=1) + doubts.sum() / (1 - share).sum().clamp(min=1)

    def scores(self, output: Tensor) -> Tensor:
        """By how much each example exceeds the threshold, shape (batch,)."""
        return self.goodness(output) - self.threshold


def hybrid_images(images: Tensor, key: Key, *, blurs: int = 6) -> Tensor:
    """Negative examples without labels: each image mixed with the next by a random mask of large patches.

    Choose it for unsupervised forward-forward: short-range statistics stay those of real images.

    Args:
        images: shape (batch, channels, height, width), at least two; shuffled, as the partner is the next.
        key: of the masks.
        blurs: how often the random mask is blurred by (1/4, 1/2, 1/4) each way before it is cut at 1/2.

    Returns:
        Images of the same shape.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> mixed = hybrid_images(images, Key(0))
        >>> bool(0 < mixed[0].mean() < 1)
        True
    """
    require_floating("images", images)
    if images.ndim != 4 or len(images) < 2:
        raise ArgumentError("images", images, "shape (batch, channels, height, width), at least two images")
    if not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key")
    require_integer("blurs", blurs, 0)
    mask = uniform(images[:, :1], key)
    kernel = images.new_tensor([0.25, 0.5, 0.25])
    for _ in range(blurs):
        for window in (kernel.view(1, 1, 3, 1), kernel.view(1, 1, 1, 3)):
            sides = (0, 0, 1, 1) if window.shape[2] == 3 else (1, 1, 0, 0)
            mask = F.conv2d(F.pad(mask, sides, mode="replicate"), window)
    return torch.where(mask > 0.5, images, images.roll(1, 0))
