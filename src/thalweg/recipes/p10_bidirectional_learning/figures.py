"""The pictures of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from thalweg.recipes.p10_bidirectional_learning.judging import ATTACKS, RADII

Results = Mapping[str, list[dict[str, Any]]]
# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
NAMES = {
    "fgsm": "one step",
    "fgsm-margin": "one step, margin",
    "pgd": "many steps",
    "pgd-margin": "many steps, margin",
}


def robustness(results: Results) -> Figure:
    """Accuracy against radius, a panel for each attack."""
    figure = Figure(figsize=(13, 3.7), layout="constrained")
    panels = figure.subplots(1, len(ATTACKS), sharey=True)
    for axes, attack in zip(panels, ATTACKS):
        for (colour, marker), (name, rows) in zip(STYLES, results.items()):
            values = [statistics.fmean(each["kept"]["clean"] for each in rows)]
            values += [
                statistics.fmean(each["kept"]["attacks"][attack][i] for each in rows)
                for i in range(len(RADII))
            ]
            line = ":" if name.startswith("control") else "-"
            axes.plot([0, *RADII], values, color=colour, marker=marker, linestyle=line, label=name)
        axes.set_title(NAMES[attack], fontsize=11)
        axes.set_xlabel("radius, of a range of 1")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def imagined(images: list[list[float]]) -> Figure:
    """What the backward direction draws for each class."""
    side = round(len(images[0]) ** 0.5)
    figure = Figure(figsize=(1.1 * len(images), 1.5), layout="constrained")
    for number, (axes, image) in enumerate(zip(figure.subplots(1, len(images)), images)):
        axes.imshow(
            [image[side * row : side * (row + 1)] for row in range(side)], cmap="gray", vmin=0, vmax=1
        )
        axes.set_title(str(number), fontsize=10)
        axes.set_axis_off()
    return figure
