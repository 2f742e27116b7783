"""`thalweg.compare`: gradient routes side by side on a step of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.blackbox import SPSA, EvolutionStrategies, ForwardGradient
from thalweg.borrowed import isolated
from thalweg.comparison.measure import measure
from thalweg.comparison.rows import Comparison, Row
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    UnsupportedError,
    require_integer,
    require_positive,
)
from thalweg.noise import Key
from thalweg.step import Backprop, Rule, Step, as_step
from thalweg.stochastic import BinaryNeuron, Enumeration, ScoreFunction
from thalweg.table import scaled

StepSource = Step | tuple[Any, Any, Any] | Callable[[], Any]


def default_routes(step: Step) -> dict[str, Rule]:
    """The rules that suit a step: score functions when its units wait for one, the others when not."""
    routes: dict[str, Rule] = {
        "backprop": Backprop(),
        "forward-gradient": ForwardGradient(),
        "spsa": SPSA(),
        "evolution-strategies": EvolutionStrategies(samples=8),
    }
    if _has_waiting_units(step):
        # a unit that leaves its gradient to the step has no other route
        return {
            "score-function": ScoreFunction(baseline="none"),
            "score-function-mean": ScoreFunction(baseline="mean"),
        }
    return routes


def compare(
    routes: Mapping[str, Rule | StepSource] | None,
    step: StepSource,
    *,
    reference: Rule | None = None,
    standard_error: float = 0.05,
    limit: int = 1000,
    seconds: float = 4.0,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Lay gradient routes side by side on your own step: what each costs and how right it is.

    Nothing of yours is changed: parameters, buffers, `.grad` and random states are as before.

    Args:
        routes: by name, either a rule to use on `step`, or a step of its own (a process with another
            `gradient=`, or a learner that gives phases) over the same parameters in the same order.
            None for all rules that suit the step.
        step: `(model, closure, parameters)`, or a function returning that. The closure returns a scalar,
            losses per example of shape (batch,), or a mapping of losses, whose sum is meant.
        reference: the rule whose gradient the others are held against; by default backprop, or the
            enumeration of all outcomes where units wait for a rule.
        standard_error: draw from each route until its bias is known this well ...
        limit: ... but at most this often ...
        seconds: ... and no longer than about this per route; the table's standard errors say what it came to.
        seed: names the random draws.
        on_row: called with each row as it is ready, for progress.

    Returns:
        A `Comparison`; `print` it. A route that refuses the step has a row that says why.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument.
        RuntimeError: torch's own, where every route fails.

    Example:
        >>> import torch, thalweg as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x, y = torch.randn(16, 4), torch.randn(16, 1)
        >>> step = (model, lambda: torch.nn.functional.mse_loss(model(x), y), list(model.parameters()))
        >>> table = tw.compare({"backprop": tw.Backprop(), "spsa": tw.SPSA()}, step)
        >>> [row.route for row in table.rows], table.rows[0].bias, table.rows[1].saved_bytes
        (['backprop', 'spsa'], 0.0, 0)
    """
    require_positive("standard_error", standard_error)
    require_positive("seconds", seconds)
    require_integer("limit", limit, 2)
    require_integer("seed", seed, 0)
    own = as_step(step)
    chosen: Mapping[str, Any] = default_routes(own) if routes is None else routes
    if not isinstance(chosen, Mapping) or not chosen:
        raise ArgumentTypeError("routes", routes, "a mapping such as {'spsa': thalweg.SPSA()}, not empty")
    truth: Rule = reference or (Enumeration() if _has_waiting_units(own) else Backprop())
    sources = {name: _source(name, route, own) for name, route in chosen.items()}
    rows = []
    failures: list[RuntimeError] = []
    for name, (source, rule) in sources.items():
        needs = getattr(rule, "needs", None)
        try:
            # a step of its own may compute its loss in another way: hold it against this step's gradient
            exact = truth if source is own else _exact_gradient(own, truth, Key(seed))
            measured = measure(
                source,
                rule,
                exact,
                standard_error=standard_error,
                limit=limit,
                seconds=seconds,
                key=Key(seed),
            )
            row = Row(name, "yours", type(truth).__name__, needs=needs, **measured)
        except (UnsupportedError, ArgumentError, ArgumentTypeError, NonFiniteError) as refusal:
            row = Row(name, "yours", needs=needs, note=f"refused: {refusal}")
        except RuntimeError as error:
            # torch's own: a kernel without this derivative, a checkpoint, a closure that differentiates
            failures.append(error)
            row = Row(name, "yours", needs=needs, note=f"failed: {_failure(error)}")
        rows.append(row)
        if on_row is not None:
            on_row(row)
    if len(failures) == len(sources):
        # no route is to blame: the step does not run
        raise failures[0]
    size = sum(parameter.numel() for parameter in own.parameters)
    settings = {
        "parameters": size,
        "standard_error": standard_error,
        "limit": limit,
        "seconds": seconds,
        "seed": seed,
    }
    return Comparison("your step", verdict(rows, size), tuple(rows), settings)


def _has_waiting_units(step: Step) -> bool:
    return any(
        isinstance(module, BinaryNeuron) and module.gradient is None for module in step.model.modules()
    )


def _source(name: str, route: Any, own: Step) -> tuple[Step, Rule | None]:
    if isinstance(route, type):
        raise ArgumentTypeError(
            f"routes[{name!r}]", route, "a rule or a step", f"Make one: {route.__name__}()."
        )
    if isinstance(route, Rule):
        return own, route
    if isinstance(route, tuple) or callable(route):
        return as_step(route), None
    raise ArgumentTypeError(f"routes[{name!r}]", route, "a rule such as thalweg.SPSA(), or a step")


def _failure(error: RuntimeError) -> str:
    text = str(error).splitlines()[0]
    if "does not require grad" in text:
        return (
            f"{text}. This route runs the closure without gradients: enter torch.enable_grad() in the "
            "closure around what it differentiates itself"
        )
    return text


def _exact_gradient(step: Step, rule: Rule, key: Key) -> list[Tensor]:
    with isolated(step.model, step.parameters):
        found = rule.estimate(step.closure, step.parameters, key).gradients
    return [torch.zeros_like(p) if g is None else g for p, g in zip(step.parameters, found)]


def verdict(rows: list[Row], size: int) -> str:
    """The outcome in one line: the least memory, and the best direction without a backward pass."""
    measured = [row for row in rows if row.cosine is not None]
    head = f"{scaled(size)} parameters".replace("  ", " ")
    if not measured:
        return f"{head}: every route refused this step"
    exact = [row for row in measured if row.cosine is not None and abs(row.cosine - 1) < 1e-6]
    parts = []
    if exact:
        least = min(exact, key=lambda row: row.saved_bytes or 0)
        parts.append(f"exact: {least.route} keeps {scaled(least.saved_bytes, 'B')}")
    others = [row for row in measured if row not in exact]
    if others:
        best = max(others, key=lambda row: row.cosine or -1.0)
        parts.append(
            f"nearest of the others: {best.route}, cosine {best.cosine:.3f} a draw, "
            f"keeps {scaled(best.saved_bytes, 'B')}"
        )
    return f"{head}: " + "; ".join(parts)
