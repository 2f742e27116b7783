"""One set of weights in both directions: inputs to classes, and by the transpose classes to inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive
from thalweg.local.stack import require_modules

ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus,
    nn.Identity,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Affine = nn.Linear | nn.Conv2d


class BidirectionalNet(nn.Module):
    """A classifier whose weights, transposed and in reverse order, generate inputs from classes.

    The weights are one and the same parameters: a step on either direction moves both. Biases and batch
    norms are each direction's own.

    Args:
        layers: Linear, Conv2d, elementwise activations, BatchNorm1d or 2d, Flatten; the last gives logits,
            (batch, classes). Pooling has no transpose: use strides.
        input_shape: of one input, without the batch.
        backward_activation: of the generator; None for the classifier's own.
        backward_norms: after which layers the generator has a batch norm, counted from the classes, 0 first;
            None for those that answer the classifier's.

    Raises:
        ArgumentError, ArgumentTypeError: a layer that has no transpose, that comes twice, or that does not
            fit the one before.

    Paper:
        Pontes-Filho, Liwicki: Bidirectional Learning for Robust Neural Networks. IJCNN 2019,
        arXiv 1805.08006.

    Example:
        >>> net = BidirectionalNet([nn.Linear(784, 16), nn.Sigmoid(), nn.Linear(16, 10)], [784])
        >>> net.classify(torch.rand(5, 784)).shape, net.generate(torch.eye(10)).shape
        (torch.Size([5, 10]), torch.Size([10, 784]))
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        input_shape: Sequence[int],
        *,
        backward_activation: nn.Module | None = None,
        backward_norms: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        found = require_modules("layers", layers)
        _require_layers(found)
        for index, size in enumerate(input_shape):
            require_integer(f"input_shape[{index}]", size, 1)
        if backward_activation is not None and not isinstance(backward_activation, ELEMENTWISE):
            raise ArgumentTypeError("backward_activation", backward_activation, "an elementwise activation")
        self.layers = nn.ModuleList(found)
        self.input_shape = tuple(input_shape)
        self.backward_activation = backward_activation
        self._affine = [i for i, layer in enumerate(found) if isinstance(layer, Affine)]
        self._shapes = _shapes(found, self.input_shape)
        self.classes = self._shapes[-1][0]
        self._paddings = [self._output_padding(i) for i in self._affine]
        like = self._weight(0)
        self.backward_biases = nn.ParameterList(
            nn.Parameter(like.new_zeros(_inputs(found[index]))) for index in reversed(self._affine)
        )
        self.backward_norms = self._norms(backward_norms)

    def classify(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, classes), of inputs (batch, *input_shape)."""
        if not isinstance(inputs, Tensor) or inputs.shape[1:] != self.input_shape:
            raise ArgumentError("inputs", inputs, f"shape (batch, {', '.join(map(str, self.input_shape))})")
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        """The same as `classify`."""
        return self.classify(inputs)

    def generate(self, classes: Tensor) -> Tensor:
        """Inputs in [0, 1], (batch, *input_shape), from vectors (batch, classes)."""
        return self.generate_logits(classes).sigmoid()

    def generate_logits(self, classes: Tensor) -> Tensor:
        """What `generate` takes the sigmoid of."""
        if not isinstance(classes, Tensor) or classes.shape[1:] != (self.classes,):
            raise ArgumentError("classes", classes, f"shape (batch, {self.classes}), the width of the logits")
        state = classes
        for step, place in enumerate(reversed(range(len(self._affine)))):
            state = self._transposed(state, place, self.backward_biases[step])
            norm = self.backward_norms[step]
            state = norm(state)
            before = self._affine[place - 1] + 1 if place else 0
            between = self.layers[before : self._affine[place]]
            # before the layers that lie in between, so that a Flatten is undone
            state = state.reshape(len(state), *self._shapes[before])
            for layer in between:
                if isinstance(layer, ELEMENTWISE):
                    state = (self.backward_activation or layer)(state)
        return state

    def shared(self) -> list[nn.Parameter]:
        """The weights of both directions."""
        return [self._weight(place) for place in range(len(self._affine))]

    def forward_parameters(self, *, bias: bool = True) -> list[nn.Parameter]:
        """What the classifier is made of; without biases and norms, `shared()`."""
        return list(self.layers.parameters()) if bias else self.shared()

    def backward_parameters(self, *, bias: bool = True) -> list[nn.Parameter]:
        """What the generator is made of; without biases and norms, `shared()`."""
        own = [*self.backward_biases, *self.backward_norms.parameters()] if bias else []
        return [*self.shared(), *own]

    @torch.no_grad()
    def start_(self, *, std: float | None = 0.1, seed: int = 0) -> BidirectionalNet:
        """Draw the weights from a normal distribution cut at two standard deviations; biases to zero.

        Args:
            std: above 0; None for sqrt(2 / fan in).
            seed: of the draw.

        Returns:
            The net itself.
        """
        require_integer("seed", seed, 0)
        if std is not None:
            require_positive("std", std)
        generator = torch.Generator().manual_seed(seed)
        for weight in self.shared():
            wide = std if std is not None else math.sqrt(2 / weight[0].numel())
            drawn = torch.empty(weight.shape)
            nn.init.trunc_normal_(drawn, std=wide, a=-2 * wide, b=2 * wide, generator=generator)
            weight.copy_(drawn)
        for index in self._affine:
            bias = self.layers[index].bias
            if isinstance(bias, Tensor):
                bias.zero_()
        for bias in self.backward_biases:
            bias.zero_()
        return self

    def _weight(self, place: int) -> nn.Parameter:
        weight = self.layers[self._affine[place]].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _transposed(self, state: Tensor, place: int, bias: Tensor) -> Tensor:
        layer = self.layers[self._affine[place]]
        if isinstance(layer, nn.Linear):
            return F.linear(state, layer.weight.T, bias)
        assert isinstance(layer, nn.Conv2d)
        shape = self._shapes[self._affine[place] + 1]
        return F.conv_transpose2d(
            state.reshape(len(state), *shape),
            layer.weight,
            bias,
            stride=layer.stride,
            padding=_padding(layer),
            output_padding=self._paddings[place],
            groups=layer.groups,
            dilation=layer.dilation,
        )

    def _output_padding(self, index: int) -> tuple[int, int]:
        layer = self.layers[index]
        if not isinstance(layer, nn.Conv2d):
            return (0, 0)
        before, after = self._shapes[index][1:], self._shapes[index + 1][1:]
        found = []
        for axis, pad in enumerate(_padding(layer)):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            found.append(before[axis] - ((after[axis] - 1) * layer.stride[axis] - 2 * pad + reach))
        if any(extra >= max(layer.stride[a], layer.dilation[a]) for a, extra in enumerate(found)):
            raise ArgumentError(f"layers[{index}]", layer, "a convolution whose transpose restores the size")
        return found[0], found[1]

    def _norms(self, wanted: Sequence[int] | None) -> nn.ModuleList:
        """A batch norm or nothing after each transposed layer, from the classes on; none at the image."""
        count = len(self._affine)
        steps = set(wanted) if wanted is not None else set()
        if wanted is None:
            for step, place in enumerate(reversed(range(1, count))):
                between = self.layers[self._affine[place - 1] + 1 : self._affine[place]]
                if any(isinstance(layer, NORMS) for layer in between):
                    steps.add(step)
        for step in steps:
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < count - 1:
                raise ArgumentError("backward_norms", step, f"numbers in 0 .. {count - 2}")
        made: list[nn.Module] = []
        for step, place in enumerate(reversed(range(count))):
            layer = self.layers[self._affine[place]]
            norm = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
            like = self._weight(place)
            made.append(
                norm(_inputs(layer), device=like.device, dtype=like.dtype) if step in steps else nn.Identity()
            )
        return nn.ModuleList(made)


def bidirectional_mlp(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module] = nn.Sigmoid,
    *,
    std: float | None = 0.1,
    seed: int = 0,
) -> BidirectionalNet:
    """A fully connected net of both directions, as in the paper's first experiments.

    Args:
        sizes: of the input, of the hidden layers, and the number of classes.
        activation: makes one.
        std: of the weights at the start; None for sqrt(2 / fan in).
        seed: of the draw.

    Example:
        >>> [tuple(weight.shape) for weight in bidirectional_mlp([784, 16, 10]).shared()]
        [(16, 784), (10, 16)]
    """
    if len(sizes) < 2:
        raise ArgumentError("sizes", sizes, "the size of the input, any hidden ones, the number of classes")
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(sizes):
        layers += [nn.Linear(below, above), activation()]
    return BidirectionalNet(layers[:-1], [sizes[0]]).start_(std=std, seed=seed)


def _require_layers(layers: Sequence[nn.Module]) -> None:
    allowed = (nn.Linear, nn.Conv2d, nn.Flatten, *NORMS, *ELEMENTWISE)
    mend = "Pooling: give a convolution a stride. Dropout has no place in a net that must invert itself."
    seen: set[int] = set()
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        if not isinstance(layer, allowed):
            raise ArgumentTypeError(
                name, layer, "Linear, Conv2d, BatchNorm, Flatten or an elementwise activation", mend
            )
        if isinstance(layer, Affine):
            if id(layer.weight) in seen:
                raise ArgumentError(
                    name, layer, "a weight that no other layer has", "Use copy.deepcopy(layer)."
                )
            seen.add(id(layer.weight))
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
            raise ArgumentError(name, layer, "Flatten() of all but the batch")
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise ArgumentError(name, layer, "padding_mode='zeros', of which there is a transpose")
            _padding(layer, name)
    if not isinstance(layers[0], Affine | nn.Flatten) or not isinstance(layers[-1], nn.Linear):
        raise ArgumentError(
            "layers", [type(each).__name__ for each in layers], "Linear or Conv2d at first, Linear at last"
        )


def _padding(layer: nn.Conv2d, name: str = "layers") -> tuple[int, int]:
    if not isinstance(layer.padding, str):
        return layer.padding[0], layer.padding[1]
    if layer.padding == "valid":
        return 0, 0
    total = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size)]
    if any(each % 2 for each in total):
        raise ArgumentError(name, layer, "padding as a number: 'same' pads an even kernel on one side more")
    return total[0] // 2, total[1] // 2


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


@torch.no_grad()
def _shapes(layers: Sequence[nn.Module], input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape before each layer, and at last that of the logits."""
    like = next(layer for layer in layers if isinstance(layer, Affine)).weight
    state = like.new_zeros(2, *input_shape)
    shapes = [input_shape]
    for index, layer in enumerate(layers):
        if not isinstance(layer, (*NORMS, *ELEMENTWISE)):
            try:
                state = layer(state)
            except RuntimeError as error:
                raise ArgumentError(
                    f"layers[{index}]", layer, f"a layer for shape {shapes[-1]}", str(error)
                ) from None
        shapes.append(tuple(state.shape[1:]))
    if len(shapes[-1]) != 1 or shapes[-1][0] < 2:
        raise ArgumentError("layers", shapes[-1], "logits of shape (classes,) at last, two classes or more")
    return shapes
