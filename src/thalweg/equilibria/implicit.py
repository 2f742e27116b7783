"""Differentiating an equilibrium by what holds there, not by how it was reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from thalweg.equilibria.convergence import Status, judge
from thalweg.equilibria.linear import SOLVERS, solve
from thalweg.equilibria.state import State, norms
from thalweg.errors import require_choice, require_finite, require_integer, require_positive
from thalweg.rollouts.sweep import Gradients, Sweep, attach
from thalweg.step import refuse_wrappers

Map = Callable[[State], State]


@dataclass(frozen=True, slots=True)
class Implicit:
    """The exact gradient of an equilibrium: one step is recorded, and its adjoint equation is solved.

    Choose it first for a layer defined by its own rest state: memory is that of one step, whatever it took to
    get there, and the gradient is as right as the state and the solve are. Whatever the function closes over
    gets its gradient, since the recorded step is ordinary autograd. The start gets none: the equilibrium does
    not depend on it. Not differentiable twice (refused by name); `Backprop()` is.

    Args:
        solver: how u = v + J^T u is solved by products with J^T. "neumann" repeats it, as safe and as slow as
            the forward iteration; "anderson" mixes the last steps and needs fewer; "gmres" also converges
            where J is no contraction, at the memory of twenty more states.
        tolerance: largest residual of an example, relative to one plus its norm, for cotangents scaled to
            norm one; above 0.
        max_steps: products with J^T, at least 1. A solve that needs more raises `ConvergenceError`.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Bai, Kolter, Koltun: Deep Equilibrium Models. NeurIPS 2019, arXiv 1909.01377.

    Example:
        >>> from thalweg.equilibria import fixed_point
        >>> a = torch.tensor([0.5], requires_grad=True)
        >>> fixed_point(lambda z: a * z + 1, torch.zeros(1), gradient=Implicit()).backward()
        >>> a.grad.round(decimals=3)  # z = 1 / (1 - a)
        tensor([4.])
    """

    solver: Literal["neumann", "anderson", "gmres"] = "anderson"
    tolerance: float = 1e-6
    max_steps: int = 200

    def __post_init__(self) -> None:
        require_choice("solver", self.solver, SOLVERS)
        require_positive("tolerance", self.tolerance)
        require_integer("max_steps", self.max_steps, 1)


@dataclass(frozen=True, slots=True)
class OneStep:
    """The gradient through the last step alone, as if the state before it were a constant: biased, cheapest.

    Choose it where the step contracts strongly, or to see what the linear solve of `Implicit` buys: this is
    the first term of its Neumann series. One step in memory, no solve. Not differentiable twice.

    Paper:
        Fung and others: JFB: Jacobian-Free Backpropagation for Implicit Networks. AAAI 2022,
        arXiv 2103.12803; Geng and others: On Training Implicit Models. NeurIPS 2021, arXiv 2111.05177.

    Example:
        >>> from thalweg.equilibria import fixed_point
        >>> a = torch.tensor([0.5], requires_grad=True)
        >>> fixed_point(lambda z: a * z + 1, torch.zeros(1), gradient=OneStep()).backward()
        >>> a.grad.round(decimals=3)  # z alone; the whole is z / (1 - a)
        tensor([2.])
    """


def attached(step: Map, state: State, policy: Implicit | OneStep, status: Status | None) -> State:
    """Join an equilibrium to what its step closes over.

    Args:
        step: the map whose fixed point the state is.
        state: the fixed point, without a graph.
        policy: how its backward is computed.
        status: gets the report of the backward.
    """
    name = type(policy).__name__
    with torch.enable_grad(), refuse_wrappers(name):
        implicit = isinstance(policy, Implicit)
        leaves = tuple(part.detach().requires_grad_(implicit) for part in state)
        outputs = step(leaves)
    if not _reaches_more(outputs, leaves):
        return state

    def run(inputs: State, kept: State, cotangents: State) -> Gradients:
        if isinstance(policy, OneStep):
            return cotangents
        return _adjoint(policy, leaves, inputs, cotangents, status)

    return attach(Sweep(name, tuple(part.detach() for part in state), (), run), outputs)


def _reaches_more(outputs: State, leaves: State) -> bool:
    """Whether the step uses anything that wants a gradient besides the state itself."""
    own = {id(leaf) for leaf in leaves}
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    if any(output.requires_grad and output.grad_fn is None and id(output) not in own for output in outputs):
        return True
    seen = set(stack)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                stack.append(behind)
    return False


def _adjoint(
    policy: Implicit, leaves: State, outputs: State, cotangents: State, status: Status | None
) -> Gradients:
    for cotangent in cotangents:
        require_finite("Implicit: the cotangent of the equilibrium", cotangent)
    # the equation is linear: scaled to norm one, its tolerance means the same for every loss
    scale = norms(cotangents).max()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    right = tuple((c / scale).to(c.dtype) for c in cotangents)
    live = [output for output in outputs if output.requires_grad]

    def product(state: State) -> State:
        with torch.enable_grad():
            given = [part for part, output in zip(state, outputs) if output.requires_grad]
            found = torch.autograd.grad(live, leaves, given, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves))

    what = f"Implicit({policy.solver!r}): the adjoint equation"
    found = solve(policy.solver, product, right, policy.tolerance, policy.max_steps, what)
    if status is not None:
        status.adjoint_iterations, status.adjoint_residual = found.iterations, found.residual
    mend = "Use solver='gmres', more max_steps, or a larger tolerance."
    judge(found, policy.tolerance, what, True, mend)
    return tuple((part * scale).to(part.dtype) for part in found.state)
