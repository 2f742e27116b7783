"""One step of a teacher for flow maps, with a start and an end of its own for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError
from thalweg.flows.field import Field
from thalweg.flows.path import Path, over


def flow_step(
    field: Field, x: Tensor, s: Tensor, t: Tensor, solver: str = "heun", **conditions: Any
) -> Tensor:
    """One step of a teacher along the probability flow, with a start and an end for each example.

    Args:
        field: the teacher.
        x: (batch, ...) at s.
        s: (batch,).
        t: (batch,), earlier.
        solver: "ddim"; "euler" or "heun", in the time of the path: on `VarianceExploding` that is EDM's.
        conditions: handed to the network.

    Returns:
        The states at t.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: torch.ones_like(x), Straight())
        >>> flow_step(field, torch.zeros(1, 1), torch.tensor([0.75]), torch.tensor([0.5]))
        tensor([[-0.2500]])
    """
    if solver == "ddim":
        kept, share = ddim_shares(field.path, s, t)
        return over(kept, x) * x + over(share, x) * field.predict("data", x, s, **conditions)
    if solver not in ("euler", "heun"):
        raise ArgumentError("solver", solver, "'ddim', 'euler' or 'heun'")
    length = over(t - s, x)
    first = field.predict("velocity", x, s, **conditions)
    ahead = x + length * first
    if solver == "euler":
        return ahead
    return x + length / 2 * (first + field.predict("velocity", ahead, t, **conditions))


def ddim_shares(path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of DDIM from s to t multiplies the state and the predicted data by."""
    start, end = path.coefficients(s), path.coefficients(t)
    # without noise at s, t = s = 0 and nothing moves
    still = start.sigma == 0
    kept = torch.where(still, 1.0, end.sigma / torch.where(still, 1.0, start.sigma))
    return kept, end.alpha - start.alpha * kept
