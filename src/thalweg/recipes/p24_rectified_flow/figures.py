"""The pictures of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from thalweg.recipes.p24_rectified_flow.digits_panel import AGAIN
from thalweg.recipes.p24_rectified_flow.digits_panel import STEPS as DIGIT_STEPS
from thalweg.recipes.p24_rectified_flow.judging import STEPS

# Okabe and Ito's palette: told apart by readers of every colour vision, and the markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Result = Mapping[str, Any]
_SHOWN = 40


def straightening(flows: Sequence[Result]) -> Figure:
    """The pairs of every flow, its paths, and its one-step map: a column for each flow."""
    figure = Figure(figsize=(3.3 * len(flows), 8.2), layout="constrained")
    panels = figure.subplots(3, len(flows), sharex=True, sharey=True, squeeze=False)
    for column, flow in enumerate(flows):
        single = [[path[0], end] for path, end in zip(flow["paths"], flow["single"], strict=True)]
        for row, lines in enumerate((flow["pairs"], flow["paths"], single)):
            _paths(panels[row][column], lines)
        number = column + 1
        panels[0][column].set_title(f"flow {number}")
        panels[1][column].set_title(f"straightness S = {flow['straightness']:.3g}", fontsize=10)
        distance = flow["distances"]["1"]
        panels[2][column].set_title(f"energy distance from the data {distance:.2g}", fontsize=10)
        panels[2][column].set_xlabel("x")
    for row, text in enumerate(("the pairs it learns from", "its paths, many Euler steps", "one Euler step")):
        panels[row][0].set_ylabel(f"{text}\n\ny")
    return figure


def _paths(panel: Axes, lines: Sequence[Any]) -> None:
    """Lines coloured by the side they start on, with both of their ends."""
    for line in lines[:_SHOWN]:
        x, y = zip(*line, strict=True)
        upper = y[0] > 0
        panel.plot(x, y, color=COLOURS[0] if upper else COLOURS[1], alpha=0.45, linewidth=0.9)
        panel.plot(x[0], y[0], "o", color="#777777", markersize=3)
        panel.plot(x[-1], y[-1], "^" if upper else "v", color=COLOURS[6], markersize=3.5, alpha=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_yticks([-7.5, 0, 7.5])
    panel.set_xticks([0, 7.5, 15])


def few_steps(rows: Mapping[str, Sequence[Result]], distilled: Sequence[Any], floor: float) -> Figure:
    """Distance from the data by number of steps, and straightness, of every row."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    names = [name for name in rows if "raw" not in name]
    for index, name in enumerate(names):
        control = name.startswith("control")
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 6,
            "markerfacecolor": "none" if control else COLOURS[index % len(COLOURS)],
        }
        means = [statistics.fmean(each["distances"][str(n)] for each in rows[name]) for n in STEPS]
        left.plot(STEPS, means, linestyle="--" if control else "-", **style)
        values = [each["straightness"] for each in rows[name]]
        place = len(names) - index
        right.plot(values, [place] * len(values), "|", color=style["color"], markersize=12, alpha=0.7)
        right.plot(statistics.fmean(values), place, linestyle="none", **style)
    for index in range(len(distilled[0])):
        value = statistics.fmean(each[index]["1"] for each in distilled)
        label = "flows 1, 2 and 3, each distilled to one step" if index == 0 else None
        left.plot(0.8, value, "*", color=COLOURS[index], markersize=11, label=label, alpha=0.8)
    left.axhline(floor, color="#777777", linestyle=":", linewidth=1.4, label="two draws of the data")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xticks(STEPS, [str(steps) for steps in STEPS])
    left.minorticks_off()
    left.set_xlabel("Euler steps")
    left.set_ylabel("energy distance from fresh data")
    right.set_xscale("log")
    right.set_xlabel("straightness S (0: straight lines), mean and seeds")
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_yticks(list(range(len(names), 0, -1)), names)
    left.set_title("mark and colour: as named on the right", fontsize=9, loc="left")
    for panel in (left, right):
        panel.grid(alpha=0.25, axis="both" if panel is left else "x")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    handles[0] = Line2D([], [], color="#777777", marker="*", markersize=11, linestyle="none")
    left.legend(handles, labels, frameon=False, fontsize=9, loc="upper right")
    return figure


