"""NoProp in continuous time: one block for all noise levels, told the time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.local.noprop_denoiser import Draw, LabelDenoiser, draws, keyed_dropout, require_key
from thalweg.local.noprop_labels import LabelEmbedding
from thalweg.local.noprop_schedule import (
    ContinuousSchedule,
    LearnedSchedule,
    deterministic_transition,
    transition,
)
from thalweg.local.stack import LocalPhase
from thalweg.noise import Key, uniform


class ContinuousNoProp(LabelDenoiser):
    """One block that denoises the label at every noise level, run many times at inference.

    Choose it to spend parameters on one block and steps at inference, and to learn the schedule. `NoProp` was
    more accurate in the paper, and so it was for us.

    Args:
        block: called as block(latent, inputs, times), times of shape (batch,) in [0, 1] where 1 is the label;
            returns logits (batch, classes). For example `DenoisingBlock(..., timed=True)`.
        embedding: as in `NoProp`.
        schedule: a module with methods `level` and `weight`; None for `LearnedSchedule()`. Its parameters
            learn with the block.
        eta: the weight of denoising beside the readout's cross-entropy, above 0.
        readout: "softmax" or "distance", see `LatentReadout`.
        weights: "snr", or "one" as a control.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    A learner with one phase. Works under `torch.compile` of the block, autocast and fake tensors.

    Paper:
        Li, Teh, Pascanu. arXiv 2503.24322, 2025.

    Example:
        >>> from thalweg.local import DenoisingBlock, one_hot_labels
        >>> labels = one_hot_labels(3)
        >>> learner = ContinuousNoProp(DenoisingBlock(labels, 4, width=8, timed=True), labels)
        >>> for phase in learner.phases((torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))):
        ...     loss = phase.backward()
        >>> learner.predict(torch.rand(5, 4), steps=10).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        block: nn.Module,
        embedding: LabelEmbedding,
        *,
        schedule: nn.Module | None = None,
        eta: float = 1.0,
        readout: Literal["softmax", "distance"] = "softmax",
        weights: Literal["snr", "one"] = "snr",
    ) -> None:
        super().__init__(embedding, readout)
        if not isinstance(block, nn.Module):
            raise ArgumentTypeError("block", block, "a torch.nn.Module")
        schedule = LearnedSchedule() if schedule is None else schedule
        if not (isinstance(schedule, nn.Module) and isinstance(schedule, ContinuousSchedule)):
            raise ArgumentTypeError("schedule", schedule, "a module with methods level and weight, or None")
        require_positive("eta", eta)
        require_choice("weights", weights, ("snr", "one"))
        self.block = block
        self.schedule: Any = schedule
        self.eta = eta
        self.weights = weights

    def phases(self, batch: Any, *, key: Key | None = None) -> Iterator[LocalPhase]:
        """One phase for block, readout, schedule and learned labels.

        Args:
            batch: (inputs, labels), labels int64 of shape (batch,).
            key: of all that is random in this batch, or None.
        """
        inputs, labels = self.split(batch)
        require_key(key)
        parameters = tuple(p for p in self.parameters() if p.requires_grad)
        keys = draws(key, inputs, 0)
        return iter([LocalPhase("block", parameters, partial(self._loss, inputs, labels, keys))])

    def _loss(self, inputs: Tensor, labels: Tensor, keys: list[Draw]) -> Tensor:
        target = self.embedding(labels)
        time = uniform(self.embedding.weight.new_empty(len(inputs)), keys[3])
        ends = self.schedule.level(time.new_tensor([0.0, 1.0]))
        latent = self._noisy(target, self.schedule.level(time), self.noise(inputs, keys[0]))
        with keyed_dropout(keys[2], inputs):
            logits = self._logits(latent, inputs, time)
        away = (self.denoised(logits) - target).flatten(1).square().sum(1)
        weight = self.schedule.weight(time) if self.weights == "snr" else 1.0
        last = self._noisy(target, ends[1].expand(len(inputs)), self.noise(inputs, keys[1]))
        denoising: Tensor = 0.5 * self.eta * weight * away
        return self.anchor(last, labels) + self.prior(target, ends[0]) + denoising

    def predict(
        self,
        inputs: Tensor,
        *,
        steps: int = 1000,
        sampler: Literal["ancestral", "deterministic"] = "ancestral",
        noise: bool = True,
        samples: int = 1,
        key: Key | None = None,
    ) -> Tensor:
        """Logits from pure noise in equal steps of time, in the mode the modules are in.

        Args:
            inputs: a batch.
            steps: runs of the block, at least 1.
            sampler: "ancestral" takes the steps of `NoProp`; "deterministic" adds no noise and moves the
                latent so that it keeps its place among those of its level.
            noise: False leaves out the noise of the ancestral steps.
            samples: starts to average over.
            key: of the draws, or None.

        Returns:
            Shape (batch, classes); with several samples the logarithm of mean probabilities.
        """
        require_integer("steps", steps, 1)
        require_choice("sampler", sampler, ("ancestral", "deterministic"))
        step_by = transition if sampler == "ancestral" else deterministic_transition

        def answer(keys: Any) -> Tensor:
            latent = self.noise(inputs, keys(0))
            times = torch.linspace(0, 1, steps + 1, dtype=latent.dtype, device=latent.device)
            levels = self.schedule.level(times)
            for index in range(steps):
                logits = self._logits(latent, inputs, times[index].expand(len(inputs)))
                step = step_by(levels[index], levels[index + 1])
                latent = step.guess * self.denoised(logits) + step.state * latent
                if noise and sampler == "ancestral":
                    latent = latent + step.noise * self.noise(inputs, keys(index + 1))
            found: Tensor = self.readout(latent, self.embedding)
            return found

        return self.sampled(inputs, samples, key, answer)

    def _logits(self, latent: Tensor, inputs: Tensor, time: Tensor) -> Tensor:
        return self.checked("block", self.block(latent, inputs, time), inputs)

    def _noisy(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        level = level.view(-1, *[1] * (target.ndim - 1))
        return level.sqrt() * target + (1 - level).sqrt() * noise
