"""The tables of the run: means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from thalweg.lab import Lab
from thalweg.recipes.p24_rectified_flow.digits_panel import STEPS as DIGIT_STEPS
from thalweg.recipes.p24_rectified_flow.judging import STEPS

Result = Mapping[str, Any]


def exact(lab: Lab, straight: Sequence[Result], curved: Sequence[Result]) -> None:
    """Costs, straightness and crossing of the exact flow."""
    columns = ["path", "cost before", "after", "fall", "S", "V", "S + V", "relative gap", "mean |y|"]
    columns += ["after one Euler step", "|z| before", "after", "|z|^4 before", "after"]
    rows: list[list[object]] = []
    for name, results in (("straight", straight), ("control: cosine", curved)):
        mean = {key: _mean(results, key) for key in ("straightness", "crossing", "drop", "gap", "height")}
        costs = [
            [statistics.fmean(each[when][cost] for each in results) for when in ("before", "after")]
            for cost in ("square", "length", "fourth")
        ]
        both = mean["straightness"] + mean["crossing"]
        rows.append(
            [
                name,
                *(round(value, 2) for value in costs[0]),
                *(round(value, 2) for value in (mean["drop"], mean["straightness"], mean["crossing"], both)),
                round(mean["gap"], 5),
                round(mean["height"], 4),
                _mean(results, "single_height"),
                *(round(value, 2) for value in (*costs[1], *costs[2])),
            ]
        )
    lab.table("The exact flow between the mixtures: the balance of its cost", columns, rows)


def nearest(lab: Lab, found: Sequence[Sequence[Result]]) -> None:
    """The flows that look up stored pairs."""
    columns = ["flow", "S", "cost", "energy distance, 1 step", "100 steps"]
    rows: list[list[object]] = [
        [
            f"flow {index + 1}",
            *(round(_mean(flows, key), 4) for key in ("straightness", "cost", "once", "often")),
        ]
        for index, flows in enumerate(zip(*found, strict=True))
    ]
    lab.table("Flows by the nearest of stored pairs: nothing is trained", columns, rows)


def trained(lab: Lab, rows: Mapping[str, Sequence[Result]], floor: float) -> None:
    """Every flow that was trained."""
    columns = ["flow", "loss", "S", "cost", "over the cheapest pairing"]
    columns += [f"energy distance, {steps} step{'s' * (steps > 1)}" for steps in STEPS]
    lab.table(
        f"Trained flows on fresh points; two draws of the data are {floor:.4f} apart",
        columns,
        [
            [
                name,
                *(round(_mean(results, key), 4) for key in ("loss", "straightness", "cost", "excess")),
                *(
                    round(statistics.fmean(each["distances"][str(steps)] for each in results), 4)
                    for steps in STEPS
                ),
            ]
            for name, results in rows.items()
        ],
    )


def digits(lab: Lab, found: Sequence[Result]) -> None:
    """Accuracy and distance of the digits' flows by number of steps."""
    columns = ["flow", "S"]
    columns += [f"% right, {steps} step{'s' * (steps > 1)}" for steps in DIGIT_STEPS]
    columns += [f"energy distance, {steps} step{'s' * (steps > 1)}" for steps in DIGIT_STEPS]
    rows: list[list[object]] = []
    for name in found[0]["flows"]:
        results = [each["flows"][name] for each in found]
        rows.append([name, round(_mean(results, "straightness"), 3)])
        for key, places in (("accuracy", 1), ("distance", 4)):
            rows[-1] += [
                round(statistics.fmean(each[key][str(steps)] for each in results), places)
                for steps in DIGIT_STEPS
            ]
    title = (
        f"Digits, {found[0]['parameters']} weights: real ones are read {_mean(found, 'real'):.1f} % right, "
        f"training and test digits are {_mean(found, 'floor'):.4f} apart"
    )
    lab.table(title, columns, rows)


def _mean(results: Sequence[Result], key: str) -> float:
    return statistics.fmean(each[key] for each in results)
