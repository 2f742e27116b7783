"""What an attack climbs: the cross-entropy, as published, or the margin, which no scale of logits masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.borrowed import isolated
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_finite,
    require_floating,
    require_integer,
)

Model = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
Bounds = tuple[float, float] | None


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit minus the labelled one: above 0 where the answer is wrong, whatever the scale.

    Args:
        logits: (batch, classes), at least two classes.
        labels: int64, (batch,).

    Returns:
        One value per example, (batch,), differentiable.

    Paper:
        Carlini, Wagner: Towards Evaluating the Robustness of Neural Networks. 2017, arXiv 1608.04644.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([-2.])
    """
    own = labels[:, None]
    others = logits.scatter(1, own, float("-inf"))
    return others.amax(1) - logits.gather(1, own).squeeze(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, (batch,); its gradient vanishes where the logits are large.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 200.0]]), torch.tensor([0]))
        tensor([200.])
    """
    return F.cross_entropy(logits, labels, reduction="none")


NAMED: dict[str, AttackLoss] = {"margin": margin, "cross_entropy": cross_entropy}


def attack_loss(loss: str | AttackLoss) -> AttackLoss:
    """The loss of that name, or the function itself."""
    if isinstance(loss, str):
        require_choice("loss", loss, tuple(NAMED))
        return NAMED[loss]
    if not callable(loss):
        raise ArgumentTypeError("loss", loss, "'margin', 'cross_entropy', or a function (logits, labels)")
    return loss


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A model under attack, its inputs and labels checked; used inside `attacked`."""

    model: Model
    inputs: Tensor
    labels: Tensor

    def logits(self, inputs: Tensor) -> Tensor:
        """What the model says, checked."""
        return require_logits(self.model(inputs), len(self.inputs))

    def gradient(self, at: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        """The gradient of each example's loss by its input, and the logits, both detached."""
        leaf = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.logits(leaf)
            losses = loss(logits, self.labels)
            if not losses.requires_grad:
                mend = "A model that cuts the graph can be attacked by square()."
                raise ArgumentError("model", logits, "an output that depends on the inputs", mend)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        require_finite("the gradient of the attack's loss", gradient)
        return gradient, logits.detach()


@contextmanager
def attacked(model: Model, inputs: Tensor, labels: Tensor | None, bounds: Bounds) -> Iterator[Target]:
    """Check what is to be attacked; inside, the model is in evaluation mode, and it leaves as it came.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
    """
    if not callable(model):
        raise ArgumentTypeError("model", model, "a function of inputs that returns logits")
    require_floating("inputs", inputs)
    if inputs.ndim < 2 or not len(inputs):
        raise ArgumentError("inputs", inputs, "at least one input, shape (batch, ...)")
    _require_bounds(inputs, bounds)
    module = model if isinstance(model, nn.Module) else None
    inputs = inputs.detach()
    with isolated(module, []):
        if module is not None:
            module.eval()
        with torch.no_grad():
            logits = require_logits(model(inputs), len(inputs))
        if labels is None:
            labels = logits.argmax(1)
        _require_labels(labels, logits)
        yield Target(model, inputs, labels)


def require_logits(logits: Any, examples: int) -> Tensor:
    """Raise unless these are finite logits of that many examples; return them."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ArgumentTypeError("model", logits, "a function that returns logits, shape (batch, classes)")
    if logits.ndim != 2 or len(logits) != examples or logits.shape[1] < 2:
        raise ArgumentError("model", logits, f"logits of shape ({examples}, classes), two classes or more")
    require_finite("the logits", logits)
    return logits


def require_radius(radius: object) -> float:
    """Raise unless `radius` is a finite number of at least 0; return it."""
    if isinstance(radius, bool) or not isinstance(radius, int | float):
        raise ArgumentTypeError("radius", radius, "a finite number of at least 0")
    if not 0 <= radius < float("inf"):
        raise ArgumentError("radius", radius, "a finite number of at least 0")
    return float(radius)


def require_steps(argument: str, value: object) -> None:
    """Raise unless `value` is an integer of at least 1."""
    require_integer(argument, value, 1)


def clipped(inputs: Tensor, bounds: Bounds) -> Tensor:
    """Back into the box, if there is one."""
    return inputs if bounds is None else inputs.clamp(*bounds)


def _require_bounds(inputs: Tensor, bounds: Bounds) -> None:
    require_finite("inputs", inputs)
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ArgumentTypeError("bounds", bounds, "(lowest, highest) or None")
    low, high = bounds
    if not low < high:
        raise ArgumentError("bounds", bounds, "(lowest, highest), the lowest below the highest")
    if bool((inputs < low).any()) or bool((inputs > high).any()):
        mend = "Put normalisation inside the model, or pass bounds=None where inputs have no natural range."
        raise ArgumentError("inputs", inputs, f"values in [{low}, {high}], the bounds", mend)


def _require_labels(labels: object, logits: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ArgumentTypeError("labels", labels, "an int64 tensor of shape (batch,), or None")
    if labels.shape != logits.shape[:1]:
        raise ArgumentError("labels", labels, f"one label for each of {len(logits)} inputs")
    if bool((labels < 0).any()) or bool((labels >= logits.shape[1]).any()):
        raise ArgumentError("labels", labels, f"labels in 0 .. {logits.shape[1] - 1}")
