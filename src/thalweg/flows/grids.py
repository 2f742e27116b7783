"""Where a sampler's steps lie between noise and data."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_choice, require_integer, require_positive
from thalweg.flows.path import Path, require_path

SPACINGS = ("time", "half_log_snr", "karras")


def time_grid(
    path: Path,
    steps: int,
    spacing: str = "time",
    *,
    first: float = 1.0,
    last: float = 1e-3,
    to_data: bool = False,
    rho: float = 7.0,
) -> Tensor:
    """Times for a sampler, falling from `first` to `last`.

    Args:
        path: the noising path.
        steps: how many steps, at least 1; the last one goes to t = 0 if `to_data`.
        spacing: even in "time"; even in "half_log_snr", as DPM-Solver likes it; or "karras", even in the
            `rho`-th root of sigma / alpha, which spends most steps near the data.
        first: in (0, 1]. Spacings other than "time" need some data there: on paths that end in pure noise
            take for example 0.999.
        last: in [0, first); "half_log_snr" needs some noise there.
        to_data: append t = 0 as the end of the last step.
        rho: the root of "karras".

    Returns:
        Shape (steps + 1,), float64, on the CPU.

    Raises:
        ArgumentError, ArgumentTypeError: a number out of range, or an end that the spacing does not reach.

    Example:
        >>> from thalweg.flows import Straight
        >>> time_grid(Straight(), 4, last=0.0)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    require_path("path", path)
    require_integer("steps", steps, 1)
    require_choice("spacing", spacing, SPACINGS)
    require_positive("rho", rho)
    if not 0 < first <= 1:
        raise ArgumentError("first", first, "a time in (0, 1]")
    if not 0 <= last < first:
        raise ArgumentError("last", last, f"a time in [0, {first})")
    if to_data and last == 0:
        raise ArgumentError("last", last, "a time above 0 before the step to data")
    count = steps if to_data else steps + 1
    share = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1).double()
    ends = torch.tensor([first, last], dtype=torch.float64)
    if spacing == "time":
        times = first + share * (last - first)
    else:
        ratio = path.half_log_snr(ends)
        if spacing == "karras":
            root = torch.exp(-ratio / rho)
            ratio = -rho * torch.log(root[0] + share * (root[1] - root[0]))
            usable = torch.isfinite(root).all()
        else:
            usable = torch.isfinite(ratio).all()
            ratio = ratio[0] + share * (ratio[1] - ratio[0])
        if not bool(usable):
            mend = "Move first below 1 or last above 0."
            raise ArgumentError("spacing", spacing, "'time' where an end has no data or no noise", mend)
        times = path.time_at(ratio)
    # the ends are exact, whatever the inverse rounds to
    times[0] = first
    if count > 1:
        times[-1] = last
    return torch.cat([times, times.new_zeros(1)]) if to_data else times
