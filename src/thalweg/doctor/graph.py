"""Walks of the graph that autograd recorded: which leaves it reaches, and what lies upstream of what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node, whose subclasses made in C++ carry no common base in Python


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors inside nested lists, tuples and mappings, in order.

    Example:
        >>> import torch
        >>> len(list(tensors_in({"a": torch.ones(1), "b": [torch.ones(1), 3]})))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def is_leaf(node: Node) -> bool:
    """Whether a node is where a leaf tensor collects its gradient."""
    return type(node).__name__ == "AccumulateGrad"


def edges(node: Node) -> list[Node]:
    """The nodes that a node hands gradients to: one step towards the inputs of the computation."""
    return [following for following, _ in node.next_functions if following is not None]


def upstream(roots: Iterable[Node | None]) -> list[Node]:
    """Every node from the roots (included) to the leaves, each after all nodes it hands gradients to.

    Example:
        >>> import torch
        >>> [type(n).__name__ for n in upstream([torch.ones(1, requires_grad=True).exp().sum().grad_fn])]
        ['AccumulateGrad', 'ExpBackward0', 'SumBackward0']
    """
    order: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root is None or root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(edges(root)))]
        while stack:
            node, rest = stack[-1]
            following = next((each for each in rest if each not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(edges(following))))
    return order


def leaves(roots: Iterable[Node | None]) -> set[int]:
    """The `id` of every leaf tensor that a gradient from the roots reaches."""
    return {id(node.variable) for node in upstream(roots) if is_leaf(node)}


def marks_upstream(order: list[Node], mark: Callable[[Node], int]) -> dict[Node, int]:
    """For each node the marks (bits of an integer) of itself and of everything upstream of it.

    Args:
        order: nodes as `upstream` lists them.
        mark: the bits of one node, 0 for none.
    """
    bits: dict[Node, int] = {}
    for node in order:
        total = mark(node)
        for following in edges(node):
            total |= bits[following]
        bits[node] = total
    return bits
