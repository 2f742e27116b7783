"""The pictures of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Results = Mapping[str, list[dict[str, Any]]]
# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
STYLES = ((RED, "s"), (BLUE, "o"), (GREEN, "^"))


def nodes(panels: Mapping[str, Results]) -> Figure:
    """Test accuracy of each row, one seed a dot; hollow, the first layer alone."""
    rows = max(len(results) for results in panels.values())
    figure = Figure(figsize=(1.5 + 5.2 * len(panels), 1.6 + 0.36 * rows), layout="constrained")
    for axes, (title, results) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        names = list(results)
        for place, name in enumerate(names):
            found = results[name]
            colour = GREY if name.startswith("control") else RED if "backprop" in name else BLUE
            colour = GREEN if name.startswith("features alone") else colour
            axes.plot(
                [each["accuracy"] for each in found], [place] * len(found), color=colour, marker="o",
                linestyle="none",
            )  # fmt: skip
            if found[0]["first"] is not None:
                axes.plot(
                    [statistics.fmean(each["first"] for each in found)], [place], color=colour, marker="D",
                    markerfacecolor="none", linestyle="none", markersize=8,
                )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("test accuracy, %")
        axes.set_title(title, fontsize=11)
    return figure


def links(results: Results, title: str) -> Figure:
    """The area under the curve of each row; one seed a dot."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, found) in enumerate(results.items()):
        colour = GREY if name.startswith("control") else RED if "backprop" in name else BLUE
        colour = GREEN if name.startswith("features alone") else colour
        axes.plot(
            [each["area"] for each in found], [place] * len(found), color=colour, marker="o", linestyle="none"
        )
        if found[0]["first"] is not None:
            axes.plot(
                [statistics.fmean(each["first"] for each in found)], [place], color=colour, marker="D",
                markerfacecolor="none", linestyle="none", markersize=8,
            )  # fmt: skip
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{title}: area under the ROC curve of test links")
    return figure


def memory(depths: Sequence[int], kept: Mapping[str, Sequence[int]]) -> Figure:
    """Kept bytes against depth."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for (colour, marker), (name, found) in zip(STYLES, kept.items()):
        axes.plot(depths, [each / 1e6 for each in found], color=colour, marker=marker, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(depths))
    axes.set_xlabel("layers")
    axes.set_ylabel("kept at once for backward, MB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
