"""A classification data set as four tensors, whatever it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer, require_positive


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Inputs and labels for training and for testing; the test part chooses nothing, see `split_train`.

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

    def split_train(self, *, fraction: float, seed: int) -> tuple[Classification, Classification]:
        """Carve a validation part out of the training part; choose hyper-parameters on these two.

        Args:
            fraction: the share to hold out, above 0 and below 1; at least one example lands on each side.
            seed: which examples; at least 0.

        Returns:
            What is left to fit on, and what was held out. Both carry their examples as `train_*` and an
            empty test part, so that no choice made on them can have seen the test data.

        Raises:
            ArgumentError, ArgumentTypeError: a fraction or a seed out of range, or a single example.

        Example:
            >>> inputs, labels = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
            >>> data = Classification(inputs, labels, inputs[:1], labels[:1], classes=2, name="toy")
            >>> fit, held_out = data.split_train(fraction=0.4, seed=0)
            >>> len(fit.train_labels), len(held_out.train_labels), len(fit.test_labels)
            (3, 2, 0)
        """
        require_positive("fraction", fraction)
        require_integer("seed", seed, 0)
        examples = len(self.train_labels)
        if fraction >= 1:
            raise ArgumentError("fraction", fraction, "a share above 0 and below 1")
        if examples < 2:
            raise ArgumentError("train_labels", self.train_labels, "at least two examples to split")
        held = min(max(round(fraction * examples), 1), examples - 1)
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
        return self._only(order[held:], "fit"), self._only(order[:held], "held out")

    def _only(self, chosen: Tensor, part: str) -> Classification:
        return Classification(
            self.train_inputs[chosen],
            self.train_labels[chosen],
            self.test_inputs[:0],
            self.test_labels[:0],
            self.classes,
            f"{self.name} ({part})",
        )
