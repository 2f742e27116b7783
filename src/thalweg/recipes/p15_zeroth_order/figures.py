"""The pictures of the panels of orders and of an objective without a derivative."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Results = Mapping[str, Sequence[Mapping[str, Any]]]
Costs = Mapping[str, Mapping[str, int]]

ROUTES = {
    "backprop": ("backprop", COLOURS[6], MARKERS[0]),
    "activity perturbation": ("activity perturbation", COLOURS[2], MARKERS[2]),
    "node perturbation": ("node perturbation", COLOURS[0], MARKERS[1]),
    "forward gradient": ("forward gradient", COLOURS[4], MARKERS[4]),
    "SPSA, 4 samples": ("SPSA, 4 samples", COLOURS[3], MARKERS[3]),
    "SPSA": ("SPSA", COLOURS[1], MARKERS[5]),
}
"""The rows whose learning is drawn: label, colour, marker."""


def orders(found: Results, costs: Costs) -> Figure:
    """Test error of every row at equal steps, beside the evaluations, work and memory of a step."""
    names = [name for name in found if not name.endswith((", centred", ", raw", ", standardised"))]
    places = list(range(len(names)))[::-1]
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
    for place, name in zip(places, names, strict=True):
        values = [100 - each["accuracy"] for each in found[name]]
        _, colour, marker = ROUTES.get(name.split(" + ")[0].replace(", Rademacher", ""), ("", "#777777", "X"))
        hollow = name.startswith("control")
        left.plot(values, [place] * len(values), "|", color=colour, markersize=12, alpha=0.7)
        left.plot(
            statistics.fmean(values),
            place,
            marker,
            color=colour,
            markersize=8,
            markerfacecolor="none" if hollow else colour,
        )
        for panel, key, unit in ((middle, "operations", 1e6), (right, "peak_bytes", 1024)):
            value = costs[name][key] / unit
            panel.barh(place, value, color=colour, height=0.55, alpha=0.8)
            calls = costs[name]["evaluations"]
            note = (
                f" {value:.1f}, {calls} call{'s' * (calls > 1)}" if key == "operations" else f" {value:.0f}"
            )
            panel.text(value, place, note, va="center", fontsize=8)
    left.axvline(5, color="#999999", linestyle=":", linewidth=1)
    left.set_yticks(places, names)
    left.set_xscale("log")
    left.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    left.minorticks_off()
    left.set_xlabel("test error (%): mean, and each seed")
    middle.set_xlabel("operations a step (10⁶),\nand calls of the network")
    right.set_xlabel("peak memory of a step (KiB),\nparameters not counted")
    for panel in (middle, right):
        panel.set_xlim(0, panel.get_xlim()[1] * 1.35)
    _plain(left, middle, right, axis="x")
    return figure


def learning(found: Results, costs: Costs) -> Figure:
    """Test error by steps, by evaluations and by operations, mean over seeds."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    units = ("steps", "evaluations of the network", "operations (10⁹)")
    for name, (label, colour, marker) in ROUTES.items():
        curves = [each["curve"] for each in found[name]]
        # a run that diverged ends with the curve of a constant
        steps = [point[0] for point in min(curves, key=len)]
        errors = [100 - statistics.fmean(curve[i][1] for curve in curves) for i in range(len(steps))]
        factors = (1, costs[name]["evaluations"], costs[name]["operations"] / 1e9)
        for panel, factor in zip(panels, factors, strict=True):
            panel.plot(
                [factor * step for step in steps[1:]],
                errors[1:],
                color=colour,
                marker=marker,
                markevery=max(1, len(steps) // 6),
                markersize=5,
                label=label,
            )
    for panel, unit in zip(panels, units, strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        panel.minorticks_off()
        panel.set_xlabel(unit)
    panels[0].set_ylabel("test error (%), mean over seeds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    _plain(*panels)
    return figure


def preparation(found: Results) -> Figure:
    """Test accuracy of three routes, and of decorrelation, under three preparations of the pixels."""
    suffixes = {", raw": "raw,\n0 to 1", ", centred": "centred", ", standardised": "standardised"}
    missing = next(each for each in suffixes if f"SPSA{each}" not in found)
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    panel = figure.subplots()
    decorrelated = ("node perturbation\n+ decorrelation", COLOURS[5], MARKERS[6])
    kinds = {name: ROUTES[name] for name in ("backprop", "node perturbation", "SPSA")}
    for index, (name, style) in enumerate(
        [*kinds.items(), ("node perturbation + decorrelation", decorrelated)]
    ):
        label, colour, marker = style
        there = [
            (place, [each["accuracy"] for each in found[row]])
            for place, suffix in enumerate(suffixes)
            if (row := name if suffix == missing else name + suffix) in found
        ]
        shift = 0.06 * (index - 1.5)
        places = [place + shift for place, _ in there]
        means = [statistics.fmean(values) for _, values in there]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in there]
        line = "-" if len(there) == len(suffixes) else ""
        panel.errorbar(
            places, means, yerr=spreads, color=colour, marker=marker, linestyle=line, capsize=3, label=label
        )
    panel.axhline(95, color="#999999", linestyle=":", linewidth=1)
    panel.set_xticks(range(3), list(suffixes.values()))
    panel.set_xlabel("pixels")
    panel.set_ylabel("test accuracy (%), ± one standard deviation")
    figure.legend(frameon=False, loc="outside right center")
    _plain(panel)
    return figure


def objective(found: Results) -> Figure:
    """Wrong answers of the training batch by step, and test accuracy before and after."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for index, (name, results) in enumerate(found.items()):
        colour, marker = COLOURS[index], MARKERS[index]
        dashed = "--" if name.startswith(("control", "cross-entropy")) else "-"
        steps = [point[0] for point in results[0]["curve"]]
        wrong = [statistics.fmean(each["curve"][i][1] for each in results) for i in range(len(steps))]
        left.plot(
            steps,
            wrong,
            dashed,
            color=colour,
            marker=marker,
            markevery=max(1, len(steps) // 6),
            markersize=5,
            label=name,
        )
        for each in results:
            right.plot(
                [0, 1], [each["before"]["test"], each["after"]["test"]], dashed, color=colour, alpha=0.3
            )
        means = [statistics.fmean(each[when]["test"] for each in results) for when in ("before", "after")]
        right.plot([0, 1], means, dashed, color=colour, marker=marker, markersize=6)
    left.set_xlabel("steps after pretraining")
    left.set_ylabel("wrong answers on the training batch (%)")
    left.set_ylim(bottom=0)
    right.set_xticks([0, 1], ["after pretraining", "at the end"])
    right.set_xlim(-0.2, 1.2)
    right.set_ylabel("test accuracy (%): mean (marks) and seeds (pale)")
    figure.legend(frameon=False, loc="outside right center")
    _plain(left, right)
    return figure


def _plain(*panels: Axes, axis: Any = "both") -> None:
    for panel in panels:
        panel.grid(alpha=0.25, axis=axis)
        panel.spines[["top", "right"]].set_visible(False)
