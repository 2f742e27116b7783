"""Node perturbation: noise on what each layer puts out, and each example's loss to say whether it helped."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from thalweg.blackbox.calls import Call, hooked, layer_name, pull_back
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_integer,
    require_positive,
)
from thalweg.losses import losses_per_example
from thalweg.noise import Key
from thalweg.step import Closure, Estimate

NODES: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, slots=True)
class NodePerturbation:
    """Add noise to the outputs of the layers and see, example by example, what it does to the loss.

    Choose it without a backward pass where the loss comes per example: the second moment of the estimate
    grows with the number of units, that of `SPSA` (perturbation of the weights) with the number of weights,
    and every example of the batch is an experiment of its own. Two forward passes under the same torch random
    numbers; what is stored are the inputs of the perturbed layers, in one copy, and no graph.

    Every layer of a type in `nodes` that owns one of the parameters is a node, at each of its calls. The
    first dimension of its output must be the examples. Its weights get the product of the example's change of
    loss, its noise and the layer's undisturbed input, summed over the batch. An example's loss must depend on
    that example only: BatchNorm in training mode is refused. Compiled modules run uncompiled.

    Args:
        samples: noisy passes per estimate, at least 1.
        scale: standard deviation of the noise on each unit, above 0. In low precision a small one is rounded
            away; there use "activity", which measures what was left of it.
        mode: "noise" correlates with the injected noise: unbiased up to scale squared. "activity" (ANP)
            correlates with the measured change of each layer's output, whatever its source, and divides by
            its squared length over all layers: *biased* in networks of more than one layer, often better
            aligned, and in no need of knowing the noise.
        layers: "all" perturbs all nodes in one pass. "one" gives each node a pass of its own: second moment
            of a single layer, (units of the layer + 2), for as many evaluations as there are nodes.
        nodes: types of layers; their output is what is perturbed, and inside one the derivative is exact. Add
            `nn.LayerNorm`, `nn.Embedding` or a type of your own to train its parameters too.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Dalm, van Gerven, Ahmad: Effective Learning with Node Perturbation in Multi-Layer Neural Networks.
        arXiv 2310.00965, 2023.

    Example:
        >>> from thalweg.step import backward
        >>> layer, x = nn.Linear(3, 1), torch.ones(64, 3)
        >>> losses = lambda: (layer(x) - 5.0).square().sum(1)
        >>> loss = backward(losses, layer.parameters(), gradient=NodePerturbation())
        >>> bool((layer.weight.grad < 0).all())
        True
    """

    samples: int = 1
    scale: float = 1e-3
    mode: Literal["noise", "activity"] = "noise"
    layers: Literal["all", "one"] = "all"
    nodes: tuple[type[nn.Module], ...] = NODES

    def __post_init__(self) -> None:
        require_integer("samples", self.samples, 1)
        require_positive("scale", self.scale)
        require_choice("mode", self.mode, ("noise", "activity"))
        require_choice("layers", self.layers, ("all", "one"))
        if not isinstance(self.nodes, tuple) or not all(
            isinstance(each, type) and issubclass(each, nn.Module) for each in self.nodes
        ):
            mend = "Write nodes=(nn.Linear, nn.LayerNorm)."
            raise ArgumentTypeError("nodes", self.nodes, "a tuple of module classes", mend)
        if not self.nodes:
            raise ArgumentError("nodes", self.nodes, "at least one module class")

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One evaluation without noise and one per sample; with layers="one" one per sample and node.

        Returns:
            The gradient estimate; the loss is the one without noise.

        Raises:
            ArgumentError: the loss is a scalar, a parameter belongs to no node, the first dimension of a
                node's output is not the batch, or the closure runs other layers the second time.
            UnsupportedError: a node whose output is not a single tensor; a BatchNorm in training mode.
            NonFiniteError: a loss is nan or infinite.
        """
        run = _Passes(closure, parameters, self)
        with torch.no_grad(), eager_if(True):
            clean = run.clean()
            targets: Sequence[int | None] = [None] if self.layers == "all" else range(len(run.calls))
            for sample in range(self.samples):
                for target in targets:
                    run.noisy(clean, key, sample, target)
            gradients = run.gradients(key)
        return Estimate(clean.mean(), gradients, run.evaluations.count)


@dataclass(frozen=True, slots=True)
class _Signal:
    """What one noisy pass said: per example the change of loss over scale, samples and examples."""

    sample: int
    target: int | None
    change: Tensor


