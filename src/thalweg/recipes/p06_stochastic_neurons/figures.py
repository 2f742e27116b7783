"""The pictures of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def error_and_work(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error of every gater, beside the share of the experts' multiply-adds that it needs at test."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = list(range(len(rows)))[::-1]
    for place, row in zip(places, rows, strict=True):
        control, dense = row["name"].startswith("control"), row["name"].startswith("dense")
        colour = COLOURS[3] if control else COLOURS[6] if dense else COLOURS[0]
        left.errorbar(
            row["error"],
            place,
            xerr=row["spread"],
            fmt="D" if control else "s" if dense else "o",
            color=colour,
            markerfacecolor="none" if control else colour,
            capsize=3,
        )
        right.barh(place, 100 * row["work"], color=colour, height=0.55, alpha=0.4 if control else 1)
        right.text(100 * row["work"] + 2, place, f"{100 * row['work']:.0f} %", va="center", fontsize=8)
    left.set_yticks(places, [row["name"] for row in rows])
    left.set_xlim(left=0)
    left.set_xlabel("test error (%), ± one standard deviation over seeds")
    right.set_xlabel("multiply-adds of the expert layer\n(% of all experts)")
    right.set_xlim(0, 115)
    for panel in (left, right):
        panel.grid(alpha=0.25, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Held-out error and open gates by epoch, mean over seeds."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, curve) in enumerate(curves.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": "--" if name.startswith("control") else "-",
            "marker": MARKERS[index % len(MARKERS)],
            "markevery": max(1, len(curve) // 6),
            "markersize": 4,
        }
        epochs = range(1, len(curve) + 1)
        left.plot(epochs, [row["held_out_error"] for row in curve], label=name, **style)
        right.plot(epochs, [100 * row["open_in_training"] for row in curve], **style)
    left.set_ylabel("held-out error (%)")
    left.set_yscale("log")
    left.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    left.minorticks_off()
    right.set_ylabel("gates open in training (%)")
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right center")
    return figure


def bias_and_variance(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Variance for the price of one evaluation, beside the bias, of every estimator."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["estimator"] for row in rows]
    places = range(len(rows))[::-1]
    left.barh(places, [row["variance"] * row["evaluations"] for row in rows], color=COLOURS[0], height=0.6)
    left.set_xscale("log")
    left.set_xlabel("variance x evaluations (relative to |gradient|²)")
    left.set_yticks(list(places), names)
    right.errorbar(
        [row["bias"] for row in rows],
        list(places),
        xerr=[5 * row["bias_se"] for row in rows],
        fmt="o",
        color=COLOURS[1],
        capsize=3,
    )
    right.axvline(0, color="#000000", linewidth=0.8)
    right.set_xlabel("bias along the gradient, ± 5 standard errors")
    for panel in (left, right):
        panel.grid(alpha=0.25, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
