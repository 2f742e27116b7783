"""The gradient identities on a network so small that the exact gradient costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from thalweg.equilibria import (
    EnergyNetwork,
    EquilibriumPropagation,
    Implicit,
    Nudged,
    SquaredError,
    convergent,
    dense_links,
)
from thalweg.recipes.p07_equilibrium_propagation.routes import settled
from thalweg.step import Backprop

SIZES = (6, 5, 4, 3)
EXAMPLES = 7
STRENGTHS = (0.1, 0.03, 0.01, 0.003, 0.001)
FORMS: tuple[Literal["positive", "negative", "centered"], ...] = ("positive", "negative", "centered")
FITTED = 1
"""Slopes are fitted from this one on, where the leading term of the bias is all of it."""
POINTS = (2, 3, 4, 6, 8)
CIRCLES = (0.1, 0.05, 0.03)
"""Radii of the holomorphic form, inside of where the nudged state is analytic in the nudge; the first is for
the fall of the error with the points."""
OUTSIDE, OUTSIDE_POINTS = 2.0, (4, 8, 12)
VJP_STRENGTHS = (1e-2, 1e-3, 1e-4)
UNFOLDED = ((1e-2, 4e-2), (1e-4, 4e-4), (1e-6, 4e-6))
"""Strengths at which the stepwise identity is checked, and the largest error it may have there."""
UNFOLDED_STEPS = 12
TRUNCATED_STRENGTH = 1e-3


class Toy:
    """A 6-5-4-3 network of scaled sigmoids in double precision, with inputs, targets and a cotangent.

    Args:
        seed: names all of them.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.network: EnergyNetwork = convergent(dense_links(SIZES, gain=0.6, seed=seed)).double()
        self.x = torch.rand(EXAMPLES, SIZES[0], generator=draw, dtype=torch.float64).requires_grad_()
        self.y = torch.randint(SIZES[-1], (EXAMPLES,), generator=draw)
        self.v = torch.randn(EXAMPLES, SIZES[-1], generator=draw, dtype=torch.float64)
        self.price = SquaredError()

    def learned(self, policy: Nudged, steps: int) -> Tensor:
        """The gradient of the mean cost as the learner finds it, nudged by the cost itself."""
        learner = EquilibriumPropagation(self.network, self.price, gradient=policy, steps=steps)
        learner.zero_grad()
        for phase in learner.phases((self.x.detach(), self.y)):
            phase.backward()
        return _flat([p.grad for p in self.network.parameters() if p.grad is not None])

    def cost_gradient(self, policy: Any, steps: int) -> Tensor:
        """The same by a policy that knows the derivatives."""
        output = self.network(self.x, gradient=policy, tolerance=None, max_steps=steps)
        loss = self.price(output, self.y).mean()
        return _flat(torch.autograd.grad(loss, list(self.network.parameters())))

    def product(self, policy: Any, steps: int) -> tuple[Tensor, Tensor]:
        """The cotangent times the Jacobian of the rest state: by the weights, and by the input."""
        output = self.network(self.x, gradient=policy, tolerance=None, max_steps=steps)
        found = torch.autograd.grad((self.v * output).sum(), [*self.network.parameters(), self.x])
        return _flat(found[:-1]), found[-1].reshape(-1)

    def truncated(self, rest: Sequence[Tensor], make: Callable[[int], tuple[Any, int]]) -> list[Tensor]:
        """Gradients from the rest state on, for 1, 2 ... steps; `make` gives policy and layer's steps."""
        found = []
        for steps in range(1, UNFOLDED_STEPS + 1):
            policy, count = make(steps)
            output = self.network(
                self.x, gradient=policy, states=tuple(rest), tolerance=None, max_steps=count
            )
            gradients = torch.autograd.grad(
                self.price(output, self.y).sum(), list(self.network.parameters()), materialize_grads=True
            )
            found.append(_flat(gradients))
        return found


