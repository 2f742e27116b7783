"""A small language model, pretrained by backprop, learns a new way of writing from forward passes alone.

The task is the same text with an underscore for every space. Percentages are on one scale for all rows: 0 is
the loss of the pretrained model on the new text, 100 the loss to which Adam brings it in the steps that it is
given. MeZO may call the model `BUDGET` times as often as Adam does; of a step of Adam only the forward pass
is counted, though its backward pass costs two more.

Step sizes were chosen on the held-out text of seeds that judge nothing: Adam's among 0.0005, 0.001, 0.002,
0.004; MeZO's in steps of at most two around what is written here, below those at which it diverges.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import thalweg as tw
from thalweg.blackbox.estimate import Evaluations
from thalweg.blackbox.slopes import Slopes
from thalweg.lab import Claim
from thalweg.noise import Key, rademacher
from thalweg.recipes.p15_zeroth_order.language_model import LanguageModel, adapt_, corpus, windows
from thalweg.recipes.p15_zeroth_order.orders import SOURCE

SHIFT, BUDGET = "underscores", 50
BATCH, LENGTH, RANK = 8, 64, 1
PRETRAINING_RATE, PRETRAINING_BATCH = 5e-3, 16
POINTS = 10


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the panel.

    Args:
        name: as it is shown.
        optimizer: "Adam" on exact gradients, "MeZO", or "zeroth-order Adam": Adam on MeZO's gradients.
        learning_rate: of that optimizer.
        learns: all weights, or LoRA: thin matrices of rank `RANK` beside each linear layer, and the biases.
        pretrained: False to start from random weights.
        scale: of the step along a direction, where there is one.
        noise: True for the control whose differences of losses have lost their signs.
    """

    name: str
    optimizer: Literal["Adam", "MeZO", "zeroth-order Adam"]
    learning_rate: float
    learns: Literal["all weights", "LoRA"] = "all weights"
    pretrained: bool = True
    scale: float = 1e-3
    noise: bool = False


ADAM = Route("Adam, all weights", "Adam", 1e-3)
ALL = Route("MeZO, all weights", "MeZO", 1e-4)
LORA = Route("MeZO, LoRA", "MeZO", 4e-3, learns="LoRA", scale=1e-2)
RANDOM = replace(ALL, name="MeZO from random weights", pretrained=False)
ADAPTIVE = Route("zeroth-order Adam, LoRA", "zeroth-order Adam", 3e-3, learns="LoRA", scale=1e-2)
ADAM_RANDOM = replace(ADAM, name="Adam from random weights", pretrained=False)
ROUTES = (
    ADAM,
    ALL,
    LORA,
    RANDOM,
    ADAPTIVE,
    ADAM_RANDOM,
    # on plain MeZO, whose steps are as long as the slopes, tossed signs soon end in overflow
    replace(ADAPTIVE, name="control: zeroth-order Adam, LoRA, signs tossed", noise=True),
)
Results = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class CoinFlipped:
    """A control: the steps of a rule, each forward or backward by the toss of a coin.

    Args:
        rule: whose steps.
    """

    rule: tw.SPSA

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Any:
        """The rule's directions."""
        return self.rule.bind(parameters, key)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """The rule's coefficients, their common sign drawn."""
        found = self.rule.measure(evaluations, parameters, key)
        sign = rademacher(found.loss, key.at(call=1_000_000))
        return replace(found, coefficients=tuple(sign * each for each in found.coefficients))

    def estimate(self, closure: Any, parameters: Sequence[Tensor], key: Key) -> tw.Estimate:
        """As of every rule."""
        return self.measure(Evaluations(closure, parameters), parameters, key).estimate(parameters)


