"""What the three kinds of NoProp share: labels as latents, a readout that anchors them, keyed draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.local.noprop_labels import LabelEmbedding, LatentReadout, require_labels
from thalweg.noise import Key, fresh_key, normal

Draw = Key | Tensor
_PLACES = 1 << 20
_DRAWS = 4


def draws(key: Key | None, like: Tensor, place: int) -> list[Draw]:
    """The keys of one phase: of its own place under `key`, or fresh ones, fixed from here on."""
    if key is None:
        return [fresh_key(like) for _ in range(_DRAWS)]
    return [key.at(call=(key.call * _PLACES + place) * _DRAWS + draw) for draw in range(_DRAWS)]


@contextmanager
def keyed_dropout(key: Draw, like: Tensor) -> Iterator[None]:
    """Under a `Key` torch's default generators draw what the key says, and stand as before afterwards.

    Dropout inside a block draws from them; only so do blocks draw the same in any order, on any process.
    """
    if not isinstance(key, Key):
        yield
        return
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(key.bits())
        if devices:
            torch.cuda.manual_seed(key.bits())
        yield


class LabelDenoiser(nn.Module):
    """Base of `NoProp`, `ContinuousNoProp` and `FlowNoProp`; has no phases of its own.

    Args:
        embedding: the labels' points.
        readout: "softmax" or "distance", see `LatentReadout`.
    """

    def __init__(self, embedding: LabelEmbedding, readout: Literal["softmax", "distance"]) -> None:
        super().__init__()
        if not isinstance(embedding, LabelEmbedding):
            mend = "Write one_hot_labels(classes), learned_labels(...) or prototype_labels(...)."
            raise ArgumentTypeError("embedding", embedding, "a LabelEmbedding", mend)
        self.embedding = embedding
        self.readout = LatentReadout(embedding, readout)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels of a batch, checked."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError("batch", batch, "(inputs, labels)")
        inputs, labels = batch
        if not isinstance(inputs, Tensor) or inputs.ndim == 0:
            raise ArgumentTypeError("batch[0]", inputs, "a tensor of inputs, shape (batch, ...)")
        require_labels(labels, self.embedding.classes, len(inputs))
        return inputs, labels

    def noise(self, inputs: Tensor, key: Draw) -> Tensor:
        """A standard normal latent for each example."""
        return normal(self.embedding.weight.new_empty(len(inputs), *self.embedding.shape), key)

    def checked(self, name: str, logits: object, inputs: Tensor) -> Tensor:
        """What a block returned, refused unless it is one logit per class."""
        expected = (len(inputs), self.embedding.classes)
        if not isinstance(logits, Tensor):
            raise ArgumentTypeError(name, logits, f"a module that returns logits of shape {expected}")
        if logits.shape != expected:
            raise ArgumentError(name, logits, f"logits of shape {expected}, one per example and class")
        return logits

    def denoised(self, logits: Tensor) -> Tensor:
        """The embedding that a block's logits guess: inside the convex hull of the labels' points."""
        return self.embedding.mix(logits.softmax(1))

    def anchor(self, latent: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of the readout on each latent, shape (batch,): it keeps learned labels apart."""
        return F.cross_entropy(self.readout(latent, self.embedding), labels, reduction="none")

    def prior(self, target: Tensor, level: Tensor | float) -> Tensor:
        """How far the first latent is from pure noise, as a divergence per example, shape (batch,)."""
        flat = target.flatten(1)
        level = torch.as_tensor(level, dtype=flat.dtype, device=flat.device)
        spread = flat.shape[1] * (level + torch.log1p(-level))
        return 0.5 * (level * flat.square().sum(1) - spread)

    def sampled(
        self, inputs: Tensor, samples: int, key: Key | None, answer: Callable[[Callable[[int], Draw]], Tensor]
    ) -> Tensor:
        """Logits from one start, or the logarithm of the mean probability over several.

        Args:
            inputs: the batch.
            samples: starts.
            key: of all draws, or None.
            answer: computes logits; given a function from the number of a draw to its key.
        """
        if not isinstance(inputs, Tensor) or inputs.ndim == 0:
            raise ArgumentTypeError("inputs", inputs, "a tensor of shape (batch, ...)")
        require_integer("samples", samples, 1)
        if key is not None and not isinstance(key, Key):
            raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
        self._warn_about_training()
        with torch.no_grad():
            found = []
            for sample in range(samples):

                def keys(draw: int, sample: int = sample) -> Draw:
                    if key is None:
                        return fresh_key(inputs)
                    return key.at(call=(key.call * _PLACES + sample) * _PLACES + draw)

                found.append(answer(keys))
        if samples == 1:
            return found[0]
        together = torch.stack([each.log_softmax(1) for each in found]).logsumexp(0)
        return together - torch.as_tensor(samples, dtype=together.dtype).log()

    def _warn_about_training(self) -> None:
        kinds = nn.modules.batchnorm._BatchNorm
        if any(isinstance(each, kinds) and each.training for each in self.modules()):
            warnings.warn(
                "predicting with BatchNorm in training mode: call .eval() first, the latents of inference "
                "are not those of training",
                stacklevel=4,
            )


def require_key(key: object) -> None:
    """Raise unless `key` is a `Key` or None."""
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
