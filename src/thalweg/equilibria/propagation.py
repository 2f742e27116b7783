"""Equilibrium propagation as its papers train: nudged by the cost itself, at a finite strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.equilibria.complex_plane import complex_plane, require_holomorphic
from thalweg.equilibria.convergence import judge, require_limits
from thalweg.equilibria.costs import Cost, SquaredError
from thalweg.equilibria.energy import EnergyNetwork
from thalweg.equilibria.nudged import Nudged, Number, contrast
from thalweg.equilibria.relaxation import Activation, Descent, activated
from thalweg.equilibria.state import State
from thalweg.errors import ArgumentError, ArgumentTypeError, require_finite, require_integer
from thalweg.parameters import fill_gradients

Gradients = list[Tensor | None]
MEND = "More steps, a larger tolerance, or tolerance=None to take what the steps give, unjudged."


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """The one phase of a learner of an energy network.

    Args:
        name: of the rule.
        parameters: what it moves.
        compute: returns the loss and the gradients.
    """

    name: str
    parameters: Sequence[Tensor]
    compute: Callable[[], tuple[Tensor, Gradients]]

    def backward(self) -> Tensor:
        """Relax, nudge, fill `.grad` with the contrast, and return the mean cost at the free rest state."""
        loss, gradients = self.compute()
        require_finite("the cost at the rest state", loss)
        fill_gradients(self.parameters, gradients)
        return loss


class EnergyLearner(nn.Module):
    """What the learners of an energy network share: free relaxation, prediction, remembered states.

    Args:
        network: the network.
        cost: of its output; None for `SquaredError()`.
        steps: of the free relaxation, at least 1; exactly so many where `tolerance` is None.
        tolerance: stop earlier where no example moves by more, and raise where `steps` do not suffice.
        remember: how many training examples have the rest state kept from which their next relaxation starts,
            as in the original paper; batches are then (inputs, targets, indices). With the batch size and
            always the same indices, a batch starts where the last one ended. 0 starts from zeros.
    """

    def __init__(
        self, network: EnergyNetwork, cost: Cost | None, steps: int, tolerance: float | None, remember: int
    ) -> None:
        super().__init__()
        if not isinstance(network, EnergyNetwork):
            raise ArgumentTypeError("network", network, "an EnergyNetwork, see thalweg.equilibria.hopfield")
        cost = SquaredError() if cost is None else cost
        if not isinstance(cost, nn.Module) or not isinstance(cost, Cost):
            raise ArgumentTypeError("cost", cost, "a torch.nn.Module with a method predict, or None")
        require_integer("steps", steps, 1)
        require_limits(tolerance, steps)
        require_integer("remember", remember, 0)
        self.network = network
        self.cost: Any = cost
        self.steps = steps
        self.tolerance = tolerance
        self.remember = remember
        like = next(network.parameters())
        for index, shape in enumerate(network.shapes if remember else ()):
            self.register_buffer(f"rest_{index}", like.detach().new_zeros(remember, *shape))

    def predict(self, inputs: Tensor) -> Tensor:
        """What the network answers after a free relaxation from zeros: the cost's reading of its output."""
        with torch.no_grad():
            rest = self.settle(self.network.drive(inputs), self.network.zeros(inputs))
            answer: Tensor = self.cost.predict(rest[-1])
            return answer

    def settle(self, drive: Tensor, states: State, steps: int | None = None) -> State:
        """The free relaxation; given `steps`, exactly so many."""
        limits = (self.steps, self.tolerance) if steps is None else (steps, None)
        name = f"{type(self).__name__}: the free relaxation"
        found = self.network.relax(drive, states, limits[0], tolerance=limits[1], what=name)
        judge(found, limits[1], name, True, MEND)
        return found.state

    def began(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, State]:
        """Inputs, targets, drive and free rest state of a batch; remembered states are taken and left."""
        wanted = "(inputs, targets, indices)" if self.remember else "(inputs, targets)"
        if not isinstance(batch, tuple | list) or len(batch) != (3 if self.remember else 2):
            raise ArgumentTypeError("batch", batch, wanted)
        inputs, targets = batch[0], batch[1]
        with torch.no_grad():
            drive = self.network.drive(inputs)
            start = self.network.zeros(inputs)
            if not self.remember:
                return inputs, targets, drive, self.settle(drive, start)
            stored = [getattr(self, f"rest_{index}") for index in range(len(start))]
            rest = self.settle(drive, tuple(kept[batch[2]] for kept in stored))
            for kept, state in zip(stored, rest):
                kept[batch[2]] = state
        return inputs, targets, drive, rest

    def learned(self) -> tuple[nn.Parameter, ...]:
        """What is learned: the parameters of network and cost that require grad."""
        return tuple(p for p in self.parameters() if p.requires_grad)

    def add(
        self,
        totals: Gradients,
        inputs: Tensor,
        targets: Tensor,
        states: State,
        at: Number,
        weight: Number,
        parameters: Sequence[Tensor],
    ) -> None:
        """Add Re(weight d(E + at C)/dtheta), averaged over the batch, at constant states."""
        with torch.enable_grad(), complex_plane(states[0].is_complex()):
            total = self.network.energy(inputs, states)
            if not (isinstance(at, float) and at == 0):
                total = total + at * self.cost(states[-1], targets)
            mean = total.mean()
            scale = torch.as_tensor(weight, dtype=mean.dtype, device=mean.device).conj()
            found = torch.autograd.grad(mean, parameters, scale, allow_unused=True)
        for index, share in enumerate(found):
            if share is not None:
                before = totals[index]
                totals[index] = share if before is None else before.add_(share)


