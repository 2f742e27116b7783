"""Digits learned without a global backward, each learner in the network of the twin that has one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.comparison.classifiers import SmoothClassifier
from thalweg.equilibria import (
    CoupledLearning,
    EquilibriumPropagation,
    Nudged,
    SquaredError,
    dense_links,
    even_odd,
)
from thalweg.local import (
    BackpropNoProp,
    DenoisingBlock,
    ForwardForward,
    LocalStack,
    NoProp,
    PredictiveCoding,
    Readout,
    align,
    one_hot_labels,
)
from thalweg.local.alignment import Feedback
from thalweg.step import Backprop

WIDTH = 48
STEPS = 12
"""Of the relaxation of an energy network."""


class AlignedClassifier(SmoothClassifier):
    """The smooth network, with errors sent back by another rule.

    Args:
        inputs: number of input values.
        classes: number of classes.
        feedback: `FeedbackAlignment(...)`, `SignSymmetry(...)` or `DirectFeedbackAlignment(...)`.
    """

    def __init__(self, inputs: int, classes: int, feedback: Feedback) -> None:
        super().__init__(inputs, classes)
        self.aligned = align(nn.Sequential(*self.body, self.head), gradient=feedback)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        logits: Tensor = self.aligned(inputs.flatten(1))
        return logits


class SettlingClassifier(SmoothClassifier):
    """The smooth network, learned by predictive coding with settled errors: backprop by another road."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        blocks = [self.body[:2], self.body[2:], self.head]
        self.learner = PredictiveCoding(blocks, steps=2, rate=1.0, prediction="fixed")

    def losses(self, inputs: Tensor, labels: Tensor) -> Any:
        """The phases of a batch."""
        return list(self.learner.phases((inputs.flatten(1), labels)))


class BlocksClassifier(nn.Module):
    """Two rectified blocks with a linear readout each.

    Args:
        inputs: number of input values.
        classes: number of classes.
        learns: "backprop" through both blocks from the sum of the readouts' losses; "local" cuts between the
            blocks; "forward-forward" learns the blocks by goodness and the readouts beside them; "readouts"
            leaves the blocks as they were drawn, a control.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        learns: Literal["backprop", "local", "forward-forward", "readouts"] = "backprop",
    ) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU()) for size in (inputs, WIDTH)]
        readouts = [Readout(WIDTH, classes) for _ in blocks]
        self.learns = learns
        if learns == "forward-forward":
            self.stack: LocalStack = ForwardForward(blocks, classes, readouts=readouts)
            self.readouts = nn.ModuleList(readouts)
        else:
            self.stack = LocalStack(blocks, readouts, normalize="rms")

    def judged(self) -> tuple[nn.Parameter, ...]:
        """The parameters by whose gradient the learner is judged: all."""
        return tuple(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of shape (batch, classes): what both readouts say."""
        if isinstance(self.stack, ForwardForward):
            return self.stack.predict(inputs.flatten(1), by="readout")
        return self.stack.predict(inputs.flatten(1))

    def losses(self, inputs: Tensor, labels: Tensor) -> Any:
        """The phases of a batch, or with a global loss the sum over the readouts, shape (batch,)."""
        if self.learns in ("local", "forward-forward"):
            return list(self.stack.phases((inputs.flatten(1), labels)))
        state, total = inputs.flatten(1), torch.zeros(())
        for block, readout in zip(self.stack.blocks, self.stack.local):
            assert self.stack.normalize is not None
            state = block(self.stack.normalize(state))
            if self.learns == "readouts":
                state = state.detach()
            total = total + readout(state, labels)
        return total


class EnergyClassifier(nn.Module):
    """A layered energy network whose output layer at rest is the answer.

    Args:
        inputs: number of input values.
        classes: number of classes.
        learns: "backprop" through all steps of the relaxation, "equilibrium" by two nudged relaxations,
            "coupled" by contrast with a clamped one.
    """

    def __init__(
        self, inputs: int, classes: int, learns: Literal["backprop", "equilibrium", "coupled"] = "backprop"
    ) -> None:
        super().__init__()
        self.network = even_odd(dense_links([inputs, WIDTH, classes], gain=0.5))
        self.cost = SquaredError()
        self.learner: EquilibriumPropagation | CoupledLearning | None = None
        if learns == "equilibrium":
            policy = Nudged(0.1, form="centered", steps=8)
            self.learner = EquilibriumPropagation(self.network, self.cost, gradient=policy, steps=STEPS)
        elif learns == "coupled":
            self.learner = CoupledLearning(self.network, self.cost, strength=0.5, steps=STEPS)

    def rest(self, inputs: Tensor) -> Tensor:
        """The output layer when the relaxation ends, differentiated step by step."""
        output: Tensor = self.network(inputs.flatten(1), gradient=Backprop(), tolerance=None, max_steps=STEPS)
        return output

    def judged(self) -> tuple[nn.Parameter, ...]:
        """The parameters by whose gradient the learner is judged: all."""
        return tuple(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of shape (batch, classes)."""
        return self.rest(inputs)

    def losses(self, inputs: Tensor, labels: Tensor) -> Any:
        """The phases of a batch, or the cost of each example, shape (batch,)."""
        if self.learner is not None:
            return self.learner.phases((inputs.flatten(1), labels))
        return self.cost(self.rest(inputs), labels)


class DenoisingClassifier(nn.Module):
    """Three blocks that denoise the label.

    Args:
        inputs: number of input values.
        classes: number of classes.
        learns: "noprop", each block alone, or "backprop" through the same blocks as one residual network.
    """

    def __init__(self, inputs: int, classes: int, learns: Literal["noprop", "backprop"] = "backprop") -> None:
        super().__init__()
        labels = one_hot_labels(classes)
        blocks = [DenoisingBlock(labels, inputs, width=WIDTH) for _ in range(3)]
        self.model: NoProp | BackpropNoProp = (
            NoProp(blocks, labels) if learns == "noprop" else BackpropNoProp(blocks, labels)
        )

    def judged(self) -> tuple[nn.Parameter, ...]:
        """The parameters by whose gradient the learner is judged: all."""
        return tuple(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of shape (batch, classes)."""
        if isinstance(self.model, NoProp):
            return self.model.predict(inputs.flatten(1), noise=False)
        logits: Tensor = self.model(inputs.flatten(1))
        return logits

    def losses(self, inputs: Tensor, labels: Tensor) -> Any:
        """The phases of a batch, or the cross-entropy of each example, shape (batch,)."""
        if isinstance(self.model, NoProp):
            return list(self.model.phases((inputs.flatten(1), labels)))
        return nn.functional.cross_entropy(self(inputs), labels, reduction="none")
