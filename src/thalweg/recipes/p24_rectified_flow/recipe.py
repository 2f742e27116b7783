"""Rectified flow: take the simulation out of training, then out of sampling, by training on its own pairs.

Panels: the theory on a toy whose flow is known; three flows trained one on the other, with what they are held
against; digits. All flows of a panel have the same network, training and points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from thalweg.errors import ArgumentError, require_integer, require_positive
from thalweg.lab import Claim, Job, Lab
from thalweg.lab.workers import MOST_WORKERS, cores
from thalweg.recipes.p24_rectified_flow import figures, tables, verdicts
from thalweg.recipes.p24_rectified_flow.baselines import BASELINES, baseline
from thalweg.recipes.p24_rectified_flow.digits_panel import DigitsTraining, digit_flows
from thalweg.recipes.p24_rectified_flow.exact import curved_balance, solvers, straight_balance
from thalweg.recipes.p24_rectified_flow.nearest import nearest_flows
from thalweg.recipes.p24_rectified_flow.stages import stages
from thalweg.recipes.p24_rectified_flow.toy import Training

Panel = Literal["exact", "trained", "digits"]
PANELS: tuple[Panel, ...] = ("exact", "trained", "digits")
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        panels: which parts to run, of "exact", "trained", "digits".
        exact_pairs: pairs on which the theory is checked, a multiple of 64.
        exact_steps: of Runge-Kutta's method there.
        stored_pairs: of the flows that need no training because they look up the nearest of stored pairs.
        pairs: points of each end that the toy's flows learn from.
        width: of the toy's network.
        layers: of the toy's network.
        updates: of each of its flows.
        batch: pairs in an update.
        simulation: Euler steps that make the pairs of a reflow.
        distillation: updates of each distillation.
        judged: fresh points that the toy's flows are judged on.
        digit_seeds: on how many of the seeds digits are made.
        digit_width: of the digits' network.
        digit_blocks: of the digits' network.
        digit_updates: of each of its flows.
        digit_batch: images in an update.
        digit_rate: step size of Adam for it.
        digit_pairs: simulated for each reflow of it.
    """

    panels: tuple[Panel, ...] = PANELS
    exact_pairs: int = 16_384
    exact_steps: int = 400
    stored_pairs: int = 1000
    pairs: int = 20_000
    width: int = 64
    layers: int = 2
    updates: int = 2500
    batch: int = 512
    simulation: int = 200
    distillation: int = 1500
    judged: int = 3000
    digit_seeds: int = 1
    digit_width: int = 128
    digit_blocks: int = 2
    digit_updates: int = 4000
    digit_batch: int = 128
    digit_rate: float = 1e-3
    digit_pairs: int = 10_000

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "exact_pairs": 256,
            "exact_steps": 100,
            "stored_pairs": 50,
            "pairs": 500,
            "updates": 30,
            "batch": 64,
            "simulation": 10,
            "distillation": 20,
            "judged": 200,
            "digit_width": 16,
            "digit_updates": 20,
            "digit_batch": 32,
            "digit_pairs": 100,
        },
        "small": {},
        "gpu": {
            "digit_width": 384,
            "digit_blocks": 3,
            "digit_updates": 60_000,
            "digit_batch": 1024,
            "digit_rate": 3e-4,
            "digit_pairs": 50_000,
        },
    }

    def __post_init__(self) -> None:
        if not self.panels or not set(self.panels) <= set(PANELS):
            raise ArgumentError("panels", self.panels, f"some of {', '.join(PANELS)}")
        for name in self.__slots__:
            if name not in ("panels", "digit_rate"):
                require_integer(name, getattr(self, name), 1)
        if self.exact_pairs % 64:
            raise ArgumentError("exact_pairs", self.exact_pairs, "a multiple of 64")
        require_positive("digit_rate", self.digit_rate)

    @property
    def training(self) -> Training:
        """How the toy's flows are trained."""
        return Training(
            pairs=self.pairs,
            width=self.width,
            layers=self.layers,
            updates=self.updates,
            batch=self.batch,
            simulation=self.simulation,
            distillation=self.distillation,
            judged=self.judged,
        )

    @property
    def digits_training(self) -> DigitsTraining:
        """How the digits' flows are trained."""
        return DigitsTraining(
            width=self.digit_width,
            blocks=self.digit_blocks,
            updates=self.digit_updates,
            batch=self.digit_batch,
            learning_rate=self.digit_rate,
            pairs=self.digit_pairs,
        )


def run(config: Config, lab: Lab) -> list[Claim]:
    """Run the panels asked for, their cells side by side; then tables, figures and claims."""
    jobs = _jobs(config, lab)
    lab.plan(len(jobs))
    found: dict[str, list[Any]] = {}
    for job, result in zip(jobs, _results(jobs, lab), strict=True):
        found.setdefault(job.name, []).append(result)
    judged: list[Claim] = []
    if "exact" in config.panels:
        judged += _exact(lab, found)
    if "trained" in config.panels:
        judged += _trained(lab, found)
    if "digits" in config.panels:
        judged += _digits(lab, found["digits"])
    return judged


