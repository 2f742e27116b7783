"""A network whose Jacobian is masked, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from thalweg.errors import ArgumentTypeError, UnsupportedError
from thalweg.gates.stop import stop

Network = Callable[..., Any]


class MaskedNetwork:
    """What a step gets in place of its network: calls are masked, data attributes are the network's own.

    Args:
        network: the network.
        state: the share of its Jacobian with respect to what was computed from the step's state, in [0, 1].
        parameters: the share with respect to its parameters and its other arguments.
        entries: the step's state, as this step's own nodes of the graph.
    """

    def __init__(self, network: Network, state: float, parameters: float, entries: Sequence[Tensor]) -> None:
        self._network = network
        self._state = state
        self._parameters = parameters
        self._entries = {entry.grad_fn for entry in entries if entry.grad_fn is not None}
        self._fence = min((entry.grad_fn._sequence_nr() for entry in entries if entry.grad_fn), default=0)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network once, masked."""
        self.calls += 1
        if self._state == 0 and self._parameters == 0:
            with torch.no_grad():
                return self._network(*args, **kwargs)
        args, kwargs = tree_map(self._gated, (args, kwargs))
        if self._parameters == 1:
            return self._network(*args, **kwargs)
        assert isinstance(self._network, nn.Module)
        fraction = 1 - self._parameters
        shared: dict[int, Tensor] = {}
        masked = {}
        # by modules, each once: a module of two names would be swapped twice and restored to the first swap
        for prefix, module in self._network.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                if id(parameter) not in shared:
                    scalable = parameter.is_floating_point() and parameter.requires_grad
                    shared[id(parameter)] = stop(parameter, fraction) if scalable else parameter
                masked[name] = shared[id(parameter)]
        return functional_call(self._network, masked, args, kwargs, tie_weights=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as a call."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._network, name)
        own_method = callable(value) and not hasattr(nn.Module, name)
        if own_method or any(isinstance(leaf, nn.Module) for leaf in tree_leaves(value)):
            raise UnsupportedError(
                f"network.{name}: a mask sees only calls of the network itself, so the gradient through "
                f"{name} would not be masked. Wrap what the step needs in one module, or route without masks"
            )
        return value

    def _gated(self, argument: Any) -> Any:
        if not (isinstance(argument, Tensor) and argument.requires_grad):
            return argument
        share = self._state if self._from_state(argument) else self._parameters
        return argument if share == 1 else stop(argument, 1 - share)

    def _from_state(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the step's state: a walk that stops where the step began."""
        stack = [tensor.grad_fn]
        seen = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            if node in self._entries:
                return True
            seen.add(node)
            # nodes made before the step began lead only to what was there before
            if node._sequence_nr() >= self._fence:
                stack.extend(parent for parent, _ in node.next_functions)
        return False


def require_maskable(
    network: object, shares: Iterable[tuple[float, float]], argument: str = "network"
) -> None:
    """Refuse a network whose parameters cannot be told from the rest, where a mask has to."""
    if isinstance(network, nn.Module):
        for module in network.modules():
            if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
                raise UnsupportedError(
                    f"a masked route through {type(module).__name__}: its hooks would not fire. Pass the "
                    "bare module and call thalweg.all_reduce_gradients_(parameters) afterwards"
                )
        return
    if not callable(network):
        raise ArgumentTypeError(argument, network, "a torch.nn.Module or a function")
    if any(parameters < 1 and state > 0 for state, parameters in shares):
        mend = "A function does not say what its parameters are."
        raise ArgumentTypeError(argument, network, "a torch.nn.Module where parameters are masked", mend)
