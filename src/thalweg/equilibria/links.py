"""The links between the layers of an energy network: what one layer says to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.noise import Key, uniform


def dense_links(sizes: Sequence[int], *, gain: float | None = None, seed: int = 0) -> list[nn.Module]:
    """Fully connected links.

    Args:
        sizes: units per layer, the input's first; at least 2 of them, each at least 1.
        gain: weights and biases uniform in +-gain / sqrt(inputs), above 0. None for the original paper's:
            weights uniform in +-sqrt(6 / (inputs + outputs)), biases 0.
        seed: names the weights.

    Example:
        >>> [tuple(link.weight.shape) for link in dense_links([4, 3, 2])]
        [(3, 4), (2, 3)]
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) < 2:
        raise ArgumentError("sizes", sizes, "at least two numbers of units")
    for index, size in enumerate(sizes):
        require_integer(f"sizes[{index}]", size, 1)
    links: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    _fill(links, gain, seed)
    return links


def conv_links(
    channels: Sequence[int],
    paddings: Sequence[int],
    features: int,
    classes: int | None,
    *,
    kernel: int = 3,
    pool: str = "max",
    gain: float | None = None,
    seed: int = 0,
) -> list[nn.Module]:
    """Convolutions with 2 x 2 pooling, and a fully connected link to the classes.

    Args:
        channels: the input's first; at least 2 of them.
        paddings: one per convolution.
        features: values of the last convolutional layer, channels x height x width.
        classes: units of the output layer; None for none, where the read-out belongs to the cost.
        kernel: side of the filters.
        pool: "max", "average", or "soft", the holomorphic one.
        gain, seed: as in `dense_links`.

    Example:
        >>> links = conv_links([1, 8, 16], [1, 1], 16 * 2 * 2, 10)  # images of 8 x 8
        >>> links[1](links[0](torch.zeros(5, 1, 8, 8))).shape
        torch.Size([5, 16, 2, 2])
    """
    require_choice("pool", pool, ("max", "average", "soft"))
    require_integer("kernel", kernel, 1)
    if not isinstance(channels, Sequence) or len(channels) < 2:
        raise ArgumentError("channels", channels, "at least two numbers of channels")
    if len(paddings) != len(channels) - 1:
        raise ArgumentError("paddings", paddings, f"{len(channels) - 1} of them, one per convolution")
    pools = {"max": nn.MaxPool2d, "average": nn.AvgPool2d, "soft": SoftMaxPool2d}
    links: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(a, b, kernel, padding=padding), pools[pool](2))
        for a, b, padding in zip(channels[:-1], channels[1:], paddings)
    ]
    if classes is not None:
        links.append(nn.Sequential(nn.Flatten(), nn.Linear(features, classes)))
    _fill(links, gain, seed)
    return links


class SoftMaxPool2d(nn.Module):
    """Pooling by the mean weighted with a softmax over each window: holomorphic, unlike a maximum.

    Args:
        size: side of the windows, which do not overlap; rows and columns that do not fill one are dropped.
        temperature: above 0; towards 0 it becomes the maximum.

    Example:
        >>> SoftMaxPool2d(2, temperature=0.01)(torch.arange(4.0).reshape(1, 1, 2, 2))
        tensor([[[[3.]]]])
    """

    def __init__(self, size: int, temperature: float = 1.0) -> None:
        super().__init__()
        require_integer("size", size, 1)
        require_positive("temperature", temperature)
        self.size = size
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, channels, height, width) to (batch, channels, height / size, width / size)."""
        size = self.size
        rows, columns = x.shape[-2] // size, x.shape[-1] // size
        if x.ndim != 4 or not rows * columns:
            raise ArgumentError("x", x, f"shape (batch, channels, height, width), at least {size} x {size}")
        x = x[..., : rows * size, : columns * size]
        windows = x.reshape(*x.shape[:2], rows, size, columns, size).transpose(3, 4).flatten(4)
        heat = windows / self.temperature
        # a constant for the derivative, which it leaves as it is
        top = (heat.real if heat.is_complex() else heat).detach().amax(-1, keepdim=True)
        weights = (heat - top).exp()
        pooled: Tensor = (weights * windows).sum(-1) / weights.sum(-1)
        return pooled


def require_links(links: object, input_shape: object) -> tuple[list[nn.Module], list[tuple[int, ...]]]:
    """Check the links of a network and find the shapes of its layers, without the batch."""
    if not isinstance(links, Sequence) or not links or not all(isinstance(m, nn.Module) for m in links):
        raise ArgumentTypeError("links", links, "a list of at least one torch.nn.Module")
    if input_shape is None:
        if not isinstance(links[0], nn.Linear):
            raise ArgumentError(
                "input_shape", None, "the shape of one input where the first link is no Linear"
            )
        input_shape = (links[0].in_features,)
    if not isinstance(input_shape, Sequence):
        raise ArgumentTypeError("input_shape", input_shape, "a tuple of sizes, without the batch")
    parameter = next((p for link in links for p in link.parameters()), torch.empty(0))
    value = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
    shapes: list[tuple[int, ...]] = []
    with torch.no_grad():
        for index, link in enumerate(links):
            try:
                value = require_floating(f"links[{index}]: its result", link(value))
            except RuntimeError as error:
                got = f"{type(link).__name__} ({error})"
                expected = f"a module that takes a layer of shape {tuple(value.shape[1:])}"
                raise ArgumentError(f"links[{index}]", got, expected) from None
            shapes.append(tuple(value.shape[1:]))
    return list(links), shapes


def _fill(links: Sequence[nn.Module], gain: float | None, seed: int) -> None:
    require_integer("seed", seed, 0)
    if gain is not None:
        require_positive("gain", gain)
    weighted = [m for link in links for m in link.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for index, module in enumerate(weighted):
        fan_in = module.weight[0].numel()
        fan_out = module.weight.numel() // module.weight.shape[1]
        bound = (6 / (fan_in + fan_out)) ** 0.5 if gain is None else gain / fan_in**0.5
        assert module.bias is not None
        for call, parameter in enumerate((module.weight, module.bias)):
            draw = uniform(parameter, Key(seed, step=index, call=call)) * 2 - 1
            with torch.no_grad():
                parameter.copy_(draw * (bound if call == 0 or gain is not None else 0.0))
