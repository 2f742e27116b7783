"""How far a field is from being a gradient at each noise level, beside the floor of rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating, require_integer
from thalweg.flows.field import Field
from thalweg.flows.jacobian_asymmetry import jacobian_asymmetry
from thalweg.flows.line_integrals import circulation
from thalweg.flows.prediction import Kind
from thalweg.flows.vector_field import require_independent_examples, state_and_times, vector_field
from thalweg.noise import Key, normal
from thalweg.step import draw_key
from thalweg.table import align

_WHOLE = 64
_ROUNDING = 100.0
_CLEAR = 100.0


@dataclass(frozen=True, slots=True)
class LevelConservativity:
    """One noise level of a `ConservativityReport`.

    Args:
        t: the time.
        asymmetry: |(J - J^T) / 2|^2 / |J|^2, a ratio of means: 0 for a gradient, 1 for a rotation.
        error: its standard error.
        floor: what rounding alone leaves, measured on the reference or estimated from the precision.
        circulation: by radius, the ratio of the sums of |integral| around loops and of the norm along them.
        verdict: "not a gradient" where the asymmetry is 100 times the floor and 5 standard errors, "symmetric
            to rounding" where it is at most 10 times the floor, else "undecided".
    """

    t: float
    asymmetry: float
    error: float
    floor: float
    circulation: Mapping[float, float]
    verdict: str


@dataclass(frozen=True, slots=True)
class ConservativityReport:
    """What `conservativity_report` found; printed as a table.

    Args:
        levels: one per time.
        method: how the Jacobian was looked at.
        kind: which prediction.
    """

    levels: tuple[LevelConservativity, ...]
    method: str
    kind: str

    def __str__(self) -> str:
        radii = list(self.levels[0].circulation)
        head = ["t", "asymmetry", "error", "floor", *(f"around r={radius:g}" for radius in radii), "verdict"]
        rows = [
            [
                f"{level.t:.3g}",
                *(f"{value:.2e}" for value in (level.asymmetry, level.error, level.floor)),
                *(f"{level.circulation[radius]:.2e}" for radius in radii),
                level.verdict,
            ]
            for level in self.levels
        ]
        return align(head, rows)


def conservativity_report(
    field: Field,
    data: Tensor,
    times: Sequence[float],
    *,
    reference: Field | None = None,
    states: Tensor | None = None,
    kind: Kind = "score",
    coordinates: Sequence[int] | None = None,
    probes: int = 8,
    planes: int = 4,
    radius: Sequence[float] = (0.1, 0.5),
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> ConservativityReport:
    """Certify how conservative a field is, level by level: choose it before using it as an energy.

    The Jacobian is taken whole up to 64 features, else by `probes` random probes, or on `coordinates` only.
    What it finds says nothing of samples: asymmetry that carries no density is harmless, see `gauged`.

    Args:
        field: the field.
        data: (batch, ...), noised at each time; a few hundred examples.
        times: in (0, 1).
        reference: a field known to be a gradient, such as the exact one, on which the floor of rounding is
            measured at the same points; None takes (100 eps)^2.
        states: the points themselves in place of noised data, (times, batch, ...): those of generated
            trajectories, where networks err more.
        kind: which prediction.
        coordinates: of the flattened features. Symmetry there is necessary, not sufficient.
        probes: of the estimate above 64 features.
        planes: random loops per point.
        radius: of the loops, in units of x; empty for none.
        conditions: handed to the network.
        key: names all draws; None takes a fresh one.

    Raises:
        ArgumentError: examples that act on each other; other wrong arguments.

    Paper:
        Vuong, McCann, Santos, Lin: Are We Really Learning the Score Function? TMLR 2025, arXiv 2509.00336.

    Example:
        >>> from thalweg.flows import Straight
        >>> turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        >>> field = Field(lambda x, t: x @ turn, Straight(), "noise")
        >>> report = conservativity_report(field, torch.randn(8, 2), [0.5], key=Key(0))
        >>> report.levels[0].asymmetry, report.levels[0].verdict
        (0.5, 'not a gradient')
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    if reference is not None and not isinstance(reference, Field):
        raise ArgumentTypeError("reference", reference, "a thalweg.flows.Field, or None")
    require_integer("planes", planes, 1)
    key = draw_key() if key is None else key
    points = _points(field, data, times, states, key)
    first, first_times = state_and_times(points[0], float(times[0]))
    require_independent_examples("field", vector_field(field, kind, conditions), first, first_times)
    whole = coordinates is not None or points[0][0].numel() <= _WHOLE
    method = "exact" if whole else "hutchinson"
    options: dict[str, Any] = {"kind": kind, "method": method, "probes": probes, "conditions": conditions}
    options["coordinates"] = coordinates
    levels = []
    for index, (t, x) in enumerate(zip(times, points)):
        here = key.at(step=key.step + index, call=1)
        # with the same probes on both, so that the floor is that of this measurement
        with torch.no_grad():
            found = jacobian_asymmetry(field, x, t, key=here, **options)
            floor = (_ROUNDING * torch.finfo(x.dtype).eps) ** 2
            if reference is not None:
                floor = float(jacobian_asymmetry(reference, x, t, key=here, **options).ratio)
            around = {
                float(r): _around(field, x, t, r, planes, kind, conditions, here.at(call=2)) for r in radius
            }
        ratio, error = float(found.ratio), float(found.standard_error)
        levels.append(
            LevelConservativity(float(t), ratio, error, floor, around, _verdict(ratio, error, floor))
        )
    words = "whole" if method == "exact" else f"{probes} probes"
    if coordinates is not None:
        words = f"{len(coordinates)} coordinates"
    return ConservativityReport(tuple(levels), words, kind)


def _points(
    field: Field, data: Tensor, times: Sequence[float], states: Tensor | None, key: Key
) -> list[Tensor]:
    if not isinstance(times, Sequence) or not times:
        raise ArgumentError("times", times, "at least one time in (0, 1)")
    if states is not None:
        if require_floating("states", states).shape[:1] != (len(times),):
            raise ArgumentError(
                "states", states, f"states for each of {len(times)} times, (times, batch, ...)"
            )
        return list(states.detach())
    state_and_times(data, float(times[0]))
    noises = (normal(data, key.at(step=key.step + index, call=0)) for index in range(len(times)))
    return [field.path.noised(data.detach(), noise, float(t)) for t, noise in zip(times, noises)]


def _around(
    field: Field, x: Tensor, t: float, radius: float, planes: int, kind: Kind, conditions: Any, key: Key
) -> float:
    found = circulation(field, x, t, radius=radius, planes=planes, kind=kind, conditions=conditions, key=key)
    return float(found.integral.abs().sum() / found.length.sum())


def _verdict(ratio: float, error: float, floor: float) -> str:
    if ratio <= 10 * floor:
        return "symmetric to rounding"
    # the error of a single example is not known
    clear = ratio > _CLEAR * floor and not ratio <= 5 * error
    return "not a gradient" if clear else "undecided"
