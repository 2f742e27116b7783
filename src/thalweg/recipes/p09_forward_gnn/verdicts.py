"""What the numbers of the run say about the paper's statements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Claim
from thalweg.recipes.p09_forward_gnn.links_panel import FORWARD, NORMALIZED, PLAIN
from thalweg.recipes.p09_forward_gnn.routes import (
    APPENDED,
    BACKPROP,
    DENSE,
    DENSE_NORMALIZED,
    SINGLE,
    VIRTUAL,
)
from thalweg.recipes.p09_forward_gnn.tables import spread

Results = Mapping[str, list[dict[str, Any]]]
ON_PAR = "on par with backprop or better on five graphs (abstract)"
BELOW_BACKPROP, ABOVE_FEATURES, ABOVE_LINKS, FLAT, LINEAR = 1.5, 5.0, 0.01, 0.1, 0.99
ROUNDING = 1e-10


def identity_claims(found: Sequence[Mapping[str, float]]) -> list[Claim]:
    """Exact statements: asserted at every size of a run, each by its worst seed."""
    statements = {
        "one layer": "one layer alone learns step for step as from its loss differentiated as usual",
        "cache": "a kept aggregate changes nothing",
        "leak": "labels that are not known change nothing",
        "locality": "the second layer's loss gives the first layer no gradient",
    }
    claims = []
    for name, statement in statements.items():
        worst = max(each[name] for each in found)
        claims.append(
            Claim(f"{statement} (largest deviation below {ROUNDING:g})", None, worst, None, worst < ROUNDING)
        )
    return claims


def node_claims(title: str, results: Results, *, decisive: bool) -> list[Claim]:
    """Single forward beside backprop and beside the features alone."""
    margins = _gaps(results, SINGLE, BACKPROP, "accuracy")
    gains = _gaps(results, SINGLE, DENSE, "accuracy")
    hardest = max((DENSE, DENSE_NORMALIZED), key=lambda name: _mean(results, name, "validation"))
    tuned = _gaps(results, SINGLE, hardest, "accuracy")
    first = [each["accuracy"] - each["first"] for each in results[SINGLE]]
    claims = [
        _claim(
            f"{title}: single forward at most {BELOW_BACKPROP:g} points below backprop (difference)",
            ON_PAR,
            margins,
            -BELOW_BACKPROP,
            decisive,
        ),
        _claim(
            f"{title}: single forward at least {ABOVE_FEATURES:g} points above the features alone",
            None,
            gains,
            ABOVE_FEATURES,
            decisive,
        ),
        _shown(f"{title}: single forward above the features alone, the way that validates better", tuned),
        _shown(f"{title}: all layers of single forward above the first alone", first),
    ]
    claims += [
        _shown(f"{title}, {name}: accuracy %", [each["accuracy"] for each in found])
        for name, found in results.items()
        if name.startswith("control")
    ]
    return claims


def variant_claims(title: str, results: Results, *, decisive: bool) -> list[Claim]:
    """Single forward against forward-forward: accuracy and time."""
    best = max((APPENDED, VIRTUAL), key=lambda name: _mean(results, name, "accuracy"))
    gains = _gaps(results, SINGLE, best, "accuracy")
    ratio = _mean(results, SINGLE, "seconds") / min(
        _mean(results, name, "seconds") for name in (APPENDED, VIRTUAL)
    )
    claims = [
        _claim(
            f"{title}: single forward at least as accurate as the better forward-forward (difference)",
            "single forward ahead of forward-forward (abstract)",
            gains,
            0.0,
            decisive,
        ),
        Claim(
            f"{title}: single forward trains faster than forward-forward (ratio of times to the faster)",
            "one graph a step instead of one for each class",
            ratio,
            None,
            ratio < 1 if decisive else None,
            decisive,
        ),
    ]
    return claims + [
        _shown(f"{title}, {name}: accuracy %", [each["accuracy"] for each in found])
        for name, found in results.items()
        if name not in (SINGLE, BACKPROP)
    ]


def link_claims(title: str, results: Results, *, decisive: bool) -> list[Claim]:
    """Forward learning of links beside backprop with the same normalisation."""
    gains = _gaps(results, FORWARD, NORMALIZED, "area")
    return [
        _claim(
            f"{title}, links: area of forward learning at least {ABOVE_LINKS:g} above backprop with inputs "
            "of unit length",
            ON_PAR,
            gains,
            ABOVE_LINKS,
            decisive,
        ),
        _shown(
            f"{title}, links: area of forward learning above plain backprop, which does not normalise",
            _gaps(results, FORWARD, PLAIN, "area"),
        ),
        *(
            _shown(f"{title}, links, {name}: area", [e["area"] for e in rows])
            for name, rows in results.items()
        ),
    ]


def memory_claims(
    title: str, depths: Sequence[int], kept: Mapping[str, Sequence[int]], *, decisive: bool
) -> list[Claim]:
    """Flat for forward learning, a straight line for backprop."""
    flat = max(kept[SINGLE]) / min(kept[SINGLE]) - 1
    line = statistics.correlation([float(depth) for depth in depths], [float(b) for b in kept[BACKPROP]])
    growth = kept[BACKPROP][-1] / kept[BACKPROP][0]
    return [
        Claim(
            f"{title}: what single forward keeps for backward is flat in depth (change below {FLAT:g})",
            "lower memory than backprop (abstract)",
            flat,
            None,
            flat <= FLAT if decisive else None,
            decisive,
        ),
        Claim(
            f"{title}: what backprop keeps grows in a line with depth (correlation at least {LINEAR:g})",
            None,
            line,
            None,
            line >= LINEAR and growth > 1 if decisive else None,
            decisive,
        ),
        _shown(
            f"{title}: bytes kept at {depths[-1]} layers, backprop over single forward",
            [kept[BACKPROP][-1] / kept[SINGLE][-1]],
        ),
    ]


def _mean(results: Results, name: str, key: str) -> float:
    return statistics.fmean(each[key] for each in results[name])


def _gaps(results: Results, one: str, other: str, key: str) -> list[float]:
    return [a[key] - b[key] for a, b in zip(results[one], results[other], strict=True)]


def _claim(statement: str, reported: str | None, values: list[float], least: float, decisive: bool) -> Claim:
    found = statistics.fmean(values)
    holds = found >= least if decisive else None
    return Claim(statement, reported, found, spread(values), holds, decisive)


def _shown(statement: str, values: list[float]) -> Claim:
    return Claim(statement, None, statistics.fmean(values), spread(values), asserted=False)
