"""The toy network: 6-5-4-3, scaled sigmoid, float64, its primitive function as a closure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.equilibria import Activation, minimize

DOUBLE = torch.float64
SIZES = (6, 5, 4, 3)


def sigma(z: Tensor) -> Tensor:
    return torch.sigmoid(4 * z - 2)


class Toy:
    """Weights, input, and a random cotangent on the last layer."""

    def __init__(self, seed: int = 0, batch: int = 7) -> None:
        g = torch.Generator().manual_seed(seed)
        pairs = list(zip(SIZES[1:], SIZES[:-1]))
        self.weights = [
            (0.5 * torch.randn(a, b, generator=g, dtype=DOUBLE) / b**0.5).requires_grad_() for a, b in pairs
        ]
        self.biases = [(0.1 * torch.randn(a, generator=g, dtype=DOUBLE)).requires_grad_() for a, _ in pairs]
        self.x = torch.rand(batch, SIZES[0], generator=g, dtype=DOUBLE).requires_grad_()
        self.v = torch.randn(batch, SIZES[-1], generator=g, dtype=DOUBLE)
        self.zeros = tuple(torch.zeros(batch, n, dtype=DOUBLE) for n in SIZES[1:])

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.weights, *self.biases, self.x]

    def energy(self, states: tuple[Tensor, ...]) -> Tensor:
        """Minus the primitive function, without the units' own term."""
        below = (self.x, *states[:-1])
        terms = [
            (s * torch.nn.functional.linear(b, w, c)).sum(1)
            for s, b, w, c in zip(states, below, self.weights, self.biases)
        ]
        return -sum(terms[1:], terms[0])

    def rest(self, gradient: Any, **options: Any) -> tuple[Tensor, ...]:
        options = {"tolerance": 1e-13, "max_steps": 400, **options}
        found: tuple[Tensor, ...] = minimize(
            self.energy,
            options.pop("start", self.zeros),
            gradient=gradient,
            relaxation=Activation(sigma),
            **options,
        )
        return found

    def gradient(
        self, gradient: Any, loss: Callable[[Tensor], Tensor] | None = None, **options: Any
    ) -> Tensor:
        """The gradient of <v, output>, or of another loss, by weights, biases and input, as one vector."""
        out = self.rest(gradient, **options)[-1]
        value = (self.v * out).sum() if loss is None else loss(out)
        found = torch.autograd.grad(value, self.leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def slope(errors: list[float], at: list[float]) -> float:
    """The least-squares slope of log error in log strength."""
    x, y = torch.tensor(at).log(), torch.tensor(errors).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
