"""The tables of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p10_bidirectional_learning.judging import RADII

Results = Mapping[str, list[dict[str, Any]]]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation, or None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def attacked(found: Mapping[str, Any], attack: str, radius: float) -> float:
    """Accuracy in per cent under one attack."""
    return float(found["attacks"][attack][RADII.index(radius)])


def robustness(lab: Lab, title: str, results: Results, which: str) -> None:
    """Clean, noisy and attacked, and what speaks for a masked gradient."""

    def cell(rows: Sequence[Mapping[str, Any]], of: Any) -> float:
        return round(statistics.fmean(of(each[which]) for each in rows), 1)

    lab.table(
        title,
        [
            "net", "clean %", "noisy %", "random signs .3", "one step .3, published", "one step .3",
            "one step .3, margin", "many steps .3, margin", "many steps .1", "many steps .1, margin",
            "one step .3, logits x 1e4", "zero gradients %", "largest logit", "masked",
        ],
        [
            [
                name,
                cell(rows, lambda r: r["clean"]),
                cell(rows, lambda r: r["noisy"]),
                cell(rows, lambda r: r["random"]),
                cell(rows, lambda r: r["published"]),
                cell(rows, lambda r: attacked(r, "fgsm", 0.3)),
                cell(rows, lambda r: attacked(r, "fgsm-margin", 0.3)),
                cell(rows, lambda r: attacked(r, "pgd-margin", 0.3)),
                cell(rows, lambda r: attacked(r, "pgd", 0.1)),
                cell(rows, lambda r: attacked(r, "pgd-margin", 0.1)),
                cell(rows, lambda r: r["scaled"]["cross_entropy"]),
                cell(rows, lambda r: r["zero"]),
                cell(rows, lambda r: r["largest"]),
                f"{sum(bool(each[which]['signs']) for each in rows)} of {len(rows)}",
            ]
            for name, rows in results.items()
        ],
    )  # fmt: skip


def signs(lab: Lab, results: Results) -> None:
    """Why the report of a net says that its gradient is masked, first seed."""
    lab.table(
        "Signs of a masked gradient, first seed",
        ["net", "signs"],
        [[name, "; ".join(rows[0]["kept"]["signs"]) or "none"] for name, rows in results.items()],
    )
