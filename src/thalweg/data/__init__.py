"""Real data sets that come in packages: nothing here downloads anything."""

from thalweg.data.classification import Classification
from thalweg.data.digits import digits
from thalweg.data.mnist import mnist

__all__ = ["Classification", "digits", "mnist"]
