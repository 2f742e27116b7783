"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p09_forward_gnn.routes import mean

Results = Mapping[str, list[dict[str, Any]]]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation, or None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def nodes(lab: Lab, title: str, results: Results) -> None:
    """Accuracy and cost of every row on one graph."""
    lab.table(
        f"{title}: accuracy on test nodes, mean over seeds, each with a split of its own; a step moves all "
        "layers once, and bytes are the most kept at once for backward",
        [
            "route",
            "test accuracy %",
            "± sd",
            "first layer alone %",
            "seconds of training",
            "steps",
            "operations of a step, M",
            "kept, MB",
        ],
        [
            [
                name,
                _rounded(mean(found, "accuracy")),
                _rounded(spread([each["accuracy"] for each in found])),
                _rounded(mean(found, "first")),
                _rounded(mean(found, "seconds")),
                round(statistics.fmean(each["steps"] for each in found)),
                round(found[0]["operations"] / 1e6, 1),
                round(found[0]["kept"] / 1e6, 1),
            ]
            for name, found in results.items()
        ],
    )


def links(lab: Lab, title: str, results: Results) -> None:
    """The area under the curve of every row."""
    lab.table(
        f"{title}, links: area under the ROC curve of test pairs, mean over seeds",
        ["route", "test area", "± sd", "first layer alone", "steps"],
        [
            [
                name,
                _rounded(mean(found, "area"), 4),
                _rounded(spread([each["area"] for each in found]), 4),
                _rounded(mean(found, "first"), 4),
                round(statistics.fmean(each["steps"] for each in found)),
            ]
            for name, found in results.items()
        ],
    )


def memory(lab: Lab, title: str, depths: Sequence[int], kept: Mapping[str, Sequence[int]]) -> None:
    """Bytes by depth."""
    lab.table(
        f"{title}: MB kept at once for backward, by number of layers",
        ["route", *(str(depth) for depth in depths)],
        [[name, *(round(each / 1e6, 2) for each in found)] for name, found in kept.items()],
    )


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)
