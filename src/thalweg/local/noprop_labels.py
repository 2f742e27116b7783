"""Labels as points in space: one-hot, learned or prototype embeddings, and reading a class off a latent."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.noise import Key, normal


class LabelEmbedding(nn.Module):
    """One point per class, fixed or learned; see `one_hot_labels`, `learned_labels`, `prototype_labels`.

    Args:
        weight: the points, shape (classes, *shape) with at least one dimension in `shape`; copied.
        learned: whether they are parameters.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> LabelEmbedding(torch.eye(3), learned=False)(torch.tensor([2]))
        tensor([[0., 0., 1.]])
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, learned: bool) -> None:
        super().__init__()
        require_floating("weight", weight)
        if weight.ndim < 2 or len(weight) < 2 or weight[0].numel() == 0:
            raise ArgumentError("weight", weight, "shape (classes, ...), at least two classes")
        if not isinstance(learned, bool):
            raise ArgumentTypeError("learned", learned, "True or False")
        if learned:
            self.weight = nn.Parameter(weight.detach().clone())
        else:
            self.register_buffer("weight", weight.detach().clone())

    @property
    def classes(self) -> int:
        """How many points."""
        return len(self.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a point."""
        return tuple(self.weight.shape[1:])

    @property
    def learned(self) -> bool:
        """Whether the points learn."""
        return self.weight.requires_grad

    def forward(self, labels: Tensor) -> Tensor:
        """The points of labels (batch,), shape (batch, *shape)."""
        return self.weight[labels]

    def mix(self, coefficients: Tensor) -> Tensor:
        """Points weighted by (batch, classes): inside their convex hull if these are probabilities."""
        flat: Tensor = coefficients @ self.weight.flatten(1)
        return flat.view(-1, *self.shape)

    def squared_distances(self, points: Tensor) -> Tensor:
        """From points (batch, *shape) to each class, shape (batch, classes)."""
        flat = self.weight.flatten(1)
        # the exact difference: the expanded square loses the small distances
        return (points.flatten(1)[:, None] - flat).square().sum(2)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"classes={self.classes}, shape={self.shape}, learned={self.learned}"


def one_hot_labels(classes: int) -> LabelEmbedding:
    """The corners of the simplex, fixed: the plainest choice, and nothing to collapse.

    Example:
        >>> one_hot_labels(2).weight
        tensor([[1., 0.],
                [0., 1.]])
    """
    require_integer("classes", classes, 2)
    return LabelEmbedding(torch.eye(classes), learned=False)


def learned_labels(classes: int, width: int = 20, *, seed: int = 0) -> LabelEmbedding:
    """Learned points in `width` dimensions; orthonormal at first, so far as the dimensions allow.

    Choose it where classes are many or alike. It needs more epochs than one-hot labels.

    Args:
        classes: at least 2.
        width: at least 1. Below `classes` the points cannot be orthogonal: then the columns are, with a
            warning.
        seed: of the start.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> w = learned_labels(3, 5).weight
        >>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-6)
        True
    """
    require_integer("classes", classes, 2)
    require_integer("width", width, 1)
    if width < classes:
        warnings.warn(
            f"{classes} labels cannot be orthogonal in {width} dimensions: only the columns are",
            stacklevel=2,
        )
    drawn = normal(torch.empty(max(classes, width), min(classes, width)), Key(seed))
    columns, upper = torch.linalg.qr(drawn)
    columns = columns * upper.diagonal().sign()
    return LabelEmbedding(columns if classes >= width else columns.T, learned=True)


def prototype_labels(inputs: Tensor, labels: Tensor, classes: int, *, learned: bool = True) -> LabelEmbedding:
    """Each class starts as its most typical example: the one with the smallest median distance to its class.

    Choose it for images: the latent is then an image too, and the block can treat both alike.

    Args:
        inputs: training examples, shape (examples, *shape).
        labels: their classes, shape (examples,); each class at least once.
        classes: at least 2.
        learned: False keeps the points where they are.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or a class without an example.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [7.0]])
        >>> prototype_labels(x, torch.tensor([0, 0, 0, 0, 1]), 2).weight.detach()
        tensor([[1.],
                [7.]])
    """
    require_floating("inputs", inputs)
    require_integer("classes", classes, 2)
    require_labels(labels, classes, len(inputs) if inputs.ndim > 1 else -1)
    found = []
    for label in range(classes):
        members = inputs[labels == label]
        if not len(members):
            raise ArgumentError("labels", labels, f"at least one example of class {label}")
        flat = members.flatten(1)
        # row by row: all distances within a class of MNIST would take 140 MB
        medians = torch.stack([(flat - row).norm(dim=1).quantile(0.5) for row in flat])
        found.append(members[medians.argmin()])
    return LabelEmbedding(torch.stack(found), learned=learned)


class LatentReadout(nn.Module):
    """Logits from a latent, the last layer of NoProp.

    Args:
        embedding: the labels' points.
        kind: "softmax" is a linear layer; "distance" turns the latent into a mixture of the points and
            scores classes by their squared distance to it.
        scale: of "distance": the standard deviation by which distances are judged.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> labels = one_hot_labels(3)
        >>> LatentReadout(labels, "distance")(torch.zeros(4, 3), labels).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        embedding: LabelEmbedding,
        kind: Literal["softmax", "distance"] = "softmax",
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        require_choice("kind", kind, ("softmax", "distance"))
        require_positive("scale", scale)
        self.kind = kind
        self.scale = scale
        self.linear = nn.Linear(embedding.weight[0].numel(), embedding.classes)

    def forward(self, latent: Tensor, embedding: LabelEmbedding) -> Tensor:
        """Logits, shape (batch, classes)."""
        logits: Tensor = self.linear(latent.flatten(1))
        if self.kind == "softmax":
            return logits
        return -embedding.squared_distances(embedding.mix(logits.softmax(1))) / (2 * self.scale**2)


def require_labels(labels: object, classes: int, count: int) -> None:
    """Raise unless `labels` are `count` integers in 0 to classes - 1; one synchronisation."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ArgumentTypeError("labels", labels, "an int64 tensor of classes, shape (batch,)")
    if labels.shape != (count,):
        raise ArgumentError("labels", labels, f"shape ({count},), one class per example")
    if isinstance(labels, FakeTensor) or labels.is_meta or isinstance(labels.detach(), FakeTensor):
        # without data; the last of the three is a real tensor inside a fake mode
        return
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ArgumentError("labels", labels, f"classes 0 to {classes - 1}")
