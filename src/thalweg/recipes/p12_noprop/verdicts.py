"""What the numbers of the run say about the paper's statements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Claim
from thalweg.recipes.p12_noprop.routes import BLOCK, CONTINUOUS, DISCRETE, FLOW, MLP, SHUFFLED, STACK
from thalweg.recipes.p12_noprop.tables import spread

Results = Mapping[str, list[dict[str, Any]]]
ROUNDING = 1e-9
LEAST = {DISCRETE: 95.0, FLOW: 95.0, CONTINUOUS: 90.0}
CHANCE, BELOW_MLP, BELOW_BLOCK, ABOVE_STACK, SHARE = 20.0, 2.5, 1.5, 10.0, 1 / 3
PUBLISHED = {
    DISCRETE: "99.47 on MNIST (Table 1)",
    CONTINUOUS: "97.84 on MNIST (Table 1)",
    FLOW: "99.21 on MNIST (Table 1)",
}


def identity_claims(found: Sequence[Mapping[str, float]]) -> list[Claim]:
    """Exact statements: asserted at every size of a run, each by its worst seed."""
    statements = {
        "levels": "a step keeps mean, variance and divergence of the noisy label",
        "locality": "one block's loss gives the others no gradient",
        "order": "the order in which blocks learn changes nothing",
        "oracle": "blocks that know the label lead to its point",
    }
    claims = []
    for name, statement in statements.items():
        worst = max(each[name] for each in found)
        claims.append(
            Claim(f"{statement} (largest deviation below {ROUNDING:g})", None, worst, None, worst < ROUNDING)
        )
    return claims


def digits_claims(results: Results, *, decisive: bool) -> list[Claim]:
    """Accuracies, chance, and the plain network beside them."""
    claims = [
        _claim(
            f"digits, {name}: test accuracy at least {least:g} %",
            PUBLISHED[name],
            _values(results, name),
            decisive,
            lambda found, least=least: found >= least,
        )
        for name, least in LEAST.items()
    ]
    claims += [
        _claim(
            f"digits, control: images shuffled: test accuracy at most {CHANCE:g} %",
            None,
            _values(results, SHUFFLED),
            decisive,
            lambda found: found <= CHANCE,
        ),
        _claim(
            f"digits, discrete: at most {BELOW_MLP:g} points below a plain network trained by backprop",
            "99.47 against 99.46 of the same blocks on MNIST (Table 1)",
            _gaps(results, DISCRETE, "accuracy", MLP),
            decisive,
            lambda found: found >= -BELOW_MLP,
        ),
        _shown(
            "digits, discrete: all blocks above the first alone, points",
            [each["accuracy"] - each["first"] for each in results[DISCRETE]],
        ),
        _shown("digits, discrete: first block alone, accuracy %", _values(results, DISCRETE, "first")),
        _shown("digits, discrete: without noise, accuracy %", _values(results, DISCRETE, "quiet")),
    ]
    named = {*LEAST, SHUFFLED}
    return claims + [
        _shown(f"digits, {name}: accuracy %", _values(results, name)) for name in results if name not in named
    ]


def image_claims(title: str, results: Results, *, decisive: bool) -> list[Claim]:
    """Beside one block and beside the same blocks trained end to end."""
    return [
        _claim(
            f"{title}: discrete without noise at most {BELOW_BLOCK:g} points below one block of backprop",
            None,
            _gaps(results, DISCRETE, "quiet", BLOCK),
            decisive,
            lambda found: found >= -BELOW_BLOCK,
        ),
        _claim(
            f"{title}: discrete at least {ABOVE_STACK:g} points above the same blocks trained end to end for "
            "as few epochs (that network is slow to start, not bad)",
            "99.47 against 99.46 after 100 epochs (Table 1)",
            _gaps(results, DISCRETE, "accuracy", STACK),
            decisive,
            lambda found: found >= ABOVE_STACK,
        ),
        _shown(f"{title}, discrete: accuracy %", _values(results, DISCRETE)),
        _shown(f"{title}, discrete: without noise, accuracy %", _values(results, DISCRETE, "quiet")),
        _shown(f"{title}, discrete: first block alone, accuracy %", _values(results, DISCRETE, "first")),
        _shown(f"{title}, {BLOCK}: accuracy %", _values(results, BLOCK)),
        _shown(f"{title}, {STACK}: accuracy %", _values(results, STACK)),
    ]


def memory_claims(depths: Sequence[int], kept: Mapping[str, Sequence[int]], *, decisive: bool) -> list[Claim]:
    """What a step keeps, at the largest depth."""
    share = kept[DISCRETE][-1] / kept[STACK][-1]
    return [
        Claim(
            f"images, {depths[-1]} blocks: a step keeps at most a third of what backprop through all keeps",
            "0.49 against 0.87 GB of GPU memory on MNIST (Table 2)",
            share,
            None,
            share <= SHARE if decisive else None,
            decisive,
        ),
        _shown(
            "images: growth of what a step keeps, from the fewest to the most blocks",
            [kept[DISCRETE][-1] / kept[DISCRETE][0] - 1],
        ),
    ]


def _values(results: Results, name: str, key: str = "accuracy") -> list[float]:
    return [each[key] for each in results[name]]


def _gaps(results: Results, one: str, key: str, other: str) -> list[float]:
    return [a[key] - b["accuracy"] for a, b in zip(results[one], results[other], strict=True)]


def _claim(statement: str, reported: str | None, values: list[float], decisive: bool, holds: Any) -> Claim:
    found = statistics.fmean(values)
    return Claim(
        statement, reported, found, spread(values), bool(holds(found)) if decisive else None, decisive
    )


def _shown(statement: str, values: list[float]) -> Claim:
    return Claim(statement, None, statistics.fmean(values), spread(values), asserted=False)
