"""A control: steps as long as another rule's, in random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import thalweg as tw
from thalweg.noise import Key, normal
from thalweg.step import Closure


@dataclass(frozen=True, slots=True)
class Directionless:
    """The length of another rule's gradient, parameter by parameter, and a random direction.

    Args:
        rule: whose length is taken.
    """

    rule: tw.Rule

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> tw.Estimate:
        """One estimate of the other rule, turned anywhere."""
        found = self.rule.estimate(closure, parameters, key)
        turned: list[Tensor | None] = []
        for index, gradient in enumerate(found.gradients):
            if gradient is None:
                turned.append(None)
                continue
            direction = normal(gradient, key.at(call=1000 + index))
            turned.append(direction * (gradient.norm() / direction.norm()))
        return tw.Estimate(found.loss, tuple(turned), found.evaluations)
