"""REBAR and RELAX: the score function, with a relaxation of the units as a control variate that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_positive
from thalweg.noise import Key, replayed
from thalweg.parameters import fill_gradients, require_finite_all
from thalweg.score import bernoulli_score
from thalweg.step import Closure, Estimate
from thalweg.stochastic.relaxation import conditional_relaxation, relaxation
from thalweg.stochastic.score_function import add
from thalweg.stochastic.tape import Tape, per_example, precise, uniform_numbers

# the second draw of each unit, independent of the one by which it decides
_SALT = Key(1).bits()


class REBAR(nn.Module):
    """The unbiased gradient through random units with the relaxed loss as control variate; three evaluations.

    Choose it where the loss can be differentiated in relaxed units (values between 0 and 1) and variance
    matters more than time. From the losses it subtracts what the same network says with the units relaxed,
    and adds the exact gradient of what was subtracted. With units in several calls (layers): 1 + 2 per call.

    Temperature and scale are parameters: in training mode each estimate adds the gradient of its own squared
    length to their `.grad`, so an optimizer that holds `rule.parameters()` lowers the variance while the
    model learns; no setting adds bias. `rule.eval()`, or `requires_grad_(False)`, leaves them as they are, at
    a third of the backward work. They are in `state_dict`. Under an AMP scaler their gradients carry the
    square of its scale: give them an Adam of their own, which does not mind.

    Unbiased when the loss of one example depends on that example's units only, and continuously on relaxed
    units: a BatchNorm in training mode, a threshold or a straight-through unit behind them makes a bias.
    Dropout masks are shared by all runs; parameters downstream get the ordinary gradient of the hard run.

    Args:
        temperature: of the relaxed units sigmoid(z / temperature), above 0.
        scale: factor of the control variate; 0 is the plain score function.

    Raises:
        ArgumentError, ArgumentTypeError: a value out of range.

    Paper:
        Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein: REBAR: low-variance, unbiased gradient estimates for
        discrete latent variable models. NeurIPS 2017, arXiv 1703.07370.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits, unit, rule = torch.zeros(64, 2, requires_grad=True), BinaryNeuron(gradient=None), REBAR()
        >>> own = torch.optim.Adam(rule.parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     own.zero_grad()
        ...     loss = backward(lambda: (unit(logits).sum(1) - 0.5) ** 2, [logits], gradient=rule)
        ...     own.step()
        >>> sorted(rule.state_dict())
        ['log_temperature', 'scale']
    """

    def __init__(self, temperature: float = 0.5, scale: float = 1.0) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ArgumentTypeError("scale", scale, "a finite number")
        if not math.isfinite(scale):
            raise ArgumentError("scale", scale, "a finite number")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """A hard run, and for each unit call two relaxed runs with a backward; draws from torch's generators.

        Raises:
            ArgumentError: the loss is a scalar, or has no derivative in relaxed units; no unit with
                `gradient=None` ran in training mode; or the first dimension of its logits is not the batch.
            UnsupportedError: such a unit ran under `torch.no_grad()`.
            NonFiniteError: a gradient is nan or infinite; no `.grad` was changed.
        """
        run = replayed(closure, [parameter.device for parameter in parameters])
        tape = Tape()
        losses = tape.run(run)
        values = precise(losses)
        own = [p for p in self.parameters() if p.requires_grad] if self.training else []
        cotangents = [torch.full_like(losses, 1 / len(losses))]
        own_gradients: tuple[Tensor | None, ...] = (None,) * len(own)
        evaluations = 1
        for index in range(len(tape.logits)):
            pair = self._relaxed_pair(tape, index, run, learning=bool(own))
            estimate = pair.estimate(values, self.scale.detach())
            cotangents.append(estimate / len(losses))
            evaluations += pair.evaluations
            if own:
                found = pair.learn(2 * estimate / len(losses), self.scale, own)
                own_gradients = tuple(add(total, part) for total, part in zip(own_gradients, found))
        gradients = tape.pull([losses, *tape.logits], cotangents, parameters)
        require_finite_all("gradients", gradients)
        if own and not isinstance(values, FakeTensor):
            fill_gradients(own, own_gradients)
        return Estimate(values.mean(), gradients, evaluations)

    def _relaxed_pair(self, tape: Tape, index: int, run: Closure, *, learning: bool) -> _Pair:
        numbers, outcome = tape.numbers[index], tape.outcomes[index].detach()
        with torch.enable_grad():
            logits = tape.logits[index].detach().to(numbers.dtype).requires_grad_()
            second = uniform_numbers(logits, tape.keys[index] ^ _SALT)
            free = self._control(tape, index, run, logits, relaxation(logits, numbers), learning)
            bound = conditional_relaxation(logits, outcome.to(logits.dtype), second)
            tied = self._control(tape, index, run, logits, bound, learning)
        score = bernoulli_score(outcome.to(logits.dtype), logits.detach())
        return _Pair(score, free, tied, self._evaluations())

    def _control(
        self, tape: Tape, index: int, run: Closure, logits: Tensor, relaxed: Tensor, learning: bool
    ) -> _Control:
        """The control variate at relaxed values of one unit call, and its derivative in the call's logits."""
        other = Tape(self._relaxing(tape, index, relaxed))
        losses = other.run(run)
        ones = torch.ones_like(losses)
        slope = None
        if losses.requires_grad:
            (slope,) = other.pull([losses], [ones], [logits], create_graph=learning)
        if slope is None:
            mend = "Use DisARM(), or RELAX(control, relaxed_loss=False)."
            expected = "losses that have a derivative in relaxed units"
            raise ArgumentError("closure", losses, expected, mend)
        return _Control(other, losses, slope)

    def _relaxing(self, tape: Tape, index: int, relaxed: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Keep what lies before call `index` hard, and relax it and all that lies behind it.

        A hard unit behind would make the control variate jump, and its derivative would know nothing of it.
        """
        temperature = self.log_temperature.exp()

        def decide(call: int, logits: Tensor, numbers: Tensor) -> Tensor:
            if call < index:
                return tape.outcomes[call]
            z = relaxed if call == index else relaxation(logits.to(numbers.dtype), numbers)
            return torch.sigmoid(z / temperature.to(z))

        return decide

    def _evaluations(self) -> int:
        return 2

    def extra_repr(self) -> str:
        """The fields, for printing."""
        temperature, scale = self.log_temperature.detach().exp(), self.scale.detach()
        return f"temperature={float(temperature):.4g}, scale={float(scale):.4g}"


class RELAX(REBAR):
    """`REBAR` with a network of your own added to the control variate, or standing alone in it.

    Choose it where the relaxed loss is a poor likeness of the loss, or where there is none: with
    `relaxed_loss=False` the loss needs no derivative and the closure runs once. The network's parameters are
    among `rule.parameters()` and learn as described in `REBAR`. An AMP scaler would scale the losses and
    not the network, which would have to follow every change of the scale: leave it out.

    Args:
        control: a differentiable module from the relaxed logits z of a unit call, of the shape of its logits
            (batch, ...), to one value per example, (batch,) or (batch, 1). With units in several calls
            (layers), a sequence of modules, one per call in the order in which they run.
        temperature: as in `REBAR`.
        scale: as in `REBAR`.
        relaxed_loss: whether the loss with relaxed units is a part of the control variate.

    Raises:
        ArgumentError, ArgumentTypeError: a value out of range.

    Paper:
        Grathwohl, Choi, Wu, Roeder, Duvenaud: Backpropagation through the void: optimizing control variates
        for black-box gradient estimation. ICLR 2018, arXiv 1711.00123.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits, unit = torch.zeros(64, 2, requires_grad=True), BinaryNeuron(gradient=None)
        >>> rule = RELAX(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), relaxed_loss=False)
        >>> loss = backward(lambda: (unit(logits).sum(1) > 1).float(), [logits], gradient=rule)
        >>> logits.grad.shape, rule.control[0][2].weight.grad.shape
        (torch.Size([64, 2]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        control: nn.Module | Sequence[nn.Module],
        temperature: float = 0.5,
        scale: float = 1.0,
        relaxed_loss: bool = True,
    ) -> None:
        super().__init__(temperature, scale)
        # a list of modules is itself a module; a Sequential is one network
        several = isinstance(control, nn.ModuleList | list | tuple)
        modules: list[Any] = list(control) if several else [control]  # type: ignore[arg-type]
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            expected = "a module from relaxed logits to one value per example, or a sequence of them"
            raise ArgumentTypeError("control", control, expected)
        if not isinstance(relaxed_loss, bool):
            raise ArgumentTypeError("relaxed_loss", relaxed_loss, "True or False")
        self.control = nn.ModuleList(modules)
        self.relaxed_loss = relaxed_loss

    def _control(
        self, tape: Tape, index: int, run: Closure, logits: Tensor, relaxed: Tensor, learning: bool
    ) -> _Control:
        if len(self.control) != len(tape.logits):
            expected = f"one module per unit call, {len(tape.logits)}"
            raise ArgumentError("control", f"{len(self.control)} of them", expected)
        values = self.control[index](relaxed)
        if not isinstance(values, Tensor) or values.shape not in ((len(relaxed),), (len(relaxed), 1)):
            raise ArgumentError("control", values, f"one value per example, shape ({len(relaxed)},)")
        values = values.reshape(-1)
        (slope,) = torch.autograd.grad(
            values.sum(), logits, create_graph=learning, retain_graph=True, materialize_grads=True
        )
        if not self.relaxed_loss:
            return _Control(tape, values, slope)
        other = super()._control(tape, index, run, logits, relaxed, learning)
        return _Control(other.tape, other.values + values, other.slope + slope)

    def _evaluations(self) -> int:
        return 2 if self.relaxed_loss else 0

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"{super().extra_repr()}, relaxed_loss={self.relaxed_loss}"


@dataclass(frozen=True, slots=True)
class _Control:
    """The control variate per example, its derivative in the logits, and the tape in which both were made."""

    tape: Tape
    values: Tensor
    slope: Tensor


@dataclass(frozen=True, slots=True)
class _Pair:
    """The control variate at the units' own relaxation, and at one drawn anew given how they came out."""

    score: Tensor
    free: _Control
    tied: _Control
    evaluations: int

    def estimate(self, losses: Tensor, scale: Tensor) -> Tensor:
        """The gradient of each example's expected loss in its logits."""
        signal = losses - scale * precise(self.tied.values)
        ordinary = scale * (self.free.slope - self.tied.slope).detach()
        return per_example(signal, self.score) * self.score + ordinary

    def learn(self, push: Tensor, scale: Tensor, own: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient in `own` of the estimate times `push`: each part in the tape in which it was made."""
        with torch.enable_grad():
            slope = scale * self.free.slope
            tied_slope, tied = scale * self.tied.slope, scale * self.tied.values
        on_values = -(push * self.score).reshape(len(push), -1).sum(1)
        totals: tuple[Tensor | None, ...] = (None,) * len(own)
        for control, outputs, cotangents in (
            (self.free, [slope], [push]),
            (self.tied, [tied_slope, tied], [-push, on_values]),
        ):
            if any(output.requires_grad for output in outputs):
                found = control.tape.pull(outputs, cotangents, own)
                totals = tuple(add(total, part) for total, part in zip(totals, found))
        return totals
