"""A process ready to run: its steps, what they are given, and what each store does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_leaf

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.noise import Key
from thalweg.rollouts.checkpointed import Chain, Checkpointed, Leaves, equal_pieces, pieces
from thalweg.rollouts.guard import Guard
from thalweg.rollouts.network import MaskedNetwork, Network
from thalweg.rollouts.route import Gate, Store


@dataclass(slots=True, eq=False)
class Process:
    """One call of `rollout`, checked and with its random choices made.

    Args:
        step: the user's step.
        structure: how the state's tensors are nested.
        steps: how many steps.
        first: the first step that is differentiated.
        network: what the step gets before its state, or None.
        shares: per step, the shares of state and parameters in the network's Jacobian; None masks nothing.
        cotangent: a gate behind each step, or None.
        inputs: what step k gets beside its state, or None.
        key: names the step's draws, or None.
        then: the read-out, or None.
        trajectory: hand out all states.
    """

    step: Callable[..., Any]
    structure: TreeSpec
    steps: int
    first: int
    network: Network | None
    shares: tuple[tuple[float, float], ...] | None
    cotangent: Gate | None
    inputs: Sequence[Any] | Tensor | None
    key: Key | None
    then: Callable[..., Any] | None
    trajectory: bool
    _masked_calls: int = field(default=0, init=False)
    _bare: bool = field(init=False)  # the state is a tensor in no container: nothing to flatten

    def __post_init__(self) -> None:
        self._bare = self.structure == treespec_leaf()

    def run(self, leaves: Leaves, store: Store) -> Any:
        """All steps and the read-out; `store` must name slots or segments, not a budget."""
        before = [leaves]
        with torch.no_grad():
            for k in range(self.first):
                leaves = self.advance(k, leaves)
                before = [*before, leaves] if self.trajectory else [leaves]
        if self.first:
            leaves = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            before[-1] = leaves
        if isinstance(store, Checkpointed) and torch.is_grad_enabled() and self.first < self.steps:
            return self._checkpointed(leaves, before, store)
        for k in range(self.first, self.steps):
            leaves = self.advance(k, leaves)
            before = [*before, leaves] if self.trajectory else [leaves]
        self._require_masked()
        result = self._result(before)
        return result if self.then is None else self.then(result)

    def _checkpointed(self, leaves: Leaves, before: list[Leaves], store: Checkpointed) -> Any:
        guard = Guard(self.step, self.network, self.then)
        advance = partial(self._guarded, guard)
        host = store.on == "host"
        steps = self.steps - self.first
        ends = equal_pieces(steps, store.segments) if store.segments else pieces(steps, store.stride)
        ends = tuple(self.first + end for end in ends)
        chain = Chain(advance, ends, self.trajectory, host, guard.normalisations)
        # a read-out runs in a checkpoint of its own, as if it were one more piece
        last = len(ends) - 1 + (self.then is not None)
        visited = chain.run(leaves, 0, last, last if store.slots is None else store.slots)
        self._require_masked()
        visited = [*before, *visited] if self.trajectory else visited
        if self.then is None:
            result = self._result(visited)
        else:
            flat = tuple(leaf for each in visited for leaf in each)
            result = chain.frame(self._read_out, flat, 0)
        guard.check()
        return result

    def _guarded(self, guard: Guard, k: int, leaves: Leaves) -> Leaves:
        new = self.advance(k, leaves)
        if k == self.first and not guard.checked:
            guard.check()
        return new

    def _read_out(self, *flat: Any) -> Any:
        assert self.then is not None
        width = self.structure.num_leaves
        visited = [flat[start : start + width] for start in range(0, len(flat), width)]
        return self.then(self._result(visited))

    def _result(self, visited: list[Leaves]) -> Any:
        states = [tree_unflatten(list(leaves), self.structure) for leaves in visited]
        return tuple(states) if self.trajectory else states[-1]

    def advance(self, k: int, leaves: Leaves) -> Leaves:
        """Step `k` on the flat state."""
        masked: MaskedNetwork | None = None
        network: tuple[Any, ...] = () if self.network is None else (self.network,)
        if self.shares is not None and self.shares[k] != (1.0, 1.0) and torch.is_grad_enabled():
            assert self.network is not None
            leaves = tuple(_entry(leaf) for leaf in leaves)
            entries = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            masked = MaskedNetwork(self.network, *self.shares[k], entries)
            network = (masked,)
        given: tuple[Any, ...] = () if self.inputs is None else (self.inputs[k],)
        if self.key is not None:
            given = (*given, self.key.at(step=k))
        state = leaves[0] if self._bare else tree_unflatten(list(leaves), self.structure)
        new = self.step(*network, state, k, *given)
        if masked is not None:
            self._masked_calls += masked.calls
        if self._bare and isinstance(new, Tensor):
            if self.cotangent is None:
                return (new,)
            found = [new]
        else:
            found, structure = tree_flatten(new)
            self._require_alike(k, leaves, found, structure)
        if self.cotangent is not None:
            found = [self.cotangent(leaf) if _is_floating(leaf) else leaf for leaf in found]
        return tuple(found)

    def _require_alike(self, k: int, leaves: Leaves, found: list[Any], structure: TreeSpec) -> None:
        mend = (
            "A step returns the next state and nothing else; keep what you want to see with trajectory=True."
        )
        if structure != self.structure:
            got = f"{structure} from step {k}"
            raise ArgumentTypeError(
                "step", got, f"a state nested like the one it got, {self.structure}", mend
            )
        for old, new in zip(leaves, found):
            if isinstance(old, Tensor) != isinstance(new, Tensor):
                raise ArgumentTypeError("step", new, f"a tensor where the state of step {k} has one", mend)

    def _require_masked(self) -> None:
        if self.shares is None or self._masked_calls or not torch.is_grad_enabled():
            return
        if any(shares != (1.0, 1.0) for shares in self.shares[self.first :]):
            raise UnsupportedError(
                "network: no step called the network that it was given, so nothing was masked. Write "
                "step(net, x, k) and call net, not the network in the surrounding scope"
            )


def _entry(leaf: Any) -> Any:
    return leaf.view_as(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def require_inputs(inputs: object, steps: int) -> None:
    """Refuse inputs that do not come one per step."""
    if inputs is None:
        return
    if isinstance(inputs, Tensor):
        if inputs.ndim == 0 or len(inputs) != steps:
            raise ArgumentError("inputs", inputs, f"{steps} entries along the first dimension")
    elif isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise ArgumentTypeError("inputs", inputs, f"a list or a tensor of {steps} entries, one per step")
    elif len(inputs) != steps:
        raise ArgumentError("inputs", f"{len(inputs)} entries", f"{steps} entries, one per step")
