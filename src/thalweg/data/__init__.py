"""Real data sets that come in packages: nothing here downloads anything."""

from thalweg.data.cifar10 import cifar10
from thalweg.data.citations import citations
from thalweg.data.classification import Classification
from thalweg.data.digits import digits
from thalweg.data.digits_graph import digits_graph
from thalweg.data.fashion_mnist import fashion_mnist
from thalweg.data.graph import EdgeSplit, Graph, Links, NodeSplit, undirected
from thalweg.data.mnist import mnist
from thalweg.data.mnist_5k import mnist_5k

__all__ = [
    "Classification",
    "EdgeSplit",
    "Graph",
    "Links",
    "NodeSplit",
    "cifar10",
    "citations",
    "digits",
    "digits_graph",
    "fashion_mnist",
    "mnist",
    "mnist_5k",
    "undirected",
]
