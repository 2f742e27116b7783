"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p15_zeroth_order.mezo import recovered
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


def mezo(lab: Lab, found: Results, memory: Sequence[Mapping[str, int]]) -> None:
    """Losses of fine-tuning, what was recovered of Adam's drop, and bytes of a step."""
    rows = []
    for name, shares in recovered(found).items():
        results = found[name]
        start, final = (statistics.fmean(each[key] for each in results) for key in ("start", "final"))
        row = [name, results[0]["learned"], results[0]["evaluations"], round(start, 3), round(final, 3)]
        rows.append([*row, round(start - final, 3), round(statistics.fmean(shares), 1), results[0]["sample"]])
    columns = ["row", "weights that learn", "forward evaluations", "test loss before", "after", "drop"]
    columns += ["% of Adam's drop from the pretrained start", "what it writes (first seed)"]
    lab.table("A new way of writing, losses in nats a letter: mean over seeds", columns, rows)
    columns = ["batch", "length", "inference", "MeZO", "backprop"]
    lab.table(
        "Bytes of the weights and of the peak beside them",
        columns,
        [[row[column] for column in columns] for row in memory],
    )


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