def identities(seed: int, steps: int) -> dict[str, Any]:
    """Every identity of one random network.

    Args:
        seed: of the network.
        steps: of the relaxations, free and nudged.

    Returns:
        `unrolled`: the error of backpropagation through all steps; `bias`: relative errors by form and
        strength, with the `slopes` of their logarithms; `holomorphic`: by points and strength, with their
        slopes, `orders`; `inside`, `outside`: its errors by number of points, with `geometric`, the
        correlation of log error and points inside; `vjp`, `vjp_slopes`: by weights and by input;
        `unfolded`: the stepwise identity's errors; `truncation`: errors of both after k steps.
    """
    toy = Toy(seed)
    truth = toy.cost_gradient(Implicit("gmres", 1e-13), steps)
    bias = {form: [_error(toy.learned(Nudged(b, form), steps), truth) for b in STRENGTHS] for form in FORMS}
    return {
        "unrolled": _error(toy.cost_gradient(Backprop(), steps), truth),
        "bias": bias,
        "slopes": {form: _slope(errors[FITTED:], STRENGTHS[FITTED:]) for form, errors in bias.items()},
        **_holomorphic(toy, steps, truth),
        **_products(toy, steps),
        **_stepwise(toy, steps, truth),
    }


def _holomorphic(toy: Toy, steps: int, truth: Tensor) -> dict[str, Any]:
    def error(strength: float, points: int) -> float:
        return _error(toy.learned(Nudged(strength, "holomorphic", points=points), steps), truth)

    errors = {str(n): [error(b, n) for b in CIRCLES] for n in POINTS[:3]}
    inside = [errors[str(n)][0] if str(n) in errors else error(CIRCLES[0], n) for n in POINTS]
    return {
        "holomorphic": errors,
        "inside": inside,
        "outside": [error(OUTSIDE, n) for n in OUTSIDE_POINTS],
        "geometric": _correlation(inside, POINTS),
        "orders": {n: _slope(each, CIRCLES) for n, each in errors.items()},
    }


def _products(toy: Toy, steps: int) -> dict[str, Any]:
    wanted = toy.product(Implicit("gmres", 1e-13), steps)
    found = [toy.product(Nudged(b), steps) for b in VJP_STRENGTHS]
    errors = {
        name: [_error(each[part], wanted[part]) for each in found]
        for part, name in enumerate(("weights", "input"))
    }
    return {
        "vjp": errors,
        "vjp_slopes": {name: _slope(each, VJP_STRENGTHS) for name, each in errors.items()},
    }


def _stepwise(toy: Toy, steps: int, truth: Tensor) -> dict[str, Any]:
    rest = settled(toy.network, toy.x.detach(), steps)

    def nudged(strength: float) -> Callable[[int], tuple[Any, int]]:
        return lambda k: (Nudged(strength, "positive", steps=k, normalize=False), 1)

    through = toy.truncated(rest, lambda k: (Backprop(), k))
    errors = [_error(_increments(toy.truncated(rest, nudged(b))), _increments(through)) for b, _ in UNFOLDED]
    after = toy.truncated(rest, lambda k: (Nudged(TRUNCATED_STRENGTH, steps=k, normalize=False), 1))
    return {
        "unfolded": errors,
        "truncation": {
            "nudged": [_error(each / EXAMPLES, truth) for each in after],
            "backprop": [_error(each / EXAMPLES, truth) for each in through],
        },
    }


def _increments(gradients: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(gradients))
    return torch.cat([stacked[:1], stacked[1:] - stacked[:-1]])


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _slope(errors: Sequence[float], at: Sequence[float]) -> float:
    x, y = torch.tensor(at).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _correlation(errors: Sequence[float], points: Sequence[int]) -> float:
    logs = torch.tensor(errors).double().log()
    return float(torch.corrcoef(torch.stack([logs, torch.tensor(points).double()]))[0, 1])