class EquilibriumPropagation(EnergyLearner):
    """Learn an energy network from states nudged by the cost itself: a local rule, in memory of one step.

    Choose it to train as the papers do, at strengths where the nudge is no derivative any more; a layer in a
    larger network wants `network(x, gradient=Nudged(...))` instead. As the strength shrinks and the
    relaxations get longer, its gradient becomes the exact one. A learner: `phases(batch)` fills `.grad` and
    any optimizer steps.

    Args:
        network: see `hopfield`, `convergent`, `even_odd`.
        cost: of the output layer; None for `SquaredError()`. Its parameters are learned too.
        gradient: a `Nudged`, whose `steps` count the nudged relaxations (None relaxes as the free one).
        steps, tolerance, remember: of the free relaxation, see `EnergyLearner`.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or a strength at which the nudged energy has no
            minimum.

    Paper:
        Scellier, Bengio: Equilibrium Propagation. Frontiers in Computational Neuroscience 2017,
        arXiv 1602.05179.

    Example:
        >>> from thalweg.equilibria import dense_links, hopfield
        >>> learner = EquilibriumPropagation(
        ...     hopfield(dense_links([4, 8, 3])), SquaredError(1.0), gradient=Nudged(0.5, "random", steps=4)
        ... )
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
        gradient: Nudged,
        steps: int = 20,
        tolerance: float | None = None,
        remember: int = 0,
    ) -> None:
        super().__init__(network, cost, steps, tolerance, remember)
        if not isinstance(gradient, Nudged):
            mend = "For other policies train network(x, gradient=...) with a loss behind it."
            raise ArgumentTypeError("gradient", gradient, "a Nudged(strength)", mend)
        self.gradient = gradient
        slow = self._slowed(-gradient.strength)
        if gradient.form != "positive" and isinstance(slow, float) and slow <= 0:
            raise ArgumentError("gradient", gradient, "a strength at which the nudged energy has a minimum")

    def phases(self, batch: Any) -> list[Contrast]:
        """One phase.

        Args:
            batch: (inputs, targets), with `remember` also the indices of the examples.
        """
        parameters = self.learned()
        return [Contrast("equilibrium", parameters, lambda: self._contrast(batch, parameters))]

    def _contrast(self, batch: Any, parameters: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        inputs, targets, drive, rest = self.began(batch)
        with torch.no_grad():
            loss = self.cost(rest[-1], targets).mean()
        totals: Gradients = [None] * len(parameters)
        for at, weight in contrast(self.gradient, rest[0], None):
            states = self._nudged(drive, targets, rest, at)
            self.add(totals, inputs, targets, states, at, weight, parameters)
        return loss, totals

    def _nudged(self, drive: Tensor, targets: Tensor, rest: State, at: Number) -> State:
        policy = self.gradient
        if isinstance(at, float) and at == 0:
            return self.settle(drive, rest, policy.steps) if policy.cancel_drift else rest
        in_plane = isinstance(at, complex)
        start = tuple(part.to(part.dtype.to_complex()) for part in rest) if in_plane else rest

        def pull(states: State, index: int) -> Tensor | None:
            if index != len(rest) - 1:
                return None
            leaf = states[index].detach().requires_grad_()
            with torch.enable_grad():
                costs = self.cost(leaf, targets)
                (slope,) = torch.autograd.grad(costs, leaf, torch.ones_like(costs))
            return -at * (slope.conj() if in_plane else slope)

        steps, tolerance = (self.steps, self.tolerance) if policy.steps is None else (policy.steps, None)
        what = f"EquilibriumPropagation: the relaxation at strength {at}"
        slow = self._slowed(at)
        with complex_plane(in_plane):
            found = self.network.relax(
                drive, start, steps, tolerance=tolerance, pull=pull, slow=slow, what=what
            )
            if in_plane:
                self._require_holomorphic(drive, targets, found.state)
        judge(found, tolerance, what, True, MEND)
        return found.state

    def _slowed(self, at: Number) -> Number | None:
        """What makes a step of the output layer exact where blocks jump to their minimum, cost included."""
        relaxation = self.network.relaxation
        curvature = getattr(self.cost, "curvature", None)
        if isinstance(relaxation, Descent) and relaxation.order == "even-odd" and curvature is not None:
            slow: Number = 1 + at * (relaxation.rate * curvature)
            return slow
        return None

    def _require_holomorphic(self, drive: Tensor, targets: Tensor, states: State) -> None:
        relaxation = self.network.relaxation
        require_holomorphic("the cost", lambda output: self.cost(output, targets), states[-1])
        for index, state in enumerate(states):
            if index:
                require_holomorphic(f"link {index}", self.network.links[index], states[index - 1])
            if isinstance(relaxation, Activation):
                require_holomorphic("the activation", partial(activated, relaxation, index), state)
