"""The units' functions in equilibrium propagation, and which of them have a holomorphic extension."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_sigmoid(x: Tensor) -> Tensor:
    """sigmoid(4 x - 2): from 0 to 1 about x = 1/2, slope 1 there; holomorphic. For dense networks.

    Example:
        >>> scaled_sigmoid(torch.tensor(0.5))
        tensor(0.5000)
    """
    return torch.sigmoid(4 * x - 2)


def half_clip(x: Tensor) -> Tensor:
    """clip(x / 2, 0, 1): for convolutions; not holomorphic, see `smooth_clip`."""
    return (0.5 * x).clamp(0, 1)


def unit_clip(x: Tensor) -> Tensor:
    """clip(x, 0, 1): the units of the original paper; not holomorphic."""
    return x.clamp(0, 1)


def smooth_clip(x: Tensor) -> Tensor:
    """A smooth version of clip(x / 2, 0, 1): holomorphic, for convolutions under holomorphic nudging.

    It leaves the interval a little (from -0.14 to 1.14) and does not increase everywhere.

    Paper:
        Laborieux, Zenke: Holomorphic Equilibrium Propagation. NeurIPS 2022, arXiv 2209.00530.

    Example:
        >>> smooth_clip(torch.tensor(1.0)).round(decimals=3)
        tensor(0.5000)
    """
    return 0.5 * x * torch.sigmoid(x) + (1 - 0.5 * x) * torch.sigmoid(x - 2)
