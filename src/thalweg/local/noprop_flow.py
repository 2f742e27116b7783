"""NoProp by flow matching: one block learns the velocity from noise to the label's point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.local.noprop_denoiser import Draw, LabelDenoiser, draws, keyed_dropout, require_key
from thalweg.local.noprop_labels import LabelEmbedding
from thalweg.local.stack import LocalPhase
from thalweg.noise import Key, uniform


class FlowNoProp(LabelDenoiser):
    """One block that carries noise to the label's point along a straight line.

    Choose it among the variants in continuous time: simplest, quickest, and good with few steps. Time runs up
    to the label: 0 is noise here, which is the other way round in `thalweg.flows`.

    Args:
        block: called as block(latent, inputs, times), times of shape (batch,) in [0, 1]; returns coefficients
            (batch, classes) of the labels' points, not passed through a softmax, whose mixture is the
            velocity. For example `DenoisingBlock(..., timed=True)`.
        embedding: as in `NoProp`.
        sigma: standard deviation of noise added on the line, at least 0; the paper gives none.
        anchor: add the readout's cross-entropy on the extrapolated end; None adds it where labels learn.
            Without it learned labels shrink to one point: False is then refused, "collapse" lets it happen.
        readout: of the anchor, "softmax" or "distance"; predictions take the nearest label's point.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    A learner with one phase. Works under `torch.compile` of the block, autocast and fake tensors.

    Paper:
        Li, Teh, Pascanu. arXiv 2503.24322, 2025; flow matching: Lipman and others. ICLR 2023,
        arXiv 2210.02747.

    Example:
        >>> from thalweg.local import DenoisingBlock, one_hot_labels
        >>> labels = one_hot_labels(3)
        >>> learner = FlowNoProp(DenoisingBlock(labels, 4, width=8, timed=True), labels)
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
        sigma: float = 0.0,
        anchor: bool | Literal["collapse"] | None = None,
        readout: Literal["softmax", "distance"] = "softmax",
    ) -> None:
        super().__init__(embedding, readout)
        if not isinstance(block, nn.Module):
            raise ArgumentTypeError("block", block, "a torch.nn.Module")
        if isinstance(sigma, bool) or not isinstance(sigma, int | float):
            raise ArgumentTypeError("sigma", sigma, "a number of at least 0")
        if not 0 <= sigma < math.inf:
            raise ArgumentError("sigma", sigma, "a number of at least 0")
        if anchor not in (None, True, False, "collapse"):
            raise ArgumentError("anchor", anchor, "True, False, None, or 'collapse'")
        if anchor is False and embedding.learned:
            mend = "Say 'collapse' if you want to watch them collapse."
            raise ArgumentError("anchor", anchor, "an anchor for labels that learn", mend)
        self.block = block
        self.sigma = sigma
        self.anchored = embedding.learned if anchor is None else anchor is True

    def phases(self, batch: Any, *, key: Key | None = None) -> Iterator[LocalPhase]:
        """One phase for the block, and with an anchor for readout and learned labels.

        Args:
            batch: (inputs, labels), labels int64 of shape (batch,).
            key: of all that is random in this batch, or None.
        """
        inputs, labels = self.split(batch)
        require_key(key)
        parts: list[nn.Module] = [self.block, self.embedding, *([self.readout] if self.anchored else [])]
        parameters = tuple(p for part in parts for p in part.parameters() if p.requires_grad)
        keys = draws(key, inputs, 0)
        return iter([LocalPhase("block", parameters, partial(self._loss, inputs, labels, keys))])

    def _loss(self, inputs: Tensor, labels: Tensor, keys: list[Draw]) -> Tensor:
        target = self.embedding(labels)
        start = self.noise(inputs, keys[0])
        time = uniform(start.new_empty(len(inputs)), keys[3])
        along = time.view(-1, *[1] * (target.ndim - 1))
        latent = along * target + (1 - along) * start
        if self.sigma:
            latent = latent + self.sigma * self.noise(inputs, keys[1])
        with keyed_dropout(keys[2], inputs):
            velocity = self.velocity(latent, inputs, time)
        loss: Tensor = (velocity - (target - start)).flatten(1).square().sum(1)
        if self.anchored:
            loss = loss + self.anchor(latent + (1 - along) * velocity, labels)
        return loss

    def velocity(self, latent: Tensor, inputs: Tensor, time: Tensor) -> Tensor:
        """Where the latent goes, shape (batch, *embedding.shape); times of shape (batch,)."""
        coefficients = self.checked("block", self.block(latent, inputs, time), inputs)
        return self.embedding.mix(coefficients)

    def predict(
        self, inputs: Tensor, *, steps: int = 1000, samples: int = 1, key: Key | None = None
    ) -> Tensor:
        """Logits from pure noise by Euler's method, in the mode the modules are in.

        Args:
            inputs: a batch.
            steps: runs of the block, at least 1.
            samples: starts to average over.
            key: of the draws, or None.

        Returns:
            Minus half the squared distance to each label's point, shape (batch, classes); with several
            samples the logarithm of mean probabilities.
        """
        require_integer("steps", steps, 1)

        def answer(keys: Any) -> Tensor:
            latent = self.transported(inputs, self.noise(inputs, keys(0)), steps)
            return -0.5 * self.embedding.squared_distances(latent)

        return self.sampled(inputs, samples, key, answer)

    def transported(self, inputs: Tensor, start: Tensor, steps: int) -> Tensor:
        """The latent after Euler steps from a start of shape (batch, *embedding.shape)."""
        latent = start
        for index in range(steps):
            time = torch.full((len(inputs),), index / steps, dtype=latent.dtype, device=latent.device)
            latent = latent + self.velocity(latent, inputs, time) / steps
        return latent
