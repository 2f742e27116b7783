"""The gradient that a step leaves: by a rule from its loss, or by the phases of a learner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.losses import mean_loss
from thalweg.noise import Key
from thalweg.step import Backprop, Phase, Rule, Step
from thalweg.wrappers import refuse_wrappers

Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one run of a step left.

    Args:
        loss: detached scalar; for a learner the sum over its phases.
        gradients: one tensor per parameter, or None.
        evaluations: calls of the closure, or phases run.
        phased: whether they were left by the phases of a learner.
    """

    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    evaluations: int
    phased: bool = False


def gradients_of(
    step: Step,
    rule: Rule,
    key: Key,
    *,
    watch: Callable[[Callable[[], Any]], Any] | None = None,
    phase: Around = nullcontext,
) -> Gradients:
    """Run a step once; `.grad` must be None everywhere (see `thalweg.parameters.isolated`).

    Args:
        step: as `thalweg.step.as_step` returns it.
        rule: how to differentiate the loss; a learner takes only `Backprop`, since it brings its own way.
        key: the rule's randomness.
        watch: called as `watch(closure)` in place of `closure()`.
        phase: entered around each phase of a learner.

    Raises:
        ArgumentTypeError, ArgumentError: the closure returned neither a loss nor phases.
    """
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        result = step.closure() if watch is None else watch(step.closure)
        if not isinstance(rule, Backprop) and is_phases(result):
            name = type(rule).__name__
            raise ArgumentTypeError("gradient", rule, f"no {name} for a learner: its phases are its rule")
        return result

    if not isinstance(rule, Backprop):
        with refuse_wrappers(type(rule).__name__):
            estimate = rule.estimate(closure, step.parameters, key)
        _check(estimate.gradients, step.parameters)
        return Gradients(estimate.loss.detach(), tuple(estimate.gradients), calls)
    with torch.enable_grad():
        result = closure()
    if is_phases(result):
        return _learn(result, step.parameters, phase)
    found = [result]
    del result
    # popped, so that the loss is the rule's alone and dies when the rule drops it
    estimate = rule.estimate(lambda: found.pop(), step.parameters, key)
    return Gradients(estimate.loss, estimate.gradients, calls)


def is_phases(result: object) -> bool:
    """Whether a closure returned the phases of a learner and not a loss."""
    return isinstance(result, Iterable) and not isinstance(result, Tensor | Mapping | str)


def _learn(phases: Iterable[Phase], parameters: Sequence[Tensor], around: Around) -> Gradients:
    total: Tensor | None = None
    count = 0
    iterator = iter(phases)
    while True:
        # a learner may compute while it makes the next phase: that belongs to the phase
        with around():
            each = next(iterator, None)
            if each is None:
                break
            if not isinstance(each, Phase):
                raise ArgumentTypeError("closure", each, "phases with a method backward(), or a loss")
            with torch.enable_grad():
                loss = mean_loss(each.backward()).detach()
        total = loss if total is None else total + loss
        count += 1
    if total is None:
        raise ArgumentError("closure", "no phases", "at least one phase, or a loss")
    gradients = tuple(p.grad for p in parameters)
    return Gradients(total, gradients, count, phased=True)


def _check(gradients: object, parameters: Sequence[Tensor]) -> None:
    if not isinstance(gradients, Sequence) or len(gradients) != len(parameters):
        raise ArgumentError("gradient", gradients, f"a rule that returns {len(parameters)} gradients")
    for index, (gradient, parameter) in enumerate(zip(gradients, parameters)):
        if gradient is not None and gradient.shape != parameter.shape:
            expected = f"a rule whose gradient [{index}] has shape {tuple(parameter.shape)}"
            raise ArgumentError("gradient", gradient, expected)
