"""One evaluation per estimate: the loss itself, less a running baseline, times the direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.blackbox.directions import Bound, Directions, bind
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.blackbox.slopes import Slopes
from thalweg.blackbox.spsa import SPSA
from thalweg.blackbox.walk import Restore, walk
from thalweg.errors import ArgumentError, ArgumentTypeError, require_positive
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


class OnePoint:
    """Unbiased from a single evaluation per direction, for losses that cannot be asked twice.

    Choose it where the system has moved on before a second evaluation could be made (a plant, a live user,
    intrinsic noise of a device); anywhere else `SPSA` has far less variance for twice the price. The baseline
    is a running mean of earlier losses, which no direction of the present estimate has touched; without one
    the variance is of the order of (loss / scale)^2, with one of the order of its changes.

    It has state: every estimate moves `baseline`. The first one also evaluates the unchanged parameters.

    Args:
        samples: directions per estimate, at least 1; each is one evaluation.
        scale: as in `SPSA`.
        directions: as in `SPSA`.
        restore: as in `SPSA`; "inplace" is refused in half precision.
        decay: how much of the old baseline each estimate keeps, at least 0 and below 1; None subtracts
            nothing.

    Raises:
        ArgumentError, ArgumentTypeError: an argument out of range.

    Paper:
        Spall: A one-measurement form of simultaneous perturbation stochastic approximation. Automatica 33,
        1997.

    Example:
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> rule = OnePoint(scale=0.5)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=rule)
        >>> bool(weight.grad > 0), rule.state_dict()
        (True, {'baseline': ...})
    """

    def __init__(
        self,
        samples: int = 1,
        scale: float = 1e-2,
        directions: Directions = "rademacher",
        restore: Restore = "copy",
        decay: float | None = 0.9,
    ) -> None:
        self._point = SPSA(samples, scale, directions, "one", restore)
        if decay is not None and decay != 0:
            require_positive("decay", decay)
            if decay >= 1:
                raise ArgumentError("decay", decay, "a number of at least 0 and below 1, or None")
        self.decay = decay
        self.baseline: Tensor | None = None

    def __repr__(self) -> str:
        point = self._point
        return (
            f"OnePoint(samples={point.samples}, scale={point.scale}, directions={point.directions!r}, "
            f"restore={point.restore!r}, decay={self.decay})"
        )

    def state_dict(self) -> dict[str, float | None]:
        """The baseline, a number or None."""
        return {"baseline": None if self.baseline is None else float(self.baseline)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ArgumentTypeError: something else.
        """
        if not isinstance(state, Mapping) or set(state) != {"baseline"}:
            raise ArgumentTypeError("state", state, "what state_dict() returned")
        value = state["baseline"]
        self.baseline = None if value is None else torch.tensor(float(value), dtype=torch.float64)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One evaluation per sample.

        Raises:
            NonFiniteError: a loss is nan or infinite; parameters, buffers and baseline are as before.
        """
        with torch.no_grad():
            return self.measure(Evaluations(closure, parameters), parameters, key).estimate(parameters)

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key."""
        return bind(self._point.directions, parameters, key, self._point.samples)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """As `estimate`, but the gradient stays a few numbers and a key."""
        if self.decay is None:
            return self._point.measure(evaluations, parameters, key)
        self._point.refuse_drift(parameters)
        bound, restore = self.bind(parameters, key), self._point.restore
        with torch.no_grad(), eager_if(restore == "swap"), walk(parameters, bound, restore) as go:
            baseline = self.baseline
            if baseline is None:
                baseline = evaluations.loss("the unchanged parameters")
            found = []
            for sample in range(len(bound.weights)):
                go(sample, self._point.scale)
                found.append(evaluations.loss(f"sample {sample}, sign +"))
            losses = torch.stack(found)
            baseline = baseline.to(losses.device, losses.dtype)
            coefficients = (losses - baseline) / self._point.scale * losses.new_tensor(bound.weights)
            mean = losses.mean()
            if not isinstance(mean, FakeTensor):
                self.baseline = torch.lerp(mean, baseline, self.decay)
        return Slopes(mean, tuple(coefficients), bound, evaluations.count)
