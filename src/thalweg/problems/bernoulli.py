"""Small networks of binary gates whose expected loss, gradient and estimator moments are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.noise import Key, normal
from thalweg.score import bernoulli_log_probability
from thalweg.stochastic.neurons import BinaryNeuron, StraightThrough

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


class BernoulliNet(nn.Module):
    """Inputs, K random gates, and two layers on top with a squared error: enumerable, in float64.

    Choose it to check an estimator of gradients through binary units against the truth: `exact_gradient`
    folds all 2^K joint outcomes into one batch, and `moments` gives an estimator's mean and variance with
    respect to the logits without sampling.

    Args:
        gates: K, from 1 to 16.
        inputs: features of each input.
        hidden: units of the layer above the gates.
        batch: number of examples.
        seed: names weights, inputs and targets.
        gradient: of the gates, as in `BinaryNeuron`.

    Raises:
        ArgumentError, ArgumentTypeError: a size out of range.

    Example:
        >>> from thalweg.stochastic.enumeration import Enumeration
        >>> from thalweg.step import backward
        >>> net = BernoulliNet(gates=3)
        >>> loss = backward(net, net.parameters(), gradient=Enumeration())
        >>> bool(torch.allclose(net.gate_weights.grad, net.exact_gradient()[0]))
        True
    """

    def __init__(
        self,
        gates: int = 8,
        inputs: int = 3,
        hidden: int = 4,
        batch: int = 4,
        seed: int = 0,
        gradient: StraightThrough | None = None,
    ) -> None:
        super().__init__()
        sizes = {"gates": gates, "inputs": inputs, "hidden": hidden, "batch": batch}
        for name, size in sizes.items():
            require_integer(name, size, 1)
        require_integer("seed", seed, 0)
        if gates > 16:
            raise ArgumentError("gates", gates, "at most 16, for 65536 outcomes")
        self.gates = BinaryNeuron(gradient)
        self.gate_weights = nn.Parameter(_drawn(seed, 0, inputs, gates))
        self.hidden_weights = nn.Parameter(_drawn(seed, 1, gates, hidden))
        self.output_weights = nn.Parameter(_drawn(seed, 2, hidden, 1))
        self.register_buffer("x", _drawn(seed, 3, batch, inputs))
        self.register_buffer("y", _drawn(seed, 4, batch))
        self.x: Tensor
        self.y: Tensor

    def logits(self) -> Tensor:
        """The logits of the gates, shape (batch, gates)."""
        return self.x @ self.gate_weights

    def losses(self, outcomes: Tensor) -> Tensor:
        """The loss of given outcomes of shape (..., batch, gates): a tensor of shape (..., batch)."""
        predicted = (torch.tanh(outcomes @ self.hidden_weights) @ self.output_weights).squeeze(-1)
        return (predicted - self.y) ** 2

    def forward(self) -> Tensor:
        """Draw the gates; one loss per example, shape (batch,). The module is its own closure."""
        return self.losses(self.gates(self.logits()))

    def outcomes(self) -> Tensor:
        """All joint outcomes of one example's gates, shape (2^K, K)."""
        count = self.gate_weights.shape[1]
        bits = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
        return bits.to(self.gate_weights)

    def probabilities(self) -> Tensor:
        """The probability of each of `outcomes` for each example, shape (2^K, batch), differentiable."""
        return self._chances(self.logits())

    def _chances(self, logits: Tensor) -> Tensor:
        outcomes = self._everyone()
        return bernoulli_log_probability(outcomes, logits.expand(len(outcomes), -1, -1)).sum(-1).exp()

    def _everyone(self) -> Tensor:
        return self.outcomes()[:, None, :].expand(-1, len(self.x), -1)

    def expected_loss(self) -> Tensor:
        """The mean over examples of the expected loss, differentiable."""
        return (self.probabilities() * self.losses(self._everyone())).sum(0).mean()

    def exact_gradient(self) -> tuple[Tensor, ...]:
        """The gradient of `expected_loss`, in the order of `parameters()`."""
        return torch.autograd.grad(self.expected_loss(), list(self.parameters()))

    def moments(self, estimator: Estimator) -> tuple[Tensor, Tensor]:
        """Mean and variance of an estimator of d E[loss] / d logits, over all outcomes of each example.

        Args:
            estimator: `estimator(outcomes, logits, losses)` with shapes (2^K, batch, K), (2^K, batch, K) and
                (2^K, batch) returns estimates of shape (2^K, batch, K). It may call autograd on `losses`
                with respect to `outcomes`.

        Returns:
            The mean, shape (batch, K), and the variance of each entry, shape (batch, K).
        """
        if not callable(estimator):
            raise ArgumentTypeError("estimator", estimator, "a function of outcomes, logits and losses")
        outcomes = self._everyone().clone().requires_grad_()
        logits = self.logits().detach().expand(len(outcomes), -1, -1)
        estimates = estimator(outcomes, logits, self.losses(outcomes)).detach()
        weights = self.probabilities().detach()[:, :, None]
        mean = (weights * estimates).sum(0)
        return mean, (weights * (estimates - mean) ** 2).sum(0)

    def exact_logit_gradient(self) -> Tensor:
        """The derivative of each example's expected loss with respect to its logits, shape (batch, K)."""
        logits = self.logits().detach().requires_grad_()
        return torch.autograd.grad((self._chances(logits) * self.losses(self._everyone())).sum(), logits)[0]


def _drawn(seed: int, call: int, *shape: int) -> Tensor:
    return normal(torch.empty(shape, dtype=torch.float64), Key(seed, call=call))