def model_of(seed: int) -> LanguageModel:
    """The model with the random weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(longest=LENGTH)


def pretrain(seed: int, steps: int, tick: Callable[[], Any] = lambda: None) -> LanguageModel:
    """Train on the text as it is by Adam, the step size rising over a tenth of the steps and then falling."""
    model, text = model_of(seed), corpus(seed).train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=PRETRAINING_RATE)
    for step in range(steps):
        part = (step + 1) / steps
        optimizer.param_groups[0]["lr"] = PRETRAINING_RATE * min(10 * part, (1 - part) / 0.9 + 1e-3)
        optimizer.zero_grad()
        tw.backward(_closure(model, windows(text, PRETRAINING_BATCH, LENGTH, generator)), model.parameters())
        optimizer.step()
        tick()
    return model


def fine_tune(route: Route, pretrained: Mapping[str, Tensor], adam_steps: int, seed: int) -> dict[str, Any]:
    """Train by one route until its evaluations are spent, and judge on the test text at some points.

    Args:
        route: one of `ROUTES`.
        pretrained: what `pretrain` came to, as of `state_dict`; a route from random weights leaves it.
        adam_steps: of the reference; the others may evaluate the loss `BUDGET` times as often.
        seed: of the text, its order, the random weights, the adapters and the directions.

    Returns:
        `start` and `final`, losses on the test text in nats a letter; `held_out`, the final loss on the text
        that settings are chosen on; `evaluations`; `learned`, how many weights; `curve`, (evaluations, loss);
        `sample`, what the model writes.
    """
    text, generator = corpus(seed, SHIFT), torch.Generator().manual_seed(seed)
    model = model_of(seed)
    if route.pretrained:
        model.load_state_dict(dict(pretrained))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learned = adapt_(model, RANK) if route.learns == "LoRA" else list(model.parameters())
    step, calls = _stepper(route, learned, seed)
    evaluations = adam_steps if route.optimizer == "Adam" else BUDGET * adam_steps
    curve = [(0, judge(model, text.test))]
    for index in range(evaluations // calls):
        step(_closure(model, windows(text.train, BATCH, LENGTH, generator)))
        done = calls * (index + 1)
        if done * POINTS // evaluations > (done - calls) * POINTS // evaluations:
            curve.append((done, judge(model, text.test)))
    return {
        "start": curve[0][1],
        "final": curve[-1][1],
        "held_out": judge(model, text.held_out),
        "evaluations": curve[-1][0],
        "learned": sum(parameter.numel() for parameter in learned),
        "curve": curve,
        "sample": model.write(text.test[:LENGTH], 100, torch.Generator().manual_seed(seed)),
    }


def _stepper(route: Route, learned: Sequence[nn.Parameter], seed: int) -> tuple[Callable[[Any], Any], int]:
    """What makes one step of a closure, and how often it evaluates it."""
    if route.optimizer == "Adam":
        return _by_adam(route, learned, tw.Backprop(), seed, (0.9, 0.999)), 1
    rule = tw.SPSA(scale=route.scale, directions="gaussian", restore="swap")
    drawn = CoinFlipped(rule) if route.noise else rule
    if route.optimizer == "zeroth-order Adam":
        return _by_adam(route, learned, tw.Streamed(drawn), seed, (0.9, 0.99)), 2
    return tw.MeZO(learned, lr=route.learning_rate, gradient=drawn, seed=seed).step, 2


def _by_adam(
    route: Route, learned: Sequence[nn.Parameter], rule: tw.Rule, seed: int, betas: tuple[float, float]
) -> Callable[[Any], None]:
    optimizer, made = torch.optim.Adam(learned, lr=route.learning_rate, betas=betas), 0

    def step(closure: Any) -> None:
        nonlocal made
        optimizer.zero_grad()
        tw.backward(closure, learned, gradient=rule, key=Key(seed, step=made))
        optimizer.step()
        made += 1

    return step


def _closure(model: LanguageModel, pieces: Tensor) -> Callable[[], Tensor]:
    return lambda: model.loss(pieces)


@torch.no_grad()
def judge(model: LanguageModel, text: Tensor, most: int = 256) -> float:
    """The loss in nats a letter on `most` pieces, spread evenly over a text."""
    count = min(most, (len(text) - 1) // LENGTH)
    starts = torch.linspace(0, len(text) - LENGTH - 1, count).long()[:, None]
    return float(model.loss(text[starts + torch.arange(LENGTH + 1)]))


def recovered(found: Results) -> dict[str, list[float]]:
    """By route and seed, how far the final loss lies from the pretrained start (0) to Adam's end (100)."""
    return {
        name: [
            100 * (adam["start"] - each["final"]) / (adam["start"] - adam["final"])
            for each, adam in zip(results, found[ADAM.name], strict=True)
        ]
        for name, results in found.items()
    }


def claims(found: Results, *, decisive: bool) -> list[Claim]:
    """The two lines of acceptance on losses (of means over seeds), and what the other rows came to.

    Args:
        found: results of `fine_tune` by the route's name, one for each seed.
        decisive: False for a run of seconds, which shows the numbers and decides nothing.
    """
    shares = recovered(found)
    means = {name: statistics.fmean(values) for name, values in shares.items()}
    most = max(
        each["evaluations"] / adam["evaluations"]
        for name in (ALL.name, LORA.name)
        for each, adam in zip(found[name], found[ADAM.name], strict=True)
    )
    better = max((ALL.name, LORA.name), key=lambda name: means[name])
    statement = f"{ALL.name}, or {LORA.name} (here: {better}) recovers at least 60 % of Adam's loss drop"
    holds = means[better] >= 60 and most <= BUDGET
    lines = [
        (f"{statement} with at most {BUDGET}x its forward evaluations", shares[better], means[better], holds),
        (
            f"{RANDOM.name}, same evaluations: recovers less than half of what {ALL.name} does, "
            f"{means[ALL.name]:.3g} %",
            shares[RANDOM.name],
            means[RANDOM.name],
            means[RANDOM.name] < 0.5 * means[ALL.name] and means[ALL.name] > 0,
        ),
    ]
    judged = [
        Claim(text, SOURCE, mean, _spread(values), holds if decisive else None, asserted=decisive)
        for text, values, mean, holds in lines
    ]
    judged += [
        Claim(
            f"{name}: % of Adam's loss drop recovered", None, means[name], _spread(shares[name]), None, False
        )
        for name in found
        if name not in (ADAM.name, better, RANDOM.name)
    ]
    own = [
        100 * (mezo["start"] - mezo["final"]) / (adam["start"] - adam["final"])
        for mezo, adam in zip(found[RANDOM.name], found[ADAM_RANDOM.name], strict=True)
    ]
    statement = f"{RANDOM.name}: % of the loss drop of {ADAM_RANDOM.name}"
    return [*judged, Claim(statement, None, statistics.fmean(own), _spread(own), None, asserted=False)]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
