"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab

Results = Mapping[str, list[dict[str, Any]]]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation, or None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def accuracies(lab: Lab, title: str, results: Results) -> None:
    """As published, without noise on the way, and the first block alone."""

    def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if values[0] is None else round(statistics.fmean(values), 2)

    lab.table(
        f"{title}: test accuracy %, mean over seeds and over five draws each",
        ["route", "as published", "± sd", "without noise", "first block alone", "steps of each block"],
        [
            [
                name,
                mean(rows, "accuracy"),
                None if len(rows) < 2 else round(statistics.stdev(r["accuracy"] for r in rows), 2),
                mean(rows, "quiet"),
                mean(rows, "first"),
                rows[0]["steps"],
            ]
            for name, rows in results.items()
        ],
    )


def memory(lab: Lab, depths: Sequence[int], kept: Mapping[str, Sequence[int]]) -> None:
    """Bytes by depth."""
    lab.table(
        "Images: MB kept at once for backward, by number of blocks",
        ["route", *(str(depth) for depth in depths)],
        [[name, *(round(each / 1e6, 2) for each in found)] for name, found in kept.items()],
    )
