"""Reflow: train again on the pairs that a flow itself makes, so that its paths become straight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_finite, require_floating, require_integer
from thalweg.flows.couplings import Draw, Pair, Paired, require_conditions, require_draw
from thalweg.flows.field import Field, JoinedNetwork
from thalweg.flows.linear_steps import Solver
from thalweg.flows.rectified import require_velocity
from thalweg.flows.samplers import checked_times, sample
from thalweg.flows.stochastic_solvers import DDIM
from thalweg.noise import Key

Simulate = Callable[[Field, Tensor], Tensor]
Fit = Callable[[Field, "Paired | Reflowed"], Field]
Times = Tensor | Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class Reflowed:
    """Pairs made when they are drawn: a batch of the source, and where the flow takes it. Nothing is stored.

    Choose it over `reflow_pairs` when every pair should be seen only once; each draw costs a simulation.

    Args:
        field: the flow.
        source: `draw(count, key)`, points at t = 1.
        times: falling from 1 to 0, or to a little above 0 where the field ends.
        solver: any deterministic one; None for `DDIM()`, which on the straight path is Euler. On steep
            fields few steps of a low order make wrong pairs: compare with more of them.
        simulate: `simulate(field, source)` in place of times and solver, for example an adaptive one by
            `probability_flow`.

    Example:
        >>> from thalweg.flows import Straight
        >>> from thalweg.noise import normal
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight())
        >>> pairs = Reflowed(field, lambda n, key: normal(torch.empty(n, 2), key), [1.0, 0.0])
        >>> pair = pairs.draw(4, Key(0))
        >>> torch.testing.assert_close(pair.data, pair.source - 1)
    """

    field: Field
    source: Draw
    times: Times | None = None
    solver: Solver | None = None
    simulate: Simulate | None = None

    def __post_init__(self) -> None:
        if not callable(self.source):
            raise ArgumentTypeError("source", self.source, "a function draw(count, key)")
        _require_simulation(self.field, self.times, self.solver, self.simulate)

    def draw(self, count: int, key: Key) -> Pair:
        """See `Coupling`."""
        require_draw(count, key)
        source = self.source(count, key)
        with torch.no_grad():
            data = _simulated(self.field, source, self.times, self.solver, self.simulate, {})
        return Pair(data, source)


def reflow_pairs(
    field: Field,
    source: Tensor,
    times: Times | None = None,
    *,
    solver: Solver | None = None,
    simulate: Simulate | None = None,
    batch: int = 4096,
    conditions: Mapping[str, Tensor] | None = None,
) -> Paired:
    """Simulate a flow from each point of the source, and keep both ends together.

    Args:
        field: the flow; modules are put in evaluation mode meanwhile.
        source: points at t = 1, (n, ...); the pairs keep its dtype.
        times: as in `Reflowed`.
        solver: as in `Reflowed`.
        simulate: as in `Reflowed`; called on batches.
        batch: how many points are simulated at once, at least 1.
        conditions: tensors of n rows, handed to the network and kept with the pairs.

    Returns:
        The pairs, on the device of the source; `Paired.save` writes them to a file.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        NonFiniteError: the simulation went to infinity.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight())
        >>> pairs = reflow_pairs(field, torch.zeros(5, 2), [1.0, 0.0])
        >>> pairs.data[0], len(pairs)
        (tensor([-1., -1.]), 5)
    """
    _require_simulation(field, times, solver, simulate)
    require_integer("batch", batch, 1)
    if require_floating("source", source).ndim == 0 or len(source) == 0:
        raise ArgumentError("source", source, "a batch of points, shape (n, ...)")
    given = dict(conditions or {})
    if given and simulate is not None:
        raise ArgumentError("conditions", sorted(given), "none where simulate= is given")
    require_conditions(given, len(source))
    source = source.detach()
    ends = []
    with torch.no_grad():
        for start in range(0, len(source), batch):
            rows = slice(start, start + batch)
            some = {name: value[rows] for name, value in given.items()}
            ends.append(_simulated(field, source[rows], times, solver, simulate, some))
    return Paired(torch.cat(ends), source, given)


def reflow(
    field: Field,
    source: Tensor | Draw,
    fit: Fit,
    times: Times | None = None,
    *,
    rounds: int = 1,
    solver: Solver | None = None,
    simulate: Simulate | None = None,
    start: Callable[[Field], Field] | None = None,
    batch: int = 4096,
    conditions: Mapping[str, Tensor] | None = None,
) -> list[Field]:
    """Make flows straighter, round by round: simulate pairs, train on them, repeat.

    One round is as a rule enough; errors add up over several, and a flow whose samples have collapsed is
    perfectly straight: look at the samples too.

    Args:
        field: the flow to begin with; predicts "velocity", and is left as it is.
        source: points at t = 1 for stored pairs, (n, ...); or `draw(count, key)` for pairs made while
            training.
        fit: `fit(field, pairs)` trains the field in your own loop and returns it. `pairs.draw(count, key)`
            gives a batch for `rectified_loss`.
        times: as in `Reflowed`.
        rounds: how often, at least 1.
        solver: as in `Reflowed`.
        simulate: as in `Reflowed`.
        start: `start(field)` makes the field that is trained, for example with new weights; None copies the
            network of the round before, which then has to be a module that owns all it uses.
        batch: as in `reflow_pairs`.
        conditions: as in `reflow_pairs`; for stored pairs.

    Returns:
        The new flows, one per round, each marked as coupled.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or a `fit` that returns no field.

    Paper:
        Liu, Gong, Liu: Flow Straight and Fast. ICLR 2023, arXiv 2209.03003.

    Example:
        >>> from thalweg.flows import Straight, rectified_loss
        >>> field = Field(torch.nn.Bilinear(2, 1, 2), Straight(), clock=lambda t: t[:, None])
        >>> def fit(field, pairs):
        ...     optimizer = torch.optim.Adam(field.network.parameters())
        ...     for step in range(3):
        ...         data, source, _ = pairs.draw(16, Key(0, step))
        ...         optimizer.zero_grad()
        ...         rectified_loss(field, data, source).mean().backward()
        ...         optimizer.step()
        ...     return field
        >>> straighter = reflow(field, torch.randn(32, 2), fit, [1.0, 0.5, 0.0], rounds=2)
        >>> len(straighter), straighter[1].coupled
        (2, True)
    """
    require_integer("rounds", rounds, 1)
    if start is not None and not callable(start):
        raise ArgumentTypeError("start", start, "a function of the field before, or None")
    if not callable(fit):
        raise ArgumentTypeError("fit", fit, "a function fit(field, pairs)")
    _require_simulation(field, times, solver, simulate)
    if conditions and not isinstance(source, Tensor):
        raise ArgumentError("conditions", sorted(conditions), "none where the source is drawn")
    found: list[Field] = []
    current = field
    for _ in range(rounds):
        pairs: Paired | Reflowed
        if isinstance(source, Tensor):
            pairs = reflow_pairs(
                current, source, times, solver=solver, simulate=simulate, batch=batch, conditions=conditions
            )
        else:
            pairs = Reflowed(current, source, times, solver, simulate)
        begun = _copied(current) if start is None else start(current)
        fitted = fit(require_velocity(begun), pairs)
        if not isinstance(fitted, Field):
            raise ArgumentTypeError("fit", fitted, "a function that returns the trained Field")
        current = fitted if fitted.coupled else replace(fitted, coupled=True)
        found.append(current)
    return found


def _copied(field: Field) -> Field:
    network = field.network
    # a copied function goes on using the modules it closes over, and training would change the teacher
    if not isinstance(network, nn.Module) or any(isinstance(m, JoinedNetwork) for m in network.modules()):
        mend = "Write start=lambda field: Field(your_new_network, field.path, coupled=True)."
        raise ArgumentTypeError("field", network, "a module that can be copied as the network", mend)
    return replace(field, network=copy.deepcopy(network), coupled=True)


def _simulated(
    field: Field,
    source: Tensor,
    times: Times | None,
    solver: Solver | None,
    simulate: Simulate | None,
    conditions: Mapping[str, Any],
) -> Tensor:
    network = field.network
    training = [m for m in network.modules() if m.training] if isinstance(network, nn.Module) else []
    try:
        for module in training:
            module.training = False
        if simulate is not None:
            data = simulate(field, source)
        else:
            assert times is not None
            data = sample(field, source, times, solver=solver, conditions=conditions)
    finally:
        for module in training:
            module.training = True
    if not isinstance(data, Tensor) or data.shape != source.shape:
        raise ArgumentError("simulate", data, f"the points at t = 0, shape {tuple(source.shape)}")
    require_finite("the simulated data", data)
    return data.detach().to(source.dtype)


def _require_simulation(
    field: Field, times: Times | None, solver: Solver | None, simulate: Simulate | None
) -> None:
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    if (times is None) == (simulate is None):
        raise ArgumentError("times", times, "either times or simulate=")
    if simulate is not None:
        if not callable(simulate):
            raise ArgumentTypeError("simulate", simulate, "a function simulate(field, source)")
        if solver is not None:
            raise ArgumentError("solver", solver, "None where simulate= is given")
        return
    assert times is not None
    values = checked_times(times)
    if values[0] != 1 or values[-1] > 0.01:
        raise ArgumentError("times", [values[0], values[-1]], "times that fall from 1 to 0, or nearly so")
    if getattr(solver if solver is not None else DDIM(), "eta", 0) or getattr(solver, "churn", 0):
        mend = "Only a deterministic solver makes a coupling that a flow can learn."
        raise ArgumentError("solver", solver, "a solver that adds no noise", mend)
