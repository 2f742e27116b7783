"""The gradient turned on the input: the fast gradient sign method, and projected gradient descent."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thalweg.attacks.losses import (
    AttackLoss,
    Bounds,
    Model,
    Target,
    attack_loss,
    attacked,
    clipped,
    margin,
    require_radius,
    require_steps,
)
from thalweg.errors import require_choice, require_positive
from thalweg.noise import Key, normal, uniform
from thalweg.step import draw_key

Norm = Literal["linf", "l2"]


def fgsm(
    model: Model,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    radius: float,
    loss: Literal["margin", "cross_entropy"] | AttackLoss = "cross_entropy",
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """Move every pixel by `radius` up the sign of the loss's gradient: the published one-step attack.

    Choose it to compare with published numbers, never alone: where the cross-entropy is saturated its
    gradient is zero, and the attack hands back the clean input. `robustness` tells when that is so.

    Args:
        model: returns logits (batch, classes); a module is attacked in evaluation mode and left as it was.
        inputs: (batch, ...), inside the bounds.
        labels: int64, (batch,); None attacks the model's own predictions.
        radius: how far a pixel may move, at least 0.
        loss: "cross_entropy", "margin", or a function (logits, labels) of one value per example.
        bounds: the range of inputs, or None.

    Returns:
        The attacked inputs, detached.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        NonFiniteError: logits or gradients that are not finite.

    Paper:
        Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples. ICLR 2015,
        arXiv 1412.6572.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> attacked = fgsm(model, torch.full((2, 4), 0.5), torch.tensor([0, 1]), radius=0.1)
        >>> bool(((attacked - 0.5).abs() <= 0.1001).all()), model.weight.grad
        (True, None)
    """
    climbed, far = attack_loss(loss), require_radius(radius)
    with attacked(model, inputs, labels, bounds) as target:
        gradient, _ = target.gradient(target.inputs, climbed)
        return clipped(target.inputs + far * gradient.sign(), bounds)


def pgd(
    model: Model,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    radius: float,
    norm: Norm = "linf",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Literal["margin", "cross_entropy"] | AttackLoss = "margin",
    bounds: Bounds = (0.0, 1.0),
    key: Key | None = None,
) -> Tensor:
    """Climb the loss in steps, projected back into the ball around the input: the standard strong attack.

    Choose it, with the margin, for every statement about robustness. Of all points on all its ways it
    returns, for each example, the one of the largest margin, so it never does worse than the clean input.

    Args:
        model: returns logits (batch, classes); a module is attacked in evaluation mode and left as it was.
        inputs: (batch, ...), inside the bounds.
        labels: int64, (batch,); None attacks the model's own predictions.
        radius: of the ball, in the units of the inputs, at least 0.
        norm: "linf": every pixel moves by at most `radius`, steps follow the sign. "l2": the whole image
            does, in the Euclidean norm; steps follow the gradient, at unit length.
        steps: at least 1.
        step_size: above 0; None for 2.5 radius / steps.
        restarts: how many ways, at least 1; the first starts at the input, the others at random in the ball.
        loss: "margin", "cross_entropy", or a function (logits, labels) of one value per example.
        bounds: the range of inputs, or None.
        key: of the random starts; None takes a fresh one, governed by `torch.manual_seed`.

    Returns:
        The attacked inputs, detached.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        NonFiniteError: logits or gradients that are not finite.

    Paper:
        Madry and others: Towards Deep Learning Models Resistant to Adversarial Attacks. ICLR 2018,
        arXiv 1706.06083.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> inputs, labels = torch.full((2, 4), 0.5), torch.tensor([0, 1])
        >>> attacked = pgd(model, inputs, labels, radius=0.3, norm="l2", steps=5, restarts=2)
        >>> bool(((attacked - inputs).norm(dim=1) <= 0.3001).all())
        True
    """
    climbed, far = attack_loss(loss), require_radius(radius)
    require_choice("norm", norm, ("linf", "l2"))
    require_steps("steps", steps)
    require_steps("restarts", restarts)
    if step_size is not None:
        require_positive("step_size", step_size)
    length = 2.5 * far / steps if step_size is None else step_size
    with attacked(model, inputs, labels, bounds) as target:
        best = _Best(target)
        for restart in range(restarts):
            start = target.inputs
            if restart:
                key = draw_key() if key is None else key
                start = clipped(start + _in_ball(start, far, norm, key.at(call=restart)), bounds)
            _climb(target, start, best, climbed, far, length, norm, steps, bounds)
        return best.inputs


class _Best:
    """Of all points seen, the one of each example whose margin is largest."""

    def __init__(self, target: Target) -> None:
        self._labels = target.labels
        self.inputs = target.inputs.clone()
        self._margins = torch.full(target.labels.shape, float("-inf"), device=target.inputs.device)

    def see(self, inputs: Tensor, logits: Tensor) -> None:
        found = margin(logits.detach(), self._labels).to(self._margins.dtype)
        better = found > self._margins
        self._margins = torch.where(better, found, self._margins)
        self.inputs = torch.where(better.view(-1, *[1] * (inputs.ndim - 1)), inputs, self.inputs)


def _climb(
    target: Target,
    start: Tensor,
    best: _Best,
    loss: AttackLoss,
    radius: float,
    length: float,
    norm: Norm,
    steps: int,
    bounds: Bounds,
) -> None:
    at = start
    for _ in range(steps):
        gradient, logits = target.gradient(at, loss)
        best.see(at, logits)
        direction = gradient.sign() if norm == "linf" else _unit(gradient)
        moved = at + length * direction - target.inputs
        at = clipped(target.inputs + _project(moved, radius, norm), bounds)
    with torch.no_grad():
        best.see(at, target.logits(at))


def _project(offset: Tensor, radius: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return offset.clamp(-radius, radius)
    size = _length(offset)
    shrunk: Tensor = offset * (radius / size.clamp_min(torch.finfo(offset.dtype).tiny)).clamp(max=1.0)
    return shrunk


def _in_ball(like: Tensor, radius: float, norm: Norm, key: Key) -> Tensor:
    """A point drawn uniformly from the ball."""
    if norm == "linf":
        return radius * (2 * uniform(like, key) - 1)
    direction = _unit(normal(like, key))
    # the same key names another draw at another step
    share = uniform(like.new_empty(len(like)), key.at(step=key.step + 1)) ** (1 / like[0].numel())
    return radius * direction * share.view(-1, *[1] * (like.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    size = _length(x)
    return torch.where(size > 0, x / size.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))


def _length(x: Tensor) -> Tensor:
    # by its largest entry first: squares of tiny gradients would vanish
    largest = x.flatten(1).abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    shape = (-1, *[1] * (x.ndim - 1))
    scaled = x / largest.view(shape)
    size: Tensor = torch.linalg.vector_norm(scaled.flatten(1), dim=1) * largest
    return size.view(shape)
