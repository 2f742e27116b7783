"""A quadratic with a given spectrum: loss, gradient and Hessian are known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating, require_integer
from thalweg.noise import Key, normal


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The loss 0.5 (x - minimum)^T H (x - minimum): choose it to see what a rule does to a known gradient.

    Make one with `from_spectrum`.

    Args:
        hessian: symmetric matrix H, shape (d, d), float64.
        minimum: shape (d,).

    Example:
        >>> problem = Quadratic.from_spectrum([1.0, 4.0], seed=0)
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> problem.loss(x).backward()
        >>> bool(torch.allclose(x.grad, problem.gradient(x)))
        True
    """

    hessian: Tensor
    minimum: Tensor

    @staticmethod
    def from_spectrum(spectrum: Sequence[float] | Tensor, seed: int = 0) -> Quadratic:
        """A quadratic with these eigenvalues, in a random basis and around a random minimum.

        Args:
            spectrum: d finite eigenvalues of any sign, in any order.
            seed: names basis and minimum.

        Raises:
            ArgumentError, ArgumentTypeError: an empty or non-finite spectrum, or no vector of numbers.
        """
        require_integer("seed", seed, 0)
        expected = "a vector of at least one finite eigenvalue"
        try:
            values = torch.as_tensor(spectrum, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError("spectrum", spectrum, expected) from None
        if values.ndim != 1 or not len(values) or not bool(torch.isfinite(values).all()):
            raise ArgumentError("spectrum", spectrum, expected)
        size = len(values)
        square = normal(torch.empty(size, size, dtype=torch.float64), Key(seed, call=0))
        basis = torch.linalg.qr(square).Q
        hessian = basis @ torch.diag(values) @ basis.T
        minimum = normal(torch.empty(size, dtype=torch.float64), Key(seed, call=1))
        return Quadratic((hessian + hessian.T) / 2, minimum)

    def loss(self, x: Tensor) -> Tensor:
        """The loss at points of shape (..., d): a tensor of shape (...)."""
        away = self._away(x)
        return 0.5 * (away * (away @ self.hessian)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """The exact gradient at points of shape (..., d): the same shape, detached."""
        return self._away(x).detach() @ self.hessian

    def _away(self, x: Tensor) -> Tensor:
        if require_floating("x", x).ndim == 0 or x.shape[-1] != len(self.minimum):
            raise ArgumentError("x", x, f"shape (..., {len(self.minimum)})")
        return x - self.minimum
