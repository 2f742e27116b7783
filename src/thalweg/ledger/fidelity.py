"""How right a gradient is: its direction, length, bias and variance against the exact one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive
from thalweg.ledger.cost import lent_rule, require_key, require_rule
from thalweg.ledger.draws import Moments, Source
from thalweg.noise import Key
from thalweg.parameters import require_finite_all
from thalweg.step import Rule, Step, as_step
from thalweg.table import align, short

# below this many draws a standard error is itself too uncertain to stop on
_LEAST = 32


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How right a gradient is; `print` it. With g the exact gradient and h a draw of the route:

    Args:
        cosine: mean over draws of the cosine between h and g; a draw of zeros counts 0.
        norm_ratio: mean over draws of |h| / |g|.
        bias: mean of <h - g, g> / |g|^2: 0 for an unbiased route, -1 for one that knows nothing of g.
        bias_se: its standard error; 0 when all draws were the same.
        squared_bias: unbiased estimate of |E h - g|^2 / |g|^2. It can be negative, by chance, where the true
            value is near 0; a plain norm of the mean error never reaches 0.
        variance: E |h - E h|^2 / |g|^2, summed over all parameters.
        draws: how many gradients were drawn.
        converged: whether `bias_se` fell to the standard error asked for; False when the limit came first.
        paired: whether the closure draws random numbers, so that the reference is random too: then each draw
            is held against the reference under the same random state, and g is the reference's mean.
        cosine_by_layer: mean cosine per module that owns parameters; nan where g is zero.
        norm_ratio_by_layer: mean norm ratio per module; nan where g is zero.
    """

    cosine: float
    norm_ratio: float
    bias: float
    bias_se: float
    squared_bias: float
    variance: float
    draws: int
    converged: bool
    paired: bool
    cosine_by_layer: Mapping[str, float] = field(default_factory=dict)
    norm_ratio_by_layer: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        reached = "" if self.converged else ", the limit"
        rows = [
            ["cosine", short(self.cosine)],
            ["norm ratio", short(self.norm_ratio)],
            ["bias along the gradient", f"{short(self.bias)} ± {short(self.bias_se, 2)}"],
            ["squared bias", short(self.squared_bias)],
            ["variance", short(self.variance)],
            ["draws", f"{self.draws}{reached}"],
        ]
        rows += [
            [f"  cosine in {name or '(the model itself)'}", short(value)] for name, value in self._layers()
        ]
        return align(["gradient against the exact one", ""], rows)

    def _layers(self) -> list[tuple[str, float]]:
        return list(self.cosine_by_layer.items()) if len(self.cosine_by_layer) > 1 else []


