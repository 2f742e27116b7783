"""Estimators side by side on one step with random units: bias, variance, direction, evaluations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer
from thalweg.ledger.cost import require_key, require_rule
from thalweg.ledger.draws import Source
from thalweg.ledger.fidelity import Fidelity, fidelity
from thalweg.ledger.gradients import gradients_of
from thalweg.noise import Key
from thalweg.step import Rule, Step, as_step
from thalweg.stochastic.arm import DisARM
from thalweg.stochastic.enumeration import Enumeration
from thalweg.stochastic.relax import REBAR
from thalweg.stochastic.score_function import ScoreFunction
from thalweg.table import align, short

# 2^20 runs of the closure are hours for most models, and the reference is computed twice
_MOST_UNITS = 20

AnyStep = Step | tuple[Any, Any, Any] | Callable[[], Any]


@dataclass(frozen=True, slots=True)
class EstimatorRow:
    """One estimator of an `EstimatorReport`.

    Args:
        name: as it was given, or the rule's `repr`.
        evaluations: how often one estimate calls the closure.
        fidelity: its bias, variance, cosine and norm against the exact gradient.
    """

    name: str
    evaluations: int
    fidelity: Fidelity

    @property
    def cost(self) -> float:
        """Variance times evaluations: the variance at the price of one evaluation, by averaging."""
        return self.fidelity.variance * self.evaluations


@dataclass(frozen=True, slots=True)
class EstimatorReport:
    """What `estimator_report` found; `print` it, or take a row by its name.

    Args:
        rows: one per estimator, in the order in which they were given.
        reference_error: root mean square error of the reference relative to its length; 0 where it was
            enumerated or given. A squared bias below its square means nothing.
    """

    rows: tuple[EstimatorRow, ...]
    reference_error: float

    def __getitem__(self, name: str) -> EstimatorRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError("name", name, "one of " + ", ".join(repr(row.name) for row in self.rows))

    def __str__(self) -> str:
        columns = ["estimator", "bias", "± se", "squared bias", "variance", "times evaluations", "cosine"]
        cells = [
            [
                row.name,
                short(row.fidelity.bias),
                short(row.fidelity.bias_se, 2),
                short(row.fidelity.squared_bias),
                short(row.fidelity.variance),
                short(row.cost),
                short(row.fidelity.cosine),
                str(row.evaluations),
                str(row.fidelity.draws),
            ]
            for row in self.rows
        ]
        table = align([*columns, "evaluations", "draws"], cells)
        if not self.reference_error:
            return table
        return f"{table}\nreference sampled, known to {short(self.reference_error, 2)} of its length"


def estimator_report(
    step: AnyStep,
    estimators: Sequence[Rule] | Mapping[str, Rule | tuple[AnyStep, Rule | None]],
    *,
    exact: str | Sequence[Tensor] = "enumerate",
    samples: int | None = None,
    standard_error: float = 0.05,
    limit: int = 10_000,
    key: Key | None = None,
) -> EstimatorReport:
    """Hold several estimators of one gradient through random units against the exact one.

    Choose it before you choose an estimator: on a small batch of your own model, or on
    `thalweg.problems.BernoulliNet`. All numbers are relative to the length of the exact gradient of all
    parameters (see `Fidelity`). Models, parameters, `.grad` and random states are afterwards as before;
    baselines, `REBAR` and `RELAX` are judged on copies, as they are.

    Args:
        step: (model, closure, parameters), or a function of no arguments that returns it, with losses per
            example and units `BinaryNeuron(gradient=None)` in training mode.
        estimators: rules; or a mapping from names to rules, or to pairs (step, rule) where the estimator is a
            property of the units: the same model with `BinaryNeuron(StraightThrough())`, say, and None for
            `Backprop()`. The parameters of such a step correspond to those of `step`, one by one.
        exact: "enumerate" runs all outcomes, twice 2^K runs for K units per example, at most 20; "sample"
            takes the mean of many draws of `DisARM()`, for more units, or a closure that draws other random
            numbers (dropout) too; or the exact gradient itself, one tensor per parameter.
        samples: a fixed number of draws of each estimator, at least 2; None draws until `standard_error`.
        standard_error: draw until the bias along the gradient is known this well, above 0.
        limit: at most this many draws of each estimator; and how many a sampled reference takes.
        key: names all random draws; None for `Key(0)`.

    Returns:
        An `EstimatorReport`.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument; more than 20 units to enumerate; a closure that
            draws other random numbers under "enumerate"; or an exact gradient that is zero.
        NonFiniteError: a gradient holds nan or infinity.

    Example:
        >>> from thalweg.stochastic import BinaryNeuron, ScoreFunction, StraightThrough
        >>> def step(gradient):
        ...     layer = torch.nn.Linear(2, 3)
        ...     torch.nn.init.constant_(layer.weight, 0.3)
        ...     model = torch.nn.Sequential(layer, BinaryNeuron(gradient))
        ...     return model, lambda: (model(torch.ones(4, 2)).sum(1) - 1) ** 2, [layer.weight]
        >>> report = estimator_report(
        ...     step(None),
        ...     {"plain": ScoreFunction(), "mirrored": DisARM(), "biased": (step(StraightThrough()), None)},
        ...     samples=64,
        ... )
        >>> report["mirrored"].fidelity.variance < report["plain"].fidelity.variance
        True
        >>> report["mirrored"].evaluations, report["biased"].evaluations
        (2, 1)
    """
    main = as_step(step)
    named = _named(estimators, main)
    key = require_key(key)
    require_integer("limit", limit, 2)
    reference, error = _reference(main, exact, limit, key)
    rows = []
    for name, (own, rule) in named.items():
        # what learns is left as it was; a user's own rule may hold on to the model, which a copy would not
        judged = copy.deepcopy(rule) if isinstance(rule, ScoreFunction | REBAR) else rule
        found = fidelity(
            own,
            gradient=judged,
            reference=reference,
            samples=samples,
            standard_error=standard_error,
            limit=limit,
            key=key,
        )
        with isolated(own.model, own.parameters):
            evaluations = gradients_of(own, judged, key).evaluations
        rows.append(EstimatorRow(name, evaluations, found))
    return EstimatorReport(tuple(rows), error)


def _named(estimators: object, main: Step) -> dict[str, tuple[Step, Rule]]:
    if isinstance(estimators, Mapping):
        pairs = list(estimators.items())
    elif isinstance(estimators, Sequence) and not isinstance(estimators, str):
        pairs = [(repr(rule), rule) for rule in estimators]
    else:
        raise ArgumentTypeError("estimators", estimators, "a sequence of rules, or a mapping from names")
    if not pairs:
        raise ArgumentError("estimators", "none", "at least one estimator")
    found: dict[str, tuple[Step, Rule]] = {}
    for name, value in pairs:
        argument = f"estimators[{name!r}]"
        if not isinstance(name, str) or name in found:
            mend = "Give a mapping from names of your own."
            raise ArgumentError("estimators", name, "names that differ, each a string", mend)
        own, rule = value if isinstance(value, tuple) and len(value) == 2 else (main, value)
        step = main if own is main else as_step(own)
        if rule is None and own is main:
            raise ArgumentTypeError(argument, rule, "a rule, or a pair (step, rule)")
        if [p.shape for p in step.parameters] != [p.shape for p in main.parameters]:
            shapes = [tuple(p.shape) for p in step.parameters]
            raise ArgumentError(argument, shapes, "a step with parameters of the shapes of the main step's")
        found[name] = (step, require_rule(rule, argument))
    return found


def _reference(main: Step, exact: str | Sequence[Tensor], limit: int, key: Key) -> tuple[list[Tensor], float]:
    """The exact gradient, one tensor per parameter, and its relative root mean square error."""
    if not isinstance(exact, str | Sequence):
        raise ArgumentTypeError("exact", exact, "'enumerate', 'sample', or one tensor per parameter")
    if not isinstance(exact, str):
        return list(exact), 0.0
    require_choice("exact", exact, ("enumerate", "sample"))
    with isolated(main.model, main.parameters):
        flat, error = _enumerated(main, key) if exact == "enumerate" else _sampled(main, limit, key)
    sizes = [p.numel() for p in main.parameters]
    parts = zip(flat.split(sizes), main.parameters)
    return [part.view(parameter.shape) for part, parameter in parts], error


def _enumerated(main: Step, key: Key) -> tuple[Tensor, float]:
    source = Source(main, Enumeration(limit=_MOST_UNITS), key)
    try:
        flat = source.draw(0)
    except ArgumentError as error:
        if error.argument != "limit":
            raise
        mend = "Use exact='sample', or a smaller model."
        expected = f"at most {_MOST_UNITS} units per example to enumerate"
        raise ArgumentError("exact", "'enumerate' with more", expected, mend) from None
    if not torch.equal(flat, source.draw(1)):
        mend = "Use exact='sample', or take the dropout out."
        raise ArgumentError("exact", "'enumerate'", "no random numbers but those of the units", mend)
    return flat, 0.0


def _sampled(main: Step, draws: int, key: Key) -> tuple[Tensor, float]:
    # another stream than that of the estimators: their errors must have nothing in common
    source = Source(main, DisARM(), Key(key.bits(), call=2))
    mean = source.draw(0)
    spread = 0.0
    for index in range(1, draws):
        drawn = source.draw(index)
        difference = drawn - mean
        mean = mean + difference / (index + 1)
        spread += float(torch.dot(difference, drawn - mean))
    length = float(mean.norm())
    error = math.sqrt(spread / (draws - 1) / draws) / length if length else math.inf
    return mean, error
