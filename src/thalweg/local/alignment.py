"""Backward weights that are not the forward weights: feedback alignment, sign symmetry, direct feedback."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.local.aligned_layers import LAYERS, aligned_layer, twin_of
from thalweg.local.feedback import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry
from thalweg.local.feedback_gates import deliver
from thalweg.noise import normal

# these multiply their input by a matrix too, inside kernels that give no other backward a chance
_CLOSED = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.modules.conv._ConvTransposeNd,
    nn.modules.lazy.LazyModuleMixin,
)


Feedback = FeedbackAlignment | DirectFeedbackAlignment | SignSymmetry


def align(module: nn.Module, *, gradient: Feedback) -> nn.Module:
    """A module that computes the same from the same parameters, and sends errors back by another rule.

    Afterwards `criterion(aligned(x), y).backward()` fills `.grad` of the very parameters of `module`, which
    itself stays as it was. Feedback weights that are drawn are buffers and travel in `state_dict`; those of
    direct feedback are drawn from their key whenever they are needed. The gradient of a weight
    is what autograd makes of the error that arrives at its layer; of the last layer it is exact.

    Under `torch.compile`, `vmap`, autocast, AMP scalers and second derivatives it is the function whose
    layers see their input through the feedback weights only: `W stop(x) + B x - stop(B x)`. Forward mode is
    refused.

    Args:
        module: linear and convolutional layers in any module; elementwise layers and normalisation keep their
            own derivative. For `DirectFeedbackAlignment` an `nn.Sequential`.
        gradient: `FeedbackAlignment(...)`, `SignSymmetry(...)` or `DirectFeedbackAlignment(...)`.

    Returns:
        A module that shares parameters and buffers with `module`.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, or no layer to align.
        UnsupportedError: a layer whose backward cannot be changed (attention, recurrent, transposed
            convolution, a subclass with a forward of its own), by name.

    Example:
        >>> from thalweg.local import FeedbackAlignment, align
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> aligned = align(net, gradient=FeedbackAlignment())
        >>> x = torch.ones(2, 4)
        >>> torch.equal(aligned(x), net(x))
        True
        >>> aligned(x).sum().backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError("module", module, "a torch.nn.Module")
    if not isinstance(gradient, Feedback):
        mend = f"Make one: {gradient.__name__}()." if isinstance(gradient, type) else ""
        expected = "FeedbackAlignment(), SignSymmetry() or DirectFeedbackAlignment()"
        raise ArgumentTypeError("gradient", gradient, expected, mend)
    if isinstance(gradient, DirectFeedbackAlignment):
        return DirectFeedback(module, gradient)
    layers = _alignable(module)
    made = {id(layer): aligned_layer(name, layer, gradient) for name, layer in layers.items()}
    return _rebuilt(module, made)


class DirectFeedback(nn.Module):
    """An `nn.Sequential` in which the error goes from the output to each group directly; made by `align`.

    Args:
        module: the sequence.
        rule: what draws the feedback weights.
    """

    def __init__(self, module: nn.Module, rule: DirectFeedbackAlignment) -> None:
        super().__init__()
        if not isinstance(module, nn.Sequential):
            mend = "Direct feedback has to know what comes after what."
            raise ArgumentTypeError("module", module, "an nn.Sequential", mend)
        groups = _groups(module)
        if len(groups) < 2:
            raise ArgumentError("module", module, "at least two layers with parameters")
        _require_separate(groups)
        self.groups = nn.ModuleList(groups)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        """The output of the sequence; backward gives each group its share of the error at the output."""
        hidden: list[Tensor] = []
        for group in self.groups:
            x = group(x.detach())
            hidden.append(x)
        out = hidden.pop()
        for index, each in enumerate(hidden):
            if each.requires_grad:
                out = deliver(out, each, self.feedback(index, each, out))
        return out

    def feedback(self, index: int, hidden: Tensor, out: Tensor) -> Tensor:
        """The weights from the output to a group, shape (outputs, features); drawn anew, always the same."""
        like = torch.empty(out[0].numel(), hidden[0].numel())
        # on the CPU, so that they are the same on every device
        drawn = normal(like, self.rule.key.at(call=index)) * (self.rule.scale / len(like) ** 0.5)
        placed: Tensor = drawn.to(out.device, out.dtype)
        return placed


def _alignable(module: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        where = f"{name or 'the module itself'} ({type(each).__name__})"
        if isinstance(each, _CLOSED):
            raise UnsupportedError(
                f"align: {where} multiplies by its weights in a kernel that cannot be aligned"
            )
        if isinstance(each, LAYERS):
            if type(each) not in LAYERS:
                raise UnsupportedError(f"align: {where} is a subclass or parametrized; use torch's own layer")
            found[name] = each
    if not found:
        raise ArgumentError("module", module, "a module with a linear or convolutional layer")
    return found


def _rebuilt(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The tree of modules again, with aligned layers in their places; the rest shares its parameters."""
    if id(module) in made:
        return made[id(module)]
    twin = twin_of(module)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _rebuilt(child, made)
    made[id(module)] = twin
    return twin


def _groups(module: nn.Sequential) -> list[nn.Module]:
    groups: list[list[nn.Module]] = []
    before: list[nn.Module] = []
    for child in module:
        if any(True for _ in child.parameters()):
            groups.append([*before, child] if not groups else [child])
            before = []
        elif groups:
            groups[-1].append(child)
        else:
            before.append(child)
    return [nn.Sequential(*group) for group in groups]


def _require_separate(groups: list[nn.Module]) -> None:
    seen: set[int] = set()
    for group in groups:
        own = {id(parameter) for parameter in group.parameters()}
        if own & seen:
            raise ArgumentError("module", "a parameter in two layers", "layers with parameters of their own")
        seen |= own
