"""NoProp in discrete time: every block learns alone to guess the label from a noisy one and the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.local.noprop_denoiser import Draw, LabelDenoiser, draws, keyed_dropout, require_key
from thalweg.local.noprop_labels import LabelEmbedding
from thalweg.local.noprop_schedule import NoiseLevels, cosine
from thalweg.local.stack import LocalPhase, require_modules, require_own_parameters
from thalweg.noise import Key


class NoProp(LabelDenoiser):
    """A stack of blocks that learn to denoise the label, each alone, in any order, on any machine.

    Choose it for memory and for parallelism: one block's activations at a time, and no signal between blocks
    while they learn. No backpropagation across blocks; inside a block it is used. What comes out is an
    ensemble of conditional classifiers that refine each other; do not expect depth to earn accuracy, and
    print `predict(x, blocks=1)`, the first block alone, beside every result. It computes as much per epoch as
    so many classifiers.

    Block t is trained on latents drawn directly from the noisy label, z = sqrt(l_t) u + sqrt(1 - l_t) noise,
    and weighted by how much it raises the signal-to-noise ratio. Fixed labels and an optimizer without a
    scale, such as Adam, cancel that weight: it matters for learned labels.

    Args:
        blocks: modules called as block(latent, inputs), latents of shape (batch, *embedding.shape), returning
            logits (batch, classes); for example `DenoisingBlock`. No parameter may be in two of them.
        embedding: `one_hot_labels(classes)`, `learned_labels(...)` or `prototype_labels(...)`.
        levels: `NoiseLevels` with one step per block; None for `cosine(len(blocks))`.
        eta: the weight of denoising beside the readout's cross-entropy, above 0.
        readout: "softmax", a linear layer on the last latent, or "distance", see `LatentReadout`.
        anchor: "every" trains readout and labels in the phase of every block, as the paper does. "own" gives
            the cross-entropy a phase of its own, the last one: one step of the readout per batch, and with
            fixed labels blocks that share no parameter at all (see `LayerParallel`).
        weights: "snr", or "one" to weigh all blocks equally, a control.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    It is a learner: `phases(batch)` fills `.grad` block by block and any optimizer steps. Under a `key`
    everything random, dropout included, is drawn from (key, block): the same in any order of blocks.
    Forward and loss work under `torch.compile` of the blocks, autocast and fake tensors.

    Paper:
        Li, Teh, Pascanu: NoProp: Training Neural Networks without Full Back-propagation or Full
        Forward-propagation. arXiv 2503.24322, 2025.

    Example:
        >>> import torch
        >>> from thalweg.local import DenoisingBlock, NoProp, one_hot_labels
        >>> labels = one_hot_labels(3)
        >>> learner = NoProp([DenoisingBlock(labels, 4, width=8) for _ in range(2)], labels)
        >>> optimizer = torch.optim.AdamW(learner.parameters())
        >>> for phase in learner.phases((torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))):
        ...     optimizer.zero_grad()
        ...     loss = phase.backward()
        ...     optimizer.step()
        >>> learner.eval().predict(torch.rand(5, 4), noise=False).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        embedding: LabelEmbedding,
        *,
        levels: NoiseLevels | None = None,
        eta: float = 0.1,
        readout: Literal["softmax", "distance"] = "softmax",
        anchor: Literal["every", "own"] = "every",
        weights: Literal["snr", "one"] = "snr",
    ) -> None:
        super().__init__(embedding, readout)
        found = require_modules("blocks", blocks)
        require_own_parameters({f"blocks[{i}]": (block,) for i, block in enumerate(found)})
        levels = cosine(len(found)) if levels is None else levels
        if not isinstance(levels, NoiseLevels):
            raise ArgumentTypeError("levels", levels, "a NoiseLevels such as cosine(10), or None")
        if levels.steps != len(found):
            raise ArgumentError("levels", f"{levels.steps} steps", f"{len(found)}, one per block")
        require_positive("eta", eta)
        require_choice("anchor", anchor, ("every", "own"))
        require_choice("weights", weights, ("snr", "one"))
        self.blocks = nn.ModuleList(found)
        self.levels = levels
        self.eta = eta
        self.anchored = anchor
        self.weights = weights

    def phases(
        self, batch: Any, *, key: Key | None = None, only: Iterable[int] | None = None
    ) -> Iterator[LocalPhase]:
        """One phase per block, with anchor="own" one more for the readout; none reads what another wrote.

        Args:
            batch: (inputs, labels), labels int64 of shape (batch,).
            key: of all that is random in this batch; None draws from torch's default generator. Give
                `Key(seed, step)`: the same numbers then come whatever the order of the blocks.
            only: which blocks learn, in that order, None for all; the index `len(blocks)` is the readout's
                phase.
        """
        inputs, labels = self.split(batch)
        require_key(key)
        return self._phases(inputs, labels, key, self._chosen(only))

    def _phases(
        self, inputs: Tensor, labels: Tensor, key: Key | None, chosen: list[int]
    ) -> Iterator[LocalPhase]:
        for index in chosen:
            parameters = self.learned(index)
            if parameters:
                keys = draws(key, inputs, index)
                name = f"block {index}" if index < len(self.blocks) else "readout"
                yield LocalPhase(name, parameters, partial(self._loss, index, inputs, labels, keys))

    def learned(self, index: int) -> tuple[nn.Parameter, ...]:
        """What one phase moves; the index `len(blocks)` is the readout's."""
        found = list(self.embedding.parameters())
        if index < len(self.blocks):
            found += self.blocks[index].parameters()
        if self.anchored == "every" or index == len(self.blocks):
            found += self.readout.parameters()
        return tuple(parameter for parameter in found if parameter.requires_grad)

    def predict(
        self,
        inputs: Tensor,
        *,
        blocks: int | None = None,
        noise: bool = True,
        samples: int = 1,
        key: Key | None = None,
    ) -> Tensor:
        """Logits from pure noise through the blocks, in the mode the modules are in.

        Args:
            inputs: a batch.
            blocks: None reads the class off the last latent. With k the answer is block k's own guess, with
                k - 1 blocks before it: 1 is the first block alone.
            noise: whether the steps add noise, as the paper does; without, accuracy is often higher. The
                start is random either way.
            samples: starts to average over; report results over several.
            key: of the draws, or None.

        Returns:
            Shape (batch, classes); with several samples the logarithm of mean probabilities.
        """
        if blocks is not None:
            require_integer("blocks", blocks, 1)
            if blocks > len(self.blocks):
                raise ArgumentError("blocks", blocks, f"at most {len(self.blocks)}, the number of blocks")

        def answer(keys: Any) -> Tensor:
            latent = self.noise(inputs, keys(0))
            for index in range(len(self.blocks)):
                logits = self._logits(index, latent, inputs)
                if index + 1 == blocks:
                    return logits
                step = self.levels.transition(index)
                latent = step.guess * self.denoised(logits) + step.state * latent
                if noise:
                    latent = latent + step.noise * self.noise(inputs, keys(index + 1))
            found: Tensor = self.readout(latent, self.embedding)
            return found

        return self.sampled(inputs, samples, key, answer)

    def _loss(self, index: int, inputs: Tensor, labels: Tensor, keys: list[Draw]) -> Tensor:
        target = self.embedding(labels)
        terms = []
        if index < len(self.blocks):
            terms.append(self._denoising(index, inputs, target, keys))
        if self.anchored == "every" or index == len(self.blocks):
            level = self.levels.levels[-1]
            latent = level**0.5 * target + (1 - level) ** 0.5 * self.noise(inputs, keys[1])
            terms.append(self.anchor(latent, labels) + self.prior(target, self.levels.levels[0]))
        return sum(terms[1:], terms[0])

    def _denoising(self, index: int, inputs: Tensor, target: Tensor, keys: list[Draw]) -> Tensor:
        level = self.levels.levels[index]
        latent = level**0.5 * target + (1 - level) ** 0.5 * self.noise(inputs, keys[0])
        with keyed_dropout(keys[2], inputs):
            logits = self._logits(index, latent, inputs)
        away = (self.denoised(logits) - target).flatten(1).square().sum(1)
        weight = self.levels.weight(index) if self.weights == "snr" else 1.0
        return 0.5 * len(self.blocks) * self.eta * weight * away

    def _logits(self, index: int, latent: Tensor, inputs: Tensor) -> Tensor:
        return self.checked(f"blocks[{index}]", self.blocks[index](latent, inputs), inputs)

    def _chosen(self, only: Iterable[int] | None) -> list[int]:
        count = len(self.blocks) + (self.anchored == "own")
        chosen = list(range(count)) if only is None else list(only)
        for index in chosen:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                raise ArgumentError("only", index, f"indices 0 to {count - 1}")
        return chosen