class _Passes:
    """The passes of one estimate over the same batch."""

    def __init__(self, closure: Closure, parameters: Sequence[Tensor], rule: NodePerturbation) -> None:
        self._rule = rule
        self._parameters = parameters
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._losses: list[object] = []
        self._owner: dict[int, str] = {}
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._signals: list[_Signal] = []
        self.calls: list[Call] = []

        def kept() -> Tensor:
            loss = closure()
            self._losses.append(loss)
            return loss

        self.evaluations = Evaluations(kept, parameters)

    def clean(self) -> Tensor:
        """The losses without noise, shape (batch,); records every call of a node."""
        with hooked(self._record):
            losses = self._evaluate("the pass without noise")
        self._copies.clear()
        reached = {id(p) for call in self.calls for p in self._owned(call.module)}
        for index, parameter in enumerate(self._parameters):
            if id(parameter) not in reached:
                self._refuse(index, parameter)
        for call in self.calls:
            if call.like.ndim == 0 or len(call.like) != len(losses):
                raise ArgumentError(
                    f"closure: the output of {layer_name(call.module)}",
                    tuple(call.like.shape),
                    f"a shape ({len(losses)}, ...), one row per loss",
                    "Fold further dimensions behind the batch, not into it.",
                )
        return losses

    def noisy(self, clean: Tensor, key: Key, sample: int, target: int | None) -> None:
        """One pass with noise on all nodes, or on the call `target` alone."""
        position = 0

        def disturb(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            nonlocal position
            if not self._is_node(module):
                return None
            index, position = position, position + 1
            same = index < len(self.calls) and self.calls[index].module is module
            if not (same and self.calls[index].like.shape == output.shape):
                raise ArgumentError("closure", layer_name(module), _SAME, _SAME_MEND)
            call = self.calls[index]
            if target is not None and target != index:
                return None
            drawn = call.noise(key, sample, index)
            noisy = drawn.mul_(self._rule.scale).add_(output).to(output.dtype)
            if call.clean is not None:
                call.change = (noisy.to(call.clean.dtype) - call.clean).to(call.like.dtype)
            return noisy

        with hooked(disturb):
            losses = self._evaluate(
                f"sample {sample}" if target is None else f"sample {sample}, node {target}"
            )
        if position != len(self.calls):
            raise ArgumentError("closure", f"{position} calls of nodes", _SAME, _SAME_MEND)
        change = (losses - clean) / (self._rule.samples * len(clean))
        if self._rule.mode == "noise":
            self._signals.append(_Signal(sample, target, change / self._rule.scale))
        else:
            self._credit_activity(change)

    def gradients(self, key: Key) -> tuple[Tensor, ...]:
        """Pull what the passes said back through each node, to its own parameters and no further."""
        totals: list[Tensor | None] = [None] * len(self._parameters)
        for index, call in enumerate(self.calls):
            cotangent, call.cotangent = call.cotangent, None
            for signal in self._signals:
                if signal.target in (None, index):
                    drawn = call.noise(key, signal.sample, index)
                    drawn.mul_(_per_example(signal.change, drawn))
                    cotangent = drawn if cotangent is None else cotangent.add_(drawn)
            assert cotangent is not None
            owned = self._owned(call.module)
            for parameter, gradient in zip(owned, pull_back(call, cotangent, owned)):
                where = self._index[id(parameter)]
                before = totals[where]
                totals[where] = gradient if before is None else before + gradient
        return tuple(total for total in totals if total is not None)

    def _credit_activity(self, change: Tensor) -> None:
        touched = [call for call in self.calls if call.change is not None]
        squares = [call.change.flatten(1).square().sum(1) for call in touched if call.change is not None]
        units = sum(call.like[0].numel() for call in touched)
        length = torch.stack([square.to(change) for square in squares]).sum(0)
        # noise that was rounded away altogether changed no loss either
        signal = units * change / length.clamp_min(torch.finfo(length.dtype).tiny)
        for call in touched:
            assert call.change is not None
            term = call.change.mul_(_per_example(signal, call.change))
            call.cotangent = term if call.cotangent is None else call.cotangent.add_(term)
            call.change = None

    def _evaluate(self, name: str) -> Tensor:
        self.evaluations.loss(name)
        losses = losses_per_example(self._losses.pop())
        if losses.ndim != 1:
            mend = (
                "Leave out the mean: cross_entropy(model(x), y, reduction='none'). From one number for the "
                "whole batch SPSA learns as well, and needs no nodes."
            )
            raise ArgumentError("closure", losses, "one loss per example, shape (batch,)", mend)
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UnsupportedError(
                f"NodePerturbation under {type(module).__name__} in training mode, which mixes examples: "
                "call its .eval(), or use LayerNorm or GroupNorm"
            )
        for parameter in module._parameters.values():
            if id(parameter) in self._index:
                self._owner[id(parameter)] = layer_name(module)
        if not self._is_node(module):
            return
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise UnsupportedError(
                f"NodePerturbation: {layer_name(module)} puts out {type(output).__name__}, not one "
                "floating-point tensor; leave its type out of nodes and its parameters out of the list"
            )
        precise = torch.promote_types(output.dtype, torch.float32)
        self.calls.append(
            Call(
                module,
                tree_map_only(Tensor, self._copy, args),
                tree_map_only(Tensor, self._copy, kwargs),
                output.new_empty((), dtype=precise).expand(output.shape),
                output.clone() if self._rule.mode == "activity" else None,
            )
        )

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy, as what runs later may write into the original; one for all who read the same value."""
        if tensor.is_inference():
            return tensor.clone()
        found = self._copies.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != tensor._version:
            found = (weakref.ref(tensor), tensor._version, tensor.clone())
            self._copies[id(tensor)] = found
        return found[2]

    def _is_node(self, module: nn.Module) -> bool:
        return isinstance(module, self._rule.nodes) and bool(self._owned(module))

    def _owned(self, module: nn.Module) -> list[Tensor]:
        # with the children: a parametrized layer keeps its parameters in one
        return [parameter for parameter in module.parameters() if id(parameter) in self._index]

    def _refuse(self, index: int, parameter: Tensor) -> None:
        owner = self._owner.get(id(parameter))
        where = f"of {owner}" if owner else "of no module that ran"
        mend = "Leave it out of the parameters"
        mend += f", or add the type to nodes=(..., {owner.split('(')[0]})." if owner else "."
        expected = "a parameter of a layer among " + ", ".join(each.__name__ for each in self._rule.nodes)
        raise ArgumentError(f"parameters[{index}] ({where})", parameter, expected, mend)


_SAME = "the same layers in the same order at each evaluation, on the same batch"
_SAME_MEND = "Fix the batch and every decision before the closure."


def _per_example(signal: Tensor, like: Tensor) -> Tensor:
    return signal.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
