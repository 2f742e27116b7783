"""What may be added to a field without changing what it generates, and what of an error does change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Field, joined
from thalweg.flows.path import Curve, clock_times, over
from thalweg.flows.prediction import conversion
from thalweg.flows.vector_field import per_example

_ANTISYMMETRIC = 1e-6


def gauged(field: Field, matrix: Tensor, strength: float | Curve = 1.0) -> Field:
    """Add c(t) A grad log p to a field's score: another field, not a gradient, with the same marginals.

    Choose it as a control: what judges a sampler must call it right, what judges conservativity wrong. For
    antisymmetric A, div(p A grad log p) = div(A grad p) = 0, so that nothing flows; and both the divergence
    and the product with the score are 0 at each point, so that the log-likelihood stays, too. The freedom is
    that of the exact flow: Euler steps spiral out, guidance may show what each branch hid, and an energy does
    not exist.

    Args:
        field: exact, or near it: what is turned is the score it predicts.
        matrix: A, antisymmetric, (d, d) for d features.
        strength: c, a number or a function of t.

    Returns:
        A field that predicts the same kind on the same path.

    Raises:
        ArgumentError, ArgumentTypeError: a matrix that is not antisymmetric; a coupled field.

    Paper:
        Horvat, Pfister: On Gauge Freedom, Conservativity and Intrinsic Dimensionality Estimation in Diffusion
        Models. ICLR 2024.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: x, Straight(), "noise")
        >>> gauged(field, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 0.5)(torch.tensor([[1.0, 2.0]]), 0.5)
        tensor([[2.0000, 1.5000]])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    if field.coupled:
        mend = "No formula gives the score of a coupled field: turn the flow before the reflow."
        raise ArgumentError("field", "a coupled field", "a field of independent normal noise", mend)
    _require_antisymmetric(matrix)
    _require_strength(strength)

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if x[0].numel() != len(matrix):
            raise ArgumentError("x", x, f"{len(matrix)} features, as the matrix has rows")
        coefficients = field.path.coefficients(clock_times(t))
        output = field(x, t, **conditions)
        # the noise, unlike the score, is regular wherever there is little of it
        noise = Field(lambda x, t: output, field.path, field.predicts).predict("noise", x, t)
        share = conversion("noise", field.predicts, coefficients).output
        c = strength(clock_times(t)) if callable(strength) else strength
        turned = (noise.flatten(1) @ matrix.to(x).mT).reshape(x.shape)
        scale = torch.as_tensor(c, dtype=torch.float64, device=x.device) * share
        return output + over(torch.as_tensor(scale), x) * turned

    return Field(joined(network, field), field.path, field.predicts)


@dataclass(frozen=True, slots=True, eq=False)
class ErrorSplit:
    """The two parts of an error under a density p.

    Args:
        gradient: of a potential, shaped as the error: what changes the marginals.
        remainder: the rest; with enough potentials div(p remainder) = 0, and it changes none.
        coefficients: of the potentials, (k,), float64.
        share: E|gradient|^2 / E|error|^2, in [0, 1].
    """

    gradient: Tensor
    remainder: Tensor
    coefficients: Tensor
    share: Tensor


def gradient_part(
    error: Tensor, x: Tensor, potentials: Callable[[Tensor], Tensor], *, weights: Tensor | None = None
) -> ErrorSplit:
    """Split an error of a field into the part that changes what is generated and the part that does not.

    The weighted Helmholtz-Hodge decomposition e = grad phi + r with div(p r) = 0, by least squares over a
    span of potentials under samples of p_t. Few potentials miss part of the gradient; more than samples can
    hold find gradients in anything: judge by a control such as `gauged`, whose share is 0.

    Args:
        error: of a score or velocity at one time, (batch, ...).
        x: where, from p_t, shaped as the error.
        potentials: k smooth functions, `potentials(x)` of shape (batch, k).
        weights: of a quadrature in place of samples, (batch,), not negative; None for equal ones.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Horvat, Pfister: On Gauge Freedom, Conservativity and Intrinsic Dimensionality Estimation in Diffusion
        Models. ICLR 2024.

    Example:
        >>> x = torch.randn(100, 2)
        >>> found = gradient_part(3 * x, x, lambda x: x.square().sum(1, keepdim=True) / 2)
        >>> round(float(found.share), 5), round(float(found.coefficients[0]), 5)
        (1.0, 3.0)
    """
    if require_floating("x", x).ndim < 2 or 0 in x.shape:
        raise ArgumentError("x", x, "a batch of states with features, shape (batch, ...)")
    if require_floating("error", error).shape != x.shape:
        raise ArgumentError("error", error, f"the shape of x, {tuple(x.shape)}")
    if not callable(potentials):
        raise ArgumentTypeError("potentials", potentials, "a function of x")
    at = x.detach().double()
    values, pull = torch.func.vjp(potentials, at)[:2]
    if values.ndim != 2 or len(values) != len(x):
        raise ArgumentError("potentials", values, f"k numbers per example, shape ({len(x)}, k)")
    units = torch.eye(values.shape[1], dtype=values.dtype, device=x.device)[:, None].expand(-1, len(x), -1)
    slopes = torch.func.vmap(lambda unit: pull(unit)[0])(units).flatten(2)
    wanted = error.detach().double().flatten(1)
    root = _roots(weights, x)
    columns = (slopes * root).flatten(1).mT
    solved = torch.linalg.pinv(columns) @ (wanted * root).flatten()
    gradient = torch.einsum("k,kbd->bd", solved, slopes)
    share = per_example((gradient * root).square()).sum() / per_example((wanted * root).square()).sum()
    found = gradient.reshape(x.shape).to(error.dtype)
    return ErrorSplit(found, error.detach() - found, solved, share)


def _roots(weights: Tensor | None, x: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    if require_floating("weights", weights).shape != (len(x),) or not bool((weights >= 0).all()):
        raise ArgumentError("weights", weights, f"one weight per example, at least 0, shape ({len(x)},)")
    return weights.detach().double().sqrt()[:, None]


def _require_antisymmetric(matrix: object) -> None:
    value = require_floating("matrix", matrix)
    if value.ndim != 2 or value.shape[0] != value.shape[1] or len(value) < 2:
        raise ArgumentError("matrix", value, "shape (d, d) for d features, d at least 2")
    if not bool((value + value.mT).abs().max() <= _ANTISYMMETRIC * value.abs().max()):
        mend = "Take (matrix - matrix.mT) / 2; a symmetric part would change what is generated."
        raise ArgumentError("matrix", value, "an antisymmetric matrix", mend)


def _require_strength(strength: object) -> None:
    if callable(strength):
        return
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise ArgumentTypeError("strength", strength, "a finite number, or a function of time")
    if not math.isfinite(strength):
        raise ArgumentError("strength", strength, "a finite number")
