"""Predictive coding: activities settle between what the block below predicts and what the one above needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.local.stack import LocalPhase, require_modules, require_own_parameters

_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RReLU)
States = list[Tensor]


class PredictiveCoding(nn.Module):
    """Relax the activities of all blocks on a local energy, then let each block learn from its own error.

    Choose it to study local learning that comes close to backpropagation, or equals it; on an ordinary
    machine it costs a forward and a backward of every block per step of relaxation. A block needs only its
    neighbours' activities. The graph of one block is kept at a time, and one activity per block, so that the
    kept bytes grow with depth by the activities alone.

    Per example the energy is the sum over hidden blocks of |s_k - f_k(s_(k-1))|^2 / 2, plus strength times
    the loss of the last block's output; gradients are those of the energy by the weights, over strength.

    | prediction | the gradient is |
    | --- | --- |
    | "free" | that of relaxed activities; the exact one as strength goes to 0, at first order |
    | "fixed": errors move, predictions stay as in the forward pass | exact once settled |

    "fixed" with rate 1 settles in `len(blocks) - 1` steps and is then backpropagation to rounding.

    Args:
        blocks: modules, each called with the activity of the one before; no dropout and no batch norm in
            training mode, since they run at every step of the relaxation.
        loss: called as loss(output, target), returns one value per example; None for cross-entropy.
        steps: of the relaxation, at least 1.
        rate: step size, above 0; as a rule below 1 with "free".
        prediction: see above.
        strength: of the loss beside the prediction errors, above 0.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
        UnsupportedError: on use, a block with dropout or batch norm in training mode.

    A learner with one phase per block; all activities of a batch settle when the first phase is reached.

    Paper:
        Whittington, Bogacz: An approximation of the error backpropagation algorithm in a predictive coding
        network with local Hebbian synaptic plasticity. Neural Computation 2017; fixed predictions: Millidge,
        Tschantz, Buckley. arXiv 2006.04182; exactness: Song and others. NeurIPS 2020.

    Example:
        >>> from thalweg.local import PredictiveCoding
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)]
        >>> learner = PredictiveCoding(blocks, steps=10)
        >>> for phase in learner.phases((torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1]))):
        ...     loss = phase.backward()
        >>> blocks[0][0].weight.grad.shape, learner.predict(torch.ones(5, 4)).shape
        (torch.Size([8, 4]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        loss: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        steps: int = 20,
        rate: float = 0.1,
        prediction: Literal["free", "fixed"] = "free",
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        found = require_modules("blocks", blocks)
        require_own_parameters({f"blocks[{i}]": (block,) for i, block in enumerate(found)})
        if loss is not None and not callable(loss):
            raise ArgumentTypeError("loss", loss, "a function of output and target, or None")
        require_integer("steps", steps, 1)
        require_positive("rate", rate)
        require_choice("prediction", prediction, ("free", "fixed"))
        require_positive("strength", strength)
        self.blocks = nn.ModuleList(found)
        self.loss: Callable[[Tensor, Any], Tensor] = _cross_entropies if loss is None else loss
        self.steps = steps
        self.rate = rate
        self.prediction = prediction
        self.strength = strength

    def predict(self, inputs: Tensor) -> Tensor:
        """The forward pass."""
        with torch.no_grad():
            for block in self.blocks:
                inputs = block(inputs)
        return inputs

    def phases(self, batch: Any) -> Iterator[LocalPhase]:
        """One phase per block.

        Args:
            batch: (inputs, targets).
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError("batch", batch, "(inputs, targets)")
        require_floating("batch[0]", batch[0])
        for name, each in self.named_modules():
            noisy = isinstance(each, _DROPOUTS) and getattr(each, "p", 1) > 0
            if each.training and (noisy or isinstance(each, nn.modules.batchnorm._BatchNorm)):
                raise UnsupportedError(
                    f"PredictiveCoding: {name} ({type(each).__name__}) in training mode answers differently "
                    "at each step of the relaxation. Call .eval() on it, or use LayerNorm"
                )
        return self._phases(batch[0].detach(), batch[1])

    def _phases(self, inputs: Tensor, target: Any) -> Iterator[LocalPhase]:
        states, errors = self.relaxed(inputs, target)
        for index, block in enumerate(self.blocks):
            parameters = tuple(p for p in block.parameters() if p.requires_grad)
            if not parameters:
                continue
            above = None
            if index < len(self.blocks) - 1:
                above = errors[index] if self.prediction == "fixed" else states[index + 1]
            local = partial(self._local, index, states[index], above, target)
            yield LocalPhase(f"block {index}", parameters, local)

    def relaxed(self, inputs: Tensor, target: Any) -> tuple[States, States]:
        """Activities of input and hidden blocks after the relaxation; with fixed predictions also errors."""
        states = [inputs.detach()]
        with torch.no_grad():
            for block in self.blocks[:-1]:
                states.append(block(states[-1]))
        fixed = self.prediction == "fixed"
        # with fixed predictions the states stay where the forward pass put them, and only errors move
        errors = [torch.zeros_like(state) for state in states[1:]] if fixed else []
        for _ in range(self.steps):
            above: Tensor | None = None
            # all move at once, from the top so that one old activity is enough to remember
            for index in range(len(self.blocks) - 1, 0, -1):
                pull = self._pull(index, states[index], above, target)
                if fixed:
                    above = errors[index - 1]
                    errors[index - 1] = above + self.rate * (pull - above)
                    continue
                above = states[index]
                with torch.no_grad():
                    away = above - self.blocks[index - 1](states[index - 1])
                states[index] = above + self.rate * (pull - away)
        return states, errors

    def _pull(self, index: int, state: Tensor, above: Tensor | None, target: Any) -> Tensor:
        """What the block above asks of a hidden activity: minus the slope of its part of the energy.

        `above` is that block's own activity or, with fixed predictions, its error; None for the last.
        """
        leaf = state.detach().requires_grad_()
        with torch.enable_grad():
            energy = self._energy(index, leaf, above, target).sum()
            (slope,) = torch.autograd.grad(energy, leaf)
        return -slope

    def _energy(self, index: int, below: Tensor, above: Tensor | None, target: Any) -> Tensor:
        """One block's part of the energy of each example."""
        output = self.blocks[index](below)
        if above is None:
            losses = self.loss(output, target)
            if not isinstance(losses, Tensor) or losses.shape != (len(below),):
                mend = "Write reduction='none' and sum over the rest."
                raise ArgumentError("loss", losses, f"one value per example, shape ({len(below)},)", mend)
            return self.strength * losses
        if self.prediction == "fixed":
            # the error is what it is, and only the prediction depends on what lies below
            found: Tensor = -(above * output).flatten(1).sum(1)
        else:
            found = 0.5 * (above - output).flatten(1).square().sum(1)
        return found

    def _local(self, index: int, below: Tensor, above: Tensor | None, target: Any) -> Tensor:
        return self._energy(index, below, above, target) / self.strength


def _cross_entropies(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")
