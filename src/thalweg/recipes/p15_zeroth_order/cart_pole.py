"""A pole on a cart, to be kept upright by pushing the cart (Barto, Sutton, Anderson 1983)."""

from __future__ import annotations

import torch
from torch import Tensor

GRAVITY, CART, POLE, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s², kg, kg, m
PUSH, STEP = 10.0, 0.02  # newtons at most, seconds
EDGE, TILT = 2.4, 0.2095  # metres and radians beyond which a trial is lost
SCALES = (EDGE, 2.0, TILT, 2.0)  # by which the policy sees position, speed, angle and angular speed


def starts(poles: int, generator: torch.Generator | None = None) -> Tensor:
    """Poles nearly upright on carts near the middle; (poles, 4)."""
    return 0.1 * torch.rand(poles, 4, generator=generator) - 0.05


@torch.no_grad()
def balanced(weights: Tensor, state: Tensor, seconds: float) -> tuple[Tensor, Tensor]:
    """Let a linear policy push until every pole has fallen or time is up.

    Args:
        weights: of position, speed, angle, angular speed (in units of `SCALES`), and of 1; (5,).
        state: metres, metres a second, radians, radians a second; (poles, 4).
        seconds: of a trial that is not lost.

    Returns:
        The fraction of the trial for which each pole stood, (poles,), which has no derivative; and the
        angle of the first pole in radians by time, (steps,), nan after its fall.
    """
    up = torch.ones(len(state), dtype=torch.bool)
    steps, stood, angles = round(seconds / STEP), torch.zeros(len(state)), []
    for _ in range(steps):
        push = PUSH * (state / state.new_tensor(SCALES) @ weights[:4] + weights[4]).clamp(-1, 1)
        state = _moved(state, push)
        up = up & (state[:, 0].abs() < EDGE) & (state[:, 2].abs() < TILT)
        stood += up
        angles.append(state[0, 2] if up[0] else state.new_tensor(float("nan")))
        if not up.any():
            break
    return stood / steps, torch.stack(angles)


def _moved(state: Tensor, push: Tensor) -> Tensor:
    _, speed, angle, turning = state.unbind(1)
    sine, cosine = angle.sin(), angle.cos()
    pulled = (push + POLE * HALF_LENGTH * turning.square() * sine) / (CART + POLE)
    lever = HALF_LENGTH * (4 / 3 - POLE * cosine.square() / (CART + POLE))
    turned = (GRAVITY * sine - cosine * pulled) / lever
    driven = pulled - POLE * HALF_LENGTH * turned * cosine / (CART + POLE)
    return state + STEP * torch.stack([speed, driven, turning, turned], 1)
