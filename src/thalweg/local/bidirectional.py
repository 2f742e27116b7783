"""Bidirectional learning and hybrid adversarial networks: a classifier that is made to generate as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, without_data
from thalweg.local.bidirectional_net import BidirectionalNet
from thalweg.local.stack import LocalPhase
from thalweg.noise import Key, fresh_key, uniform

Prior = Callable[[Tensor, Key | Tensor], Tensor]


def uniform_prior(like: Tensor, key: Key | Tensor) -> Tensor:
    """The published prior: uniform on [-1, 1), in the shape of `like`."""
    return 2 * uniform(like, key) - 1


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """Teach the generator the mean input of each class: cross-entropy of every pixel, from a one-hot class.

    Choose it for bidirectional learning as published. Inputs are in [0, 1].
    """


@dataclass(frozen=True, slots=True, eq=False)
class Adversarial:
    """Teach the generator to deceive a discriminator, from random vectors: a hybrid adversarial network.

    Args:
        discriminator: returns one logit per input, (batch,) or (batch, 1); it shares nothing with the net.
        prior: makes the vectors from a tensor of their shape, (batch, classes), and a key of
            `thalweg.noise`.

    Raises:
        ArgumentTypeError: a discriminator or a prior that is none.
    """

    discriminator: nn.Module
    prior: Prior = uniform_prior

    def __post_init__(self) -> None:
        if not isinstance(self.discriminator, nn.Module):
            raise ArgumentTypeError("discriminator", self.discriminator, "a torch.nn.Module")
        if not callable(self.prior):
            raise ArgumentTypeError("prior", self.prior, "a function of a tensor and a key")


class Bidirectional(nn.Module):
    """Train one set of weights in both directions, a step each; a learner of two phases, or three.

    Give each phase an optimizer of its own: moments shared between the directions are another method. Do not
    take the accuracy under the one-step attack on the cross-entropy for robustness: the logits grow until
    that attack is blind. `thalweg.attacks.robustness` tells.

    Args:
        net: see `BidirectionalNet`.
        backward: `Reconstruct()` (the default) or `Adversarial(discriminator)`.
        bias: False trains the weights alone: biases are set to zero and stay there, batch norms stay as they
            are; a discriminator trains whole.
        stop_backward_after: how many batches have backward phases; then only the classifier learns. None for
            all, 0 for plain backpropagation.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Pontes-Filho, Liwicki: Bidirectional Learning for Robust Neural Networks. IJCNN 2019,
        arXiv 1805.08006.

    Example:
        >>> from thalweg.local import bidirectional_mlp
        >>> learner = Bidirectional(bidirectional_mlp([12, 8, 3]))
        >>> batch = torch.rand(5, 12), torch.tensor([0, 1, 2, 0, 1])
        >>> [(phase.name, phase.backward().shape) for phase in learner.phases(batch)]
        [('forward', torch.Size([])), ('backward', torch.Size([]))]
    """

    def __init__(
        self,
        net: BidirectionalNet,
        *,
        backward: Reconstruct | Adversarial | None = None,
        bias: bool = True,
        stop_backward_after: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, BidirectionalNet):
            raise ArgumentTypeError("net", net, "a BidirectionalNet")
        backward = Reconstruct() if backward is None else backward
        if not isinstance(backward, Reconstruct | Adversarial):
            raise ArgumentTypeError("backward", backward, "Reconstruct() or Adversarial(discriminator)")
        if not isinstance(bias, bool):
            raise ArgumentTypeError("bias", bias, "True or False")
        if stop_backward_after is not None:
            require_integer("stop_backward_after", stop_backward_after, 0)
        self.net = net
        self.discriminator: nn.Module | None = None
        if isinstance(backward, Adversarial):
            self.discriminator = backward.discriminator
            own = {id(parameter) for parameter in net.parameters()}
            if any(id(parameter) in own for parameter in backward.discriminator.parameters()):
                raise ArgumentError("discriminator", backward.discriminator, "parameters that the net lacks")
        self.backward = backward
        self.bias = bias
        self.stop_backward_after = stop_backward_after
        self._batches = 0
        if not bias:
            self._zero_biases()

    def phases(self, batch: Any, *, key: Key | None = None) -> Iterator[LocalPhase]:
        """The classifier, the discriminator if there is one, the generator: each is computed when reached.

        Args:
            batch: (inputs, labels), inputs in [0, 1], labels int64.
            key: of the random vectors; None takes a fresh one, governed by `torch.manual_seed`.
        """
        inputs, labels = self._require(batch)
        backward = self.stop_backward_after is None or self._batches < self.stop_backward_after
        self._batches += 1
        keys: list[Key | Tensor] = []
        if backward and isinstance(self.backward, Adversarial):
            # the generator deceives with other vectors than those told apart
            keys = [fresh_key(inputs) if key is None else key.at(call=key.call + each) for each in (1, 2)]
        return self._phases(inputs, labels, backward, keys)

    def predict(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, classes), in the mode the modules are in."""
        with torch.no_grad():
            return self.net.classify(inputs)

    def get_extra_state(self) -> Tensor:
        """How many batches there were, for `state_dict`."""
        return torch.tensor(self._batches)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where the saved learner was."""
        self._batches = int(state)

    def _phases(
        self, inputs: Tensor, labels: Tensor, backward: bool, keys: list[Key | Tensor]
    ) -> Iterator[LocalPhase]:
        net = self.net
        yield LocalPhase(
            "forward",
            _trained(net.forward_parameters(bias=self.bias)),
            lambda: F.cross_entropy(net.classify(inputs), labels, reduction="none"),
        )
        if not backward:
            return
        parameters = _trained(net.backward_parameters(bias=self.bias))
        if isinstance(self.backward, Reconstruct):
            yield LocalPhase("backward", parameters, lambda: self._reconstruction(inputs, labels))
            return
        judge = _trained(self.backward.discriminator.parameters())
        yield LocalPhase("discriminator", judge, lambda: self._told_apart(inputs, keys[0]))
        yield LocalPhase("backward", parameters, lambda: self._deceived(inputs, keys[1]))

    def _reconstruction(self, inputs: Tensor, labels: Tensor) -> Tensor:
        onehot = torch.eye(self.net.classes, dtype=inputs.dtype, device=inputs.device)[labels]
        logits = self.net.generate_logits(onehot)
        return F.binary_cross_entropy_with_logits(logits, inputs, reduction="none").flatten(1).mean(1)

    def _told_apart(self, inputs: Tensor, key: Key | Tensor) -> Tensor:
        with torch.no_grad():
            made = self.net.generate(self._vectors(inputs, key))
        return F.softplus(-self._judged(inputs)) + F.softplus(self._judged(made))

    def _deceived(self, inputs: Tensor, key: Key | Tensor) -> Tensor:
        return F.softplus(-self._judged(self.net.generate(self._vectors(inputs, key))))

    def _vectors(self, inputs: Tensor, key: Key | Tensor) -> Tensor:
        assert isinstance(self.backward, Adversarial)
        like = inputs.new_empty(len(inputs), self.net.classes)
        vectors = self.backward.prior(like, key)
        if not isinstance(vectors, Tensor) or vectors.shape != like.shape:
            raise ArgumentError(
                "prior", vectors, f"vectors of shape {tuple(like.shape)}, as wide as the logits"
            )
        return vectors

    def _judged(self, inputs: Tensor) -> Tensor:
        assert self.discriminator is not None
        logits = self.discriminator(inputs)
        if not isinstance(logits, Tensor) or logits.numel() != len(inputs):
            raise ArgumentError("discriminator", logits, f"one logit for each of {len(inputs)} inputs")
        return logits.flatten()

    def _require(self, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError("batch", batch, "(inputs, labels)")
        inputs, labels = batch
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ArgumentTypeError("inputs", inputs, "a floating-point tensor")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
            raise ArgumentTypeError("labels", labels, f"an int64 tensor of shape ({len(inputs)},)")
        if not without_data(inputs) and bool(((inputs < 0) | (inputs > 1)).any()):
            mend = "The generator ends in a sigmoid: scale inputs to [0, 1]."
            raise ArgumentError("inputs", inputs, "values in [0, 1]", mend)
        return inputs, labels

    @torch.no_grad()
    def _zero_biases(self) -> None:
        for layer in self.net.layers:
            bias = layer.bias if isinstance(layer, nn.Linear | nn.Conv2d) else None
            if bias is not None:
                bias.zero_()
        for bias in self.net.backward_biases:
            bias.zero_()


def _trained(parameters: Any) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in parameters if parameter.requires_grad)