def fidelity(
    step: Step | tuple[Any, Any, Any] | Callable[[], Any],
    *,
    gradient: Rule | None = None,
    reference: Rule | Sequence[Tensor] | None = None,
    samples: int | None = None,
    standard_error: float = 0.05,
    limit: int = 10_000,
    key: Key | None = None,
) -> Fidelity:
    """Hold a route's gradient against the exact one.

    Every draw has a key of its own, and what the closure draws from torch's default generators differs from
    draw to draw too. Drawing goes on until the standard error of the bias is small enough; a route that
    reads neither its key nor those generators is done after two draws. Sums are kept in float64. Parameters,
    buffers, `.grad`, training flags and random states are afterwards bit for bit as before.

    Args:
        step: (model, closure, parameters), or a function of no arguments that returns it. A learner's
            gradient is what its phases leave in `.grad`.
        gradient: the rule to judge; None for `Backprop`, and for a learner. `Backprop` on a step with
            straight-through units judges those, given the exact `reference`.
        reference: the rule that computes the exact gradient of the same closure, by default `Backprop`; or
            the exact gradient itself, one tensor per parameter. A learner needs the latter.
        samples: a fixed number of draws, at least 2; None draws until `standard_error`.
        standard_error: draw until the bias is known this well, above 0.
        limit: at most this many draws, at least 2.
        key: names all random draws; None for `Key(0)`.

    Returns:
        A `Fidelity`.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument, or an exact gradient that is zero.
        NonFiniteError: a gradient holds nan or infinity.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> x = torch.ones(2, 4)
        >>> found = fidelity((model, lambda: model(x).square().mean(), model.parameters()))
        >>> found.cosine, found.bias, found.draws
        (1.0, 0.0, 2)
    """
    found = as_step(step)
    rule = lent_rule(gradient, found)
    key = require_key(key)
    require_positive("standard_error", standard_error)
    require_integer("limit", limit, 2)
    if samples is not None:
        require_integer("samples", samples, 2)
    _check_reference(reference, found.parameters)
    with isolated(found.model, found.parameters):
        source = Source(found, rule, key)
        exact, pair = _exact(source, reference)
        target = samples if samples is not None else limit
        moments = Moments(exact, source.layers())
        while moments.draws < target:
            drawn = source.draw(moments.draws)
            moments.add(drawn, pair(moments.draws) if pair is not None else None)
            least = _LEAST if source.random or source.keyed else 2
            if samples is None and moments.draws >= least and moments.bias_se() <= standard_error:
                break
    return _summary(moments, source, converged=moments.bias_se() <= standard_error, paired=pair is not None)


def _exact(
    source: Source, reference: Rule | Sequence[Tensor] | None
) -> tuple[Tensor, Callable[[int], Tensor] | None]:
    if isinstance(reference, Sequence):
        exact, pair = source.flat(tuple(reference)), None
    else:
        require_rule(reference, "reference")
        twin = Source(source.step, lent_rule(reference, source.step), source.key)
        exact, pair = twin.draw(0), None
        if twin.phased:
            mend = "A learner has no backprop of its own: pass the exact gradient, one tensor per parameter."
            raise ArgumentError("reference", reference, "the exact gradient as tensors", mend)
        if twin.random and not torch.equal(exact, twin.draw(1)):
            pair = twin.draw
            for index in range(1, _LEAST):
                exact += (twin.draw(index) - exact) / (index + 1)
    if not bool(exact.any()):
        mend = (
            "Nothing can be compared with it: is the loss at a stationary point, or cut from the parameters?"
        )
        raise ArgumentError("reference", "a gradient of zeros", "an exact gradient that is not zero", mend)
    return exact, pair


def _check_reference(reference: object, parameters: Sequence[Tensor]) -> None:
    if reference is None or (isinstance(reference, Rule) and not isinstance(reference, type)):
        return
    if not isinstance(reference, Sequence) or isinstance(reference, str | Tensor):
        expected = "a rule such as thalweg.Backprop(), or one tensor per parameter"
        raise ArgumentTypeError("reference", reference, expected)
    if len(reference) != len(parameters):
        raise ArgumentError("reference", f"{len(reference)} tensors", f"{len(parameters)}, one per parameter")
    for index, (tensor, parameter) in enumerate(zip(reference, parameters)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"reference[{index}]", tensor, "a tensor")
        if tensor.shape != parameter.shape:
            raise ArgumentError(f"reference[{index}]", tensor, f"shape {tuple(parameter.shape)}")
    require_finite_all("reference", list(reference))


def _summary(moments: Moments, source: Source, *, converged: bool, paired: bool) -> Fidelity:
    names = source.layer_names()
    cosines, ratios = moments.by_layer()
    return Fidelity(
        cosine=moments.cosine(),
        norm_ratio=moments.norm_ratio(),
        bias=moments.bias(),
        bias_se=moments.bias_se(),
        squared_bias=moments.squared_bias(),
        variance=moments.variance(),
        draws=moments.draws,
        converged=converged,
        paired=paired,
        cosine_by_layer=dict(zip(names, cosines)),
        norm_ratio_by_layer=dict(zip(names, ratios)),
    )
