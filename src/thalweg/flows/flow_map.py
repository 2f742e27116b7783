"""Flow maps: networks that jump along the probability flow, from any time to any earlier one, in one call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Network, batched_times
from thalweg.flows.path import Path, readable, require_path
from thalweg.flows.samplers import checked_times
from thalweg.noise import Key, normal
from thalweg.rollouts.rollout import rollout
from thalweg.rollouts.route import Policy
from thalweg.step import draw_key


@dataclass(frozen=True, slots=True, eq=False)
class FlowMap(ABC):
    """Psi(x, s, t): where the probability flow takes x from time s to time t <= s.

    One object, learnt under different parametrisations: `ConsistencyModel`, `ConsistencyTrajectory`,
    `MeanFlow`. In each the map from a time to itself is the identity by construction, not by a penalty.
    Differentiable, transforms as in the network.

    Args:
        network: what is learnt; see the parametrisation. A module or any function.
        path: the noising path; t = 0 is data and t = 1 noise.
    """

    network: Network
    path: Path

    def __post_init__(self) -> None:
        if not callable(self.network) or isinstance(self.network, type):
            raise ArgumentTypeError("network", self.network, "a function network(x, s, t, **conditions)")
        require_path("path", self.path)

    @property
    def last(self) -> float | None:
        """The only time at which jumps end; None where they may end anywhere."""
        return None

    def __call__(self, x: Tensor, s: Tensor | float, t: Tensor | float, **conditions: Any) -> Tensor:
        """Jump.

        Args:
            x: the states at s, (batch, ...).
            s: times in [0, 1], (batch,) or one for all.
            t: likewise, at most s.
            conditions: handed to the network.

        Returns:
            The states at t, shaped as x.
        """
        begin, end = batched_times(x, s), batched_times(x, t)
        if readable(begin) and readable(end) and bool((end > begin).any()):
            raise ArgumentError("t", t, "times at or before s, towards the data")
        jumped = self._jump(x, begin, end, **conditions)
        return jumped.to(x.dtype)

    @abstractmethod
    def _jump(self, x: Tensor, s: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The jump for times of shape (batch,)."""

    def with_network(self, network: Network) -> Self:
        """The map with another network in its place, such as one of averaged weights."""
        return replace(self, network=network)


def sample_map(
    flow_map: FlowMap,
    start: Tensor,
    times: Tensor | Sequence[float],
    *,
    gamma: float | None = None,
    gradient: Policy | None = None,
    conditions: Mapping[str, Any] | None = None,
    then: Callable[[Any], Any] | None = None,
    key: Key | None = None,
    trajectory: bool = False,
) -> Any:
    """Sample with a flow map in one jump or a few, and choose how the result is differentiated.

    Between two jumps a share of the noise may be drawn anew: the jump then goes further, and noise is added
    back. With `gamma` = 0 nothing is drawn and errors of the jumps add up; with 1 each jump goes all the way
    to the data, which corrects errors of the ones before, as in multistep consistency sampling.

    Args:
        flow_map: the map.
        start: the states at `times[0]`, (batch, ...).
        times: at least two, strictly falling; one jump each. The last is where a consistency model ends.
        gamma: in [0, 1]; None for 0, or for 1 where the map ends at one time only, as consistency models do.
        gradient: a policy of `rollout`; None for `Backprop()`. The network is the map's.
        conditions: handed to the network.
        then: a read-out of the result, differentiated under the same policy.
        key: names the noise; None takes one from torch's generator.
        trajectory: return the states at all times, as a tuple.

    Returns:
        The state at the last time, or the trajectory, or what `then` makes of it.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, rising times, or a `gamma` the map cannot serve.
        NonFiniteError: the result holds nan or infinity.

    Paper:
        Song, Dhariwal, Chen, Sutskever: Consistency Models. ICML 2023. Kim et al.: Consistency Trajectory
        Models. ICLR 2024.

    Example:
        >>> from thalweg.flows import MeanFlow, Straight
        >>> straight = MeanFlow(lambda x, s, t: torch.ones_like(x), Straight())
        >>> sample_map(straight, torch.zeros(1, 2), [1.0, 0.0])
        tensor([[-1., -1.]])
    """
    require_map("flow_map", flow_map)
    if require_floating("start", start).ndim == 0:
        raise ArgumentError("start", start, "a batch of states, shape (batch, ...)")
    grid = checked_times(times)
    if grid[-1] > grid[0]:
        raise ArgumentError("times", times, "times that fall towards the data")
    share = _require_gamma(flow_map, gamma, grid)
    jumps = [_jump_plan(flow_map, share, k, grid) for k in range(len(grid) - 1)]
    given = dict(conditions or {})
    noisy = any(fresh for _, _, fresh in jumps)
    if key is None and noisy:
        key = draw_key()

    def step(network: Network, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        seen = flow_map if network is flow_map.network else flow_map.with_network(network)
        aim, scale, fresh = jumps[k]
        landed = seen(x, grid[k], aim, **given)
        if not fresh:
            return landed
        assert key is not None
        return torch.add(landed * scale, normal(x, key), alpha=fresh)

    return rollout(
        step,
        start,
        len(jumps),
        gradient=gradient,
        network=flow_map.network,
        then=then,
        key=key,
        trajectory=trajectory,
    )


def _jump_plan(flow_map: FlowMap, gamma: float, k: int, grid: Sequence[float]) -> tuple[float, float, float]:
    """Where jump k lands, what the state is multiplied by there, and how much noise is added."""
    end = grid[k + 1]
    if gamma == 0 or k == len(grid) - 2:
        return end, 1.0, 0.0
    alpha, sigma = (float(c) for c in flow_map.path.coefficients(end)[:2])
    if flow_map.last is not None:
        aim = flow_map.last
    elif gamma == 1:
        aim = 0.0
    else:
        # where sigma / alpha is the share that is kept
        lower = flow_map.path.half_log_snr(end) - math.log(1 - gamma**2) / 2
        aim = float(flow_map.path.time_at(lower))
    there = flow_map.path.coefficients(aim)
    scale = alpha / float(there.alpha)
    return aim, scale, math.sqrt(max(0.0, sigma**2 - (scale * float(there.sigma)) ** 2))


def _require_gamma(flow_map: FlowMap, gamma: float | None, grid: Sequence[float]) -> float:
    single = flow_map.last is not None
    if gamma is None:
        gamma = 1.0 if single else 0.0
    if isinstance(gamma, bool) or not isinstance(gamma, int | float):
        raise ArgumentTypeError("gamma", gamma, "a number in [0, 1], or None")
    if not 0 <= gamma <= 1:
        raise ArgumentError("gamma", gamma, "a number in [0, 1]")
    if single and gamma != 1 and len(grid) > 2:
        raise ArgumentError("gamma", gamma, "1 for a map whose jumps all end at one time")
    if flow_map.last is not None and grid[-1] != flow_map.last:
        raise ArgumentError("times", grid[-1], f"a last time of {flow_map.last}, where this map ends")
    return float(gamma)


def require_map(argument: str, value: object) -> None:
    """Raise `ArgumentTypeError` unless `value` is a flow map."""
    if not isinstance(value, FlowMap):
        raise ArgumentTypeError(argument, value, "a flow map such as MeanFlow(network, path)")


def require_output(output: object, x: Tensor) -> Tensor:
    """Raise unless a network returned a tensor shaped as x; return it."""
    if not isinstance(output, Tensor) or output.shape != x.shape:
        expected = f"a network whose output has the shape {tuple(x.shape)} of x"
        raise ArgumentError("network", output, expected)
    return output
