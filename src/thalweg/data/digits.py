"""Scikit-learn's bundled handwritten digits: real data in an instant, for tests and one-minute runs."""

from __future__ import annotations

import torch

from thalweg.data.classification import Classification
from thalweg.errors import MissingExtraError

TRAIN_EXAMPLES = 1400


def digits() -> Classification:
    """Load the 1797 digits of 8x8 pixels (the test part of UCI's "optdigits"); choose it when seconds count.

    The split is a permutation of seed 0, 1400 for training and 397 for testing; scikit-learn ships none.

    Returns:
        Inputs of shape (examples, 64) in [0, 1], ten classes.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> data = digits()
        >>> data.train_inputs.shape, data.test_inputs.shape
        (torch.Size([1400, 64]), torch.Size([397, 64]))
    """
    try:
        import numpy as np
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(error.name or "scikit-learn", "recipes") from None
    pixels, labels = load_digits(return_X_y=True)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    inputs = (torch.from_numpy(pixels) / 16).to(torch.float32)[order]
    targets = torch.from_numpy(labels).to(torch.int64)[order]
    return Classification(
        inputs[:TRAIN_EXAMPLES],
        targets[:TRAIN_EXAMPLES],
        inputs[TRAIN_EXAMPLES:],
        targets[TRAIN_EXAMPLES:],
        classes=10,
        name="digits 8x8",
    )
