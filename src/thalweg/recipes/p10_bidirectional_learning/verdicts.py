"""What the numbers of the run say about the paper's statements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Claim
from thalweg.recipes.p10_bidirectional_learning.routes import BACKPROP, BOTH
from thalweg.recipes.p10_bidirectional_learning.tables import attacked, spread

Results = Mapping[str, list[dict[str, Any]]]
GAIN, LEFT = 25.0, 5.0
ROUNDING = 1e-10
PUBLISHED = "60.1 against 4.2, no bias (appendix, table 1)"


def identity_claims(found: Sequence[Mapping[str, float]]) -> list[Claim]:
    """Exact statements: asserted at every size of a run, each by its worst seed."""
    statements = {
        "zero": "an attack of radius 0 changes no answer",
        "worst case": "one step on the margin is the worst case of a linear net in closed form",
        "scale": "attacks on the margin do not see the scale of the logits",
        "tied": "the backward direction is the transpose of the forward one, after a step of each",
    }
    claims = []
    for name, statement in statements.items():
        worst = max(each[name] for each in found)
        claims.append(
            Claim(f"{statement} (largest deviation below {ROUNDING:g})", None, worst, None, worst < ROUNDING)
        )
    return claims


def linear_claims(data: str, results: Results, *, decisive: bool) -> list[Claim]:
    """The published effect, and what is left of it under attacks on the margin."""
    both, backprop = ([each["kept"] for each in results[name]] for name in (BOTH, BACKPROP))
    gains = [attacked(a, "fgsm", 0.3) - attacked(b, "fgsm", 0.3) for a, b in zip(both, backprop, strict=True)]
    claims = [
        _claim(
            f"{data}, linear: under the one-step attack of 0.3 on the cross-entropy, bidirectional is at "
            f"least {GAIN:g} points above backprop",
            PUBLISHED,
            gains,
            statistics.fmean(gains) >= GAIN,
            decisive,
        )
    ]
    for name, rows in ((BOTH, both), (BACKPROP, backprop)):
        values = [attacked(each, "fgsm-margin", 0.3) for each in rows]
        claims.append(
            _claim(
                f"{data}, {name}: the same step on the margin leaves at most {LEFT:g} %: the gain was a "
                "masked gradient",
                None,
                values,
                statistics.fmean(values) <= LEFT,
                decisive,
            )
        )
    small = [attacked(a, "pgd-margin", 0.1) - attacked(b, "pgd-margin", 0.1) for a, b in zip(both, backprop)]
    claims += [
        _shown(
            f"{data}, linear: many steps of 0.1 on the margin, bidirectional above backprop, points", small
        ),
        *(
            _shown(
                f"{data}, {name}: many steps of 0.1 on the margin, accuracy %",
                [attacked(e, "pgd-margin", 0.1) for e in rows],
            )
            for name, rows in ((BOTH, both), (BACKPROP, backprop))
        ),
        _shown(
            f"{data}, {BOTH}: share of runs whose gradient the report calls masked",
            [float(bool(each["signs"])) for each in both],
        ),
        _shown(
            f"{data}, control: {BACKPROP} with logits x 1e4: accuracy under the one-step attack, %",
            [each["scaled"]["cross_entropy"] for each in backprop],
        ),
    ]
    return claims + noise_claims(data, results)


def noise_claims(data: str, results: Results) -> list[Claim]:
    """What every net reaches on clean and on noisy images, and under the published attack."""
    return [
        _shown(f"{data}, {name}: {what} accuracy %", [each["kept"][key] for each in rows])
        for name, rows in results.items()
        for key, what in (("clean", "clean"), ("noisy", "noisy"), ("published", "published attack's"))
    ]


def _claim(statement: str, reported: str | None, values: list[float], holds: bool, decisive: bool) -> Claim:
    found = statistics.fmean(values)
    return Claim(statement, reported, found, spread(values), holds if decisive else None, decisive)


def _shown(statement: str, values: list[float]) -> Claim:
    return Claim(statement, None, statistics.fmean(values), spread(values), asserted=False)
