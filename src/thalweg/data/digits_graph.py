"""Handwritten digits joined to the digits that look like them: a real graph with nothing to fetch."""

from __future__ import annotations

import torch

from thalweg.data.digits import digits
from thalweg.data.graph import Graph, undirected
from thalweg.errors import ArgumentError, require_integer


def digits_graph(*, neighbours: int = 10) -> Graph:
    """Join each of scikit-learn's digits to those nearest by cosine; choose it when no archive is at hand.

    Args:
        neighbours: how many each digit is joined to, 1 to 1 796; being a neighbour works both ways.

    Returns:
        1 797 nodes of 64 features in [0, 1], ten classes.

    Raises:
        ArgumentError, ArgumentTypeError: a number out of range.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> digits_graph().features.shape
        torch.Size([1797, 64])
    """
    require_integer("neighbours", neighbours, 1)
    data = digits()
    features = torch.cat([data.train_inputs, data.test_inputs])
    if neighbours >= len(features):
        raise ArgumentError("neighbours", neighbours, f"less than {len(features)}, the number of digits")
    directions = features.double() / features.double().norm(dim=1, keepdim=True)
    likeness = (directions @ directions.T).fill_diagonal_(-1.0)
    nearest = likeness.topk(neighbours, dim=1).indices
    sources = torch.arange(len(features))[:, None].expand_as(nearest)
    edges = undirected(torch.stack([sources.flatten(), nearest.flatten()]), len(features))
    labels = torch.cat([data.train_labels, data.test_labels])
    return Graph(features, edges, labels, data.classes, "digits, nearest by cosine")
