"""The claims of the run: what has to hold in every seed, and what is only shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from thalweg.lab import Claim
from thalweg.recipes.p24_rectified_flow.digits_panel import AGAIN
from thalweg.recipes.p24_rectified_flow.toy import HEIGHT

Result = Mapping[str, Any]
Baselines = Mapping[str, Sequence[Result]]
WORSE = ("VP path", "cosine path")
FEW = ("1", "2", "4", "8")


def exact(straight: Sequence[Result], curved: Sequence[Result], *, decisive: bool) -> list[Claim]:
    """The exact flow: three lines that must hold, and the control that need not satisfy the first.

    The first is a mean over pairs: as few as a run of seconds has (`decisive` False) do not decide it.
    """
    heights = [each["height"] for each in straight]
    return [
        _worst(
            "exact flow: the fall of the cost equals S + V within 1 % (relative gap, largest of all seeds)",
            "an identity, Eq. 15",
            [each["gap"] for each in straight],
            at_most=0.01,
            decisive=decisive,
        ),
        Claim(
            f"exact flow: mean |y| of where it ends is {HEIGHT} ± 0.02 (farthest of all seeds)",
            "not stated; the law is kept, Theorem 3.3",
            max(heights, key=lambda height: abs(height - HEIGHT)),
            _spread(heights),
            all(abs(height - HEIGHT) <= 0.02 for height in heights),
        ),
        _worst(
            "exact flow: one Euler step ends between the modes, mean |y| is 0 (to 1e-6)",
            "not stated",
            [each["single_height"] for each in straight],
            at_most=1e-6,
        ),
        _shown(
            "control: relative gap of the same balance on the cosine path, to which it does not apply",
            None,
            [each["gap"] for each in curved],
        ),
    ]


def nearest(found: Sequence[Sequence[Result]]) -> Claim:
    """The paper's toy model: its figure shows straightness fall, and names no number."""
    ratios = [flows[1]["straightness"] / flows[0]["straightness"] for flows in found]
    statement = "by the nearest of stored pairs, nothing trained: S of flow 2 over flow 1's"
    return _shown(statement, "falls, no number (Fig. 3d)", ratios)


def trained(found: Sequence[Result], baselines: Baselines, *, decisive: bool) -> list[Claim]:
    """The trained flows; a run of seconds (`decisive` False) shows the numbers and decides nothing."""
    flows = [each["flows"] for each in found]
    return [
        *_reflows(flows, decisive=decisive),
        *(_worse(name, baselines[name], flows, decisive=decisive) for name in WORSE),
        _many_steps(flows, decisive=decisive),
        *_single_steps(found, baselines),
    ]


def _reflows(flows: Sequence[Any], *, decisive: bool) -> list[Claim]:
    """What has to hold between the flows of a seed."""

    def straighter(later: int, earlier: int) -> list[float]:
        return [each[later]["straightness"] / each[earlier]["straightness"] for each in flows]

    falls = "falls with each reflow, no number (Fig. 3d and 9)"
    lines = (
        (
            "S of flow 2 is at most 0.1 of flow 1's (largest ratio of all seeds)",
            falls,
            straighter(1, 0),
            0.1,
        ),
        ("S of flow 3 is at most 1.5 times flow 2's (largest)", falls, straighter(2, 1), 1.5),
        (
            "one step: energy distance of flow 2 is at most 0.1 of flow 1's (largest ratio)",
            "FID 12.21 against 378 on CIFAR-10 (Table 1a)",
            [_once(each[1]) / _once(each[0]) for each in flows],
            0.1,
        ),
        (
            "flow 2: energy distance of one step is at most 1.3 times that of 100 steps (largest)",
            "FID 12.21 of one step, 3.36 of 110 on CIFAR-10 (Table 1a)",
            [_once(each[1]) / _often(each[1]) for each in flows],
            1.3,
        ),
        (
            "no reflow raises the cost by more than 2 % (largest ratio of a flow's cost to that before)",
            "never, in theory (Theorem 3.5)",
            [max(b["cost"] / a["cost"] for a, b in pairwise(each)) for each in flows],
            1.02,
        ),
    )
    return [
        _worst(statement, reported, values, at_most=limit, decisive=decisive)
        for statement, reported, values, limit in lines
    ]


