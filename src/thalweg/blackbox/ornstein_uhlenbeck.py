"""Ornstein-Uhlenbeck adaptation: weights that wander around their means, and means that follow reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from thalweg import noise
from thalweg.borrowed import borrowed
from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive
from thalweg.losses import mean_loss
from thalweg.noise import Key
from thalweg.parameters import collect
from thalweg.step import draw_key

_SHARED = "shared"


class OrnsteinUhlenbeck(torch.optim.Optimizer):
    """Learn in continuous time from a stream of rewards, one evaluation a tick and no gradient.

    Choose it where the noise is there anyhow or there is no pair of evaluations to compare: control, hardware
    and simulators that run on while they learn. Parameters theta wander around means mu, and mu moves towards
    where theta was when the reward r, minus the loss, came out above its running mean:

        d theta = pull (mu - theta) dt + spread dW
        d mu    = rate (r - mean r) (theta - mu) dt
        d mean r = reward_rate (r - mean r) dt

    by Euler-Maruyama with step `tick`. mu starts at the parameters, the mean reward at the first reward. With
    rate 0 each parameter ends up with variance spread^2 / (2 pull), times 1 / (1 - pull tick / 2) of the
    discretisation. Learning needs rewards of the order of 1: the means diverge when rate times the spread of
    the reward is large.

    Args:
        params: parameters or parameter groups, as for every optimizer of torch; the four numbers may differ
            between groups.
        spread: Sigma, above 0, in units of the parameters per square root of time.
        pull: lambda, above 0, per unit of time.
        rate: eta, at least 0.
        reward_rate: rho, at least 0, per unit of time; 0 keeps the first reward as the mean.
        tick: dt, above 0; pull * tick below 2 and reward_rate * tick at most 1.
        seed: names the noise, at least 0; None draws one, governed by `torch.manual_seed`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument out of range.

    Paper:
        García Fernández, Ahmad, van Gerven: Ornstein-Uhlenbeck Adaptation as a Mechanism for Learning in
        Brains and Machines. Entropy 26, 2024.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> adaptation = OrnsteinUhlenbeck([weight], seed=0)
        >>> for _ in range(2000):
        ...     loss = adaptation.step(lambda: (weight - 1.0).square().sum())
        >>> with adaptation.at_means():
        ...     bool((weight - 1.0).abs() < 0.3)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        spread: float = 0.3,
        pull: float = 1.0,
        rate: float = 1.0,
        reward_rate: float = 1.0,
        tick: float = 0.05,
        seed: int | None = None,
    ) -> None:
        if seed is not None:
            require_integer("seed", seed, 0)
        require_positive("tick", tick)
        if reward_rate != 0:
            require_positive("reward_rate", reward_rate)
        if reward_rate * tick > 1:
            raise ArgumentError("reward_rate", reward_rate, f"at most 1 / tick = {1 / tick}")
        self._tick, self._reward_rate = tick, reward_rate
        super().__init__(params, {"spread": spread, "pull": pull, "rate": rate})
        # kept under a name, where `state_dict` finds it beside the means
        shared = {"seed": draw_key().seed if seed is None else seed, "ticks": 0, "reward": None}
        cast(dict[Any, Any], self.state)[_SHARED] = shared

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in every optimizer; its means start at its parameters.

        Raises:
            ArgumentError, ArgumentTypeError: a number out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["params"] = list(collect(group["params"], "params"))
        require_positive("spread", group["spread"])
        require_positive("pull", group["pull"])
        if group["rate"] != 0:
            require_positive("rate", group["rate"])
        if group["pull"] * self._tick >= 2:
            raise ArgumentError("pull", group["pull"], f"below 2 / tick = {2 / self._tick}")
        for parameter in group["params"]:
            self.state[parameter] = {"mean": parameter.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Live through one tick.

        Args:
            closure: the loss at the parameters as they are now, a scalar or one per example; for a stream of
                rewards `lambda: -reward`. Runs once, under `torch.no_grad()`.

        Returns:
            The loss, a detached scalar.

        Raises:
            NonFiniteError: the loss is nan or infinite; nothing moved.
            ArgumentTypeError, ArgumentError: no function, or what it returned is no loss.
        """
        if not callable(closure):
            raise ArgumentTypeError("closure", closure, "a function without arguments that returns the loss")
        loss = mean_loss(closure()).detach()
        shared, tick = cast(dict[Any, Any], self.state)[_SHARED], self._tick
        reward = -loss.to(torch.promote_types(loss.dtype, torch.float32))
        mean_reward = reward.clone() if shared["reward"] is None else shared["reward"].to(reward)
        surprise = reward - mean_reward
        key, index = Key(shared["seed"], step=shared["ticks"]), 0
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter]["mean"]
                away = parameter - mean
                kick = noise.normal(parameter, key.at(call=index))
                parameter.sub_(away, alpha=group["pull"] * tick)
                parameter.add_(kick, alpha=group["spread"] * math.sqrt(tick))
                mean.add_(away.mul_((group["rate"] * tick * surprise).to(away.device, away.dtype)))
                index += 1
        shared["reward"] = mean_reward + self._reward_rate * tick * surprise
        shared["ticks"] += 1
        return loss

    @contextmanager
    def at_means(self) -> Iterator[None]:
        """Put the means in place of the wandering parameters for a body, as for evaluating; bit for bit."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        with torch.no_grad(), borrowed(parameters, lambda i, _: self.state[parameters[i]]["mean"]):
            yield
