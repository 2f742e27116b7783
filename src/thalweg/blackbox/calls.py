"""One call of a layer that is to be perturbed: its undisturbed inputs, its noise, and its own derivative."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from thalweg import noise
from thalweg.errors import UnsupportedError
from thalweg.noise import Key


@dataclass(slots=True, eq=False)
class Call:
    """One call of a node in the clean pass, and what is found out about it later."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Tensor  # shape and device of the output and the dtype of its noise; holds no values
    clean: Tensor | None  # the output itself, where changes of activity are measured
    change: Tensor | None = None
    cotangent: Tensor | None = None

    def noise(self, key: Key, sample: int, index: int) -> Tensor:
        """The unit noise of this call, which is number `index`, in noisy pass `sample`; drawn anew."""
        return noise.normal(self.like, Key(key.bits(), step=sample, call=index, device=key.device))


def pull_back(call: Call, cotangent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The vector-Jacobian product of one layer with respect to its own parameters."""
    module = call.module
    plain = type(module) is nn.Linear and all(p is module.weight or p is module.bias for p in parameters)
    if plain and isinstance(module, nn.Linear) and len(call.args) == 1:
        # as the layer's own backward, without running the layer again, and in float32 or better
        rows = cotangent.reshape(-1, module.out_features)
        inputs = call.args[0].reshape(-1, module.in_features).to(rows.dtype)
        return [rows.T @ inputs if parameter is module.weight else rows.sum(0) for parameter in parameters]
    cast = parameters[0].dtype
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.to(cast) if t.is_floating_point() else t, (call.args, call.kwargs)
    )
    with torch.enable_grad(), torch.autocast(cotangent.device.type, enabled=False):
        # not `module(...)`: hooks have had their call
        output = module.forward(*args, **kwargs)
        found = torch.autograd.grad(output, parameters, cotangent.to(output.dtype), allow_unused=True)
    gradients = []
    for gradient in found:
        if gradient is None:
            raise UnsupportedError(
                f"NodePerturbation: a parameter of {layer_name(module)} takes no part in its forward; "
                "torch.nn.utils.parametrizations serve, the older hooks of torch.nn.utils do not"
            )
        gradients.append(gradient)
    return gradients


def layer_name(module: nn.Module) -> str:
    """What a message calls a layer."""
    return " ".join(repr(module).split())[:80]


@contextmanager
def hooked(hook: Callable[[nn.Module, Any, Any, Any], Any]) -> Iterator[None]:
    """Call `hook(module, args, kwargs, output)` after every module that runs in the body."""
    handle = nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    try:
        with warnings.catch_warnings():
            # a compiled module calls the hook once more, for its wrapper, which is no node
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")
            yield
    finally:
        handle.remove()
        # torch leaves this entry behind, and every module call of the process would be slower for it
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
