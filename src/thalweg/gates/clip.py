"""Clip the gradient that passes a tensor: by value, by norm, or pixel by pixel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_floating,
)
from thalweg.gates.clip_function import gated

Per = Literal["pixel", "sample", "tensor", "value"]


class ClipStatistics:
    """Count what `clip` did, on the device and without waiting for it; read it when the backward is done.

    Counts add up over gates and backward passes until `reset`. Reading waits for the device once.

    Args:
        device: where the gated tensors live.

    Example:
        >>> statistics = ClipStatistics()
        >>> x = torch.zeros(1, 3, 2, 2, requires_grad=True)
        >>> (100 * clip(x, 1.0, statistics=statistics)[..., 0]).sum().backward()
        >>> statistics.clipped_fraction(), statistics.nonfinite()
        (0.5, 0)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # groups seen, groups changed, values that were nan or infinite
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def clipped_fraction(self) -> float:
        """The share of groups (pixels, samples, ...) above the limit; nan before any backward."""
        seen, clipped, _ = self.counts.tolist()
        return clipped / seen if seen else float("nan")

    def nonfinite(self) -> int:
        """How many values arrived as nan or infinity."""
        return int(self.counts[2])

    def reset(self) -> None:
        """Start counting anew."""
        self.counts.zero_()


def clip(
    x: Tensor,
    limit: float,
    *,
    per: Per = "pixel",
    norm: Literal["inf", "l2"] = "inf",
    dim: int = 1,
    mode: Literal["clip", "normalize"] = "clip",
    nonfinite: Literal["zero", "keep"] = "zero",
    scale: torch.amp.GradScaler | Tensor | float | None = None,
    statistics: ClipStatistics | None = None,
) -> Tensor:
    """Return `x` unchanged, and bound the gradient that comes back through it.

    Choose it where a gradient crosses a frozen network on its way to an image or another shared parameter: a
    few wild pixels would drown the rest, and clipping the norm of the parameters' gradient afterwards cannot
    change its direction. Place it directly behind the renderer, before any resizing.

    The gate is one copy of the tensor, so the result may be changed in place, and `x` may be a leaf that is
    gated again and again. Without a gradient to gate (`no_grad`, inference) it is that copy and nothing else.
    It supports `vmap` and `grad` in either order, `jvp` (clipping is a rule for cotangents: tangents pass
    unchanged), `torch.compile(fullgraph=True)`, checkpointing and autocast. Refused with `UnsupportedError`:
    second derivatives, because the derivative of a clipped gradient would itself be clipped.

    Args:
        x: floating-point tensor, such as rendered images (batch, channels, height, width).
        limit: the largest norm c that passes, above 0 and possibly infinite, in units of the gradient of the
            unscaled loss. A loss averaged over the batch needs 1/batch of the limit of a summed one.
        per: what is bounded: each "pixel" (the vector along `dim`), each "sample" (first dimension), the
            whole "tensor", or each "value" by itself (which turns the colour of a pixel's gradient).
        norm: "inf" (the largest magnitude, as the paper's code does) or "l2" (as the paper writes). With a
            single channel all of these and "value" agree.
        dim: the channel dimension for per="pixel": 1 for (batch, channels, ...), -1 for channels last.
        mode: "clip" scales by min(1, c/norm); "normalize" by c/(norm + c), smooth and always below c.
        nonfinite: "zero" replaces nan and infinite values by zero; "keep" passes the groups that hold them
            untouched, so that a `GradScaler` sees the overflow, skips the step and lowers its scale.
        scale: what the loss was multiplied with, because the gradients carry that factor: the
            `torch.amp.GradScaler` itself, a number, or a tensor with one element (in compiled code).
        statistics: counts what happened, without synchronising.

    Returns:
        A tensor with the bits of `x`.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument.

    Paper:
        Pan, Lu, Zhu, Zhang: Enhancing High-Resolution 3D Generation through Pixel-wise Gradient Clipping.
        ICLR 2024, arXiv 2310.12474.

    Example:
        >>> image = torch.zeros(1, 3, 1, 2, requires_grad=True)
        >>> wild = torch.tensor([[[[100.0, 0.0]], [[50.0, 1.0]], [[0.0, 0.0]]]])
        >>> (clip(image, 1.0) * wild).sum().backward()
        >>> image.grad[0, :, 0, :].T.tolist()
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]
    """
    require_floating("x", x)
    require_choice("per", per, ("pixel", "sample", "tensor", "value"))
    require_choice("norm", norm, ("inf", "l2"))
    require_choice("mode", mode, ("clip", "normalize"))
    require_choice("nonfinite", nonfinite, ("zero", "keep"))
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise ArgumentTypeError("limit", limit, "a number above 0")
    if not limit > 0:
        raise ArgumentError("limit", limit, "a number above 0")
    counts = _counts(statistics, x)
    bound = _scaled(limit, scale, x)
    dims = _dimensions(x, per, dim)
    if torch.compiler.is_compiling():
        import thalweg.gates.traced  # noqa: F401  (for its effect on the compiler)
    return gated(x, bound, dims, norm == "l2", mode == "clip", nonfinite == "zero", counts)


def _dimensions(x: Tensor, per: Per, dim: int) -> tuple[int, ...]:
    if per == "value":
        return ()
    if per == "tensor":
        return tuple(range(-x.ndim, 0))
    if per == "sample":
        if x.ndim < 1:
            raise ArgumentError("x", x, "at least one dimension for per='sample'")
        return tuple(range(1 - x.ndim, 0))
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise ArgumentTypeError("dim", dim, "an integer")
    if not -x.ndim <= dim < x.ndim:
        mend = "Name the channel dimension, or use per='tensor' or per='value'."
        raise ArgumentError("dim", dim, f"a dimension of a tensor of shape {tuple(x.shape)}", mend)
    return (dim if dim < 0 else dim - x.ndim,)


def _scaled(limit: float, scale: torch.amp.GradScaler | Tensor | float | None, x: Tensor) -> Tensor | float:
    if scale is None:
        return limit
    if isinstance(scale, torch.amp.GradScaler):
        if torch.compiler.is_compiling():
            raise UnsupportedError("clip in compiled code: pass the scale as a tensor, not the GradScaler")
        # through its public method: no synchronisation, and a disabled scaler returns what it got
        return limit * scale.scale(torch.ones((), device=x.device))
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ArgumentError("scale", scale, "a floating-point tensor with one element")
        return limit * scale.detach().reshape(()).to(x.device)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArgumentTypeError("scale", scale, "a GradScaler, a number or a tensor with one element")
    if not 0 < scale < float("inf"):
        raise ArgumentError("scale", scale, "a finite number above 0")
    return limit * scale


def _counts(statistics: ClipStatistics | None, x: Tensor) -> Tensor | None:
    if statistics is None:
        return None
    if not isinstance(statistics, ClipStatistics):
        raise ArgumentTypeError("statistics", statistics, "a ClipStatistics or None")
    if statistics.counts.device != x.device:
        mend = f"Write ClipStatistics({str(x.device)!r})."
        raise ArgumentError("statistics", statistics.counts, f"counts on {x.device}", mend)
    return statistics.counts
