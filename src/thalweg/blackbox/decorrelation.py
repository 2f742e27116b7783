"""Decorrelation: a matrix before a layer that learns, without any loss, to make its inputs uncorrelated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_finite,
    require_floating,
    require_integer,
    require_positive,
)


class Decorrelation(nn.Module):
    """Multiply features by a matrix R that each training batch moves towards uncorrelated outputs.

    Choose it before the layers of a network that learns by `NodePerturbation` from correlated inputs (raw
    pixels, deep layers): noise on one unit then says less about the others. x* = R x, and after it
    R <- R - rate (C - diag C) R with C the mean of x* x*^T over the batch; R starts as the identity. R is a
    buffer: no gradient and no optimizer move it, `state_dict` keeps it, and the rules of `thalweg.backward`
    let it move once per estimate, however often they evaluate. Gradients pass through to the inputs.

    Args:
        size: number of features, at least 1.
        rate: step size, at least 0, below 2 divided by the largest eigenvalue of C; 0.01 to 0.05 for features
            of variance 1. 0 keeps R as it is.
        automatic: True lets every forward in training mode update R with its own output; False leaves that to
            calls of `update_`.
        device: of the buffer.
        dtype: of the buffer; None is torch's default.

    Shape:
        Input and output (..., size).

    Raises:
        ArgumentError, ArgumentTypeError: an argument out of range; an input of another size.
        NonFiniteError: in `update_`, when R would become nan or infinite: the rate is too large.

    Paper:
        Dalm, van Gerven, Ahmad: Effective Learning with Node Perturbation in Multi-Layer Neural Networks.
        arXiv 2310.00965, 2023.

    Example:
        >>> unit = Decorrelation(2, rate=0.05)
        >>> x = torch.randn(64, 1).expand(64, 2) + 0.3 * torch.randn(64, 2)
        >>> for _ in range(300):
        ...     y = unit(x)
        >>> bool((y[:, 0] * y[:, 1]).mean().abs() < 0.05 * (x[:, 0] * x[:, 1]).mean())
        True
    """

    matrix: Tensor

    def __init__(
        self,
        size: int,
        rate: float = 0.01,
        *,
        automatic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_integer("size", size, 1)
        if rate != 0:
            require_positive("rate", rate)
        if not isinstance(automatic, bool):
            raise ArgumentTypeError("automatic", automatic, "True or False")
        self.size, self.rate, self.automatic = size, rate, automatic
        self.register_buffer("matrix", torch.eye(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Decorrelate features of shape (..., size), in the dtype of `x`."""
        require_floating("x", x)
        if x.ndim == 0 or x.shape[-1] != self.size:
            raise ArgumentError("x", x, f"a shape (..., {self.size})")
        decorrelated = x @ self.matrix.to(x.dtype).T
        if self.training and self.automatic:
            self.update_(decorrelated)
        return decorrelated

    @torch.no_grad()
    def update_(self, decorrelated: Tensor) -> None:
        """Move R by what this unit put out, features of shape (..., size); every row counts alike."""
        if self.rate == 0 or decorrelated.numel() == 0:
            return
        rows = decorrelated.detach().reshape(-1, self.size).to(self.matrix.dtype)
        correlation = rows.T @ rows / len(rows)
        # a new tensor: a graph that holds the old one stays valid
        moved = self.matrix - self.rate * (off_diagonal(correlation) @ self.matrix)
        if not torch.compiler.is_compiling():
            require_finite(f"Decorrelation: its matrix under rate={self.rate}, which is too large", moved)
        self.matrix = moved

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"{self.size}, rate={self.rate}, automatic={self.automatic}"


def off_diagonal(matrix: Tensor) -> Tensor:
    """A square matrix of shape (size, size) without its diagonal.

    Example:
        >>> off_diagonal(torch.ones(2, 2))
        tensor([[0., 1.],
                [1., 0.]])
    """
    return matrix - torch.diag(torch.diagonal(matrix))
