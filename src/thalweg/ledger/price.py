"""What a route would cost, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger.cost import count, lent_rule, require_key, require_rule
from thalweg.ledger.fake import FakeMode, building, explained, kept
from thalweg.noise import Key
from thalweg.step import Rule, Step, as_step
from thalweg.table import align, scaled


@dataclass(frozen=True, slots=True)
class Price:
    """What one gradient by one route would cost; the fields mean what they mean in `Cost`.

    Args:
        route: the name under which the route was given.
        saved_bytes: kept for backward.
        peak_bytes: the most bytes alive at once of what the step makes, parameters not counted.
        operations: floating-point operations.
        evaluations: calls of the closure, or phases of a learner.
        parameter_bytes: what the parameters themselves take.
        by_module: saved bytes by module path.
        estimated: operators in the step whose fake kernel does not say what the real one keeps, so that the
            bytes are an estimate; empty when the count is exact.
    """

    route: str
    saved_bytes: int
    peak_bytes: int
    operations: int
    evaluations: int
    parameter_bytes: int
    by_module: Mapping[str, int] = field(default_factory=dict)
    estimated: tuple[str, ...] = ()


class Prices(list[Price]):
    """A list of `Price` that prints as a table."""

    def __str__(self) -> str:
        rows = [
            [
                each.route,
                mark + scaled(each.saved_bytes, "B"),
                mark + scaled(each.peak_bytes, "B"),
                scaled(each.operations, "FLOP"),
                str(each.evaluations),
            ]
            for each in self
            for mark in ["~" if each.estimated else ""]
        ]
        return align(["route", "kept for backward", "peak", "operations", "evaluations"], rows)


def price(
    step: Step | tuple[Any, Any, Any] | Callable[[], Any],
    *,
    routes: Sequence[Rule | None] | Mapping[str, Rule | None] | None = None,
    key: Key | None = None,
) -> Prices:
    """Predict memory and operations of a step under fake tensors: shapes without data.

    The same code counts as in `cost`, so that the two agree as far as fake kernels describe real ones. They
    do on the CPU, fused attention included; not for the CPU's fused LSTM, whose workspace torch leaves out.
    On CUDA torch predicts which attention kernel will run, and with it what attention keeps; that is an
    estimate. `Price.estimated` names such operators. Prices are for the device that the step's tensors are
    on.

    Parameters, buffers, `.grad`, training flags and random states are afterwards bit for bit as before.

    Args:
        step: a function of no arguments that builds the model and returns (model, closure, parameters): it
            runs under fake tensors and allocates no weights. Or such a tuple, or a function returning one,
            over a model that exists; its tensors are then only looked at.
        routes: rules, by name or in a list; None stands for `Backprop`, and for what a learner does. Left
            out: that one alone.
        key: the rules' random draws; None for `Key(0)`.

    Returns:
        A list of `Price` in the order of the routes, which prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument; nothing was changed.
        UnsupportedError: the step reads a value (`.item()`, `if tensor:`, a shape that depends on data),
            which fake tensors do not have; or a route swaps the weights of a model that exists (`SPSA` with
            restore="swap"): then pass a function that builds the model.

    Example:
        >>> def step():
        ...     model = torch.nn.Linear(100_000, 100_000)  # 40 GB of weights, never allocated
        ...     return model, lambda: model(torch.ones(2, 100_000)).exp().sum(), model.parameters()
        >>> found = price(step)
        >>> found[0].saved_bytes == (100_000 + 100_000) * 2 * 4
        True
    """
    rules = _named(routes)
    key = require_key(key)
    fake = FakeMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng():
        if callable(step) and not isinstance(step, tuple):
            with fake, explained(), building():
                found = as_step(step)
        else:
            found = as_step(step)
        return Prices(_price(found, name, rule, key, fake) for name, rule in rules.items())


def _price(step: Step, name: str, rule: Rule, key: Key, fake: FakeMode) -> Price:
    rule = lent_rule(rule, step)
    # the caller's autocast remembers weights that it has cast: neither its casts nor ours are for the other
    torch.clear_autocast_cache()
    try:
        with isolated(step.model, step.parameters), kept(step), fake, explained():
            counter, evaluations = count(step, rule, key, fake)
    finally:
        torch.clear_autocast_cache()
    return Price(
        route=name,
        saved_bytes=counter.saved_bytes,
        peak_bytes=counter.peak_bytes,
        operations=counter.operations,
        evaluations=evaluations,
        parameter_bytes=sum(p.numel() * p.element_size() for p in step.parameters),
        by_module=dict(counter.by_module),
        estimated=tuple(
            sorted(name for operator, name in _ESTIMATED.items() if operator in counter.operators)
        ),
    )


_aten = torch.ops.aten
_ESTIMATED = {
    _aten.mkldnn_rnn_layer: "mkldnn_rnn_layer",
    _aten._cudnn_rnn: "_cudnn_rnn",
    _aten._scaled_dot_product_flash_attention: "_scaled_dot_product_flash_attention",
    _aten._scaled_dot_product_efficient_attention: "_scaled_dot_product_efficient_attention",
    _aten._scaled_dot_product_cudnn_attention: "_scaled_dot_product_cudnn_attention",
}


def _named(routes: Sequence[Rule | None] | Mapping[str, Rule | None] | None) -> dict[str, Rule]:
    if routes is None:
        routes = [None]
    if isinstance(routes, Mapping):
        named = {name: require_rule(rule, f"routes[{name!r}]") for name, rule in routes.items()}
    elif isinstance(routes, Sequence) and not isinstance(routes, str):
        rules = [require_rule(rule, f"routes[{index}]") for index, rule in enumerate(routes)]
        named = {_name(rule): rule for rule in rules}
        if len(named) < len(rules):
            raise ArgumentError(
                "routes", routes, "different rules", "Name them: {'first': ..., 'second': ...}."
            )
    else:
        mend = "Write routes=[thalweg.Backprop(), thalweg.SPSA()]."
        raise ArgumentTypeError("routes", routes, "a list of rules or a mapping from names to rules", mend)
    if not named:
        raise ArgumentError("routes", routes, "at least one rule")
    return named


def _name(rule: Rule) -> str:
    text = repr(rule)
    return type(rule).__name__ if text.startswith("<") else text
