"""MeZO: zeroth-order steps in the memory of inference, with a log from which a run can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.blackbox.directions import Bound, weighted_sum
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.blackbox.one_point import OnePoint
from thalweg.blackbox.slopes import Measuring
from thalweg.blackbox.spsa import SPSA
from thalweg.borrowed import loan
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_finite,
    require_integer,
    require_positive,
)
from thalweg.noise import Key
from thalweg.parameters import collect
from thalweg.step import draw_key, refuse_wrappers


class Update(NamedTuple):
    """One step of a run: all that is needed to make it again.

    Args:
        key: of the directions.
        coefficients: one per direction; the step is -lr times their sum.
        lr: learning rate of each parameter group.
        weight_decay: of each parameter group.
    """

    key: Key
    coefficients: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]


class Log:
    """The updates of a run and the rule that drew their directions; iterate it, measure it with `len`.

    Args:
        gradient: the rule.
        sizes: how many parameters each parameter group holds.
        updates: in order.
    """

    def __init__(self, gradient: Measuring, sizes: tuple[int, ...], updates: Iterable[Update] = ()) -> None:
        self.gradient, self.sizes, self.updates = gradient, sizes, list(updates)

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)


class MeZO(torch.optim.Optimizer):
    """Zeroth-order gradient descent in place: no activations, no gradients, no optimizer state.

    Choose it to fine-tune a model of which only a forward pass fits. The gradient is never made: each
    parameter's direction is drawn again from its key and added at once. The run is in `log`, some ten bytes
    per step and coefficient, from which `replay_` makes the weights again, bit for bit unless
    `restore="inplace"`. For momentum or Adam see `Streamed`.

    Args:
        params: parameters or parameter groups, as for every optimizer of torch.
        lr: learning rate, above 0: about that of gradient descent divided by the number of weights that
            matter. 1e-7 to 1e-6 for all weights of a language model.
        gradient: `SPSA` (the default: Gaussian, scale 1e-3, restore "swap"), `EvolutionStrategies`,
            `ForwardGradient` or `OnePoint`. Of `SPSA(weights="sign")` it is ZO-SGD-Sign.
        weight_decay: at least 0; parameters of less than two dimensions (biases, layer norms) are left out.
        conservative: also evaluate the unchanged parameters and the steps with either sign, on the same batch
            and random numbers, and keep the best of the three; 3 evaluations more, no weight decay.
        seed: names the directions, at least 0; None draws one, governed by `torch.manual_seed`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument out of range.

    Paper:
        Malladi, Gao, Nichani, Damian, Lee, Chen, Arora: Fine-Tuning Language Models with Just Forward Passes.
        arXiv 2305.17333, 2023.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> start = [p.detach().clone() for p in model.parameters()]
        >>> optimizer = MeZO(model.parameters(), lr=0.01, seed=0)
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: model(torch.ones(1, 4)).square().mean())
        >>> replay_(start, optimizer.log)
        >>> all(torch.equal(a, b) for a, b in zip(start, model.parameters()))
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        *,
        gradient: Measuring | None = None,
        weight_decay: float = 0.0,
        conservative: bool = False,
        seed: int | None = None,
    ) -> None:
        rule = SPSA(directions="gaussian", restore="swap") if gradient is None else gradient
        if isinstance(rule, type) or not isinstance(rule, Measuring):
            expected = "a rule over keyed directions: SPSA, EvolutionStrategies, ForwardGradient, OnePoint"
            raise ArgumentTypeError("gradient", rule, expected)
        if not isinstance(conservative, bool):
            raise ArgumentTypeError("conservative", conservative, "True or False")
        if conservative and getattr(rule, "restore", "copy") == "inplace":
            raise ArgumentError("conservative", conservative, "False with restore='inplace'")
        if seed is not None:
            require_integer("seed", seed, 0)
        self.gradient, self.conservative = rule, conservative
        self.seed = draw_key().seed if seed is None else seed
        self.log = Log(rule, ())
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in every optimizer; after the first step the log could not say whose it is.

        Raises:
            ArgumentError, ArgumentTypeError: a rate out of range, or a step has been made.
        """
        if len(self.log):
            raise ArgumentError("param_group", "a group after the first step", "all groups before it")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["params"] = list(collect(group["params"], "params"))
        require_positive("lr", group["lr"])
        if group["weight_decay"] != 0:
            require_positive("weight_decay", group["weight_decay"])
            if self.conservative:
                raise ArgumentError("weight_decay", group["weight_decay"], "0 with conservative=True")
        self.log.sizes = tuple(len(group["params"]) for group in self.param_groups)

    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one step.

        Args:
            closure: returns the loss on a fixed batch, and does nothing else: no `backward`, no `zero_grad`.
                A batch that does not fit may be summed over parts within it.

        Returns:
            The rule's reading of the loss before the step, detached.

        Raises:
            ArgumentTypeError: no closure.
            NonFiniteError: a loss is nan or infinite; nothing was changed.
        """
        if not callable(closure):
            raise ArgumentTypeError("closure", closure, "a function without arguments that returns the loss")
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        decays = tuple(float(group["weight_decay"]) for group in self.param_groups)
        key = Key(self.seed, step=len(self.log))
        evaluations = Evaluations(closure, parameters)
        with torch.no_grad(), refuse_wrappers("MeZO"):
            found = self.gradient.measure(evaluations, parameters, key)
            slopes = torch.stack(found.coefficients)
            require_finite("the slopes", slopes)
            coefficients = tuple(slopes.tolist())
            update = Update(key, coefficients, rates, decays)
            if self.conservative:
                update = self._best(update, found.bound, evaluations, parameters)
            _apply(update, found.bound, parameters, self.log.sizes)
        self.log.updates.append(update)
        return found.loss

    def _best(
        self, update: Update, bound: Bound, evaluations: Evaluations, parameters: Sequence[Tensor]
    ) -> Update:
        """The update with the sign that does best, 0 among them."""
        restore = getattr(self.gradient, "restore", "copy")
        turned = {sign: _turned(update, sign) for sign in (0, 1, -1)}
        rates = _per_parameter(update.lr, self.log.sizes)
        with eager_if(restore == "swap"), loan(parameters, restore) as move:
            losses = {0: evaluations.loss("the unchanged parameters")}
            for sign in (1, -1):
                coefficients = turned[sign].coefficients

                def moved(
                    index: int, value: Tensor, _out: Tensor | None, by: tuple[float, ...] = coefficients
                ) -> Tensor:
                    return _stepped(value.clone(), bound, by, index, rates[index], 0.0)

                move(moved)
                losses[sign] = evaluations.loss(f"the step, sign {'+' if sign > 0 else '-'}")
        return turned[min(losses, key=lambda sign: float(losses[sign]))]

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds
        own = {name: getattr(self, name) for name in ("gradient", "conservative", "seed", "log")}
        return {**super().__getstate__(), **own}

    def state_dict(self) -> dict[str, Any]:
        """Groups, seed and log, in plain numbers, and the state of a rule that has one."""
        steps = [(update.key.step, *update[1:]) for update in self.log]
        found = {**super().state_dict(), "seed": self.seed, "log": steps}
        if isinstance(self.gradient, OnePoint):
            found["gradient"] = self.gradient.state_dict()
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; training goes on with the directions it would have had."""
        seed = state_dict["seed"]
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.seed = seed
        if isinstance(self.gradient, OnePoint):
            self.gradient.load_state_dict(state_dict["gradient"])
        self.log.updates = [
            Update(Key(seed, step=step), tuple(coefficients), tuple(lr), tuple(decay))
            for step, coefficients, lr, decay in state_dict["log"]
        ]


def replay_(parameters: Iterable[Tensor], log: Log) -> None:
    """Make the steps of a run again, in place, without a model, a batch or a loss.

    Args:
        parameters: tensors that hold what the run began with, in its order; they need not require grad.
        log: `MeZO(...).log`, or a part of it that begins where `parameters` stand.

    Raises:
        ArgumentError, ArgumentTypeError: no log, or parameters that do not fit it; nothing was changed.

    Example:
        >>> weight = torch.zeros(3)
        >>> replay_([weight], Log(SPSA(), (1,), [Update(Key(0), (2.0,), (0.5,), (0.0,))]))
        >>> weight.abs()
        tensor([1., 1., 1.])
    """
    if not isinstance(log, Log):
        raise ArgumentTypeError("log", log, "the log of a MeZO")
    values = list(parameters)
    for index, value in enumerate(values):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(f"parameters[{index}]", value, "a floating-point tensor")
    if len(values) != sum(log.sizes):
        raise ArgumentError("parameters", f"{len(values)} of them", f"{sum(log.sizes)}, as in the run")
    with torch.no_grad():
        for update in log:
            _apply(update, log.gradient.bind(values, update.key), values, log.sizes)


def _apply(update: Update, bound: Bound, parameters: Sequence[Tensor], sizes: tuple[int, ...]) -> None:
    rates, decays = _per_parameter(update.lr, sizes), _per_parameter(update.weight_decay, sizes)
    for index, parameter in enumerate(parameters):
        _stepped(parameter, bound, update.coefficients, index, rates[index], decays[index])


def _stepped(
    value: Tensor, bound: Bound, coefficients: Sequence[float], index: int, rate: float, decay: float
) -> Tensor:
    """Move one parameter in place."""
    decay = decay if value.ndim > 1 else 0.0
    if len(coefficients) == 1 and not decay:
        drawn = bound.part(0, index, value.detach())
        return value if drawn is None else value.add_(drawn, alpha=-rate * coefficients[0])
    total = weighted_sum(bound, coefficients, index, value)
    if total is None:
        return value
    return value.add_(total.add_(value, alpha=decay), alpha=-rate)


def _turned(update: Update, sign: int) -> Update:
    return update._replace(coefficients=tuple(sign * c for c in update.coefficients))


def _per_parameter(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [value for value, size in zip(values, sizes) for _ in range(size)]
