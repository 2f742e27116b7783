"""Averaged weights: a network that follows the trained one slowly, as target and for sampling."""

from __future__ import annotations

import torch
from torch import nn

from thalweg.errors import ArgumentError


def average_weights_(average: nn.Module, online: nn.Module, decay: float) -> None:
    """Move an averaged network a little towards the one that is trained: average <- decay average + ...

    Buffers are copied. Call it after each step of the optimizer; as target and for sampling hand out
    `flow_map.with_network(average)`.

    Args:
        average: a copy of the network, for example by `copy.deepcopy`.
        online: the network that is trained.
        decay: in [0, 1).

    Example:
        >>> online, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> average_weights_(average, online, 0.0)
        >>> bool(average.weight == online.weight)
        True
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ArgumentError("decay", decay, "a number in [0, 1)")
    pairs = list(zip(average.parameters(), online.parameters(), strict=True))
    buffers = list(zip(average.buffers(), online.buffers(), strict=True))
    if any(mine.shape != theirs.shape for mine, theirs in pairs + buffers):
        raise ArgumentError("average", type(average), "a copy of the online network")
    with torch.no_grad():
        for weight, trained in pairs:
            weight.lerp_(trained, 1 - decay)
        for buffer, current in buffers:
            buffer.copy_(current)
