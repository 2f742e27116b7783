"""Forward gradient: one directional derivative, carried along with the forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from thalweg.blackbox.directions import Bound, Directions, bind, require_directions
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.blackbox.slopes import Slopes
from thalweg.errors import ArgumentError, UnsupportedError, require_integer
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


@dataclass(frozen=True, slots=True)
class ForwardGradient:
    """The slope of the loss along a random direction, times that direction: unbiased, and no backward.

    Choose it when activations do not fit but every operator has a forward derivative: the limit of `SPSA` as
    its scale goes to 0, without a scale to choose and without rounding in a difference of losses. Memory is
    that of inference plus two vectors as large as the parameters; time is that of two to three forwards.

    Parameters are given their tangents in place, so the closure may use them in any way: tied, through
    `torch.func.functional_call`, or as plain tensors. As in a backward pass, `torch.no_grad()` and
    `.detach()` cut. Compiled modules run uncompiled, attention runs on the math kernel. Inside the closure
    the parameters do not require grad; differentiating with respect to the inputs works.

    Args:
        samples: directions per estimate, at least 1; each is one evaluation.
        directions: "rademacher" (second moment d), "gaussian" (d + 2), or any other that `SPSA` takes.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Baydin, Pearlmutter, Syme, Wood, Torr: Gradients without Backpropagation. arXiv 2202.08587, 2022.

    Example:
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=ForwardGradient())
        >>> weight.grad
        tensor([6.])
    """

    samples: int = 1
    directions: Directions = "rademacher"

    def __post_init__(self) -> None:
        require_integer("samples", self.samples, 1)
        require_directions("directions", self.directions)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One evaluation per sample, each with one Jacobian-vector product.

        Raises:
            UnsupportedError: an operator without a forward derivative, by name; a custom operator or a custom
                autograd.Function that would drop the tangent.
            ArgumentError: the loss does not depend on the parameters.
        """
        found = self.measure(Evaluations(closure, parameters), parameters, key)
        with torch.no_grad():
            return found.estimate(parameters)

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key."""
        return bind(self.directions, parameters, key, self.samples)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """As `estimate`, but the gradient stays a few numbers and a key."""
        bound = self.bind(parameters, key)
        coefficients: list[Tensor] = []
        # enabled before `_Watch` looks: what it lets back to the caller's mode would stop tangents for good
        with torch.enable_grad(), _without_reverse(parameters), _served_kernels():
            for sample, weight in enumerate(bound.weights):
                tangents = (
                    bound.part(sample, index, parameter.detach())
                    for index, parameter in enumerate(parameters)
                )
                loss, slope = _slope(evaluations, f"sample {sample}", parameters, tangents)
                coefficients.append(slope * weight)
        return Slopes(loss, tuple(coefficients), bound, evaluations.count)


def _slope(
    evaluations: Evaluations, name: str, parameters: Sequence[Tensor], tangents: Iterator[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The loss and its derivative along the tangents."""
    if forward_ad._current_level >= 0:
        raise UnsupportedError(
            "ForwardGradient inside another forward-mode derivative: torch cannot nest them"
        )
    try:
        with forward_ad.dual_level(), _Watch(parameters), torch.enable_grad():
            for parameter, tangent in zip(parameters, tangents):
                if tangent is None:
                    continue
                # writes the same bits back and with them the tangent, on the very object that the closure
                # uses; the tangent vanishes with the level
                with _unsafe_preserve_version_counter(parameter):
                    parameter.copy_(forward_ad.make_dual(parameter.detach(), tangent))
            pair = forward_ad.unpack_dual(evaluations.loss(name))
            loss, slope = pair.primal.detach(), pair.tangent
    except (NotImplementedError, RuntimeError) as error:
        unsupported = _unsupported(error)
        if unsupported is None:
            raise
        raise unsupported from error
    if slope is None:
        mend = "The closure must compute the loss from the parameters anew at each call."
        raise ArgumentError("closure", loss, "a loss that depends on the parameters", mend)
    return loss, slope.detach()


_OPERATOR = re.compile(r"forward AD with (\S+) that does not support it")
_WAY_OUT = "SPSA needs no derivative, Backprop needs no forward one"


def _unsupported(error: Exception) -> UnsupportedError | None:
    """Translate torch's refusal of forward mode; None when the error is about something else."""
    text = str(error)
    if named := _OPERATOR.search(text):
        return UnsupportedError(f"ForwardGradient: {named[1]} has no forward derivative; {_WAY_OUT}")
    if "jvp" in text and "autograd.Function" in text:
        return UnsupportedError(
            f"ForwardGradient: a custom autograd.Function has no jvp; write one, or: {_WAY_OUT}"
        )
    if any(word in text for word in ("forward AD", "forward mode AD", "forward grad", "forward-mode")):
        return UnsupportedError(f"ForwardGradient: {text.splitlines()[0]}; {_WAY_OUT}")
    return None


class _Watch(TorchFunctionMode):
    """Refuses the places where torch would drop a tangent in silence; makes `no_grad` stop tangents too."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = {id(parameter) for parameter in parameters}
        self._cut_by_user = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._is_fwd_grad_enabled():
            self._cut_by_user = False
        hidden = not (torch._C._is_fwd_grad_enabled() or self._cut_by_user)
        if func is torch._C._set_grad_enabled:
            if not hidden:
                # what a backward pass would not see, a forward derivative must not see either
                self._cut_by_user = not args[0]
                torch._C._set_fwd_grad_enabled(bool(args[0]))
            return func(*args, **kwargs)
        if hidden:
            self._refuse_hidden(func, (*args, *kwargs.values()))
        if isinstance(func, OpOverload | OpOverloadPacket):
            _refuse_custom(func, (*args, *kwargs.values()))
        if func is torch.lstm:
            # the fused kernel of the CPU has no forward derivative, the composed one has
            with _without_mkldnn():
                return func(*args, **kwargs)
        if func is torch.nn.functional.group_norm and args:
            # its forward derivative takes views that a channels-last input does not have
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **kwargs)

    def _refuse_hidden(self, func: Any, arguments: Sequence[Any]) -> None:
        """Inside the forward of a custom Function torch turns tangents off, of captured parameters too."""
        if any(id(tensor) in self._parameters for tensor in _tensors(arguments)):
            raise UnsupportedError(
                "ForwardGradient: a parameter is used inside the forward of a custom autograd.Function "
                f"(by {getattr(func, '__name__', func)}), where its tangent is lost. For a checkpoint pass "
                f"use_reentrant=False; else: {_WAY_OUT}"
            )


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # not torch.backends.mkldnn.flags: it also sets TF32, and warns about it at every call
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _refuse_custom(func: OpOverload[Any, Any] | OpOverloadPacket[Any, Any], arguments: Sequence[Any]) -> None:
    name = str(func._name if isinstance(func, OpOverload) else func._qualified_op_name)
    if name.split("::")[0] in ("aten", "prim", "prims"):
        return
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return
    if any(_has_tangent(tensor) for tensor in _tensors(arguments)):
        raise UnsupportedError(
            f"ForwardGradient: {name} is a custom operator without forward derivative; {_WAY_OUT}"
        )


def _has_tangent(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


@contextmanager
def _without_reverse(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let no graph grow from the parameters: nothing is stored for a backward pass."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _served_kernels() -> Iterator[None]:
    """Only kernels that have a forward derivative: eager, math attention, no fused transformer layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager_if(True), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
