"""What `clip` does to a cotangent, as one autograd function for eager, transformed and compiled code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import UnsupportedError


def gated(x: Tensor, *fields: Any) -> Tensor:
    """The gate behind checked arguments; of plain values, so that it can be a node of a compiled graph."""
    out: Tensor = _Gate.apply(x, _Rule(*fields))  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """What happens to the cotangent; dimensions count from the end, so that `vmap` may add some in front."""

    limit: Tensor | float
    dims: tuple[int, ...]
    euclidean: bool
    clips: bool
    zeroes: bool
    counts: Tensor | None

    def __call__(self, cotangent: Tensor) -> Tensor:
        if not cotangent.numel():
            return cotangent.clone()
        # norms of half-precision numbers overflow or round to the wrong side of the limit
        wide = cotangent if cotangent.dtype is torch.float64 else cotangent.float()
        filled = wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        ratio = self.room(filled)
        factor = ratio.clamp(max=1.0) if self.clips else 1 / (1 + 1 / ratio)
        treated = filled * factor
        if self.counts is not None:
            groups = torch.ones_like(ratio, dtype=torch.int64).sum()
            self.counts.add_(torch.stack([groups, (ratio < 1).sum(), (~torch.isfinite(wide)).sum()]))
        if not self.zeroes:
            finite = torch.isfinite(wide)
            whole = finite.all(self.dims, keepdim=True) if self.dims else finite
            treated = torch.where(whole, treated, wide)
        return treated.to(cotangent.dtype)

    def room(self, filled: Tensor) -> Tensor:
        """limit/norm of each group; the norm is that of a vector scaled to 1, whose squares stay in range."""
        tiny = torch.finfo(filled.dtype).tiny
        if not self.dims:
            return self.limit / filled.abs().clamp(min=tiny)
        largest = filled.abs().amax(self.dims, keepdim=True).clamp(min=tiny)
        if not self.euclidean:
            return self.limit / largest
        unit = torch.linalg.vector_norm(filled / largest, dim=self.dims, keepdim=True)
        ratio: Tensor = (self.limit / largest) / unit.clamp(min=1.0)
        return ratio


def _refuse() -> None:
    raise UnsupportedError(
        "clip: no second derivative, the derivative of a clipped gradient would itself be clipped. Clip the "
        "gradient that autograd.grad returned instead, or leave the gate out of the inner function"
    )


class _Treat(torch.autograd.Function):
    """The rule as a function of the live cotangent: refuses to be differentiated in every mode."""

    @staticmethod
    def forward(cotangent: Tensor, rule: _Rule) -> Tensor:
        return rule(cotangent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Rule], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        _refuse()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], cotangent: Tensor, rule: _Rule
    ) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        treated: Tensor = _Treat.apply(cotangent.movedim(in_dims[0], 0), rule)  # type: ignore[no-untyped-call]
        return treated, 0


class _Gate(torch.autograd.Function):
    """A copy forward, the rule backward."""

    @staticmethod
    def forward(x: Tensor, rule: _Rule) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Rule], output: Tensor) -> None:
        ctx.rule = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        treated: Tensor = _Treat.apply(cotangent, ctx.rule)  # type: ignore[no-untyped-call]
        return treated, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, rule: _Rule) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        out: Tensor = _Gate.apply(x.movedim(in_dims[0], 0), rule)  # type: ignore[no-untyped-call]
        return out, 0