def _many_steps(flows: Sequence[Any], *, decisive: bool) -> Claim:
    """Reflow is not meant to better what many steps make: judged, never asserted."""
    ratios = [_often(each[1]) / _often(each[0]) for each in flows]
    return Claim(
        "100 steps: energy distance of flow 2 is at least 0.8 of flow 1's (smallest ratio)",
        "FID 3.36 against 2.58 with an adaptive solver (Table 1a)",
        min(ratios),
        _spread(ratios),
        min(ratios) >= 0.8 if decisive else None,
        asserted=False,
    )


def _single_steps(found: Sequence[Result], baselines: Baselines) -> list[Claim]:
    """Energy distances of one step: flow 2 among its controls."""
    distilled = "FID 6.18, 4.85 for flow 2 distilled (Table 1a)"
    rows: tuple[tuple[str, str | None, list[float]], ...] = (
        ("flow 2", None, [_once(each["flows"][1]) for each in found]),
        ("flow 1 distilled", distilled, [each["distilled"][0]["1"] for each in found]),
        ("minibatch transport", None, [_once(each) for each in baselines["minibatch transport"]]),
        ("control: flow 2 of shuffled pairs", None, [_once(each["shuffled"]) for each in found]),
        (
            "control: flow 1 with twice the updates",
            None,
            [_once(each) for each in baselines["flow 1, twice the updates"]],
        ),
        ("floor: two draws of the data", None, [each["floor"] for each in found]),
    )
    return [_shown(f"one step, energy distance: {name}", reported, values) for name, reported, values in rows]


def raw(found: Sequence[Result]) -> list[Claim]:
    """Why the networks are standardised: flow 2 by one without."""
    flows = [each["flows"][1] for each in found]
    return [
        _shown("in raw coordinates: energy distance of one step of flow 2", None, [_once(f) for f in flows]),
        _shown("in raw coordinates: S of flow 2", None, [float(f["straightness"]) for f in flows]),
    ]


def digits(found: Sequence[Result]) -> list[Claim]:
    """How far digits made in one step are from real ones, and what a classifier reads in them."""
    shown = [
        (
            "digits: energy distance of training from test digits, the floor",
            [each["floor"] for each in found],
        ),
        ("digits: % of test digits that the classifier reads right", [each["real"] for each in found]),
    ]
    for name in ("flow 1", AGAIN, "flow 2"):
        flows = [each["flows"][name] for each in found]
        control = "control: " if name == AGAIN else ""
        distances, right = ([flow[key]["1"] for flow in flows] for key in ("distance", "accuracy"))
        shown.append((f"{control}digits, one step of {name}: energy distance from test digits", distances))
        shown.append((f"{control}digits, one step of {name}: % read as the label asked for", right))
    return [_shown(statement, None, values) for statement, values in shown]


def _once(flow: Result) -> float:
    return float(flow["distances"]["1"])


def _often(flow: Result) -> float:
    return float(flow["distances"]["100"])


def _worse(name: str, results: Sequence[Result], flows: Sequence[Any], *, decisive: bool) -> Claim:
    least = [
        min(each["distances"][steps] for steps in FEW) / own[1]["distances"]["1"]
        for each, own in zip(results, flows, strict=True)
    ]
    statement = (
        f"{name}: with 1, 2, 4 and 8 steps farther from the data than flow 2 with one "
        "(least ratio of energy distances)"
    )
    holds = all(value > 1 for value in least) if decisive else None
    reported = "VP ODE at one step: FID 451 against 12.21 (Table 1a)" if name == "VP path" else None
    return Claim(statement, reported, min(least), _spread(least), holds, asserted=decisive)


def _worst(
    statement: str, reported: str, values: Sequence[float], *, at_most: float, decisive: bool = True
) -> Claim:
    holds = max(values) <= at_most if decisive else None
    return Claim(statement, reported, max(values), _spread(values), holds, asserted=decisive)


def _shown(statement: str, reported: str | None, values: Sequence[float]) -> Claim:
    return Claim(statement, reported, statistics.fmean(values), _spread(values), None, asserted=False)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
