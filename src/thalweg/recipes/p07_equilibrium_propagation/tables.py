"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p07_equilibrium_propagation.exact import FORMS, STRENGTHS
from thalweg.recipes.p07_equilibrium_propagation.routes import Route

Row = dict[str, Any]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation, or None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def rounded(value: float | None, digits: int = 2) -> float | None:
    """For a table's cell, which may be empty."""
    return None if value is None else round(value, digits)


def identities(lab: Lab, toys: Sequence[Row]) -> None:
    """Error by form and strength, mean over the seeds' networks."""
    rows = []
    for form in FORMS:
        errors = [statistics.fmean(toy["bias"][form][i] for toy in toys) for i in range(len(STRENGTHS))]
        slope = statistics.fmean(toy["slopes"][form] for toy in toys)
        rows.append([form, *(float(f"{error:.2g}") for error in errors), round(slope, 3)])
    lab.table(
        "Toy network: relative error against the implicit gradient, by strength of the nudge",
        ["form", *map(str, STRENGTHS), "slope"],
        rows,
    )


def digits_row(route: Route, results: Sequence[Row]) -> Row:
    """Accuracy over seeds, and the cost of a step, which is the same on all."""
    accuracies, first = [each["accuracy"] for each in results], results[0]
    return {
        "name": route.name,
        "route": route,
        "accuracy": statistics.fmean(accuracies),
        "accuracies": accuracies,
        "lasts": [each["last_accuracy"] for each in results],
        "spread": spread(accuracies),
        "loss": statistics.fmean(min(each["loss"]) for each in results),
        "operations": first["operations"],
        "kept": first["kept"],
        "epochs": first["epochs"],
        "steps": first["steps"],
    }


def digits(lab: Lab, rows: Sequence[Row]) -> None:
    """What every route reaches on the small digits, and what its steps cost."""
    lab.table(
        "Digits, 64-128-10: mean over seeds, and the cost of one step. Complex products count as one, "
        "and an implicit gradient takes as many as its solve needs, here at the first batch. Learners add "
        "their gradients up themselves: these count as kept",
        [
            "route",
            "test accuracy %",
            "± sd",
            "after the last epoch %",
            "± sd",
            "least training loss",
            "operations, M",
            "kept for backward, kB",
            "epochs",
        ],
        [
            [
                row["name"],
                rounded(row["accuracy"]),
                rounded(row["spread"]),
                rounded(statistics.fmean(row["lasts"])),
                rounded(spread(row["lasts"])),
                rounded(row["loss"], 4),
                rounded(row["operations"] / 1e6),
                rounded(row["kept"] / 1e3, 1),
                row["epochs"],
            ]
            for row in rows
        ],
    )


def mnist(lab: Lab, trained: Mapping[str, Sequence[Row]], data: str) -> None:
    """Errors of the last epoch."""
    rows = []
    for name, results in trained.items():
        test, train = ([each[f"{part}_error"][-1] for each in results] for part in ("test", "train"))
        first = results[0]
        rows.append(
            [
                name,
                rounded(statistics.fmean(test)),
                rounded(spread(test)),
                rounded(statistics.fmean(train)),
                rounded(first["operations"] / 1e6, 1),
                rounded(first["kept"] / 1e3, 1),
                first["epochs"],
            ]
        )
    lab.table(
        f"{data}: error after the last epoch, mean over {len(next(iter(trained.values())))} seed(s), and the "
        "cost of one step. Nudging adds its gradients up itself: these count as kept",
        [
            "route",
            "test error %",
            "± sd",
            "training error %",
            "operations, M",
            "kept for backward, kB",
            "epochs",
        ],
        rows,
    )


def images(lab: Lab, results: Mapping[str, Row], data: str) -> None:
    """Test error by epoch of the convolutional network."""
    epochs = len(next(iter(results.values()))["test_error"])
    lab.table(
        f"Convolutions on {data}: test error in per cent by epoch",
        ["route", *(str(epoch + 1) for epoch in range(epochs))],
        [[name, *(round(error, 2) for error in result["test_error"])] for name, result in results.items()],
    )
