"""A classification data set as four tensors, whatever it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Inputs and labels for training and for testing; the test part chooses nothing, see `validation`.

    Args:
        train_inputs: float32, (examples, *shape), scaled to [0, 1].
        train_labels: int64, (examples,), each in 0 .. classes - 1.
        test_inputs: float32, (test examples, *shape).
        test_labels: int64, (test examples,).
        classes: number of classes, at least 2.
        name: what the data set is called in tables.

    Raises:
        ArgumentError, ArgumentTypeError: tensors that do not fit together.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    name: str

    def __post_init__(self) -> None:
        require_integer("classes", self.classes, 2)
        for part in ("train", "test"):
            inputs, labels = getattr(self, f"{part}_inputs"), getattr(self, f"{part}_labels")
            if inputs.dtype != torch.float32 or inputs.ndim < 2:
                raise ArgumentTypeError(
                    f"{part}_inputs", inputs, "a float32 tensor of shape (examples, *shape)"
                )
            if labels.dtype != torch.int64:
                raise ArgumentTypeError(f"{part}_labels", labels, "an int64 tensor of shape (examples,)")
            if labels.shape != inputs.shape[:1]:
                raise ArgumentError(f"{part}_labels", labels, f"one label for each of {len(inputs)} inputs")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise ArgumentError(f"{part}_labels", labels, f"labels in 0 .. {self.classes - 1}")
        if self.train_inputs.shape[1:] != self.test_inputs.shape[1:]:
            raise ArgumentError("test_inputs", self.test_inputs, "the shape of the training inputs")

    def validation(self, examples: int) -> Classification:
        """The last training examples in place of the test part; choose hyper-parameters on this.

        Args:
            examples: how many to hold out, at least 1 and fewer than there are for training.

        Returns:
            A data set whose test part is carved out of this one's training part; this one's test part is
            not in it.

        Example:
            >>> data = Classification(
            ...     torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0]), torch.rand(1, 2), torch.tensor([1]), 2, "toy"
            ... )
            >>> held_out = data.validation(2)
            >>> len(held_out.train_labels), len(held_out.test_labels)
            (3, 2)
        """
        require_integer("examples", examples, 1)
        rest = len(self.train_labels) - examples
        if rest < 1:
            raise ArgumentError("examples", examples, f"fewer than the {len(self.train_labels)} for training")
        return Classification(
            self.train_inputs[:rest],
            self.train_labels[:rest],
            self.train_inputs[rest:],
            self.train_labels[rest:],
            self.classes,
            f"{self.name} (held out)",
        )
