"""The bundled digits, in the split that is written down."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from thalweg.data import digits


def test_digits_are_those_of_scikit_learn_in_the_order_of_seed_0() -> None:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    data = digits()
    assert data.train_inputs.shape == (1400, 64)
    assert data.test_inputs.shape == (397, 64)
    np.testing.assert_array_equal(data.train_inputs.numpy() * 16, pixels[order[:1400]])
    np.testing.assert_array_equal(data.test_labels.numpy(), labels[order[1400:]])


def test_digits_have_the_recorded_counts_and_range() -> None:
    data = digits()
    counts = torch.cat([data.train_labels, data.test_labels]).bincount().tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float(data.train_inputs.min()) == 0.0
    assert float(data.train_inputs.max()) == 1.0
    assert data.train_inputs.dtype == torch.float32


def test_loading_leaves_the_random_state_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    digits()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
