"""Guidance: a field made of two fields, or of a field and a classifier.

Plain guidance is affine in the fields, so it is the same whatever they predict. A guided field's score at
time t is that of the density p_t(x) (p_t(x | c) / p_t(x))^weight. Noising and tilting do not commute, so that
these densities are not the noised versions of any one law of data: at the end of a sampler the samples do not
follow the tilted law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows.field import Field, joined
from thalweg.flows.path import over
from thalweg.flows.stochastic_solvers import require_share

Everywhere = (0.0, 1.0)


def classifier_free(
    field: Field,
    weight: float,
    *,
    null: Mapping[str, Any] | None,
    interval: tuple[float, float] = Everywhere,
    rescale: float = 0.0,
    parallel: float = 1.0,
) -> Field:
    """Classifier-free guidance: without the condition, plus `weight` times the difference it makes.

    Choose `interval` to keep diversity: guide in the middle only. Two calls of the network a step; with
    `weight` 0 or 1, one.

    Args:
        field: a field whose network takes the conditions, given to `sample(conditions=...)`.
        weight: 0 without condition, 1 with it, more to exaggerate it. Ho and Salimans count from -1:
            their w is this less 1.
        null: what the network is given in place of the conditions of these names, for example
            `{"label": torch.full((n,), -1)}`; an empty mapping drops all conditions.
        interval: the times (from, to) in which guidance acts; elsewhere the conditional field alone does.
        rescale: in [0, 1], how much of the standard deviation per example of the predicted data is brought
            back to that of the conditional prediction; against overexposure at large weights.
        parallel: in [0, 1], how much is kept of the part of the difference, in predicted data, that lies
            along the conditional prediction: adaptive projected guidance has 0, which avoids
            oversaturation. Neither of the two is affine: both make even an exact guided field
            non-conservative.

    Returns:
        A field that predicts the same kind on the same path.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or no `null`.

    Paper:
        Ho, Salimans: Classifier-Free Diffusion Guidance. 2022. Kynkäänniemi et al.: Applying Guidance in a
        Limited Interval. NeurIPS 2024. Lin et al.: Common Diffusion Noise Schedules and Sample Steps are
        Flawed. WACV 2024. Sadat et al.: Eliminating Oversaturation and Artifacts. ICLR 2025.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t, shift: x + shift, Straight())
        >>> guided = classifier_free(field, 3.0, null={"shift": 0.0})
        >>> guided(torch.zeros(1, 2), 0.5, shift=1.0)
        tensor([[3., 3.]])
    """
    _require_field("field", field)
    if not isinstance(null, Mapping):
        mend = "Write null={'label': ...}, or null={} for a network that may be called without conditions."
        raise ArgumentTypeError("null", null, "the conditions of the unconditional call", mend)
    nothing = dict(null)
    if weight == 1:
        return field

    def without(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return field(x, t, **({**conditions, **nothing} if nothing else {}))

    return _guided(
        field,
        Field(joined(without, field), field.path, field.predicts, coupled=field.coupled),
        weight,
        interval,
        rescale,
        parallel,
    )


def autoguidance(
    field: Field, weaker: Field, weight: float, *, interval: tuple[float, float] = Everywhere
) -> Field:
    """Guidance by a weaker version of the same model: away from what it does worse.

    Args:
        field: the model; both take the same conditions.
        weaker: a smaller or less trained one, on an equal path, predicting the same kind.
        weight: 1 is the model alone; more extrapolates.
        interval: as in `classifier_free`.

    Raises:
        ArgumentError: fields of different paths or predictions; bring them together by `on` and `converted`.

    Paper:
        Karras, Aittala, Kynkäänniemi, Lehtinen, Aila, Laine: Guiding a Diffusion Model with a Bad Version of
        Itself. NeurIPS 2024.

    Example:
        >>> from thalweg.flows import Straight
        >>> good, bad = (Field(lambda x, t, s=s: s * x, Straight()) for s in (1.0, 0.5))
        >>> autoguidance(good, bad, 2.0)(torch.ones(1, 1), 0.5)
        tensor([[1.5000]])
    """
    _require_field("field", field)
    _require_field("weaker", weaker)
    if weaker.path != field.path:
        raise ArgumentError(
            "weaker", weaker.path, f"a field on {field.path}", "Move it: weaker.on(field.path)."
        )
    if weaker.predicts != field.predicts:
        mend = f"Convert it: weaker.converted({field.predicts!r})."
        raise ArgumentError("weaker", weaker.predicts, f"a field that predicts {field.predicts!r}", mend)
    return _guided(field, weaker, weight, interval, 0.0, 1.0)


def classifier_guidance(
    field: Field,
    log_probability: Callable[..., Tensor],
    weight: float,
    *,
    interval: tuple[float, float] = Everywhere,
) -> Field:
    """Guidance by a classifier of noised data: its gradient is added to the score.

    With the exact classifier it is classifier-free guidance with the exact conditional field.

    Args:
        field: the unconditional field.
        log_probability: `log_probability(x, t, **conditions)`, shape (batch,): log p_t(c | x).
        weight: what its gradient is multiplied by.
        interval: the times (from, to) in which guidance acts.

    Returns:
        A field that predicts the same kind; its conditions go to the classifier alone.

    Paper:
        Dhariwal, Nichol: Diffusion Models Beat GANs on Image Synthesis. NeurIPS 2021.

    Example:
        >>> from thalweg.flows import Cosine
        >>> field = Field(lambda x, t: -x, Cosine(), predicts="score")
        >>> guided = classifier_guidance(field, lambda x, t: -x.square().sum(1) / 2, 2.0)
        >>> guided(torch.ones(1, 2), 0.5)
        tensor([[-3., -3.]])
    """
    _require_field("field", field)
    if field.coupled:
        mend = "What a classifier adds is a share of the score: guide the flow before the reflow."
        raise ArgumentError("field", "a coupled field", "a field of independent normal noise", mend)
    if not callable(log_probability):
        raise ArgumentTypeError("log_probability", log_probability, "a function of x, t and the conditions")
    strength = _strength(weight, interval, resting=0.0)

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        output = field(x, t)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            leaf = x if differentiable else x.detach().requires_grad_()
            total = log_probability(leaf, t, **conditions).sum()
            (pull,) = torch.autograd.grad(total, leaf, create_graph=differentiable)
        return output + over(strength(t) * _score_share(field, t), x) * pull

    return Field(joined(network, field), field.path, field.predicts)


def _score_share(field: Field, t: Tensor) -> Tensor:
    """What a prediction changes by, per change of the score; regular wherever the prediction itself is."""
    alpha, sigma, alpha_rate, sigma_rate = field.path.coefficients(t)
    if field.predicts == "score":
        return torch.ones_like(sigma)
    if field.predicts == "noise":
        return -sigma
    if field.predicts == "data":
        return sigma**2 / alpha
    if field.predicts == "v":
        return -sigma * (alpha**2 + sigma**2) / alpha
    return sigma * (alpha_rate * sigma / alpha - sigma_rate)


def _guided(
    field: Field,
    other: Field,
    weight: float,
    interval: tuple[float, float],
    rescale: float,
    parallel: float,
) -> Field:
    for name, share in (("rescale", rescale), ("parallel", parallel)):
        require_share(name, share)
        if share > 1:
            raise ArgumentError(name, share, "a number in [0, 1]")
    strength = _strength(weight, interval, resting=1.0)
    affine = rescale == 0 and parallel == 1
    constant = affine and tuple(interval) == Everywhere

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if constant and weight == 0:
            return other(x, t, **conditions)
        towards, away = field(x, t, **conditions), other(x, t, **conditions)
        if constant:
            return torch.lerp(away, towards, weight)
        share = over(strength(t), x)
        if affine:
            return away + share * (towards - away)
        return _in_data(field, x, t, towards, away, share, rescale, parallel)

    return Field(joined(network, field, other), field.path, field.predicts, coupled=field.coupled)


def _in_data(
    field: Field,
    x: Tensor,
    t: Tensor,
    towards: Tensor,
    away: Tensor,
    share: Tensor,
    rescale: float,
    parallel: float,
) -> Tensor:
    """Projection and rescaling are defined on predicted data; everything else stays as it is."""
    said = (Field(lambda x, t, value=value: value, field.path, field.predicts) for value in (towards, away))
    data, without = (one.predict("data", x, t) for one in said)
    axes = tuple(range(1, x.ndim))
    change = data - without
    if parallel != 1:
        along = (change * data).sum(axes, keepdim=True) / data.square().sum(axes, keepdim=True)
        change = change - (1 - parallel) * along * data
    # at weight 1 the conditional prediction itself
    guided = data + (share - 1) * change
    if rescale:
        ratio = data.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        guided = guided * (1 - rescale + rescale * ratio)
    return Field(lambda x, t: guided, field.path, "data").predict(field.predicts, x, t)


def _strength(weight: float, interval: tuple[float, float], resting: float) -> Callable[[Tensor], Tensor]:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ArgumentTypeError("weight", weight, "a finite number")
    if not math.isfinite(weight):
        raise ArgumentError("weight", weight, "a finite number")
    if not (isinstance(interval, tuple) and len(interval) == 2):
        raise ArgumentTypeError("interval", interval, "two times (from, to)")
    least, most = interval
    if not 0 <= least < most <= 1:
        raise ArgumentError("interval", interval, "two times (from, to) with 0 <= from < to <= 1")

    def strength(t: Tensor) -> Tensor:
        inside = (t >= least) & (t <= most)
        return torch.where(inside, weight, resting).to(torch.float64)

    return strength


def _require_field(argument: str, value: object) -> None:
    if not isinstance(value, Field):
        raise ArgumentTypeError(argument, value, "a thalweg.flows.Field")
