"""The picture of the panel on learning in continuous time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thalweg.recipes.p15_zeroth_order import cart_pole, neuro

# Okabe and Ito's palette: told apart by readers of every colour vision; the lines differ, too
STYLES = dict(zip(neuro.ROUTES, (("#0072B2", "-"), ("#000000", ":"), ("#D55E00", "--")), strict=True))


def neuro_figure(toys: neuro.Results, tracked: neuro.Results, poles: neuro.Results) -> Figure:
    """What the means are worth while they learn, of every seed; and the body at work, of the first."""
    figure = Figure(figsize=(12.5, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([["toy", "track", "pole"], ["toy", "follow", "swing"]])
    _curves(axes["toy"], toys)
    axes["toy"].axhline(0.25, color="#999999", linewidth=1)
    axes["toy"].annotate("0.25, to be reached", (0, 0.25), xytext=(2, 3), textcoords="offset points")
    axes["toy"].set(yscale="log", ylabel="distance of the means from the target", xlabel="ticks")
    axes["toy"].set_title("a point in five dimensions")
    _curves(axes["track"], tracked)
    first = tracked[neuro.ROUTES[0]][0]
    axes["track"].axhline(first["kalman"], color="#009E73", linewidth=1.2, label="Kalman's filter")
    axes["track"].set(ylabel="mean squared error", xlabel="ticks", ylim=(0, None))
    axes["track"].set_title("a signal behind noise")
    _curves(axes["pole"], poles, factor=neuro.SECONDS)
    axes["pole"].set(ylabel="seconds upright", xlabel="trials", ylim=(0, 1.05 * neuro.SECONDS))
    axes["pole"].set_title("a pole on a cart")
    _follow(axes["follow"], first["shown"])
    _swing(axes["swing"], poles[neuro.ROUTES[0]][0]["angles"])
    for panel in axes.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = axes["track"].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=len(labels))
    return figure


def _curves(panel: Axes, found: neuro.Results, factor: float = 1.0) -> None:
    for route, results in found.items():
        colour, line = STYLES[route]
        for index, each in enumerate(results):
            ticks, values = zip(*each["curve"], strict=True)
            panel.plot(
                ticks,
                [factor * value for value in values],
                color=colour,
                linestyle=line,
                alpha=1 if index == 0 else 0.4,
                label=route if index == 0 else None,
            )


def _follow(panel: Axes, shown: Mapping[str, Sequence[float]]) -> None:
    ticks = range(len(shown["signal"]))
    panel.plot(ticks, shown["seen"], ".", color="#999999", markersize=4, label="seen")
    panel.plot(ticks, shown["signal"], color="#000000", linewidth=1.2, label="signal")
    panel.plot(ticks, shown["output"], color="#0072B2", linewidth=1.8, label="learned output")
    panel.set(xlabel="ticks of a new stretch", ylabel="signal (standard deviations)")
    panel.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _swing(panel: Axes, angles: Mapping[str, Sequence[Any]]) -> None:
    for name, colour, line in (("before", "#E69F00", "--"), ("after", "#0072B2", "-")):
        values = [math.nan if angle is None else angle for angle in angles[name]]
        seconds = [cart_pole.STEP * step for step in range(len(values))]
        panel.plot(seconds, values, line, color=colour, label=f"{name} learning")
    for edge in (-1, 1):
        panel.axhline(edge * math.degrees(cart_pole.TILT), color="#999999", linewidth=1)
    panel.set(xlabel="seconds", ylabel="angle of a new pole (degrees)")
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
