"""Random search by squares: an attack that looks at no gradient, so that none can be masked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.attacks.losses import (
    Bounds,
    Model,
    Target,
    attacked,
    clipped,
    margin,
    require_radius,
    require_steps,
)
from thalweg.errors import ArgumentError, require_positive
from thalweg.noise import Key, rademacher, uniform
from thalweg.step import draw_key


def square(
    model: Model,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    radius: float,
    queries: int = 1000,
    share: float = 0.3,
    bounds: Bounds = (0.0, 1.0),
    key: Key | None = None,
) -> Tensor:
    """Try random squares of pixels at the faces of the box and keep what raises the margin.

    Choose it beside `pgd`: where it does more harm than the gradient, the gradient is masked. It needs
    hundreds of queries to come near; each is one forward of the batch.

    Args:
        model: returns logits (batch, classes); a module is attacked in evaluation mode and left as it was.
        inputs: (batch, channels, height, width); vectors (batch, pixels) are taken as square images where
            the number of pixels is a square, else as images of one row.
        labels: int64, (batch,); None attacks the model's own predictions.
        radius: how far a pixel may move, at least 0.
        queries: how many forwards, at least 1.
        share: of the pixels that the first squares cover, above 0 and at most 1; it shrinks on the way.
        bounds: the range of inputs, or None.
        key: of the random draws; None takes a fresh one, governed by `torch.manual_seed`.

    Returns:
        The attacked inputs, detached.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Andriushchenko and others: Square Attack. ECCV 2020, arXiv 1912.00049.

    Example:
        >>> model = torch.nn.Linear(9, 3)
        >>> inputs, labels = torch.full((2, 9), 0.5), torch.tensor([0, 1])
        >>> moved = square(model, inputs, labels, radius=0.1, queries=5) - inputs
        >>> bool((moved.abs() <= 0.1001).all())
        True
    """
    far = require_radius(radius)
    require_steps("queries", queries)
    require_positive("share", share)
    if share > 1:
        raise ArgumentError("share", share, "a number above 0 and at most 1")
    key = draw_key() if key is None else key
    with attacked(model, inputs, labels, bounds) as target, torch.no_grad():
        return _search(target, far, queries, share, bounds, key)


def _search(target: Target, radius: float, queries: int, share: float, bounds: Bounds, key: Key) -> Tensor:
    clean = target.inputs
    images = clean.reshape(_image_shape(clean))
    batch, channels, height, width = images.shape
    best = images
    margins = margin(target.logits(clean), target.labels)
    # the first query: stripes of one column each, the published start
    stripes = rademacher(images.new_empty(batch, channels, 1, width), key.at(call=0)).expand_as(images)
    candidate = clipped(images + radius * stripes, bounds)
    for query in range(queries):
        found = margin(target.logits(candidate.reshape(clean.shape)), target.labels)
        better = found > margins
        margins = torch.where(better, found, margins)
        best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
        side = _side(share, query / queries, height, width)
        inside = _squares(best, side, key.at(call=2 * query + 1))
        signs = rademacher(images.new_empty(batch, channels, 1, 1), key.at(call=2 * query + 2))
        candidate = torch.where(inside, clipped(images + radius * signs, bounds), best)
    return best.reshape(clean.shape)


def _image_shape(inputs: Tensor) -> tuple[int, ...]:
    if inputs.ndim == 4:
        return tuple(inputs.shape)
    pixels = inputs[0].numel()
    side = math.isqrt(pixels)
    return (len(inputs), 1, side, side) if side * side == pixels else (len(inputs), 1, 1, pixels)


def _side(share: float, done: float, height: int, width: int) -> int:
    """The published schedule: the share is halved at fixed parts of the way."""
    halvings = sum(done >= at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
    area = share * 0.5**halvings * height * width
    return max(1, min(round(math.sqrt(area)), max(height, width)))


def _squares(images: Tensor, side: int, key: Key) -> Tensor:
    """A mask of one square at a random place in each image, (batch, 1, height, width)."""
    batch, _, height, width = images.shape
    places = uniform(images.new_empty(batch, 2), key)
    top = (places[:, 0] * (max(height - side, 0) + 1)).floor().view(-1, 1, 1, 1)
    left = (places[:, 1] * (max(width - side, 0) + 1)).floor().view(-1, 1, 1, 1)
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
