"""Real data sets that come in packages: nothing here downloads anything."""

from thalweg.data.classification import Classification
from thalweg.data.digits import digits
from thalweg.data.mnist import mnist
from thalweg.data.mnist_5k import mnist_5k

__all__ = ["Classification", "digits", "mnist", "mnist_5k"]
