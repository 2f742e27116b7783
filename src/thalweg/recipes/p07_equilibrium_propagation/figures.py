"""The pictures of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from thalweg.recipes.p07_equilibrium_propagation.digits_panel import WATCHED
from thalweg.recipes.p07_equilibrium_propagation.exact import (
    CIRCLES,
    OUTSIDE,
    OUTSIDE_POINTS,
    POINTS,
    STRENGTHS,
    TRUNCATED_STRENGTH,
    UNFOLDED_STEPS,
)
from thalweg.recipes.p07_equilibrium_propagation.mnist_panel import MNIST_ROUTES

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def bias(toy: Mapping[str, Any]) -> Figure:
    """Error against strength, against points, and against the steps of a truncated relaxation."""
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for index, (form, name) in enumerate(
        (("positive", "positive"), ("negative", "negative"), ("centered", "centred"))
    ):
        slope = toy["slopes"][form]
        left.plot(
            STRENGTHS, toy["bias"][form], color=COLOURS[index], marker=MARKERS[index],
            linestyle="--" if form == "negative" else "-", label=f"{name}, slope {slope:.2f}",
        )  # fmt: skip
    for index, points in enumerate(("3", "4"), 3):
        left.plot(
            CIRCLES, toy["holomorphic"][points], color=COLOURS[index], marker=MARKERS[index],
            label=f"{points} points, slope {toy['orders'][points]:.2f}",
        )  # fmt: skip
    left.set_xscale("log")
    # room for the legend
    errors = [error for each in toy["bias"].values() for error in each]
    left.set_ylim(0.02 * min(errors), 2 * max(errors))
    left.set_xlabel("strength of the nudge")
    left.set_title("how hard", fontsize=11)
    middle.plot(POINTS, toy["inside"], color=COLOURS[0], marker="o", label=f"strength {CIRCLES[0]}")
    middle.plot(
        OUTSIDE_POINTS, toy["outside"], color=COLOURS[1], marker="s", label=f"strength {OUTSIDE:g}, outside"
    )
    middle.set_xticks(range(2, 13, 2))
    middle.set_xlabel("points on the complex circle")
    middle.set_title("from how many sides", fontsize=11)
    steps = range(1, UNFOLDED_STEPS + 1)
    right.plot(
        steps, toy["truncation"]["backprop"], color=COLOURS[6], linewidth=1, marker="o", markersize=9,
        markerfacecolor="none", label="backprop through the last k steps",
    )  # fmt: skip
    right.plot(
        steps, toy["truncation"]["nudged"], color=COLOURS[0], linestyle="none", marker="o", markersize=4,
        label=f"k nudged steps, strength {TRUNCATED_STRENGTH:g}",
    )  # fmt: skip
    right.axhline(
        toy["truncation"]["nudged"][-1], color=COLOURS[0], linewidth=0.8, linestyle=":",
        label="what the nudge itself errs",
    )  # fmt: skip
    right.set_xticks(range(2, UNFOLDED_STEPS + 1, 2))
    right.set_xlabel("k, steps from the rest state")
    right.set_title("for how long", fontsize=11)
    for panel in (left, middle, right):
        panel.set_yscale("log")
        panel.set_ylabel("relative error of the gradient")
        panel.legend(frameon=False, fontsize=8)
        _plain(panel)
    return figure


def digits(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of every route, beside the operations and the kept bytes of its step."""
    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
    places = list(range(len(rows)))[::-1]
    lowest = min(row["accuracy"] for row in rows)
    shown = 90.0 if max(row["accuracy"] for row in rows) > 92 else 0.0
    for place, row in zip(places, rows, strict=True):
        control = row["route"].control
        colour = COLOURS[3] if control else COLOURS[_family(row["route"])]
        fill = "none" if control else colour
        if row["accuracy"] < shown:
            # far below: an arrow and the number, or the rest could not be told apart
            left.annotate(
                f"{row['accuracy']:.0f} %", (shown + 0.05, place), (shown + 0.75, place), va="center",
                fontsize=8, color=colour, arrowprops={"arrowstyle": "->", "color": colour},
            )  # fmt: skip
        else:
            left.plot(
                row["accuracies"],
                [place] * len(row["accuracies"]),
                ".",
                color=colour,
                alpha=0.45,
                markersize=5,
            )
            left.plot(row["accuracy"], place, "D" if control else "o", color=colour, markerfacecolor=fill)
        middle.barh(place, row["operations"] * row["steps"] / 1e9, color=colour, height=0.55)
        right.barh(place, row["kept"] / 1e3, color=colour, height=0.55)
    left.set_yticks(places, [row["name"] for row in rows])
    left.set_xlim(shown if lowest < shown else None, 100 if shown else None)
    below = f", arrows: mean below {shown:.0f} %" if lowest < shown else ""
    left.set_xlabel(f"test accuracy (%)\nlarge: mean over seeds, dots: seeds{below}")
    middle.set_xlabel("operations of the\nwhole training (G)")
    right.set_xlabel("kept for backward\nof one step (kB)")
    right.set_xscale("log")
    for panel in (left, middle, right):
        _plain(panel, "x")
    return figure


def gradients(watched: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Cosine with the implicit gradient by epoch, one panel for each link."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(WATCHED):
        for link, panel in enumerate(panels):
            epochs = zip(*(seed[name] for seed in watched), strict=True)
            means = [statistics.fmean(row[link] for row in rows) for rows in epochs]
            panel.plot(
                range(1, len(means) + 1), means, color=COLOURS[index], marker=MARKERS[index], markersize=4,
                markevery=max(1, len(means) // 6), label=name,
            )  # fmt: skip
    for panel, title in zip(panels, ("first link, 64 to hidden", "output link")):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(-0.05, 1.05)
        _plain(panel)
    panels[0].set_ylabel("cosine with the implicit gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    return figure


def mnist(trained: Mapping[str, Sequence[Mapping[str, Any]]], data: str) -> Figure:
    """Error by epoch on test digits (lines) and training digits (dotted)."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    panel = figure.subplots()
    for index, route in enumerate(MNIST_ROUTES):
        results = trained[route.name]
        at = results[0]["at"]
        for part, style in (("test", "-"), ("train", ":")):
            rows = zip(*(each[f"{part}_error"] for each in results), strict=True)
            panel.plot(
                at, [statistics.fmean(row) for row in rows], color=COLOURS[index], linestyle=style,
                marker=MARKERS[index], markersize=4, linewidth=1.8 if part == "test" else 1.2,
                label=route.name if part == "test" else None,
            )  # fmt: skip
    if data == "mnist":
        panel.axhspan(2, 3, color="#000000", alpha=0.08, linewidth=0)
    panel.plot([], [], color="#555555", linestyle=":", label="on training digits")
    panel.set_yscale("log")
    errors = [error for results in trained.values() for each in results for error in each["test_error"]]
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50) if tick <= max(errors) * 1.1]
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.set_ylim(top=max(errors) * 1.15)
    panel.minorticks_off()
    panel.set_xlabel("passes over the digits (where operations are equal: of equilibrium propagation)")
    panel.set_ylabel("error (%)")
    _plain(panel)
    figure.legend(frameon=False, loc="outside right center")
    return figure


def _family(route: Any) -> int:
    """Nudged, clamped, exact or truncated, feed-forward: an index of `COLOURS`."""
    if route.rule is None:
        return 6
    kind = type(route.rule).__name__
    return {"Nudged": 0, "Coupled": 4}.get(kind, 1)


def _plain(panel: Any, axis: str = "both") -> None:
    panel.grid(alpha=0.25, axis=axis)
    panel.spines[["top", "right"]].set_visible(False)
