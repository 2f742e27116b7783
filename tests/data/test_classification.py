"""Four tensors that fit together, and a validation part that never sees the test part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thalweg.data import Classification
from thalweg.errors import ArgumentError, ArgumentTypeError


def numbered(train: int, test: int = 3) -> Classification:
    """Each input carries its own number, so that a split can be followed."""
    numbers = torch.arange(train + test, dtype=torch.float32)[:, None]
    labels = torch.arange(train + test) % 2
    return Classification(numbers[:train], labels[:train], numbers[train:], labels[train:], 2, "numbered")


@given(st.integers(2, 40), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_split_partitions_the_training_part(examples: int, fraction: float, seed: int) -> None:
    data = numbered(examples)
    fit, held_out = data.split_train(fraction=fraction, seed=seed)
    both = torch.cat([fit.train_inputs, held_out.train_inputs])[:, 0]
    assert both.sort().values.tolist() == list(range(examples))
    assert min(len(fit.train_labels), len(held_out.train_labels)) >= 1
    assert abs(len(held_out.train_labels) - fraction * examples) <= 1
    for part in (fit, held_out):
        assert len(part.test_inputs) == len(part.test_labels) == 0
        assert torch.equal(part.train_inputs[:, 0].long() % 2, part.train_labels)


def test_split_is_named_by_its_seed() -> None:
    data = numbered(50)
    first, again, other = (data.split_train(fraction=0.3, seed=seed)[1].train_inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan"), "half"])
def test_split_refuses_other_fractions(fraction: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match="fraction"):
        numbered(10).split_train(fraction=fraction, seed=0)
    with pytest.raises(ArgumentError, match="two examples"):
        numbered(1).split_train(fraction=0.5, seed=0)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"train_inputs": torch.zeros(4, 2, dtype=torch.float64)}, "train_inputs"),
        ({"train_inputs": torch.zeros(4)}, "train_inputs"),
        ({"train_inputs": torch.zeros(3, 2)}, "train_labels"),
        ({"train_labels": torch.zeros(4)}, "train_labels"),
        ({"train_labels": torch.tensor([0, 1, 2, 0])}, "train_labels"),
        ({"test_labels": torch.tensor([-1, 0])}, "test_labels"),
        ({"test_inputs": torch.zeros(2, 3)}, "test_inputs"),
        ({"classes": 1}, "classes"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], argument: str) -> None:
    good: dict[str, Any] = {
        "train_inputs": torch.zeros(4, 2),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test_inputs": torch.zeros(2, 2),
        "test_labels": torch.tensor([0, 1]),
        "classes": 2,
        "name": "good",
    }
    Classification(**good)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        Classification(**(good | change))
