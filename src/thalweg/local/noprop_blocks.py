"""The blocks of NoProp, and the ordinary network made of the same blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.local.noprop_labels import LabelEmbedding, LatentReadout
from thalweg.local.stack import require_modules
from thalweg.noise import Key, fresh_key, normal

_TIMES = 64  # sinusoidal features of the time


class DenoisingBlock(nn.Module):
    """Guess the label from a noisy one and the input, in the layout of the paper's figure.

    Input and latent go their own ways and meet in a joint head. Without `timed` all paths have batch norm and
    the latent's a skip; with it there is a path for the time, and no batch norm, as in the paper.

    Args:
        embedding: the labels' points. Where a point has the shape of an image, the latent takes a path of
            convolutions too, and must have the shape of `inputs`.
        inputs: features per example, or (channels, height, width) of images, at least 4 x 4.
        width: of all layers but the last hidden one, which has half.
        channels: of the three convolutions.
        dropout: in [0, 1), after convolutions.
        timed: whether it is called with times, as `ContinuousNoProp` and `FlowNoProp` do.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> from thalweg.local import one_hot_labels
        >>> block = DenoisingBlock(one_hot_labels(10), (1, 28, 28), width=16, channels=(4, 4, 8))
        >>> block(torch.zeros(2, 10), torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        embedding: LabelEmbedding,
        inputs: int | tuple[int, int, int],
        *,
        width: int = 256,
        channels: tuple[int, int, int] = (32, 64, 128),
        dropout: float = 0.2,
        timed: bool = False,
    ) -> None:
        super().__init__()
        require_integer("width", width, 2)
        _require_inputs(inputs)
        if not (isinstance(channels, tuple) and len(channels) == 3):
            raise ArgumentTypeError("channels", channels, "three integers")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ArgumentError("dropout", dropout, "a number in [0, 1)")
        if len(embedding.shape) == 3 and embedding.shape != inputs:
            raise ArgumentError("inputs", inputs, f"{embedding.shape}, the shape of the prototypes")
        self.timed = timed
        self.input_path = _path(inputs, width, channels, dropout, timed)
        self.latent_path = (
            _path(embedding.shape, width, channels, dropout, timed)
            if len(embedding.shape) == 3
            else nn.Sequential(nn.Flatten(), *_layer(embedding.weight[0].numel(), width, timed))
        )
        self.skipped = None
        if not timed and len(embedding.shape) != 3:
            self.skipped = nn.Sequential(
                *_layer(width, width, False), nn.Linear(width, width), nn.BatchNorm1d(width)
            )
        self.time_path = nn.Sequential(nn.Linear(_TIMES, width), nn.ReLU()) if timed else None
        self.head = nn.Sequential(
            *_layer((3 if timed else 2) * width, width, timed),
            *_layer(width, width // 2, timed),
            nn.Linear(width // 2, embedding.classes),
        )

    def forward(self, latent: Tensor, inputs: Tensor, time: Tensor | None = None) -> Tensor:
        """Logits, shape (batch, classes); times of shape (batch,) in [0, 1]."""
        told = self.latent_path(latent)
        if self.skipped is not None:
            told = told + self.skipped(told)
        paths = [self.input_path(inputs), told]
        if self.time_path is not None:
            if time is None:
                raise ArgumentTypeError("time", time, "times of shape (batch,), since timed=True")
            paths.append(self.time_path(_sinusoids(time)))
        logits: Tensor = self.head(torch.cat(paths, 1))
        return logits


class BackpropNoProp(nn.Module):
    """The same blocks as one residual network, trained end to end: the baseline of the paper.

    z_t = (1 - a_t) z_{t-1} + a_t u_t, a_t = tanh(w_t) learned, z_0 drawn from a normal distribution. It is
    slow to start, not bad: give it epochs.

    Args:
        blocks: as in `NoProp`.
        embedding: as in `NoProp`.
        start: the first a_t, in (0, 1); the paper gives none.

    Example:
        >>> from thalweg.local import one_hot_labels
        >>> labels = one_hot_labels(3)
        >>> net = BackpropNoProp([DenoisingBlock(labels, 4, width=8) for _ in range(2)], labels)
        >>> net(torch.rand(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, blocks: Iterable[nn.Module], embedding: LabelEmbedding, *, start: float = 0.5) -> None:
        super().__init__()
        found = require_modules("blocks", blocks)
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 < start < 1:
            raise ArgumentError("start", start, "a number in (0, 1)")
        self.blocks = nn.ModuleList(found)
        self.embedding = embedding
        self.readout = LatentReadout(embedding)
        self.mixing = nn.Parameter(torch.full((len(found),), math.atanh(start)))

    def forward(self, inputs: Tensor, *, key: Key | None = None) -> Tensor:
        """Logits, shape (batch, classes); the start is drawn from `key`, or from a fresh one."""
        like = self.embedding.weight.new_empty(len(inputs), *self.embedding.shape)
        latent = normal(like, fresh_key(like) if key is None else key)
        for block, mixing in zip(self.blocks, self.mixing.tanh()):
            guess = self.embedding.mix(block(latent, inputs).softmax(1))
            latent = (1 - mixing) * latent + mixing * guess
        logits: Tensor = self.readout(latent, self.embedding)
        return logits


def _layer(inputs: int, outputs: int, plain: bool) -> list[nn.Module]:
    norm = [] if plain else [nn.BatchNorm1d(outputs)]
    return [nn.Linear(inputs, outputs), *norm, nn.ReLU()]


def _path(
    inputs: int | tuple[int, ...], width: int, channels: tuple[int, ...], dropout: float, timed: bool
) -> nn.Sequential:
    last: nn.Module = nn.ReLU() if timed else nn.BatchNorm1d(width)
    if isinstance(inputs, int):
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), last)
    first, second, third = channels
    return nn.Sequential(
        *(nn.Conv2d(inputs[0], first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(second, third, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        nn.Flatten(),
        nn.Linear(third * (inputs[1] // 2 // 2) * (inputs[2] // 2 // 2), width),
        last,
    )


def _sinusoids(time: Tensor) -> Tensor:
    scales = torch.exp(
        torch.linspace(0, math.log(1e4), _TIMES // 2, dtype=time.dtype, device=time.device).neg()
    )
    # at most 10 radians from start to end: features that turn faster were noise to small networks
    angles = 10 * time[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], 1)


def _require_inputs(inputs: object) -> None:
    if isinstance(inputs, tuple):
        if len(inputs) != 3:
            raise ArgumentError("inputs", inputs, "(channels, height, width)")
        for name, value, least in zip(("channels", "height", "width"), inputs, (1, 4, 4)):
            require_integer(f"inputs: {name}", value, least)
    else:
        require_integer("inputs", inputs, 1)
