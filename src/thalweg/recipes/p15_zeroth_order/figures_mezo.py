"""The picture of the panel on fine-tuning a language model by forward passes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thalweg.recipes.p15_zeroth_order import mezo
from thalweg.recipes.p15_zeroth_order.memory import TINY

# Okabe and Ito's palette: told apart by readers of every colour vision; markers and lines differ, too
COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#E69F00", "#777777", "#D55E00")
LINES = ("-", "-", "-", "--", "-", "--", ":")
MARKERS = ("o", "s", "D", "s", "v", "o", "X")


def mezo_figure(found: mezo.Results, memory: Sequence[Mapping[str, int]]) -> Figure:
    """Losses by evaluations (mean and range over seeds), and bytes of a step by the size of a batch."""
    figure = Figure(figsize=(12.5, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for index, (name, results) in enumerate(found.items()):
        _curve(left, name, results, index)
    adam = found[mezo.ADAM.name]
    start, end = (statistics.fmean(each[key] for each in adam) for key in ("start", "final"))
    passed = start - 0.6 * (start - end)
    left.axhline(passed, color="#999999", linewidth=1)
    left.annotate(
        "60 % of Adam's drop",
        (0.66, passed),
        xytext=(0, -4),
        textcoords="offset points",
        xycoords=("axes fraction", "data"),
        ha="center",
        va="top",
        fontsize=9,
        color="#555555",
    )
    left.set_xscale("symlog", linthresh=5)
    left.set_xlim(left=0)
    ticks = [
        tick for tick in (0, 5, 50, 500, 2500) if tick <= max(r[0]["evaluations"] for r in found.values())
    ]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xlabel("forward evaluations (those of Adam have a backward pass each)")
    left.set_ylabel("test loss on the new text (nats a letter)")
    _memory(right, memory)
    for panel in (left, right):
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    return figure


def _curve(panel: Axes, name: str, results: Sequence[Mapping[str, Any]], index: int) -> None:
    calls = [point[0] for point in results[0]["curve"]]
    losses = list(zip(*([point[1] for point in each["curve"]] for each in results), strict=True))
    style: dict[str, Any] = {"color": COLOURS[index], "linestyle": LINES[index], "marker": MARKERS[index]}
    filled = "none" if name.startswith("control") or "random" in name else COLOURS[index]
    means = [statistics.fmean(each) for each in losses]
    panel.plot(calls, means, label=name, markersize=5, markerfacecolor=filled, **style)
    low, high = [min(each) for each in losses], [max(each) for each in losses]
    panel.fill_between(calls, low, high, color=COLOURS[index], alpha=0.15)


def _memory(panel: Axes, rows: Sequence[Mapping[str, int]]) -> None:
    shown = [row for row in rows if row["batch"] != TINY[0] and row["batch"] == mezo.BATCH]
    lengths = [row["length"] for row in shown]
    for name, colour, line, marker, size in (
        ("backprop", "#000000", "-", "o", 5),
        ("inference", "#999999", "-", "o", 9),
        ("MeZO", "#0072B2", "--", "s", 5),
    ):
        panel.plot(
            lengths,
            [row[name] / 2**20 for row in shown],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=size,
            label=name,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(lengths, [str(length) for length in lengths])
    sizes = (1, 2, 5, 10, 20, 50)
    panel.set_yticks(sizes, [str(size) for size in sizes])
    panel.set_xlabel(f"letters in each of {mezo.BATCH} pieces")
    panel.set_ylabel("weights and the peak beside them (MiB)")
    panel.legend(frameon=False)
