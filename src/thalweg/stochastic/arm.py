"""ARM and DisARM: run the closure again with the units' random numbers mirrored, and compare the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.noise import Key, replayed
from thalweg.step import Closure, Estimate
from thalweg.stochastic.tape import Tape, fires, per_example, precise

Weight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ARM:
    """The unbiased gradient through random units from a run and its mirror image; two evaluations per layer.

    Each unit fires where its uniform number v lies below p; mirrored, where 1 - v does. The estimate is the
    difference of the two losses times (1/2 - v): what all outcomes have in common drops out without a
    baseline. `DisARM` costs the same and varies less; choose this one to compare with it.

    With units in several calls (layers), each is mirrored in a run of its own, in which the units before keep
    their outcomes and those after decide anew from the same numbers: 1 + calls evaluations. Dropout masks and
    the like are the same in all runs. Only the first run keeps a graph; what lies downstream of the units
    gets its ordinary gradient. The loss needs no derivative in the units.

    Unbiased when the loss of one example depends on that example's units only: no BatchNorm in training mode
    behind the units, which would also move its running statistics once per run.

    Paper:
        Yin, Zhou: ARM: Augment-REINFORCE-merge gradient for stochastic binary networks. ICLR 2019,
        arXiv 1807.11143.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits = torch.zeros(1, requires_grad=True)
        >>> unit = BinaryNeuron(gradient=None)
        >>> losses = lambda: (unit(logits.expand(10000)) - 1.0) ** 2
        >>> loss = backward(losses, [logits], gradient=ARM())
        >>> bool((logits.grad + 0.25).abs() < 0.02)
        True
    """

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One forward and one backward, and one more forward per unit call; draws from torch's generators.

        Raises:
            ArgumentError: the loss is a scalar, no unit with `gradient=None` ran in training mode, or the
                first dimension of a unit's logits is not the batch.
            UnsupportedError: such a unit ran under `torch.no_grad()`.
        """
        return _mirrored(closure, parameters, lambda logits, numbers, b, mirror: 0.5 - numbers)


@dataclass(frozen=True, slots=True)
class DisARM:
    """The unbiased gradient through random units from a run and its mirror image, with ARM's noise taken out.

    Choose it where a second forward per layer of units is affordable: no baseline, no tuning, and the loss
    needs no derivative in the units. The estimate is the mean of `ARM`'s over all uniform numbers that lead
    to the same pair of outcomes, so its variance is never larger. Runs, evaluations and conditions are those
    of `ARM`.

    Paper:
        Dong, Mnih, Tucker: DisARM: an antithetic gradient estimator for binary latent variables. NeurIPS
        2020, arXiv 2006.10680; the same as U2G of Yin et al., arXiv 2006.07060.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits = torch.zeros(8, 1, requires_grad=True)
        >>> unit = BinaryNeuron(gradient=None)
        >>> loss = backward(lambda: 8 * unit(logits).sum(1), [logits], gradient=DisARM())
        >>> logits.grad.flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500])
    """

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """As `ARM.estimate`."""
        return _mirrored(closure, parameters, _disarmed)


def _disarmed(logits: Tensor, numbers: Tensor, outcome: Tensor, mirror: Tensor) -> Tensor:
    # where both outcomes are the same the unit did not cause the difference of the losses
    return 0.5 * (outcome - mirror).to(numbers.dtype) * torch.sigmoid(logits.to(numbers.dtype).abs())


def _mirrored(closure: Closure, parameters: Sequence[Tensor], weight: Weight) -> Estimate:
    run = replayed(closure, [parameter.device for parameter in parameters])
    tape = Tape()
    losses = tape.run(run)
    values = precise(losses)
    cotangents = [torch.full_like(losses, 1 / len(losses))]
    for index, logits in enumerate(tape.logits):
        logits, numbers, outcome = logits.detach(), tape.numbers[index], tape.outcomes[index]
        mirror = fires(logits, 1 - numbers)
        other = Tape(_with(tape, index, mirror), graph=False).run(run)
        difference = per_example((values - precise(other)) / len(losses), numbers)
        cotangents.append(difference * weight(logits, numbers, outcome, mirror))
    gradients = tape.pull([losses, *tape.logits], cotangents, parameters)
    return Estimate(values.mean(), gradients, 1 + len(tape.logits))


def _with(tape: Tape, index: int, outcome: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Let a run repeat the outcomes of `tape` before call `index`, take `outcome` there, and go its way."""

    def decide(call: int, logits: Tensor, numbers: Tensor) -> Tensor:
        if call < index:
            return tape.outcomes[call]
        return outcome if call == index else fires(logits, numbers)

    return decide
