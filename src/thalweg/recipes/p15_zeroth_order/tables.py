"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p15_zeroth_order.orders import after

Results = Mapping[str, Sequence[Mapping[str, Any]]]


def orders(lab: Lab, found: Results, costs: Mapping[str, Mapping[str, int]], steps: int) -> None:
    """Test accuracy at equal steps, evaluations and operations, beside what a step takes."""
    exact = costs["backprop"]
    rows = []
    for name, results in found.items():
        cost = costs[name]
        calls = steps * exact["evaluations"] / cost["evaluations"]
        work = steps * exact["operations"] / cost["operations"]
        final = [each["accuracy"] for each in results]
        rows.append(
            [
                name,
                results[0]["learning_rate"],
                round(statistics.fmean(final), 2),
                round(statistics.stdev(final), 2) if len(final) > 1 else None,
                round(statistics.fmean(after(each, calls) for each in results), 2),
                round(statistics.fmean(after(each, work) for each in results), 2),
                cost["evaluations"],
                cost["operations"],
                cost["saved_bytes"],
                cost["peak_bytes"],
            ]
        )
    columns = ["row", "step size", f"test % after {steps} steps", "± sd"]
    columns += ["at backprop's evaluations", "at backprop's operations"]
    columns += ["evaluations a step", "operations a step", "bytes kept for backward", "peak bytes"]
    lab.table("Digits, 64-64-10, 4736 weights: mean over seeds", columns, rows)


def objective(lab: Lab, found: Results) -> None:
    """Wrong answers of the training batch and test accuracy, before and after."""
    rows = []
    for name, results in found.items():
        row: list[Any] = [name]
        for key, factor in (("zero_one", 100), ("test", 1)):
            row += [
                round(factor * statistics.fmean(each[when][key] for each in results), 2)
                for when in ("before", "after")
            ]
        rows.append([*row, results[0]["learning_rate"], results[0]["evaluations"]])
    columns = ["row", "wrong on the training batch % before", "after", "test % before", "after"]
    lab.table(
        "An objective without a derivative: mean over seeds", [*columns, "step size", "evaluations"], rows
    )
