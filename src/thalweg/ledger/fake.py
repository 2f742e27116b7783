"""Building and running models whose tensors have shapes and no data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from thalweg.errors import UnsupportedError
from thalweg.step import Step


class FakeMode(FakeTensorMode):
    """A fake mode that survives `copy.deepcopy` of a module, as in `nn.TransformerEncoder`.

    Copied tensors would otherwise bring a copy of the mode with them and be strangers to this one.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


@contextmanager
def building() -> Iterator[None]:
    """Let models build under a fake mode that otherwise fail to: three places in torch expect data."""
    made: dict[tuple[int, int], tuple[Any, ...]] = {}

    def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `.to()` and `.half()` swap a fake parameter with its successor, which the fake mode's own weak
        # references forbid; and they would turn the tensors of an existing model into fake ones
        if recurse:
            for child in module.children():
                child._apply(change)
        for name, parameter in module._parameters.items():
            if isinstance(parameter, FakeTensor):
                key = (id(change), id(parameter))
                if key not in made:
                    new = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
                    made[key] = (new, change, parameter)
                module._parameters[name] = made[key][0]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, FakeTensor):
                module._buffers[name] = change(buffer)
        return module

    def leave(tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return tensor

    with (
        patch.object(nn.Module, "_apply", convert),
        # redraws values until they lie in range, which a price does not need
        patch.object(nn.init, "_no_grad_trunc_normal_", leave, create=True),
        warnings.catch_warnings(),
    ):
        # copying a fake module asks for its address first
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def kept(step: Step) -> Iterator[None]:
    """Give real parameters their memory back when a route has pointed them at fake memory, and say so."""
    leaves = {id(p): p for p in (*step.model.parameters(), *step.parameters)}
    memory = [(p, p.data) for p in leaves.values() if not isinstance(p, FakeTensor)]
    moved = False
    try:
        yield
    finally:
        for parameter, data in memory:
            if parameter.is_meta != data.is_meta:
                parameter.data = data
                moved = True
        if moved:
            raise UnsupportedError(
                "price: the route swaps the weights of an existing model, which fake tensors cannot follow. "
                "Give price a function that builds the model"
            )


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do when fake tensors cannot run a step."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedError(
            f"price: the step reads the value of a tensor ({error}), which fake tensors do not have. "
            "Leave .item(), print(loss) and data-dependent shapes out of the step, or use thalweg.ledger.cost"
        ) from error
    except UnsupportedOperatorException as error:
        raise UnsupportedError(
            f"price: {error} has no rule for fake tensors. Give it one with torch.library.register_fake, or "
            "use thalweg.ledger.cost"
        ) from error
