"""The small networks of the hospital, before anything is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DEPTH, WIDTH = 20, 64


class Between(nn.Module):
    """An encoder and a head with a function between them, in a module of its own named `middle`."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, width)
        self.middle = _Apply(function)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.encoder(x)))
        return out


class _Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """A pre-norm residual block: x + W2 relu(W1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Recurrent(nn.Module):
    """A plain recurrent cell h <- tanh(U h + W x), called once for every step."""

    def __init__(self, width: int, steps: int, gain: float) -> None:
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh())
        self.entry = nn.Linear(8, width)
        self.steps = steps
        nn.init.orthogonal_(self.cell[0].weight, gain=gain)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = 0.01 * self.entry(x)
        for _ in range(self.steps):
            state = self.cell(state)
        return state


class TwoHeads(nn.Module):
    """A shared trunk with two linear heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.left = nn.Linear(32, 1)
        self.right = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.left(features), self.right(features)


def stack(
    activation: type[nn.Module] | None, initialise: Callable[[Tensor], Any] | None, seed: int
) -> nn.Sequential:
    """A deep stack of linear layers of one width; zero biases where the weights are initialised by hand."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for _ in range(DEPTH):
        layer = nn.Linear(WIDTH, WIDTH)
        if initialise is not None:
            initialise(layer.weight)
            nn.init.zeros_(layer.bias)
        parts += [layer] if activation is None else [layer, activation()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 4))
