"""One step of learning: `backward` in place of `loss.backward()`, and what it asks of a rule or a learner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    UnsupportedError,
    describe,
    require_finite,
)
from thalweg.losses import losses_per_example as losses_per_example
from thalweg.losses import mean_loss as mean_loss
from thalweg.noise import Key, fresh_key
from thalweg.parameters import collect, fill_gradients, hand_over
from thalweg.wrappers import refuse_wrappers as refuse_wrappers

Closure = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a rule found out about a gradient.

    Args:
        loss: the loss at the unchanged parameters or the rule's best reading of it; a detached scalar.
        gradients: one tensor per parameter, or None where the parameter has no part in the loss.
        evaluations: how often the closure was called.
    """

    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    evaluations: int

    def fill(self, parameters: Sequence[Tensor]) -> None:
        """Hand each parameter its gradient through autograd, all checked before the first is.

        Raises:
            ArgumentError: no parameter has a gradient.
        """
        if self.gradients and all(gradient is None for gradient in self.gradients):
            raise ArgumentError("closure", self.loss, "a loss that depends on the parameters", _CUT)
        fill_gradients(parameters, self.gradients)


@runtime_checkable
class Rule(Protocol):
    """What `gradient=` accepts in `backward`: anything with this one method."""

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """Estimate the gradient of the mean of `closure()`; change nothing, draw only from `key`."""
        ...


@runtime_checkable
class Phase(Protocol):
    """One update of a learner: a loss of its own and the parameters it moves."""

    name: str
    parameters: Sequence[Tensor]

    def backward(self) -> Tensor:
        """Fill `.grad` of this phase's parameters and return the phase's loss, detached."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A way to learn without one global loss: two methods, and any optimizer steps between the phases.

    Example:
        >>> def train(learner, optimizer, batch):
        ...     for phase in learner.phases(batch):
        ...         optimizer.zero_grad()
        ...         phase.backward()
        ...         optimizer.step()
    """

    def phases(self, batch: Any) -> Iterable[Phase]:
        """The updates of one batch, in order; each is computed when it is reached."""
        ...

    def predict(self, inputs: Any) -> Tensor:
        """The outputs by which the learner is judged, for example logits of shape (batch, classes)."""
        ...


class Step(NamedTuple):
    """A user's own training step, as the ledger, the doctor and `compare` take it; a plain tuple will do.

    Args:
        model: the module, for names and for buffers that must come back unchanged.
        closure: called without arguments; returns a loss (scalar or one value per example), a mapping of
            named losses, or the phases of a learner.
        parameters: what the step learns.
    """

    model: nn.Module
    closure: Callable[[], Any]
    parameters: Sequence[Tensor]


def as_step(step: object) -> Step:
    """Check a training step in any of the forms in which it may come.

    Args:
        step: a `Step`, a plain tuple (model, closure, parameters), or a function of no arguments that returns
            one of the two.

    Returns:
        A `Step` whose parameters are a tuple, each tensor once.

    Raises:
        ArgumentTypeError, ArgumentError: anything else, or parameters that cannot get a gradient.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> found = as_step(lambda: (model, lambda: model(torch.ones(1, 2)).sum(), model.parameters()))
        >>> found.model is model, len(found.parameters)
        (True, 2)
    """
    expected = "a tuple (model, closure, parameters), or a function of no arguments that returns one"
    if callable(step) and not isinstance(step, nn.Module | type):
        step = step()
        expected = "a function that returns a tuple (model, closure, parameters)"
    if not isinstance(step, tuple) or len(step) != 3:
        mend = "Write thalweg.Step(model, lambda: criterion(model(x), y), model.parameters())."
        raise ArgumentTypeError("step", step, expected, mend)
    model, closure, parameters = step
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("step[0]", model, "a torch.nn.Module, the model")
    if not callable(closure):
        raise ArgumentTypeError("step[1]", closure, "a function without arguments that returns the loss")
    return Step(model, closure, collect(parameters, "step[2]"))


