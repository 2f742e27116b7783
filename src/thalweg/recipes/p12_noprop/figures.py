"""The pictures of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Results = Mapping[str, list[dict[str, Any]]]
# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
BLUE, RED, GREEN, GREY, AMBER = "#0072B2", "#D55E00", "#009E73", "#777777", "#E69F00"
SHOWN = (
    ("accuracy", "o", "as published"),
    ("quiet", "^", "without noise"),
    ("first", "D", "first block alone"),
)


def accuracies(panels: Mapping[str, Results]) -> Figure:
    """Test accuracy of each row, one seed a mark."""
    rows = max(len(results) for results in panels.values())
    figure = Figure(figsize=(1.5 + 5.4 * len(panels), 1.9 + 0.36 * rows), layout="constrained")
    for axes, (title, results) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for place, (name, found) in enumerate(results.items()):
            colour = GREY if name.startswith("control") else RED if name.startswith("backprop") else BLUE
            for shift, (key, marker, _) in enumerate(SHOWN):
                values = [each[key] for each in found if each[key] is not None]
                axes.plot(
                    values, [place + 0.2 * (shift - 1)] * len(values), color=colour, marker=marker,
                    linestyle="none", markersize=5,
                )  # fmt: skip
        axes.set_yticks(range(len(results)), list(results))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("test accuracy, %")
        axes.set_title(title, fontsize=11)
    for _, marker, label in SHOWN:
        axes.plot([], [], color="black", marker=marker, linestyle="none", label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def memory(depths: Sequence[int], kept: Mapping[str, Sequence[int]]) -> Figure:
    """Kept bytes against depth."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for (colour, marker), (name, found) in zip(((BLUE, "o"), (RED, "s")), kept.items()):
        axes.plot(depths, [each / 1e6 for each in found], color=colour, marker=marker, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(depths))
    axes.set_xlabel("blocks")
    axes.set_ylabel("kept at once for backward, MB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
