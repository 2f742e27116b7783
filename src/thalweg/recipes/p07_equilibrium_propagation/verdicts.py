"""What the numbers of the run say about the paper's statements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from thalweg.lab import Claim
from thalweg.recipes.p07_equilibrium_propagation.exact import FORMS, UNFOLDED
from thalweg.recipes.p07_equilibrium_propagation.images_panel import CENTRED, POSITIVE, TRUNCATED
from thalweg.recipes.p07_equilibrium_propagation.mnist_panel import NUDGED_ROW
from thalweg.recipes.p07_equilibrium_propagation.routes import CENTERED, THROUGH_TIME, TWIN, TWIN_LONGER
from thalweg.recipes.p07_equilibrium_propagation.tables import Row, spread

TOLERANCE = 0.1
"""How far a measured slope may lie from its order."""
GEOMETRIC = -0.95
"""The largest correlation of log error and number of points that is called a straight line."""
THEOREM = "proved, Theorem 1 of arXiv 1602.05179"
HOLOMORPHIC = "proved, arXiv 2209.00530"
MNIST_EPOCHS, TEST_LIMIT, TRAIN_LIMIT = 5, 3.5, 1.5


def identity_claims(toys: Sequence[Row]) -> list[Claim]:
    """Exact statements: asserted at every size of a run, each by its worst seed."""
    orders = {"positive": 1, "negative": 1, "centered": 2}
    claims = []
    for form in FORMS:
        worst = _furthest([toy["slopes"][form] for toy in toys], orders[form])
        name = "centred" if form == "centered" else f"one-sided ({form})"
        claims.append(
            _slope_claim(f"{name} nudging: the error falls as the nudge", worst, orders[form], THEOREM)
        )
    for points in toys[0]["orders"]:
        worst = _furthest([toy["orders"][points] for toy in toys], int(points))
        statement = f"holomorphic nudging with {points} points: the error falls as the nudge"
        claims.append(_slope_claim(statement, worst, int(points), HOLOMORPHIC))
    line = max(toy["geometric"] for toy in toys)
    outside = min(error for toy in toys for error in toy["outside"])
    claims += [
        Claim(
            "holomorphic nudging: the error falls geometrically with the points (correlation of its "
            f"logarithm with them at most {GEOMETRIC})",
            HOLOMORPHIC,
            line,
            None,
            line <= GEOMETRIC,
        ),
        Claim(
            "outside of the radius of convergence no number of points helps (smallest error above 0.1)",
            None,
            outside,
            None,
            outside > 0.1,
        ),
    ]
    for index, (strength, limit) in enumerate(UNFOLDED):
        error = max(toy["unfolded"][index] for toy in toys)
        claims.append(
            Claim(
                "the k-th nudged step adds what the k-th step back of backprop through time adds: error over "
                f"12 steps at most {limit:g} at nudge {strength:g}",
                "proved, arXiv 1905.13633",
                error,
                None,
                error <= limit,
            )
        )
    for part in ("weights", "input"):
        worst = _furthest([toy["vjp_slopes"][part] for toy in toys], 2)
        statement = f"as a vector-Jacobian product, by the {part}: the error falls as the nudge"
        claims.append(_slope_claim(statement, worst, 2, None))
    unrolled = max(toy["unrolled"] for toy in toys)
    claims.append(
        Claim(
            "the implicit gradient is that of backprop through all steps (relative error)",
            None,
            unrolled,
            None,
            None,
            asserted=False,
        )
    )
    return claims


def digits_claims(rows: Sequence[Row], *, decisive: bool) -> list[Claim]:
    """One line of acceptance, and what the honest rows say."""
    by_name = {row["name"]: row for row in rows}
    claims = []
    for key, when in (
        ("accuracies", "at the epoch of least training loss"),
        ("lasts", "after the last epoch"),
    ):
        pairs = zip(by_name[CENTERED][key], by_name[THROUGH_TIME][key], strict=True)
        apart = [one - other for one, other in pairs]
        gap, asserted = abs(statistics.fmean(apart)), decisive and key == "accuracies"
        limit = " at most 1.5" if key == "accuracies" else ""
        claims.append(
            Claim(
                f"digits: centred nudging and backprop through time{limit} points apart {when}, "
                "mean over seeds",
                None,
                gap,
                spread(apart),
                gap <= 1.5 if asserted else None,
                asserted=asserted,
            )
        )
    claims += [
        Claim(
            f"digits: centred nudging ahead of {name}, in points",
            None,
            by_name[CENTERED]["accuracy"] - by_name[name]["accuracy"],
            None,
            None,
            asserted=False,
        )
        for name in (TWIN, TWIN_LONGER)
    ]
    claims += [
        Claim(
            f"digits, {row['name']}: test accuracy in per cent",
            None,
            row["accuracy"],
            row["spread"],
            None,
            asserted=False,
        )
        for row in rows
        if row["route"].control
    ]
    return claims


def mnist_claims(
    trained: Mapping[str, Sequence[Row]], data: str, epochs: int, hidden: int, *, decisive: bool
) -> list[Claim]:
    """The paper's experiment; asserted on all 60 000 digits and on nothing less."""
    decisive = decisive and data == "mnist" and epochs >= MNIST_EPOCHS and hidden >= 500
    where = "MNIST" if data == "mnist" else f"{data} (decided on all 60 000 digits of MNIST only)"
    claims = []
    for part, limit, holds, words in (
        ("test", TEST_LIMIT, lambda error: error <= TEST_LIMIT, "at most"),
        ("train", TRAIN_LIMIT, lambda error: error < TRAIN_LIMIT, "below"),
    ):
        check: Callable[[float], bool] = holds
        errors = [run[f"{part}_error"][min(epochs, MNIST_EPOCHS) - 1] for run in trained[NUDGED_ROW]]
        name = "test" if part == "test" else "training"
        paper = "2-3 % after 25 epochs" if part == "test" else "0.00 % after 25 epochs"
        claims.append(
            Claim(
                f"{where}, equilibrium propagation: {name} error {words} {limit} % after "
                f"{MNIST_EPOCHS} epochs",
                f"{paper} (recalled; the paper's table was not seen)",
                statistics.fmean(errors),
                spread(errors),
                check(statistics.fmean(errors)) if decisive else None,
                asserted=decisive,
            )
        )
    for name, results in trained.items():
        if name != NUDGED_ROW:
            errors = [run["test_error"][-1] for run in results]
            claims.append(
                Claim(
                    f"{where}, {name}: test error in per cent",
                    None,
                    statistics.fmean(errors),
                    spread(errors),
                    None,
                    asserted=False,
                )
            )
    return claims


