"""Linear and convolutional layers whose input hears the error through other weights than the forward ones."""

from __future__ import annotations

import copy
import zlib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.local.feedback import FeedbackAlignment, SignSymmetry
from thalweg.local.feedback_gates import Convolution, deliver
from thalweg.noise import normal

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Aligned:
    """The feedback weights of an aligned layer."""

    feedback_rule: FeedbackAlignment | SignSymmetry

    def backward_weight(self) -> Tensor:
        """What stands in for the forward weight on the way back."""
        rule, layer = self.feedback_rule, _any(self)
        if isinstance(rule, FeedbackAlignment):
            fixed: Tensor = layer.feedback
            return fixed
        weight: Tensor = layer.weight.detach()
        signs: Tensor = weight.sign()
        if rule.magnitude == "random":
            of_fixed_size: Tensor = signs * layer.feedback
            return of_fixed_size
        return signs * weight.abs().mean() if rule.magnitude == "mean" else signs


class AlignedLinear(Aligned, nn.Linear):
    """A linear layer with feedback weights of its own; made by `align`."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output; its input hears the error through the feedback weights."""
        out = F.linear(x.detach(), self.weight, self.bias)
        return deliver(out, x, self.backward_weight()) if x.requires_grad else out


class _AlignedConvolution(Aligned):
    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output; its input hears the error through the feedback weights."""
        layer = _any(self)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            # torch's own way: padded first, with an exact derivative, then convolved without padding
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.stride)
        how = Convolution(layer.stride, padding, layer.dilation, layer.groups)
        run = _RUN[len(layer.stride)]
        out: Tensor = run(
            x.detach(), layer.weight, layer.bias, how.stride, how.padding, how.dilation, how.groups
        )
        return deliver(out, x, self.backward_weight(), how) if x.requires_grad else out


class AlignedConv1d(_AlignedConvolution, nn.Conv1d):
    """A convolution with feedback weights of its own; made by `align`."""


class AlignedConv2d(_AlignedConvolution, nn.Conv2d):
    """A convolution with feedback weights of its own; made by `align`."""


class AlignedConv3d(_AlignedConvolution, nn.Conv3d):
    """A convolution with feedback weights of its own; made by `align`."""


_TWINS: dict[type, type] = dict(zip(LAYERS, (AlignedLinear, AlignedConv1d, AlignedConv2d, AlignedConv3d)))
_RUN: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def aligned_layer(name: str, layer: nn.Module, rule: FeedbackAlignment | SignSymmetry) -> nn.Module:
    """A layer that shares its parameters with `layer`; `name` picks its random weights."""
    twin: Any = twin_of(layer)
    twin.__class__ = _TWINS[type(layer)]
    twin.feedback_rule = rule
    if isinstance(rule, SignSymmetry) and rule.magnitude != "random":
        return twin  # type: ignore[no-any-return]
    weight: Tensor = twin.weight.detach()
    # a stream of its own for each layer, whatever else the module holds
    drawn = normal(weight, rule.key.at(call=zlib.crc32(name.encode()))) * (3 * weight[0].numel()) ** -0.5
    twin.register_buffer("feedback", drawn.abs() if isinstance(rule, SignSymmetry) else drawn * rule.scale)
    return twin  # type: ignore[no-any-return]


def twin_of(module: nn.Module) -> nn.Module:
    """The same module again with tables of its own: what is registered with one is not with the other."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            twin.__dict__[name] = copy.copy(value)
    return twin


def _any(module: object) -> Any:
    return module
