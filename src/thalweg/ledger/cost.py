"""What one gradient costs: memory kept for backward, peak, operations, evaluations, time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentTypeError, require_integer
from thalweg.ledger.gradients import gradients_of
from thalweg.ledger.storages import StorageCounter
from thalweg.noise import Key
from thalweg.step import Backprop, Rule, Step, as_step
from thalweg.table import align, scaled


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one gradient; `print` it.

    Args:
        saved_bytes: kept for backward: the storages that the forward made and that live when it ends (the
            largest number over all calls of the closure, or over the phases of a learner). Parameters,
            buffers and tensors that were there before, such as the batch, are not counted; nor is the loss
            itself. Tensors that the closure keeps elsewhere are, since they are memory all the same. 0 where
            the loss has no graph.
        peak_bytes: the most bytes that lived at once, gradients included, of what the step made. What a
            kernel takes and gives back within one operator is not seen.
        operations: floating-point operations of matrix products, convolutions and attention, forward and
            backward, recomputation included, as `torch.utils.flop_counter` counts them (and CPU attention,
            which it leaves out).
        evaluations: calls of the closure, or phases of a learner.
        milliseconds: median wall time of the step, measured without any counting; nan when not measured.
        by_module: saved bytes by module path ("" is the model itself, "(outside)" what ran outside it). The
            innermost module that first saved a tensor owns it; a tensor that no saved-tensor hook saw (kept
            by checkpointing or a user's hooks) belongs to the module that made it.
        allocator_peak_bytes: on CUDA, the allocator's own peak above its level before the step; else None.
    """

    saved_bytes: int
    peak_bytes: int
    operations: int
    evaluations: int
    milliseconds: float
    by_module: Mapping[str, int] = field(default_factory=dict)
    allocator_peak_bytes: int | None = None

    def __str__(self) -> str:
        rows = [
            ["kept for backward", scaled(self.saved_bytes, "B")],
            ["peak", scaled(self.peak_bytes, "B")],
            ["operations", scaled(self.operations, "FLOP")],
            ["evaluations", str(self.evaluations)],
            ["time", f"{self.milliseconds:.3g} ms"],
        ]
        if self.allocator_peak_bytes is not None:
            rows.insert(2, ["peak, by the allocator", scaled(self.allocator_peak_bytes, "B")])
        largest = sorted(self.by_module.items(), key=lambda item: -item[1])
        for name, size in largest[:8]:
            rows.append([f"  kept by {name or '(the model itself)'}", scaled(size, "B")])
        if len(largest) > 8:
            rest = sum(size for _, size in largest[8:])
            rows.append([f"  kept by {len(largest) - 8} others", scaled(rest, "B")])
        return align(["cost of one gradient", ""], rows)


def cost(
    step: Step | tuple[Any, Any, Any] | Callable[[], Any],
    *,
    gradient: Rule | None = None,
    repeats: int = 5,
    key: Key | None = None,
) -> Cost:
    """Measure what one gradient of a step costs; when the step is too large to run, see `price`.

    Parameters, buffers, `.grad`, training flags and random states are afterwards bit for bit as before. A
    compiled model is timed as compiled and counted as the code that it was made from.

    Args:
        step: (model, closure, parameters), or a function of no arguments that returns it. The closure returns
            a loss, losses per example of shape (batch,), a mapping of losses, or the phases of a learner.
        gradient: the rule that differentiates the loss; None for `Backprop`, and for a learner.
        repeats: timed runs, at least 0; a run before them warms up, and one after them counts.
        key: the rule's random draws; None for `Key(0)`.

    Returns:
        A `Cost`.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument; nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> x = torch.ones(4, 8)
        >>> found = cost((model, lambda: model(x).sum(), model.parameters()))
        >>> found.saved_bytes == 4 * 16 * 4, dict(found.by_module), found.evaluations
        (True, {'1': 256}, 1)
    """
    found = as_step(step)
    rule = lent_rule(gradient, found)
    require_integer("repeats", repeats, 0)
    key = require_key(key)
    with isolated(found.model, found.parameters):
        milliseconds = _time(found, rule, key, repeats) if repeats else float("nan")
        allocator = _allocator_peak(found, rule, key)
        counter, evaluations = count(found, rule, key)
    return Cost(
        saved_bytes=counter.saved_bytes,
        peak_bytes=counter.peak_bytes,
        operations=counter.operations,
        evaluations=evaluations,
        milliseconds=milliseconds,
        by_module=dict(counter.by_module),
        allocator_peak_bytes=allocator,
    )


