"""The picture of a comparison: what a trained network is worth against what its gradient costs."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from thalweg.comparison.rows import Row
from thalweg.errors import MissingExtraError
from thalweg.table import scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")


def accuracy_against_cost(rows: Collection[Row], controls: Collection[str]) -> Figure:
    """Draw accuracy against bytes kept for backward, and against forward evaluations a step.

    Args:
        rows: the comparison; rows without an accuracy are left out.
        controls: names of the rows that are there to be beaten; drawn hollow.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "recipes") from None
    shown = [row for row in rows if row.accuracy is not None]
    networks = list(dict.fromkeys(row.network for row in shown))
    styles = dict(zip(networks, zip(_COLOURS, _MARKERS)))
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for panel, field, label in (
        (left, "saved_bytes", "kept for the backward pass"),
        (right, "evaluations", "forward evaluations a step"),
    ):
        points = [(getattr(row, field), row) for row in shown if getattr(row, field) is not None]
        for value, row in points:
            _point(panel, value, row, *styles[row.network], hollow=row.route in controls)
        _scale(panel, [value for value, _ in points], "B" if field == "saved_bytes" else "")
        panel.set_xlabel(label)
        panel.set_ylim(0, 103)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        _name_points(panel, points)
    left.set_ylabel("test accuracy (%)")
    for network, (colour, marker) in styles.items():
        left.plot([], [], marker, color=colour, label=f"{network} network")
    left.plot([], [], "o", color="#555555", markerfacecolor="none", label="control")
    figure.legend(frameon=False, loc="outside upper left", ncols=len(networks) + 1)
    return figure


def error_against_bytes(rows: Collection[Any]) -> Figure:
    """Draw the error of each policy's gradient against the bytes it keeps and the most it holds.

    Args:
        rows: rows with `error`, `saved_bytes` and `peak_bytes`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "recipes") from None
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    panel = figure.subplots()
    floor = 1e-8
    shown = [row for row in rows if row.error is not None]
    for index, row in enumerate(shown):
        colour, marker = _COLOURS[index % len(_COLOURS)], "os^DvP*X<>"[index % 10]
        height = max(row.error, floor)
        panel.plot([row.saved_bytes, row.peak_bytes], [height, height], "-", color=colour, lw=1, alpha=0.6)
        panel.plot(row.saved_bytes, height, marker, color=colour, markersize=9, label=row.route)
        panel.plot(row.peak_bytes, height, "|", color=colour, markersize=12)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("bytes: kept for the backward pass (marker), most held at one time (bar)")
    panel.set_ylabel("relative error of the gradient (1e-8: equal bits)")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _scale(panel: Axes, values: list[float], unit: str) -> None:
    """A logarithmic axis that has room for zero, ticked at 1, 2, 5 and 10, or where the only values are."""
    positive = [value for value in values if value > 0]
    if not positive:
        panel.set_xticks([0.0] if values else [], [scaled(0.0, unit)] if values else [])
        panel.set_xlim(-1, 5)
        return
    if min(values) > 0:
        panel.set_xscale("log")
    else:
        panel.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    powers = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
    low, high = min(positive), max(positive)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    # nothing round between values that are all alike
    shown = shown or [low]
    shown = ([] if min(values) > 0 else [0.0]) + shown
    panel.set_xticks(shown, [scaled(tick, unit) for tick in shown])
    panel.minorticks_off()
    first = -0.15 * low if min(values) <= 0 else low / 1.4
    panel.set_xlim(first, high * 1.4)


def _point(panel: Axes, value: float, row: Row, colour: str, marker: str, *, hollow: bool) -> None:
    assert row.accuracy is not None
    panel.errorbar(
        value,
        100 * row.accuracy,
        yerr=100 * (row.accuracy_sd or 0.0),
        fmt=marker,
        color=colour,
        markerfacecolor="none" if hollow else colour,
        markersize=8,
        capsize=3,
        elinewidth=1,
    )


def _name_points(panel: Axes, points: list[tuple[float, Row]]) -> None:
    """Write each name at the right edge, moved apart where accuracies nearly coincide."""
    place = 108.0
    for value, row in sorted(points, key=lambda pair: -(pair[1].accuracy or 0.0)):
        height = 100 * (row.accuracy or 0.0)
        place = min(height, place - 4.2)
        panel.annotate(
            row.route,
            (value, height),
            xytext=(1.02, place),
            textcoords=panel.get_yaxis_transform(),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#bbbbbb", "shrinkB": 5},
            annotation_clip=False,
        )
