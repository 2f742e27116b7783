"""The two networks that routes are compared on: one smooth, one that must decide in hard bits."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from thalweg.stochastic import BinaryNeuron, Concrete, StraightThrough


class SmoothClassifier(nn.Module):
    """A tanh network: every route that needs a derivative has one.

    Args:
        inputs: number of input values.
        classes: number of classes.
        width: units of each of the two hidden layers.
        trained: "all", or "last" to cut the gradient below the last layer (a control).
    """

    def __init__(self, inputs: int, classes: int, width: int = 48, trained: str = "all") -> None:
        super().__init__()
        self.trained = trained
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, classes)

    def judged(self) -> tuple[nn.Parameter, ...]:
        """The parameters by whose gradient a route is judged: all."""
        return tuple(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for inputs of shape (batch, ...)."""
        features = self.body(inputs.flatten(1))
        logits: Tensor = self.head(features.detach() if self.trained == "last" else features)
        return logits

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy per example, shape (batch,)."""
        return nn.functional.cross_entropy(self(inputs), labels, reduction="none")


class HardClassifier(nn.Module):
    """A network that has to say what it saw in a few random bits before it may answer.

    With `bits` binary units between encoder and decoder the expected loss is a sum over 2^bits codes, and the
    decoder sees nothing but the code: the exact gradient is cheap, so each estimator has a true reference.

    Args:
        inputs: number of input values.
        classes: number of classes.
        gradient: how the units are differentiated: a `StraightThrough` or `Concrete`, None (left to
            `thalweg.backward`), "expected" for the exact expectation over all codes, or "cut" for no gradient
            at all (a control).
        width: hidden units of encoder and decoder.
        bits: number of binary units.
    """

    codes: Tensor

    def __init__(
        self,
        inputs: int,
        classes: int,
        gradient: StraightThrough | Concrete | str | None,
        width: int = 48,
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.gradient = gradient
        self.encoder = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, bits))
        self.units = BinaryNeuron(gradient=StraightThrough() if isinstance(gradient, str) else gradient)
        self.decoder = nn.Sequential(nn.Linear(bits, width), nn.Tanh(), nn.Linear(width, classes))
        codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)))
        self.register_buffer("codes", codes, persistent=False)

    def judged(self) -> tuple[nn.Parameter, ...]:
        """The parameters by whose gradient a route is judged: those below the bits.

        The decoder above them gets an ordinary gradient by every route, and a much larger one: counted in,
        it would hide what an estimator does.
        """
        return tuple(self.encoder.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape (batch, classes); random bits in training, thresholded ones in evaluation."""
        bits = self.units(self.encoder(inputs.flatten(1)))
        logits: Tensor = self.decoder(bits.detach() if self.gradient == "cut" else bits)
        return logits

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy per example, shape (batch,); its expectation over the bits for "expected"."""
        if self.gradient == "expected":
            return self.expected_losses(inputs, labels)
        return nn.functional.cross_entropy(self(inputs), labels, reduction="none")

    def expected_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The exact expectation of the loss per example, shape (batch,): a sum over all codes."""
        logits = self.encoder(inputs.flatten(1))
        log_one, log_zero = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
        codes = self.codes.to(logits.dtype)
        probability = (log_one @ codes.T + log_zero @ (1 - codes).T).exp()
        by_code = -nn.functional.log_softmax(self.decoder(codes), dim=1)
        return (probability * by_code[:, labels].T).sum(dim=1)