def image_claims(results: Mapping[str, Row], *, decisive: bool) -> list[Claim]:
    """The lines of acceptance of the convolutional network."""
    error = {name: result["test_error"][-1] for name, result in results.items()}
    behind, ahead = error[CENTRED] - error[TRUNCATED], error[POSITIVE] - error[CENTRED]
    verdicts: list[tuple[str, str | None, float, bool]] = [
        (
            "images: centred nudging within 3 points of truncated backprop",
            "CIFAR-10: 88.5/88.7/88.1 % and 88.5/88.4/88.2 % (arXiv 2209.00530, 90 epochs)",
            behind,
            abs(behind) <= 3,
        ),
        (
            "images: centred nudging ahead of positive nudging",
            "11.7 % and 86 % test error on CIFAR-10 (arXiv 2006.03824)",
            ahead,
            ahead > 0,
        ),
    ]
    return [
        Claim(statement, paper, measured, None, holds if decisive else None, asserted=decisive)
        for statement, paper, measured, holds in verdicts
    ]


def _slope_claim(statement: str, slope: float, order: int, reported: str | None) -> Claim:
    power = "" if order == 1 else f" to the power {order}"
    text = f"{statement}{power} (slope within {TOLERANCE} of {order})"
    return Claim(text, reported, slope, None, abs(slope - order) <= TOLERANCE)


def _furthest(slopes: Sequence[float], order: int) -> float:
    return max(slopes, key=lambda slope: abs(slope - order))
