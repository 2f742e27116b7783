"""A gate that lets an error pass, and hands a copy of it through weights of your own to another tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, slots=True)
class Convolution:
    """How a convolution runs, to run its transpose.

    Args:
        stride, padding, dilation: one integer per dimension.
        groups: as in torch.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def transpose(self, error: Tensor, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        """The error at an input of this size that an error at the output causes."""
        dims = len(self.stride)
        least = [
            (out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for out, stride, padding, dilation, kernel in zip(
                error.shape[-dims:], self.stride, self.padding, self.dilation, weight.shape[-dims:]
            )
        ]
        # the rows that a stride leaves over at the end
        rest = [whole - found for whole, found in zip(size[-dims:], least)]
        found: Tensor = _TRANSPOSED[dims](
            error, weight, None, self.stride, self.padding, rest, self.groups, self.dilation
        )
        return found


def deliver(out: Tensor, to: Tensor, weight: Tensor, convolution: Convolution | None = None) -> Tensor:
    """Return a copy of `out`; backward also sends its error, through `weight`, to the tensor `to`.

    Args:
        out: what passes, shape (..., outputs) or, for direct feedback and convolutions, (batch, ...).
        to: what gets the error.
        weight: shape (outputs, features); of the last dimensions if `to` has as many dimensions as `out` and
            the sizes fit, else of the flattened examples. Of a convolution the shape of its own weight.
        convolution: how it runs, or None for a matrix.

    Example:
        >>> h = torch.zeros(1, 3, requires_grad=True)
        >>> deliver(torch.zeros(1, 2), h, torch.ones(2, 3)).sum().backward()
        >>> h.grad
        tensor([[2., 2., 2.]])
    """
    passed: Tensor = _Deliver.apply(out, to, weight, convolution)  # type: ignore[no-untyped-call]
    return passed


class _Deliver(torch.autograd.Function):
    """The identity in `out`; a linear map of the error for `to`. Its second derivative is that of the map."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, to: Tensor, weight: Tensor, convolution: Convolution | None) -> Tensor:
        # a copy, so that an activation may overwrite it
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, to, weight, convolution = inputs
        ctx.save_for_backward(weight)
        ctx.size, ctx.dtype, ctx.convolution = tuple(to.shape), to.dtype, convolution

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(error.dtype)
        if ctx.convolution is not None:
            sent = ctx.convolution.transpose(error, weight, ctx.size)
        elif error.shape[-1] == weight.shape[0] and ctx.size == (*error.shape[:-1], weight.shape[1]):
            sent = error @ weight
        else:
            sent = (error.flatten(1) @ weight).view(ctx.size)
        return error, sent.to(ctx.dtype), None, None
