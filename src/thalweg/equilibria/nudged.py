"""Equilibrium propagation: the gradient of an equilibrium from states nudged towards a lower cost."""

from __future__ import annotations

import cmath
from dataclasses import dataclass
from math import pi
from typing import Literal

from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.noise import Key, fresh_key, rademacher

Number = float | complex | Tensor
Form = Literal["positive", "negative", "centered", "random", "holomorphic"]
FORMS = ("positive", "negative", "centered", "random", "holomorphic")


@dataclass(frozen=True, slots=True)
class Nudged:
    """Equilibrium propagation as a vector-Jacobian product: relax again under a small force, and compare.

    Choose it where only relaxed states can be had: no adjoint circuit and no second derivative of the energy,
    only the system itself, pulled a little. In `thalweg.equilibria.minimize` the pull is linear, the incoming
    cotangent, so the answer is the vector-Jacobian product of the equilibrium whatever loss comes after, with
    gradients of inputs and everything else the energy closes over. Learners
    (`thalweg.equilibria.EquilibriumPropagation`) nudge by the cost itself. Not differentiable twice.

    | form | relaxations | bias in the strength b |
    | --- | --- | --- |
    | "positive", "negative" | 1 | b |
    | "random": the sign is drawn per backward | 1 | b, averages to b^2 |
    | "centered" | 2 | b^2 |
    | "holomorphic": `points` on a complex circle | points / 2 + 1 | b^points, inside its radius |

    Args:
        strength: how hard, above 0. In single precision not below 1e-2: the contrast drowns in rounding.
        form: see above. "holomorphic" needs an energy and a relaxation that are holomorphic in the state.
        steps: steps of each nudged relaxation, all from the free rest state, without looking whether they
            come to rest; a truncation that amounts to that of backpropagation through as many steps. None
            relaxes as the free state did.
        points: of the holomorphic form, at least 2; 2 is "centered".
        normalize: divide each example's cotangent by its norm before, and multiply back after. Exact, since
            the product is linear in it, and it makes the strength independent of the scale of the loss.
            Learners, whose cost is native, do not look at this.
        cancel_drift: compare with a state relaxed for as many steps without nudge, for one-sided forms whose
            free state is not at rest; else its drift is divided by the strength.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Scellier, Bengio: Equilibrium Propagation. Frontiers in Computational Neuroscience 2017,
        arXiv 1602.05179; centred: arXiv 2006.03824; holomorphic: Laborieux, Zenke. NeurIPS 2022,
        arXiv 2209.00530.

    Example:
        >>> import torch
        >>> from thalweg.equilibria import minimize
        >>> x = torch.tensor([[2.0]], requires_grad=True)
        >>> energy = lambda s: (0.5 * s.square() - s * x.sin()).sum(1)
        >>> s = minimize(energy, torch.zeros(1, 1), gradient=Nudged(0.1, form="centered"))
        >>> s.backward()
        >>> bool((x.grad - x.cos()).abs() < 1e-4)
        True
    """

    strength: float
    form: Form = "centered"
    steps: int | None = None
    points: int = 4
    normalize: bool = True
    cancel_drift: bool = False

    def __post_init__(self) -> None:
        require_positive("strength", self.strength)
        require_choice("form", self.form, FORMS)
        if self.steps is not None:
            require_integer("steps", self.steps, 1)
        require_integer("points", self.points, 2)
        for name in ("normalize", "cancel_drift"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(name, getattr(self, name), "True or False")
        if self.cancel_drift and self.form in ("centered", "holomorphic"):
            mend = "Their points cancel a common drift by themselves."
            raise ArgumentError("cancel_drift", True, f"False with form={self.form!r}", mend)


def contrast(policy: Nudged, like: Tensor, key: Key | Tensor | None) -> list[tuple[Number, Number]]:
    """Where to relax and how to weigh the derivatives found there: pairs (strength, weight).

    The gradient is the sum of Re(weight * dF/dtheta) over the states relaxed at those strengths. Of a pair of
    conjugate points only one is listed, at double weight.

    Args:
        policy: the nudge.
        like: a tensor of the device and dtype in which a random sign is drawn.
        key: of the random sign; None for a fresh one.

    Example:
        >>> import torch
        >>> contrast(Nudged(0.5), torch.zeros(1), None)
        [(0.5, 1.0), (-0.5, -1.0)]
    """
    b = float(policy.strength)
    if policy.form == "centered":
        return [(b, 0.5 / b), (-b, -0.5 / b)]
    if policy.form == "holomorphic":
        count = policy.points
        found: list[tuple[Number, Number]] = []
        for k in range(count // 2 + 1):
            real = k == 0 or 2 * k == count
            at = b * (1.0 if k == 0 else -1.0) if real else cmath.rect(b, 2 * pi * k / count)
            found.append((at, (1 if real else 2) / (count * at)))
        return found
    if policy.form == "random":
        sign = random_sign(like, key)
        return [(sign * b, sign / b), (0.0, -sign / b)]
    at = b if policy.form == "positive" else -b
    return [(at, 1 / at), (0.0, -1 / at)]


def random_sign(like: Tensor, key: Key | Tensor | None) -> Tensor:
    """-1 or 1, a tensor without dimensions."""
    return rademacher(like.detach().new_empty(1), fresh_key(like) if key is None else key).reshape(())
