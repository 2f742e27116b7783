"""The picture of a comparison: its axes say what was measured, and nothing that was not."""

import itertools

import pytest

from thalweg.comparison.rows import Row

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from thalweg.comparison.pareto import accuracy_against_cost


def rows(*kept: int) -> list[Row]:
    return [
        Row(f"route {index}", "smooth", accuracy=0.5, accuracy_sd=0.01, saved_bytes=size, evaluations=2)
        for index, size in enumerate(kept)
    ]


def ticks(figure: Figure, panel: int = 0) -> list[tuple[float, str]]:
    figure.draw_without_rendering()
    axes = figure.axes[panel]
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [(float(at), label.get_text()) for at, label in labels if low <= at <= high]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((), []),
        ((0, 0), [(0.0, "0 B")]),
        ((350,), [(350.0, "350 B")]),
        ((0, 350), [(0.0, "0 B"), (350.0, "350 B")]),
        ((0, 100_000), [(0.0, "0 B"), (100_000.0, "100 kB")]),
        ((900, 2100), [(1000.0, "1 kB"), (2000.0, "2 kB")]),
    ],
    ids=str,
)
def test_the_axis_of_bytes_is_ticked_where_there_are_bytes(
    kept: tuple[int, ...], expected: list[tuple[float, str]]
) -> None:
    assert ticks(accuracy_against_cost(rows(*kept), [])) == expected


@pytest.mark.parametrize("kept", [(0, 0), (0, 350), (350, 350), (1, 10**9)], ids=str)
def test_every_point_lies_within_the_axes(kept: tuple[int, ...]) -> None:
    figure = accuracy_against_cost(rows(*kept), [])
    for axes, values in zip(figure.axes, (kept, (2, 2)), strict=True):
        low, high = axes.get_xlim()
        assert all(low < value < high for value in values)


def test_many_names_stay_beside_their_panel_and_apart() -> None:
    """Networks of many routes have a panel each, the others share one; no name leaves it or meets another."""
    networks = ["smooth"] * 14 + ["hard units"] * 12 + ["blocks"] * 3 + ["energy"] * 3
    found = [
        Row(f"route {index}", network, accuracy=0.98 if index % 3 else 0.1, saved_bytes=index, evaluations=1)
        for index, network in enumerate(networks)
    ]
    figure = accuracy_against_cost(found, [])
    assert len(figure.axes) == 6
    named = [[text.xyann[1] for text in axes.texts] for axes in figure.axes]
    assert [len(places) for places in named] == [14, 12, 6] * 2
    for places in named:
        assert all(0 <= place <= 105 for place in places)
        ordered = sorted(places)
        assert all(high - low > 3.5 for low, high in itertools.pairwise(ordered))
