"""Stop the gradient at a tensor, all of it or a part."""

from __future__ import annotations

from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.gates.scale import scale


def stop(x: Tensor, fraction: float = 1.0) -> Tensor:
    """Return `x` unchanged, and let only `1 - fraction` of the gradient through.

    Choose it where a part must not move, or must not hear everything: insulate a backbone from a young head
    with `fraction=1`, and open the gate as the head grows up.

    Args:
        x: floating-point tensor of any shape.
        fraction: the share of the gradient that is stopped, in [0, 1].

    Returns:
        For `fraction=1` the tensor `x.detach()`: it costs nothing and shares the memory of `x`, and what lies
        below gets no gradient at all (`.grad` stays None). Otherwise `scale(x, 1 - fraction)`.

    Raises:
        ArgumentTypeError, ArgumentError: `x` is not floating point, or `fraction` is not in [0, 1].

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> stop(x).requires_grad
        False
        >>> stop(x, 0.75).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.2500])
    """
    require_floating("x", x)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise ArgumentTypeError("fraction", fraction, "a number in [0, 1]")
    if not 0 <= fraction <= 1:
        raise ArgumentError("fraction", fraction, "a number in [0, 1]")
    return x.detach() if fraction == 1 else scale(x, 1 - fraction)
