"""Learning in continuous time: weights wander, a reward says when it went well, and the means follow.

Three tasks by Ornstein-Uhlenbeck adaptation, which sees one reward a tick and no derivative. Controls: the
same wandering while no reward moves the means, and rewards that come from another moment of the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import thalweg as tw
from thalweg.lab import Claim
from thalweg.recipes.p15_zeroth_order import cart_pole
from thalweg.recipes.p15_zeroth_order.orders import SOURCE

Results = Mapping[str, Sequence[Mapping[str, Any]]]
ROUTES = ("adaptation", "control: no reward modulation", "control: shuffled reward")

# the toy
DIMENSIONS, START = 5, 2.5
# the tracked signal: a first-order process of variance 1, seen through noise of the same variance
MEMORY, NOISE = 0.95, 1.0
SIGNALS = 16
TRACKING = {"spread": 0.1, "pull": 1.0, "rate": 2.0, "reward_rate": 1.0, "tick": 0.05}
BALANCING = {"spread": 0.5, "pull": 2.0, "rate": 2.0, "reward_rate": 1.0, "tick": 0.1}
POLES, SECONDS = 8, 5.0


def toy(route: str, ticks: int, seed: int) -> dict[str, Any]:
    """Find a point in five dimensions from minus the squared distance to it.

    Args:
        route: one of `ROUTES`.
        ticks: at least 1.
        seed: of the direction of the target and of the noise.

    Returns:
        `distance` of the means at the end, `start`, and `curve`, the distance at some forty-odd ticks.
    """
    direction = torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    target = START * direction / direction.norm()
    theta = torch.zeros(DIMENSIONS, requires_grad=True)
    adaptation = tw.OrnsteinUhlenbeck([theta], seed=seed, **({} if _learns(route) else {"rate": 0.0}))
    found = _live(
        adaptation,
        lambda: (theta - target).square().sum(),
        lambda: float((theta - target).norm()),
        ticks=ticks,
        shuffled="shuffled" in route,
    )
    return {"distance": found[-1][1], "start": START, "curve": found}


def track(route: str, ticks: int, seed: int) -> dict[str, Any]:
    """Follow signals that are seen through noise: learn how far to trust the past, and how far the eye.

    Each output is `a` times the output before plus `b` times what is seen; minus the squared error, mean over
    `SIGNALS` signals that are followed at once, is the reward. Both weights start at 0, where the output is
    the best constant; the best are Kalman's.

    Args:
        route: one of `ROUTES`.
        ticks: at least 1; one of them is one step of the signal.
        seed: of the signal and of the noise.

    Returns:
        `error` of the learned means, `best_constant`, `unfiltered` and `kalman`: mean squared errors on a
        fresh stretch of the signals; `shown`, the beginning of one; `curve`, the error while learning.
    """
    theta = torch.zeros(2, requires_grad=True)
    numbers = TRACKING | ({} if _learns(route) else {"rate": 0.0})
    adaptation = tw.OrnsteinUhlenbeck([theta], seed=seed, **numbers)
    signal, seen = _signal(ticks, torch.Generator().manual_seed(seed))
    fresh = _signal(500, torch.Generator().manual_seed(seed + 1_000_000))
    output, now = torch.zeros(SIGNALS), iter(range(ticks))

    def loss() -> Tensor:
        nonlocal output
        tick = next(now)
        # a limit as of any body: while the weights wander, the loop may be unstable for a moment
        output = (theta[0] * output + theta[1] * seen[tick]).clamp(-5, 5)
        return (output - signal[tick]).square().mean()

    def judged() -> float:
        return _error(_filtered(theta, fresh[1]), fresh[0])

    curve = _live(adaptation, loss, judged, ticks=ticks, shuffled="shuffled" in route)
    with adaptation.at_means():
        learned, weights = _filtered(theta, fresh[1]), theta.tolist()
    return {
        "error": curve[-1][1],
        "weights": weights,
        "best_constant": _error(fresh[0].mean().expand_as(fresh[0]), fresh[0]),
        "unfiltered": _error(fresh[1], fresh[0]),
        "kalman": _error(_filtered(torch.tensor(kalman()), fresh[1]), fresh[0]),
        "curve": curve,
        "shown": {
            "signal": fresh[0][:200, 0].tolist(),
            "seen": fresh[1][:200, 0].tolist(),
            "output": learned[:200, 0].tolist(),
        },
    }


def balance(route: str, ticks: int, seed: int) -> dict[str, Any]:
    """Keep poles upright with a linear policy, told only for how long they stood; one tick is one trial.

    Args:
        route: one of `ROUTES`.
        ticks: trials, at least 1.
        seed: of the starts and of the noise.

    Returns:
        `stood`, the fraction of a trial for which new poles stand under the learned means; `best_constant`,
        the same for the best constant push; `curve`; `angles` in degrees of one pole before and after.
    """
    theta = torch.zeros(5, requires_grad=True)
    numbers = BALANCING | ({} if _learns(route) else {"rate": 0.0})
    adaptation = tw.OrnsteinUhlenbeck([theta], seed=seed, **numbers)
    generator = torch.Generator().manual_seed(seed)
    fresh = cart_pole.starts(64, torch.Generator().manual_seed(seed + 1_000_000))

    def loss() -> Tensor:
        return -cart_pole.balanced(theta, cart_pole.starts(POLES, generator), SECONDS)[0].mean()

    def stood(weights: Tensor) -> float:
        return float(cart_pole.balanced(weights, fresh, SECONDS)[0].mean())

    curve = _live(adaptation, loss, lambda: stood(theta), ticks=ticks, shuffled="shuffled" in route)
    constants = [torch.tensor([0.0, 0.0, 0.0, 0.0, push]) for push in torch.linspace(-0.2, 0.2, 9).tolist()]
    with adaptation.at_means():
        after = cart_pole.balanced(theta, fresh[:1], SECONDS)[1]
        weights = theta.tolist()
    before = cart_pole.balanced(torch.zeros(5), fresh[:1], SECONDS)[1]
    return {
        "stood": curve[-1][1],
        "weights": weights,
        "best_constant": max(stood(constant) for constant in constants),
        "curve": curve,
        "angles": {name: _degrees(angle) for name, angle in (("before", before), ("after", after))},
    }


def kalman() -> list[float]:
    """The best weights of the filter of `track`: of its own last output, and of what it sees."""
    predicted = 1.0
    for _ in range(1000):
        gain = predicted / (predicted + NOISE)
        predicted = MEMORY**2 * (1 - gain) * predicted + 1 - MEMORY**2
    return [MEMORY * (1 - gain), gain]


def claims(toys: Results, tracked: Results, poles: Results, *, decisive: bool) -> list[Claim]:
    """The line of acceptance, of the mean over seeds, and what all three tasks came to beside their controls.

    Args:
        toys: results of `toy` by route, one for each seed.
        tracked: of `track`.
        poles: of `balance`.
        decisive: False for a run of seconds, which shows the numbers and decides nothing.
    """
    far = [each["distance"] for each in toys[ROUTES[0]]]
    shares = [100 * each["distance"] / each["start"] for each in toys[ROUTES[0]]]
    lines = [
        ("at most 0.25", far, statistics.fmean(far) <= 0.25),
        ("below 15 % of its start, in %", shares, statistics.fmean(shares) < 15),
    ]
    found = [
        Claim(
            f"Ornstein-Uhlenbeck adaptation on the toy: final ||mu - t|| {limit}",
            SOURCE,
            statistics.fmean(values),
            _spread(values),
            holds if decisive else None,
            asserted=decisive,
        )
        for limit, values, holds in lines
    ]
    found.append(_shown("the same, worst seed", [max(far)]))
    found += [
        _shown(f"toy, {route}: final ||mu - t||", [each["distance"] for each in toys[route]])
        for route in ROUTES[1:]
    ]
    for route in ROUTES:
        errors = [each["error"] / each["best_constant"] for each in tracked[route]]
        found.append(_shown(f"tracking, {route}: squared error by that of the best constant", errors))
    best = [each["kalman"] / each["best_constant"] for each in tracked[ROUTES[0]]]
    found.append(_shown("tracking, bound: the same of Kalman's filter", best))
    for route in ROUTES:
        times = [SECONDS * each["stood"] for each in poles[route]]
        found.append(_shown(f"cart-pole, {route}: seconds upright of {SECONDS:g}", times))
    best = [SECONDS * each["best_constant"] for each in poles[ROUTES[0]]]
    found.append(_shown("cart-pole, control: the best constant push, seconds upright", best))
    return found


def _shown(statement: str, values: Sequence[float]) -> Claim:
    return Claim(statement, None, statistics.fmean(values), _spread(values), None, asserted=False)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _learns(route: str) -> bool:
    return "no reward modulation" not in route


def _live(
    adaptation: tw.OrnsteinUhlenbeck,
    loss: Callable[[], Tensor],
    judged: Callable[[], float],
    *,
    ticks: int,
    shuffled: bool,
) -> list[tuple[int, float]]:
    """Live through the ticks; what the means are worth at some of them, the last included."""
    seen: list[Tensor] = []

    def another() -> Tensor:
        seen.append(loss())
        return seen[int(torch.randint(len(seen), ()))]

    curve = []
    for tick in range(ticks + 1):
        if tick % math.ceil(ticks / 40) == 0 or tick == ticks:
            with adaptation.at_means():
                curve.append((tick, judged()))
        if tick < ticks:
            adaptation.step(another if shuffled else loss)
    return curve


def _signal(ticks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The signals and what is seen of them, both (ticks, SIGNALS)."""
    kicks = torch.randn(ticks, SIGNALS, generator=generator)
    kicks[1:] *= math.sqrt(1 - MEMORY**2)
    signal = _decayed(kicks, MEMORY)
    return signal, signal + math.sqrt(NOISE) * torch.randn(ticks, SIGNALS, generator=generator)


def _decayed(kicks: Tensor, memory: float) -> Tensor:
    value, found = torch.zeros(kicks.shape[1]), []
    for kick in kicks:
        value = memory * value + kick
        found.append(value)
    return torch.stack(found)


def _filtered(weights: Tensor, seen: Tensor) -> Tensor:
    own, eye = weights.tolist()
    # beyond 1 the filter would run away; the body's limit is not modelled here
    return _decayed(eye * seen, max(-1.0, min(1.0, own)))


def _error(output: Tensor, signal: Tensor) -> float:
    return float((output - signal).square().mean())


def _degrees(angles: Tensor) -> list[float | None]:
    return [None if math.isnan(angle) else math.degrees(angle) for angle in angles.tolist()]
