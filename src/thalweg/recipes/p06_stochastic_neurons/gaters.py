"""The gaters that are held against each other, and the network around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.step import Backprop, Rule
from thalweg.stochastic import (
    AdaptiveL1Sparsity,
    BinaryNeuron,
    ConditionalLinear,
    KLSparsity,
    MinimumVariance,
    NoisyRectifier,
    ScoreFunction,
    StochasticTimesSmooth,
    StraightThrough,
)

Sparsity = KLSparsity | AdaptiveL1Sparsity


class Rectifier(NoisyRectifier):
    """The noisy rectifier without its noise: the paper's sparse baseline, never random."""

    def forward(self, logits: Tensor, threshold: Tensor | float | None = None) -> Tensor:
        """Rectify, in training and in evaluation alike."""
        return torch.relu(logits)


class Sigmoid(nn.Module):
    """A gate that is never closed: the paper's dense baseline, with noise before the sigmoid or without.

    Args:
        noise: standard deviation of normal noise on the logits in training, at least 0.
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, logits: Tensor, threshold: Tensor | float | None = None) -> Tensor:
        """The gate's value, between 0 and 1."""
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return torch.sigmoid(logits)

    def probability(self, logits: Tensor) -> Tensor:
        """Its value without noise."""
        return torch.sigmoid(logits)


@dataclass(frozen=True, slots=True)
class Gater:
    """One way to gate the experts, and how it is trained.

    Args:
        name: in tables and figures.
        gate: makes the unit.
        sparsity: makes the cost that keeps gates closed, given the target fraction; None for no cost.
        gater_rate: factor on the learning rate of the gater's own weights.
        momentum: of the optimizer.
        share: of the experts that the network has, so that a dense one does no more work than a sparse one.
        rule: makes the rule for the gradient; None for plain backpropagation.
        reported: the paper's test error in per cent, full set and 2000 experts; None where it has none.
        stochastic: whether it is one of the paper's four, and no baseline or control.
        control: "" for none; "frozen gater" never moves the gater's weights; "shuffled losses" hands each
            example another one's loss.
    """

    name: str
    gate: Callable[[], nn.Module]
    sparsity: Callable[[float], Sparsity] | None = None
    gater_rate: float = 1.0
    momentum: float = 0.0
    share: float = 1.0
    rule: Callable[[], Rule] | None = None
    reported: float | None = None
    stochastic: bool = False
    control: str = ""


def gaters(target: float) -> tuple[Gater, ...]:
    """The paper's four, its baselines at equal and at full work, and the controls; `target` is the share."""

    def kl(weight: float) -> Callable[[float], Sparsity]:
        return lambda share: KLSparsity(share, weight)

    score: dict[str, Any] = {
        "gate": lambda: BinaryNeuron(gradient=None),
        "sparsity": kl(0.1),
        "gater_rate": 0.01,
        "rule": lambda: ScoreFunction(baseline=MinimumVariance()),
    }
    straight: dict[str, Any] = {"gate": lambda: BinaryNeuron(StraightThrough()), "sparsity": kl(0.1)}
    return (
        Gater("straight-through", reported=1.39, stochastic=True, **straight),
        Gater(
            "straight-through, sigmoid slope",
            gate=lambda: BinaryNeuron(StraightThrough(slope="sigmoid")),
            sparsity=kl(0.1),
        ),
        Gater(
            "stochastic times smooth",
            gate=StochasticTimesSmooth,
            sparsity=kl(0.001),
            momentum=0.5,
            reported=1.96,
            stochastic=True,
        ),
        Gater("score function", reported=1.89, stochastic=True, **score),
        Gater(
            "noisy rectifier",
            gate=NoisyRectifier,
            sparsity=AdaptiveL1Sparsity,
            reported=1.87,
            stochastic=True,
        ),
        Gater("rectifier, no noise", gate=Rectifier, sparsity=AdaptiveL1Sparsity, reported=1.60),
        Gater("dense sigmoid, equal work", gate=Sigmoid, share=target, reported=1.92),
        Gater("dense sigmoid + noise, equal work", gate=lambda: Sigmoid(1.0), share=target, reported=1.87),
        Gater("dense sigmoid, all experts", gate=Sigmoid),
        Gater("control: frozen gater", control="frozen gater", **straight),
        Gater("control: shuffled losses", control="shuffled losses", **score),
    )


class GatedNetwork(nn.Module):
    """Experts, gates and a linear read-out.

    Args:
        gater: which gates.
        inputs: size of the input.
        classes: number of classes.
        experts: of a gater with all of them.
        bottleneck: units of the gater's hidden layer.
        target: fraction of gates to be open.
    """

    def __init__(
        self, gater: Gater, *, inputs: int, classes: int, experts: int, bottleneck: int, target: float
    ) -> None:
        super().__init__()
        self.layer = ConditionalLinear(
            inputs,
            max(1, round(gater.share * experts)),
            bottleneck,
            gater.gate(),
            sparsity=None if gater.sparsity is None else gater.sparsity(target),
        )
        self.head = nn.Linear(self.layer.experts.out_features, classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def gater_parameters(self) -> list[nn.Parameter]:
        """The weights that decide which gates open."""
        return [*self.layer.bottleneck.parameters(), *self.layer.gater.parameters()]

    def other_parameters(self) -> list[nn.Parameter]:
        """The experts and the read-out."""
        return [*self.layer.experts.parameters(), *self.head.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        logits: Tensor = self.head(self.layer(x))
        return logits

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy per example, shape (batch,), and the sparsity cost's gradient.

        The cost adds its gradient and not its value: it is the same for all examples and no outcome of a gate
        changes it, so that a rule which learns from the losses' values has nothing to learn from it.
        """
        losses = nn.functional.cross_entropy(self(x), labels, reduction="none")
        if self.layer.sparsity is None:
            return losses
        penalty = self.layer.penalty()
        return losses + (penalty - penalty.detach())


def rule_of(gater: Gater) -> Rule:
    """The rule that trains a gater: fresh, because a baseline learns."""
    return Backprop() if gater.rule is None else gater.rule()
