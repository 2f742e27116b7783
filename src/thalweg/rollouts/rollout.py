"""A long process, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from thalweg.errors import ArgumentError, ArgumentTypeError, require_finite, require_integer
from thalweg.noise import Key
from thalweg.rollouts.checkpointed import Checkpointed
from thalweg.rollouts.network import Network, require_maskable
from thalweg.rollouts.plan import Plan, choose
from thalweg.rollouts.process import Process, require_inputs
from thalweg.rollouts.route import Policy, Route, Store, as_route
from thalweg.step import draw_key

_EVERYTHING = Route()


def rollout(
    step: Callable[..., Any],
    state: Any,
    steps: int,
    *,
    gradient: Policy | None = None,
    network: Network | None = None,
    then: Callable[..., Any] | None = None,
    inputs: Sequence[Any] | Tensor | None = None,
    key: Key | None = None,
    trajectory: bool = False,
) -> Any:
    """Run a step many times, and choose how the result is differentiated.

    The result is that of the plain loop `for k in range(steps): state = step(state, k)`; `gradient` decides
    what its backward costs and how right it is. Gradients reach the initial state, the parameters, and
    whatever else the step closes over, as in the plain loop.

    | gradient | choose it | kept for backward | the gradient is |
    | --- | --- | --- | --- |
    | `Backprop()` | it fits | every step | exact |
    | `Checkpointed(...)` | it does not | some states, one step | exact |
    | `Truncated(last=k)` | early steps matter little | the last k steps | biased |
    | `Skipped()` | no backward through the network | the skip path | biased |
    | `Route(...)` | none of the above says it | what it says | biased, where masks are not one |

    With `Backprop` and plain routes all transforms of the step itself are supported: `torch.func.grad`,
    `vmap`, `jvp`, `torch.compile`, double backward. Masks and `Checkpointed` support autocast and double
    backward, not `torch.func`.

    Args:
        step: `step(state, k)` returns the next state; k counts from 0. What else is given is passed in this
            order: `step(network, state, k, inputs[k], key)`. It must not change the state in place.
        state: a tensor, or tuples, lists and dicts of them, nested; every step returns the same nesting.
        steps: how many, at least 1.
        gradient: the policy; None for `Backprop()`.
        network: the network whose Jacobian a route masks; a `torch.nn.Module` (a function will do where
            parameters are not masked by themselves). The step must call what it is given. Refused masks say
            so.
        then: the read-out of the final state (a decoder, a reward), differentiated under the same policy: in
            image models it often keeps more memory than all steps. Gets the trajectory if that is asked for.
        inputs: one entry per step: a list, or a tensor of shape (steps, ...).
        key: the name of this process's random draws; step k gets `key.at(step=k)`, so that a recomputation
            draws the same numbers.
        trajectory: hand out all states, the initial one first, as a tuple of `steps + 1`.

    Returns:
        The final state, or the trajectory, or what `then` makes of it.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; a mask without `network=`; a budget that nothing
            fits, before anything has run.
        UnsupportedError: what the policy cannot serve, by name (see the policies).
        NonFiniteError: the result holds nan or infinity.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> noise = torch.randn(4, 2, requires_grad=True)
        >>> def step(x, k):
        ...     return x - 0.1 * net(x)
        >>> x = rollout(step, noise, 50, gradient=Checkpointed(slots=8), then=lambda x: x.square().mean())
        >>> x.backward()
        >>> noise.grad.shape
        torch.Size([4, 2])
    """
    route = _EVERYTHING if gradient is None else as_route(gradient)
    process, leaves = _prepare(route, step, state, steps, network, then, inputs, key, trajectory)
    store: Store = route.store
    if isinstance(store, Checkpointed) and store.budget is not None:
        store = choose(process, leaves, store).store if torch.is_grad_enabled() else Checkpointed()
    result = process.run(leaves, store)
    _require_finite_result(result)
    return result


def plan(
    step: Callable[..., Any],
    state: Any,
    steps: int,
    *,
    gradient: Policy,
    network: Network | None = None,
    then: Callable[..., Any] | None = None,
    inputs: Sequence[Any] | Tensor | None = None,
    key: Key | None = None,
    trajectory: bool = False,
) -> Plan:
    """Say what a rollout with a budget will do and take, before anything runs.

    `rollout` does the same by itself and remembers the answer for as long as the step's code and the shapes
    of what it reaches stay. Choose `plan` to see the numbers, or to plan once outside a loop and pass
    `plan(...).store` on. Counting runs the process under fake tensors a few times, once in
    full: no memory, and about a tenth of a millisecond per operator whatever the sizes, so seconds for a
    short sampler and a minute for hundreds of steps.

    Args:
        gradient: a policy whose store is `Checkpointed(budget=...)`. The others as in `rollout`.

    Returns:
        A `Plan`.

    Raises:
        ArgumentError: nothing fits; the message says what would.
        UnsupportedError: the step reads a value, which fake tensors do not have.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> found = plan(lambda x, k: x.sin(), x, 20, gradient=Checkpointed(budget="50kB"))
        >>> found.step_calls < 40, found.peak_bytes <= 50_000
        (True, True)
    """
    route = as_route(gradient)
    if not isinstance(route.store, Checkpointed) or route.store.budget is None:
        raise ArgumentError("gradient", gradient, "a policy that stores by Checkpointed(budget=...)")
    process, leaves = _prepare(route, step, state, steps, network, then, inputs, key, trajectory)
    return choose(process, leaves, route.store)


def _prepare(
    route: Route,
    step: Callable[..., Any],
    state: Any,
    steps: int,
    network: Network | None,
    then: Callable[..., Any] | None,
    inputs: Sequence[Any] | Tensor | None,
    key: Key | None,
    trajectory: bool,
) -> tuple[Process, tuple[Any, ...]]:
    if not callable(step):
        raise ArgumentTypeError("step", step, "a function step(state, k) that returns the next state")
    require_integer("steps", steps, 1)
    leaves, structure = tree_flatten(state)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ArgumentTypeError("state", state, "a tensor, or tensors in tuples, lists and dicts")
    if then is not None and not callable(then):
        raise ArgumentTypeError("then", then, "a function of the final state, or None")
    if network is not None and not callable(network):
        raise ArgumentTypeError("network", network, "a torch.nn.Module, or None")
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    require_inputs(inputs, steps)
    if route.masks_network() and network is None:
        mend = "Write rollout(step, x, n, network=net) with step(net, x, k), so that the mask sees its calls."
        raise ArgumentError("network", None, "the network whose Jacobian the route masks", mend)
    # one step past the last: no step draws there
    draws = key.at(step=steps) if key is not None else draw_key() if route.random() else Key(0)
    horizon = route.horizon(steps, draws)
    shares = tuple(zip(*route.masks(steps, draws))) if route.masks_network() else None
    if shares is not None:
        require_maskable(network, shares)
    process = Process(
        step=step,
        structure=structure,
        steps=steps,
        first=steps - horizon,
        network=network,
        shares=shares,
        cotangent=route.cotangent,
        inputs=inputs,
        key=key,
        then=then,
        trajectory=trajectory,
    )
    return process, tuple(leaves)


def _require_finite_result(result: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            require_finite("the result of the rollout", leaf)