def _results(jobs: Sequence[Job], lab: Lab) -> list[Any]:
    if lab.preset == "smoke":
        # more of its seconds would go into starting workers than they save
        return lab.cells(jobs, workers=1)
    if lab.device.type == "cpu":
        return lab.cells(jobs)
    # the toy stays on the processor, which an accelerator leaves idle; digits come first in the list
    images = [job for job in jobs if job.name == "digits"]
    return lab.cells(images) + lab.cells(jobs[len(images) :], workers=min(cores(), MOST_WORKERS))


def _jobs(config: Config, lab: Lab) -> list[Job]:
    """The longest cells first, so that no core is left alone with one of them at the end."""
    training, jobs = config.training, []
    if "digits" in config.panels:
        some, device = lab.seeds[: config.digit_seeds], str(lab.device)
        jobs += [
            Job("digits", seed, digit_flows, (config.digits_training, ROUNDS, seed, device)) for seed in some
        ]
    for seed in lab.seeds:
        if "exact" in config.panels:
            pairs, steps = config.exact_pairs, config.exact_steps
            jobs.append(Job("exact: straight", seed, straight_balance, (pairs, steps, seed)))
            # far from the balance, so that an eighth of the pairs shows it
            jobs.append(Job("exact: cosine", seed, curved_balance, (pairs // 8, steps, seed)))
            jobs.append(Job("nearest pairs", seed, nearest_flows, (config.stored_pairs, ROUNDS, seed)))
        if "trained" in config.panels:
            jobs.append(Job("flows", seed, stages, (training, ROUNDS, seed)))
            plain = replace(training, standardised=False)
            jobs.append(Job("flows in raw coordinates", seed, stages, (plain, 1, seed)))
            jobs += [Job(name, seed, baseline, (name, training, seed)) for name in BASELINES]
    if "exact" in config.panels:
        first = lab.seeds[0]
        jobs.append(
            Job("exact: solvers", first, solvers, (config.exact_pairs // 8, config.exact_steps, first))
        )
    return jobs


def _exact(lab: Lab, found: Mapping[str, Sequence[Any]]) -> list[Claim]:
    straight, curved = found["exact: straight"], found["exact: cosine"]
    tables.exact(lab, straight, curved)
    tables.nearest(lab, found["nearest pairs"])
    lab.figure(
        "balance",
        figures.balance(straight[0], found["exact: solvers"][0]),
        "The exact flow of the toy. Left: its paths bend where lines of independent pairs cross. Middle: "
        "what it saves of the cost is straightness and crossing. Right: near t = 1/2 the field is so steep "
        "that 16 to 64 Euler steps are worse than 8.",
    )
    return [
        *verdicts.exact(straight, curved, decisive=lab.preset != "smoke"),
        verdicts.nearest(found["nearest pairs"]),
    ]


def _trained(lab: Lab, found: Mapping[str, Sequence[Any]]) -> list[Claim]:
    results, plain = found["flows"], found["flows in raw coordinates"]
    rows: dict[str, Sequence[Any]] = {
        f"flow {index + 1}": [each["flows"][index] for each in results] for index in range(ROUNDS + 1)
    }
    rows["control: flow 2, shuffled pairs"] = [each["shuffled"] for each in results]
    rows |= {f"{'control: ' * name.startswith('flow')}{name}": found[name] for name in BASELINES}
    rows |= {f"flow {k + 1}, raw coordinates": [each["flows"][k] for each in plain] for k in range(2)}
    floor = sum(each["floor"] for each in results) / len(results)
    tables.trained(lab, rows, floor)
    lab.figure(
        "straightening",
        figures.straightening(results[0]["flows"]),
        "Each column is one flow, first seed: the pairs that it is given, the paths that it takes, and where "
        "one Euler step lands. Grey: source, black: data; lines are coloured by the side they start on.",
    )
    lab.figure(
        "few_steps",
        figures.few_steps(rows, [each["distilled"] for each in results], floor),
        "Energy distance from fresh data by number of Euler steps, and straightness; means over seeds. "
        "Dashed: controls.",
    )
    lab.figure(
        "tangents",
        figures.tangents(results[0]["flows"]),
        "Where the tangent of each path points at each time: level lines are straight paths.",
    )
    return [*verdicts.trained(results, found, decisive=lab.preset != "smoke"), *verdicts.raw(plain)]


def _digits(lab: Lab, found: Sequence[Any]) -> list[Claim]:
    tables.digits(lab, found)
    lab.figure(
        "digits",
        figures.digits(found[0]),
        "Digits made on demand from the same noise, first seed. One step of flow 1 makes the mean of each "
        "digit, which a classifier reads well: only the distance tells it from a digit.",
    )
    return verdicts.digits(found)
