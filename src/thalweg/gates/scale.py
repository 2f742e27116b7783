"""Scale or reverse the gradient that passes a tensor."""

from __future__ import annotations

import math

from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    """Return `x` unchanged, and multiply the gradient that comes back through it by `factor`.

    Choose it to let one branch learn slower or faster than the others without touching the optimizer. To let
    nothing pass, `stop` is cheaper.

    In all transforms (`vmap`, `grad`, `jvp`, `torch.compile(fullgraph=True)`, second derivatives) it is the
    function `factor * x + (1 - factor) * x.detach()`, whose value is `x` bit for bit; so a tangent is scaled
    too, and a second derivative through the gate carries the factor twice. The result is a tensor of its own,
    which may be changed in place.

    Args:
        x: floating-point tensor of any shape.
        factor: a finite number, or a tensor with one element on the device of `x` (for a schedule that must
            not recompile); gets no gradient.

    Returns:
        A tensor with the bits of `x`.

    Raises:
        ArgumentTypeError, ArgumentError: `x` is not floating point, or `factor` not finite or not one number.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scale(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    return _scaled(x, factor, "factor")


def reverse(x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """Return `x` unchanged, and send the gradient back with its sign turned, times `strength`.

    Choose it for adversarial features: the layers above the gate learn a task that the layers below it
    unlearn. Arguments, returns and transforms as in `scale`, of which it is the case `factor = -strength`.

    Paper:
        Ganin, Lempitsky: Unsupervised Domain Adaptation by Backpropagation. ICML 2015, arXiv 1409.7495.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse(x, 0.1).sum().backward()
        >>> x.grad
        tensor([-0.1000, -0.1000])
    """
    return _scaled(x, strength, "strength", sign=-1)


def _scaled(x: Tensor, factor: float | Tensor, argument: str, sign: int = 1) -> Tensor:
    require_floating("x", x)
    if isinstance(factor, Tensor):
        if factor.numel() != 1 or not factor.is_floating_point():
            raise ArgumentError(
                argument, factor, "a finite number, or a floating-point tensor with one element"
            )
        # 0-dim and, where x has no dimensions either, of its dtype: it neither widens nor reshapes x
        factor = factor.detach().reshape(())
        factor = factor if x.ndim else factor.to(x.dtype)
    elif isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ArgumentTypeError(argument, factor, "a finite number, or a tensor with one element")
    elif not math.isfinite(factor):
        raise ArgumentError(argument, factor, "a finite number")
    # the product carries the graph; its memory is then overwritten out of autograd's sight, so that the value
    # is exact, and no hook or custom Function stands in the way of a transform
    out: Tensor = x * (sign * factor)
    out.detach().copy_(x.detach())
    return out