def tangents(flows: Sequence[Result]) -> Figure:
    """The height at which the tangent of each path would end, by time, for every flow."""
    figure = Figure(figsize=(3.6 * len(flows), 3.4), layout="constrained")
    panels = figure.subplots(1, len(flows), sharey=True, squeeze=False)[0]
    for number, (panel, flow) in enumerate(zip(panels, flows, strict=True), start=1):
        for heights in flow["tangents"][:_SHOWN]:
            times = [1 - index / (len(heights) - 1) for index in range(len(heights))]
            colour = COLOURS[0] if heights[-1] > 0 else COLOURS[1]
            panel.plot(times, heights, color=colour, alpha=0.45, linewidth=0.9)
        panel.set_title(f"flow {number}")
        panel.set_xlim(1, 0)
        panel.set_yticks([-7.5, 0, 7.5])
        panel.set_xlabel("time t (1: source, 0: data)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("y of the end that\nthe tangent points at")
    return figure


def balance(exact: Result, solvers: Result) -> Figure:
    """The exact flow: its paths, where its cost goes, and how many Euler steps it takes."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    _paths(left, solvers["paths"])
    left.set_xlabel("x")
    left.set_ylabel("y")
    left.set_title("paths of the exact flow", fontsize=10)
    bottom = 0.0
    parts = (
        ("cost of the flow", exact["after"]["square"], COLOURS[0]),
        ("straightness S", exact["straightness"], COLOURS[4]),
        ("crossing V", exact["crossing"], COLOURS[2]),
    )
    middle.bar(0, exact["before"]["square"], color="#999999", width=0.6)
    middle.text(
        0, exact["before"]["square"] / 2, f"{exact['before']['square']:.1f}", ha="center", va="center"
    )
    for name, value, colour in parts:
        middle.bar(1, value, bottom=bottom, color=colour, width=0.6)
        middle.text(1.36, bottom + value / 2, f"{name}\n{value:.1f}", va="center", fontsize=9)
        bottom += value
    middle.set_xticks([0, 1], ["independent\npairs", "exact flow"])
    middle.set_xlim(-0.5, 2.3)
    middle.set_ylabel("mean squared distance")
    steps = [int(name) for name in solvers["errors"]]
    right.plot(steps, list(solvers["errors"].values()), "o-", color=COLOURS[3])
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(steps, [str(each) for each in steps])
    right.set_xlabel("Euler steps on the exact field")
    right.set_ylabel("rms distance from the exact ends")
    right.grid(alpha=0.25)
    for panel in (middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def digits(found: Result) -> Figure:
    """Images of the flows, beside their distance from real ones and what a classifier reads in them."""
    rows = [
        ("flow 1", "100"),
        ("flow 1", "1"),
        (AGAIN, "1"),
        *[(name, "1") for name in found["flows"] if name not in ("flow 1", AGAIN)],
    ]
    figure = Figure(figsize=(12.5, 4.3), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    left, right = halves
    panels = left.subplots(len(rows), 10, squeeze=False)
    for line, (axes, (name, steps)) in enumerate(zip(panels, rows, strict=True)):
        for digit, panel in enumerate(axes):
            image = found["flows"][name]["images"][steps][digit]
            pixels = [image[start : start + 8] for start in range(0, 64, 8)]
            panel.imshow(pixels, cmap="gray_r", vmin=-1, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            if line == 0:
                panel.set_title(str(digit), fontsize=9)
        text = f"{name},\n{steps} step{'s' * (steps != '1')}"
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    upper, lower = right.subplots(2, 1, sharex=True)
    for index, (name, flow) in enumerate(found["flows"].items()):
        control = name == AGAIN
        colour = COLOURS[index % len(COLOURS)]
        for panel, key in ((upper, "distance"), (lower, "accuracy")):
            panel.plot(
                DIGIT_STEPS,
                [flow[key][str(steps)] for steps in DIGIT_STEPS],
                marker=MARKERS[index],
                linestyle="--" if control else "-",
                color=colour,
                markerfacecolor="none" if control else colour,
                label=f"control: {name}" if control else name,
            )
    upper.axhline(found["floor"], color="#777777", linestyle=":", label="real digits")
    lower.axhline(found["real"], color="#777777", linestyle=":")
    upper.set_yscale("log")
    upper.set_yticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
    upper.set_ylabel("energy distance\nfrom test digits")
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylabel("read as the label\nasked for (%)")
    lower.set_xlabel("Euler steps")
    lower.set_xscale("log")
    lower.set_xticks(DIGIT_STEPS, [str(steps) for steps in DIGIT_STEPS])
    for panel in (upper, lower):
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
