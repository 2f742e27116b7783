"""What a closure may return: a scalar, one loss per example, or a mapping of named losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, require_finite


def mean_loss(loss: object) -> Tensor:
    """Check what a closure returned and reduce it to a scalar: losses per example by their mean.

    Raises:
        ArgumentTypeError, ArgumentError: not a floating-point tensor of at most one dimension, or empty.
        NonFiniteError: nan or infinity, also of the mean alone.
    """
    tensor = _losses(loss, "closure")
    mean = tensor.mean() if tensor.ndim else tensor
    _require_finite_losses(loss, mean)
    return mean


def losses_per_example(loss: object) -> Tensor:
    """Check what a closure returned: a scalar, or one loss per example of shape (batch,).

    Of a mapping it is the sum, per example where all values have the same shape, else of their means.
    """
    tensor = _losses(loss, "closure")
    _require_finite_losses(loss, tensor)
    return tensor


def _losses(loss: object, name: str) -> Tensor:
    if isinstance(loss, Mapping):
        if not loss:
            raise ArgumentTypeError(name, loss, "at least one named loss")
        terms = [_losses(value, f"{name}[{key!r}]") for key, value in loss.items()]
        if len({term.shape for term in terms}) > 1:
            terms = [term.mean() for term in terms]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise ArgumentTypeError(name, loss, "a floating-point tensor as its return value")
    if loss.ndim > 1 or loss.numel() == 0:
        raise ArgumentError(name, loss, "a scalar loss, or one loss per example of shape (batch,)")
    return loss


def _require_finite_losses(loss: object, total: Tensor, name: str = "the loss") -> None:
    """Wait for the device once; only when `total` is not finite look for the term that is to blame."""
    try:
        require_finite(name, total)
    except NonFiniteError:
        if isinstance(loss, Mapping):
            for key, value in loss.items():
                _require_finite_losses(value, _losses(value, name), f"{name}[{key!r}]")
        elif isinstance(loss, Tensor):
            require_finite(name, loss)
        raise
