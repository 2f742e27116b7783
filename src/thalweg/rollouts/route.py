"""Which part of a long process is differentiated: shares of Jacobians by step, and the cotangent."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thalweg.errors import ArgumentTypeError, require_integer
from thalweg.noise import Key
from thalweg.rollouts.checkpointed import Checkpointed
from thalweg.rollouts.masks import Last, Mask, RandomLast, is_one, require_mask, shares
from thalweg.step import Backprop

Store = Backprop | Checkpointed


@dataclass(frozen=True, slots=True, init=False)
class Gate:
    """A gate with its options: what happens to the cotangent behind each step.

    Args:
        function: a gate, such as `thalweg.gates.clip`: a function at module level, so that routes pickle.
        options: its keyword arguments.

    Example:
        >>> from thalweg import gates
        >>> Gate(gates.clip, limit=1.0, per="sample") == Gate(gates.clip, limit=1.0, per="sample")
        True
    """

    function: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...]

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        if not callable(function):
            raise ArgumentTypeError("function", function, "a gate such as thalweg.gates.clip")
        try:
            pickle.dumps((self.function, self.options))
        except Exception as error:
            mend = "Write a function at module level; lambdas and inner functions cannot be named."
            raise ArgumentTypeError("function", function, "something that pickles", mend) from error

    def __call__(self, x: Tensor) -> Tensor:
        """The gated tensor."""
        return self.function(x, **dict(self.options))

    def __reduce__(self) -> tuple[Any, ...]:
        return _gate, (self.function, self.options)


def _gate(function: Callable[..., Tensor], options: tuple[tuple[str, Any], ...]) -> Gate:
    return Gate(function, **dict(options))


@dataclass(frozen=True, slots=True)
class Route:
    """Which Jacobians of a long process are multiplied into its gradient, and what is stored.

    For steps x' = a x + b F(x, c) with a network F the reverse sweep is: u = cotangent(lambda'), lambda =
    a lambda' + state_k (dF/dx)^T b u, and the parameters' gradient grows by parameters_k (dF/dtheta)^T b u.
    Choose it when none of its rows (`Backprop`, `Checkpointed`, `Truncated`, `Skipped`) says what you want;
    the gradient is biased as soon as a mask is not one. `Route(state=0.0)` is DRTune's, `Route(state=m,
    parameters=m)` with `m = Last(k)` or `Bernoulli("ramp")` are AlignProp's.

    Masks need the network: `rollout(step, x, n, network=net)` with `step(net, x, k)`. They bear on its calls:
    `state` on arguments that were computed from the step's state, `parameters` on its parameters and on all
    other arguments, such as a condition. Where both are zero the network runs without a graph and keeps
    nothing. Values in between scale; a scaled parameter costs a copy of it for each step kept.

    Args:
        state: the share of the network's Jacobian with respect to the state: a number in [0, 1] for all
            steps, a tuple with one number per step, or a rule such as `Last(5)`.
        parameters: likewise for its parameters and conditions.
        cotangent: a `Gate`, through which the state passes behind every step; None for none.
        last: differentiate only so many steps, or a rule that draws the number; the steps before run without
            a graph as a whole, and the initial state then gets no gradient. None for all steps. Needs no
            network.
        store: `Backprop()` stores everything, `Checkpointed(...)` some states.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong field.

    Example:
        >>> import torch
        >>> from thalweg.rollouts import rollout
        >>> net = torch.nn.Linear(1, 1)
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = rollout(lambda net, x, k: x + net(x), x, 3, network=net, gradient=Route(state=0.0))
        >>> y.backward()
        >>> x.grad, net.bias.grad
        (tensor([1.]), tensor([3.]))
    """

    state: Mask = 1.0
    parameters: Mask = 1.0
    cotangent: Gate | None = None
    last: int | Last | RandomLast | None = None
    store: Store = field(default_factory=Backprop)

    def __post_init__(self) -> None:
        require_mask("state", self.state)
        require_mask("parameters", self.parameters)
        if self.cotangent is not None and not isinstance(self.cotangent, Gate):
            mend = "Write Gate(thalweg.gates.clip, limit=1.0)."
            raise ArgumentTypeError("cotangent", self.cotangent, "a Gate or None", mend)
        if self.last is not None and not isinstance(self.last, Last | RandomLast):
            require_integer("last", self.last, 1)
        _require_store(self.store)

    def masks_network(self) -> bool:
        """Whether a mask bears on the network's Jacobian, which must then be given."""
        return not (is_one(self.state) and is_one(self.parameters))

    def masks(self, steps: int, key: Key) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The shares of state and parameters, one per step; equal random rules give equal draws."""
        return shares("state", self.state, steps, key), shares("parameters", self.parameters, steps, key)

    def horizon(self, steps: int, key: Key) -> int:
        """How many of the last steps are differentiated."""
        if self.last is None:
            return steps
        rule = Last(self.last) if isinstance(self.last, int) else self.last
        return rule.draw(steps, key)

    def random(self) -> bool:
        """Whether a rule draws."""
        return not all(
            isinstance(field, int | float | tuple | Last | None)
            for field in (self.state, self.parameters, self.last)
        )


@dataclass(frozen=True, slots=True)
class Truncated:
    """Differentiate only the last steps; those before run without a graph.

    Choose it when even `Checkpointed` takes too much time and early steps matter little. The gradient is
    biased: the parameters miss what they did in early steps, and the initial state gets none. Memory and time
    of the backward are those of the steps that are kept. The row DRaFT-K of the table; with a random rule
    AlignProp's, whose parameters get the same gradient although their skip path stays open. Transforms as in
    `store`.

    Args:
        last: how many steps, at least 1; or a rule, `RandomLast(least, most)`, drawn once per call from the
            rollout's key, or without one from torch's generator.
        store: `Backprop()`, or `Checkpointed(...)` for the steps that are kept.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong field.

    Paper:
        Clark, Vicol, Swersky, Fleet: Directly Fine-Tuning Diffusion Models on Differentiable Rewards. ICLR
        2024, arXiv 2309.17400.

    Example:
        >>> Truncated(last=10, store=Checkpointed(segments=5)).route().last
        10
    """

    last: int | Last | RandomLast
    store: Store = field(default_factory=Backprop)

    def __post_init__(self) -> None:
        if self.last is None:
            raise ArgumentTypeError("last", None, "an integer of at least 1 or a rule")
        self.route()

    def route(self) -> Route:
        """This row as a `Route`."""
        return Route(last=self.last, store=self.store)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Leave the network out of the derivative: what remains is the skip path around it.

    Choose it to steer a sampler by its own state when no backward through the network is affordable; right
    where the network's Jacobian is small, as on straight flows, and wrong on curved ones. Needs `network=`.
    For steps x' = a x + b F(x) the gradient is the product of the a. The network runs without a graph: its
    parameters and its conditions get no gradient. Transforms as in `store`.

    Args:
        store: `Backprop()` or `Checkpointed(...)`.

    Paper:
        Patel, Wen, Metaxas, Yang: Steering Rectified Flow Models in the Vector Field for Controlled Image
        Generation. ICCV 2025, arXiv 2412.00100.

    Example:
        >>> Skipped().route() == Route(state=0.0, parameters=0.0)
        True
    """

    store: Store = field(default_factory=Backprop)

    def __post_init__(self) -> None:
        _require_store(self.store)

    def route(self) -> Route:
        """This row as a `Route`."""
        return Route(state=0.0, parameters=0.0, store=self.store)


Policy = Backprop | Checkpointed | Truncated | Skipped | Route
_POLICIES = "one of Backprop(), Checkpointed(...), Truncated(last=...), Skipped(), Route(...)"


def as_route(gradient: object) -> Route:
    """Check a policy of `rollout` and write it as the `Route` of which it is a row."""
    if gradient is None:
        return Route()
    if isinstance(gradient, type):
        raise ArgumentTypeError("gradient", gradient, _POLICIES, f"Make one: {gradient.__name__}().")
    if isinstance(gradient, Route):
        return gradient
    if isinstance(gradient, Backprop | Checkpointed):
        return Route(store=gradient)
    if isinstance(gradient, Truncated | Skipped):
        return gradient.route()
    mend = "Rules of thalweg.backward, which see the whole loss, go there."
    raise ArgumentTypeError("gradient", gradient, _POLICIES, mend)


def _require_store(store: object) -> None:
    if not isinstance(store, Backprop | Checkpointed):
        mend = f"Make one: {store.__name__}()." if isinstance(store, type) else ""
        raise ArgumentTypeError("store", store, "Backprop() or Checkpointed(...)", mend)
