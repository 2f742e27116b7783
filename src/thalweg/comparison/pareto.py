"""The picture of a comparison: what a trained network is worth against what its gradient costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.comparison.rows import Row
from thalweg.errors import MissingExtraError
from thalweg.table import scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v")
_FEW = 5


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
    styles = dict(zip(networks, zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS))))
    groups = _groups(shown, networks) or [set()]
    # a name takes its line: more routes, higher panels
    lines = max((sum(row.network in group for row in shown) for group in groups), default=1)
    size = (0.6 + 6.0 * len(groups), 2 * max(3.6, 0.27 * lines))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2, len(groups), sharey=True, squeeze=False)
    costs = (("saved_bytes", "kept for the backward pass"), ("evaluations", "forward evaluations a step"))
    for (field, label), line in zip(costs, panels, strict=True):
        for group, panel in zip(groups, line):
            found = [row for row in shown if row.network in group]
            points = [(getattr(row, field), row) for row in found if getattr(row, field) is not None]
            for value, row in points:
                _point(panel, value, row, *styles[row.network], hollow=row.route in controls)
            _scale(panel, [value for value, _ in points], "B" if field == "saved_bytes" else "")
            panel.set_xlabel(label)
            panel.set_ylim(0, 103)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            _name_points(panel, points)
        line[0].set_ylabel("test accuracy (%)")
    for network, (colour, marker) in styles.items():
        panels[0][0].plot([], [], marker, color=colour, label=f"{network} network")
    panels[0][0].plot([], [], "o", color="#555555", markerfacecolor="none", label="control")
    figure.legend(frameon=False, loc="outside upper left", ncols=len(networks) + 1)
    return figure


def _groups(rows: Collection[Row], networks: Sequence[str]) -> list[set[str]]:
    """Which networks share a panel: one of many routes has its own, those of few routes come together."""
    count = {network: sum(row.network == network for row in rows) for network in networks}
    large = [{network} for network in networks if count[network] > _FEW]
    small = {network for network in networks if count[network] <= _FEW}
    return large + ([small] if small else [])


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
    ordered = sorted(points, key=lambda pair: -(pair[1].accuracy or 0.0))
    apart = min(7.0, 104.0 / max(len(ordered), 1))
    places: list[float] = []
    for index, (_, row) in enumerate(ordered):
        # never so low that the names still to come have no room
        room = apart * (len(ordered) - 1 - index)
        place = max(100 * (row.accuracy or 0.0), room)
        places.append(min(place, places[-1] - apart if places else 104.0))
    for place, (value, row) in zip(places, ordered, strict=True):
        panel.annotate(
            row.route,
            (value, 100 * (row.accuracy or 0.0)),
            xytext=(1.02, place),
            textcoords=panel.get_yaxis_transform(),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#bbbbbb", "shrinkB": 5},
            annotation_clip=False,
        )