@dataclass(frozen=True, slots=True)
class Backprop:
    """The exact gradient by reverse-mode differentiation: `loss.backward()`; the reference for all others.

    Example:
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=Backprop())
        >>> weight.grad
        tensor([6.])
    """

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One forward and one backward."""
        with torch.enable_grad():
            loss = mean_loss(closure())
        if not loss.requires_grad:
            raise ArgumentError("closure", loss, "a loss that depends on the parameters", _CUT)
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ArgumentError("closure", loss, "a loss that depends on the parameters", _CUT)
        return Estimate(loss.detach(), tuple(gradients), 1)


_CUT = "thalweg.doctor.examine names the place where the graph was cut."


def backward(
    closure: Closure,
    parameters: Iterable[Tensor],
    *,
    gradient: Rule | None = None,
    key: Key | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Fill `.grad` of the parameters by the rule of your choice, in place of `loss.backward()`.

    Args:
        closure: computes the loss on a fixed batch; a scalar, or one value per example of shape (batch,),
            whose mean is then the loss, or a mapping of named losses, whose sum is. Some rules call it more
            than once, so it must not step anything.
        parameters: what gets a gradient, for example `model.parameters()`.
        gradient: a rule: `Backprop()` (the default), `ForwardGradient`, `SPSA`, `EvolutionStrategies`,
            `ScoreFunction`, or your own object with a method `estimate`.
        key: the name of this step's random draws; None takes a fresh one, governed by `torch.manual_seed`.
            Give one when the same draws must come again, as in the line search of L-BFGS.
        scaler: an AMP scaler, while the closure returns the plain loss: `.grad` then holds the gradient of
            the scaled loss, and `unscale_`, `step` and `update` follow as usual. Where something overflows
            no error is raised but `.grad` is infinite, so that the scaler skips the step and lowers its
            scale. None, or a disabled one, for no scaling.

    Returns:
        The loss, a detached scalar, not scaled; nan where it overflowed under a scaler.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; nothing was changed.
        NonFiniteError: the loss or a gradient is nan or infinite, and there is no scaler to see it; no
            `.grad` was changed. Under `Backprop` only the loss is checked, as in `loss.backward()`:
            non-finite gradients arrive in `.grad`.
        UnsupportedError: the closure runs a DistributedDataParallel or FSDP module under another rule than
            `Backprop`: use the bare module and `thalweg.all_reduce_gradients_`; or it is called inside
            `torch.inference_mode`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> x, y = torch.ones(8, 2), torch.zeros(8, 1)
        >>> loss = backward(lambda: nn.functional.mse_loss(model(x), y), model.parameters())
        >>> loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([1, 2]))
    """
    if not callable(closure):
        mend = "Write backward(lambda: criterion(model(x), y), ...)."
        raise ArgumentTypeError(
            "closure", closure, "a function without arguments that returns the loss", mend
        )
    rule = Backprop() if gradient is None else gradient
    if isinstance(rule, type) or not isinstance(rule, Rule):
        raise ArgumentTypeError("gradient", rule, "a rule such as thalweg.SPSA()", _not_a_rule(rule))
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    if torch.is_inference_mode_enabled():
        raise UnsupportedError("backward: inference mode makes no gradients; call it outside of the block")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ArgumentTypeError("scaler", scaler, "a torch.amp.GradScaler or None")
    found = collect(parameters)
    if scaler is None or not scaler.is_enabled():
        return _fill(closure, found, rule, key)
    return _fill_scaled(closure, found, rule, key, scaler)


def _fill(closure: Closure, found: tuple[Tensor, ...], rule: Rule, key: Key | None) -> Tensor:
    if isinstance(rule, Backprop):
        # the route the user already has: no copies, and a data-parallel wrapper keeps working
        with torch.enable_grad():
            loss = mean_loss(closure())
        if not loss.requires_grad:
            raise ArgumentError("closure", loss, "a loss that depends on the parameters", _CUT)
        loss.backward(inputs=list(found))
        if all(p.grad is None for p in found) and not _reaches(loss, found):
            raise ArgumentError("closure", loss, "a loss that depends on the parameters", _CUT)
        return loss.detach()
    with refuse_wrappers(type(rule).__name__):
        estimate = rule.estimate(closure, found, key if key is not None else draw_key())
    require_finite("the loss", estimate.loss)
    estimate.fill(found)
    return estimate.loss


def _fill_scaled(
    closure: Closure, found: tuple[Tensor, ...], rule: Rule, key: Key | None, scaler: torch.amp.GradScaler
) -> Tensor:
    raised: list[NonFiniteError] = []

    def scaled() -> Any:
        try:
            losses = closure()
        except NonFiniteError as error:
            # the closure's own refusal, which no scale mends
            raised.append(error)
            raise
        return _scale(losses, scaler)

    try:
        loss = _fill(scaled, found, rule, key)
    except NonFiniteError:
        if raised:
            raise
        hand_over(found, [torch.full_like(p, float("inf")) for p in found])
        return found[0].new_full((), float("nan")).detach()
    # through its public method: no synchronisation
    return loss / scaler.scale(torch.ones_like(loss))


def _scale(losses: Any, scaler: torch.amp.GradScaler) -> Any:
    if isinstance(losses, Mapping):
        return {name: _scale(loss, scaler) for name, loss in losses.items()}
    # what is no tensor is refused by name later
    return scaler.scale(losses) if isinstance(losses, Tensor) else losses


def _reaches(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of the loss holds a parameter; a hook may have taken all of `.grad` away again."""
    wanted = {id(parameter) for parameter in parameters}
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        left += [behind for behind, _ in node.next_functions]
    return id(loss) in wanted


def draw_key() -> Key:
    """A `Key` taken from torch's default CPU generator, so that `torch.manual_seed` governs it."""
    # under no mode of the caller's: a seed is a number even where tensors are fake
    with _disable_current_modes():
        return Key(seed=int(fresh_key(torch.empty(0))))


def _not_a_rule(rule: object) -> str:
    if isinstance(rule, type):
        return f"Make one: {rule.__name__}()."
    return f"{describe(rule)} has no method estimate(closure, parameters, key)."
