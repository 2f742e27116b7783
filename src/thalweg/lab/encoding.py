"""Figures and tensors as the bytes of their files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.errors import ArgumentTypeError, MissingExtraError


def figure_bytes(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file; equal figures are equal bytes.

    Raises:
        ArgumentTypeError: not a figure.
    """
    if not hasattr(figure, "savefig"):
        raise ArgumentTypeError("figure", figure, "a matplotlib figure")
    stream = io.BytesIO()
    # no software version in the file
    figure.savefig(stream, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as a safetensors file; tied ones are written once for each name.

    Raises:
        ArgumentTypeError: a value is not a tensor.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise MissingExtraError("safetensors", "recipes") from None
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"tensors[{key!r}]", tensor, "a tensor")
    return save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()})
