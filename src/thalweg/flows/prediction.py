"""What a network of a generative field predicts, and how one prediction is made of another.

At x = alpha data + sigma noise every prediction is an affine function of every other: a multiple of x,
which no model decides, plus a multiple of the output.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch

from thalweg.errors import ArgumentError, require_choice
from thalweg.flows.path import Coefficients, readable

Kind = Literal["data", "noise", "score", "velocity", "v"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# numbers or tensors: the same formulas serve a table of steps and a batch of times
Scalar = Any


class Affine(NamedTuple):
    """`state` times x plus `output` times what the network said."""

    state: Scalar
    output: Scalar


def require_kind(argument: str, value: object) -> None:
    """Raise `ArgumentError` unless `value` names a prediction."""
    if value == "clean":
        raise ArgumentError(argument, value, "one of " + ", ".join(map(repr, KINDS)), "Write 'data'.")
    require_choice(argument, value, KINDS)


def conversion(source: Kind, target: Kind, path: Coefficients | tuple[Scalar, ...]) -> Affine:
    """How the prediction `target` is made of x and the prediction `source`.

    | prediction | is the mean, given x, of |
    | --- | --- |
    | data | the data |
    | noise | the noise |
    | score | - noise / sigma, the gradient of log p_t |
    | velocity | alpha' data + sigma' noise, the slope of the probability flow |
    | v | alpha noise - sigma data |

    Args:
        source: what there is.
        target: what is wanted.
        path: (alpha, sigma, alpha', sigma'), numbers or tensors.

    Returns:
        The two coefficients; not finite at a time at which the one cannot be had from the other.

    Example:
        >>> conversion("data", "noise", (0.75, 0.5, -1.0, 1.0))
        Affine(state=2.0, output=-1.5)
    """
    if source == target:
        return Affine(0.0, 1.0)
    alpha, sigma, alpha_rate, sigma_rate = path
    if target == "data":
        return _data(source, path)
    noise = _noise(source, path)
    if target == "noise":
        return noise
    if target == "score":
        return Affine(-noise.state / sigma, -noise.output / sigma)
    data = _data(source, path)
    shares = (alpha_rate, sigma_rate) if target == "velocity" else (-sigma, alpha)
    return Affine(
        shares[0] * data.state + shares[1] * noise.state, shares[0] * data.output + shares[1] * noise.output
    )


def _data(source: Kind, path: Coefficients | tuple[Scalar, ...]) -> Affine:
    alpha, sigma, alpha_rate, sigma_rate = path
    if source == "data":
        return Affine(0.0, 1.0)
    if source == "noise":
        return Affine(1 / alpha, -sigma / alpha)
    if source == "score":
        return Affine(1 / alpha, sigma**2 / alpha)
    if source == "velocity":
        turn = alpha_rate * sigma - sigma_rate * alpha
        return Affine(-sigma_rate / turn, sigma / turn)
    square = alpha**2 + sigma**2
    return Affine(alpha / square, -sigma / square)


def _noise(source: Kind, path: Coefficients | tuple[Scalar, ...]) -> Affine:
    alpha, sigma, alpha_rate, sigma_rate = path
    if source == "data":
        return Affine(1 / sigma, -alpha / sigma)
    if source == "noise":
        return Affine(0.0, 1.0)
    if source == "score":
        return Affine(0.0, -sigma)
    if source == "velocity":
        turn = alpha_rate * sigma - sigma_rate * alpha
        return Affine(alpha_rate / turn, -alpha / turn)
    square = alpha**2 + sigma**2
    return Affine(sigma / square, alpha / square)


def require_regular(found: Affine, source: Kind, target: Kind, t: object) -> Affine:
    """Refuse coefficients that are not finite, where looking at them costs no wait for a device."""
    for value in found:
        tensor = torch.as_tensor(value)
        if readable(tensor) and not bool(torch.isfinite(tensor).all()):
            mend = (
                "At t = 0 there is no noise to tell, at t = 1 there may be no data: stop a little before, "
                "or let the network predict 'v', or 'velocity' on a path whose rates are finite."
            )
            raise ArgumentError("t", t, f"times at which {target!r} can be had from {source!r}", mend)
    return found
