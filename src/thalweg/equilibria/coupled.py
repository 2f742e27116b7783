"""Coupled learning and contrastive learning: the output is clamped, not nudged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from thalweg.equilibria.convergence import judge
from thalweg.equilibria.costs import Cost
from thalweg.equilibria.energy import EnergyNetwork
from thalweg.equilibria.propagation import MEND, Contrast, EnergyLearner, Gradients
from thalweg.equilibria.state import State
from thalweg.errors import require_choice, require_integer, require_positive

FORMS = ("positive", "negative", "centered")


class CoupledLearning(EnergyLearner):
    """Clamp the output a part of the way to the target, let the rest settle, and contrast: a local rule.

    Choose it to compare with published work, or for hardware that can fix an output but not push it. Its
    contrast is no gradient of the cost, however small the strength.

    Args:
        network: see `hopfield`, `convergent`, `even_odd`.
        cost: of the output layer; None for `SquaredError()`, with which the output is clamped to
            o + strength (y - o). In general it moves by -strength times the slope of the cost.
        strength: above 0. With form "positive" and `SquaredError()`, 1 is contrastive Hebbian learning.
        form: "positive" towards the target, "negative" away from it, or "centered": both.
        clamped_steps: of the relaxation under the clamp; None as the free one.
        steps, tolerance, remember: of the free relaxation, see `thalweg.equilibria.EquilibriumPropagation`.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Stern and others: Supervised learning in physical networks. Physical Review X 2021,
        arXiv 2011.03861; compared in arXiv 2312.15103.

    Example:
        >>> from thalweg.equilibria import dense_links, even_odd
        >>> learner = CoupledLearning(even_odd(dense_links([4, 8, 3], gain=0.5)), strength=0.5)
        >>> for phase in learner.phases((torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))):
        ...     loss = phase.backward()
        >>> learner.network.links[1].weight.grad.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        network: EnergyNetwork,
        cost: Cost | None = None,
        *,
        strength: float = 1.0,
        form: Literal["positive", "negative", "centered"] = "positive",
        clamped_steps: int | None = None,
        steps: int = 20,
        tolerance: float | None = None,
        remember: int = 0,
    ) -> None:
        super().__init__(network, cost, steps, tolerance, remember)
        require_positive("strength", strength)
        require_choice("form", form, FORMS)
        if clamped_steps is not None:
            require_integer("clamped_steps", clamped_steps, 1)
        self.strength = strength
        self.form = form
        self.clamped_steps = clamped_steps

    def phases(self, batch: Any) -> list[Contrast]:
        """One phase.

        Args:
            batch: (inputs, targets), with `remember` also the indices of the examples.
        """
        # the cost has no part in the contrast, so a read-out of its own would never learn
        parameters = tuple(p for p in self.network.parameters() if p.requires_grad)
        return [Contrast("coupled", parameters, lambda: self._contrast(batch, parameters))]

    def _contrast(self, batch: Any, parameters: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        inputs, targets, drive, rest = self.began(batch)
        output = rest[-1].detach().requires_grad_()
        with torch.enable_grad():
            costs = self.cost(output, targets)
            (slope,) = torch.autograd.grad(costs, output, torch.ones_like(costs))
        b = self.strength
        points = {
            "positive": [(b, 1 / b), (0.0, -1 / b)],
            "negative": [(-b, -1 / b), (0.0, 1 / b)],
            "centered": [(b, 0.5 / b), (-b, -0.5 / b)],
        }
        totals: Gradients = [None] * len(parameters)
        for at, weight in points[self.form]:
            states = self._clamped(drive, rest, rest[-1] - at * slope) if at else rest
            self.add(totals, inputs, targets, states, 0.0, weight, parameters)
        return costs.detach().mean(), totals

    def _clamped(self, drive: Tensor, rest: State, output: Tensor) -> State:
        hidden = range(len(rest) - 1)
        if not hidden:
            return (output,)
        limits = (self.steps, self.tolerance) if self.clamped_steps is None else (self.clamped_steps, None)
        what = "CoupledLearning: the clamped relaxation"
        found = self.network.relax(
            drive, (*rest[:-1], output), limits[0], tolerance=limits[1], free=hidden, what=what
        )
        judge(found, limits[1], what, True, MEND)
        return found.state