def saved_bytes(closure: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Bytes that a forward keeps for backward; the quick question when nothing else is asked.

    Args:
        closure: runs the forward and returns its result, which itself is not counted unless the graph saved
            it. Gradients are enabled.
        model: the module whose buffers come back unchanged, or None.

    Raises:
        ArgumentTypeError: not a function.

    Example:
        >>> x = torch.ones(10, requires_grad=True)
        >>> saved_bytes(lambda: x.exp().sum()), saved_bytes(lambda: x.sum())
        (40, 0)
    """
    if not callable(closure):
        raise ArgumentTypeError("closure", closure, "a function without arguments that runs the forward")

    def run(counter: StorageCounter) -> None:
        with torch.enable_grad():
            _watched(counter)(closure)

    with isolated(model, ()):
        return _counted(run, model, None).saved_bytes


def count(step: Step, rule: Rule, key: Key, fake: FakeTensorMode | None = None) -> tuple[StorageCounter, int]:
    """Run a step once under a `StorageCounter`; returns it and the number of evaluations."""
    evaluations = 0

    def run(counter: StorageCounter) -> None:
        nonlocal evaluations
        left = gradients_of(step, rule, key, watch=_watched(counter), phase=counter.phase)
        evaluations = left.evaluations

    return _counted(run, step.model, fake), evaluations


def require_rule(gradient: Rule | None, argument: str = "gradient") -> Rule:
    """The rule that was given, `Backprop` for None, or a refusal."""
    if gradient is None:
        return Backprop()
    if isinstance(gradient, type) or not isinstance(gradient, Rule):
        mend = f"Make one: {gradient.__name__}()." if isinstance(gradient, type) else ""
        raise ArgumentTypeError(argument, gradient, "a rule such as thalweg.Backprop(), or None", mend)
    return gradient


def lent_rule(gradient: Rule | None, step: Step) -> Rule:
    """A rule to measure with: a copy, since a rule may learn; the step's own model stays the one it was.

    A rule that cannot be copied (it holds a process group, say) is lent itself.
    """
    rule = require_rule(gradient)
    own = (*step.model.modules(), *step.model.parameters(), *step.model.buffers(), *step.parameters)
    try:
        return copy.deepcopy(rule, {id(each): each for each in own})
    except (TypeError, RuntimeError):
        return rule


def require_key(key: Key | None) -> Key:
    """The key that was given, `Key(0)` for None, or a refusal."""
    if key is None:
        return Key(0)
    if not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    return key


def _watched(counter: StorageCounter) -> Callable[[Callable[[], Any]], Any]:
    def call(closure: Callable[[], Any]) -> Any:
        with counter.forward():
            result = closure()
        # without a graph nothing waits for a backward, whatever else a rule may keep
        if counter.hand_out(result):
            counter.close_forward()
        return result

    return call


def _counted(
    run: Callable[[StorageCounter], None], model: nn.Module | None, fake: FakeTensorMode | None
) -> StorageCounter:
    with torch.random.fork_rng():
        counter = StorageCounter(model, fake)
        try:
            with counter.counting():
                run(counter)
            return counter
        except RuntimeError as error:
            # torch.func.grad and its kin refuse hooks; then only the attribution loses its savers
            if "saved tensor hooks" not in str(error):
                raise
    counter = StorageCounter(model, fake, attribute=False)
    with counter.counting():
        run(counter)
    return counter


def _time(step: Step, rule: Rule, key: Key, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        _clear(step)
        _synchronize(step)
        start = time.perf_counter()
        gradients_of(step, rule, key)
        _synchronize(step)
        times.append(1000 * (time.perf_counter() - start))
    _clear(step)
    return statistics.median(times[1:])


def _allocator_peak(step: Step, rule: Rule, key: Key) -> int | None:
    device = step.parameters[0].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    gradients_of(step, rule, key)
    torch.cuda.synchronize(device)
    _clear(step)
    return torch.cuda.max_memory_allocated(device) - before


def _clear(step: Step) -> None:
    for parameter in (*step.parameters, *step.model.parameters()):
        parameter.grad = None


def _synchronize(step: Step) -> None:
    device = step.parameters[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
