"""The step under examination: its loss terms, evaluated again and again on the same noise, without trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger.storages import written_name
from thalweg.parameters import collect
from thalweg.wrappers import refuse_wrappers

Losses = Callable[[], Any] | Mapping[str, Callable[[], Any]]


class Patient:
    """A model, its loss terms and what it learns; every visit starts from the same buffers and random state.

    Args:
        model: the module, for names and for buffers that must come back.
        losses: one function of no arguments, or a mapping from names to such functions.
        parameters: what the step learns, or None for all parameters that require grad.
        seed: what torch's generators are set to before every evaluation.
    """

    def __init__(
        self, model: nn.Module, losses: Losses, parameters: Iterable[Tensor] | None, seed: int
    ) -> None:
        if not isinstance(model, nn.Module):
            mend = "Pass the model, the closure and the parameters: examine(model, closure, parameters)."
            raise ArgumentTypeError("model", model, "a torch.nn.Module", mend)
        _require_functions(losses)
        self.model = model
        self.parameters = _learned(model, parameters)
        self.names = _names(model, self.parameters)
        self.compiled = any("_orig_mod" in path.split(".") for path, _ in model.named_modules())
        self.forwards = 0
        self.backwards = 0
        self._losses = losses
        self._seed = seed

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Everything that runs the model happens inside; compiled regions run as the code they came from."""
        with ExitStack() as stack:
            stack.enter_context(isolated(self.model, self.parameters))
            stack.enter_context(_other_generators_kept())
            stack.enter_context(refuse_wrappers("examine"))
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            torch.manual_seed(self._seed)
            yield

    def terms(self) -> dict[str, Tensor]:
        """Evaluate the loss terms, each a scalar; call it inside a visit."""
        self.forwards += 1
        if not isinstance(self._losses, Mapping):
            return _named(self._losses())
        found: dict[str, Tensor] = {}
        for name, function in self._losses.items():
            torch.manual_seed(self._seed)
            found[str(name)] = _scalar(function(), f"losses[{name!r}]")
        return found

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor] | None = None, keep: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Differentiate a scalar; None where the graph does not reach."""
        self.backwards += 1
        wanted = self.parameters if parameters is None else parameters
        if not loss.requires_grad:
            return (None,) * len(wanted)
        found = torch.autograd.grad(loss, list(wanted), retain_graph=keep, allow_unused=True)
        # few operations know the sparse gradients of embeddings
        return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in found)

    def name(self, parameter: Tensor) -> str:
        """The name of a parameter in the model, or its place in `parameters`."""
        return self.names[id(parameter)]

    def listing(self, parameters: Sequence[Tensor], most: int = 3) -> str:
        """The first few names, for a line of text."""
        return ", ".join(map(self.name, parameters[:most])) + (", ..." if len(parameters) > most else "")

    def owner(self, parameter: Tensor) -> str:
        """The path of the module that holds a parameter."""
        return self.name(parameter).rpartition(".")[0]


def common_path(paths: Iterable[str]) -> str:
    """The longest module path that holds all the given ones.

    Example:
        >>> common_path(["encoder.layer.0", "encoder.layer.1.norm"])
        'encoder.layer'
    """
    split = [path.split(".") for path in paths]
    if not split:
        return ""
    together: list[str] = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        together.append(parts[0])
    return ".".join(together)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the loss terms."""
    values = list(terms.values())
    return torch.stack([value.to(values[0].device) for value in values]).sum() if values[1:] else values[0]


def _require_functions(losses: object) -> None:
    expected = "a function without arguments that returns the loss, or a mapping from names to such functions"
    if isinstance(losses, Mapping):
        if not losses:
            raise ArgumentError("losses", losses, "at least one loss term")
        for name, function in losses.items():
            if not callable(function):
                mend = "A term must be evaluated again under hooks: write {name: lambda: ...}."
                raise ArgumentTypeError(f"losses[{name!r}]", function, "a function without arguments", mend)
    elif isinstance(losses, nn.Module) or not callable(losses):
        raise ArgumentTypeError(
            "losses", losses, expected, "Write examine(model, lambda: loss(model(x), y))."
        )


def _named(loss: object) -> dict[str, Tensor]:
    if isinstance(loss, Mapping):
        if not loss:
            raise ArgumentError("losses", loss, "at least one loss term")
        return {str(name): _scalar(value, f"losses[{name!r}]") for name, value in loss.items()}
    return {"loss": _scalar(loss, "losses")}


def _scalar(loss: object, argument: str) -> Tensor:
    mend = ""
    if not isinstance(loss, Tensor):
        if isinstance(loss, Iterable):
            mend = "The phases of a learner are examined one at a time: return one phase's loss."
        elif isinstance(loss, float):
            mend = "Return the tensor, not loss.item()."
        raise ArgumentTypeError(argument, loss, "a floating-point tensor as the function's result", mend)
    if not loss.is_floating_point():
        raise ArgumentTypeError(argument, loss, "a floating-point tensor as the function's result")
    if loss.ndim > 1 or loss.numel() == 0:
        raise ArgumentError(argument, loss, "a scalar loss, or one loss per example of shape (batch,)")
    return loss.mean() if loss.ndim else loss


def _learned(model: nn.Module, parameters: Iterable[Tensor] | None) -> tuple[Tensor, ...]:
    if parameters is not None:
        return collect(parameters)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        mend = "All are frozen, or there are none: set requires_grad, or pass parameters=."
        raise ArgumentError("model", type(model), "a module with parameters that require grad", mend)
    return collect(trainable)


def _names(model: nn.Module, parameters: Sequence[Tensor]) -> dict[int, str]:
    names = {id(p): f"parameters[{index}]" for index, p in enumerate(parameters)}
    names.update((id(p), written_name(name)) for name, p in model.named_parameters())
    return names


@contextmanager
def _other_generators_kept() -> Iterator[None]:
    # a closure with numpy or random in it must see the same draws at every visit, and leave none behind
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    array: Any = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)
