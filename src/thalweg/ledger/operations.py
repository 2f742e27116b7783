"""Floating-point operations of an operator: torch's formulas, and those of kernels that torch leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


def _attention_layer(batch: int, tokens: int, width: int) -> int:
    projections = 2 * batch * tokens * width * 4 * width
    products = 2 * (2 * batch * tokens * tokens * width)
    return projections + products


def _encoder_layer(source: Tensor, width: int, *args: Any, **kwargs: Any) -> int:
    """`nn.TransformerEncoderLayer` without gradients, which torch runs as one kernel."""
    if source.is_nested:
        return 0
    batch, tokens, _ = source.shape
    first_weight: Tensor = args[12]  # ffn_weight_1 of shape (hidden, width), the fifteenth argument in all
    feed_forward = 2 * (2 * batch * tokens * width * first_weight.shape[0])
    return _attention_layer(batch, tokens, width) + feed_forward


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, *_args: Any, **_kw: Any
) -> int:
    """`nn.MultiheadAttention` on itself without gradients, which torch runs as one kernel."""
    if query.is_nested:
        return 0
    batch, tokens, _ = query.shape
    return _attention_layer(batch, tokens, width)


def _lstm_layer(inputs: Tensor, weight: Tensor, recurrent: Tensor, *_args: Any, **_kw: Any) -> int:
    """One layer and direction of `nn.LSTM` on the CPU; the time steps of every example are rows."""
    rows = inputs.shape[0] * inputs.shape[1]
    return 2 * rows * (weight.numel() + recurrent.numel())


def _lstm_layer_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _lstm_layer(*args, **kwargs)


def _sampled_products(pattern: Tensor, rows: Tensor, *_args: Any, **_kw: Any) -> int:
    """Dot products of rows and columns, computed at the stored entries of a sparse matrix only."""
    return 2 * pattern._nnz() * rows.shape[1]


# the formula wants the pattern itself, not its shape
_sampled_products._get_raw = True  # type: ignore[attr-defined]

_aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # the products of CPU attention are those of the other kernels
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    _aten._transformer_encoder_layer_fwd: _encoder_layer,
    _aten._native_multi_head_attention: _multi_head_attention,
    _aten.sparse_sampled_addmm: _sampled_products,
    _aten.mkldnn_rnn_layer: _lstm_layer,
    _aten.mkldnn_rnn_layer_backward: _lstm_layer_backward,
}
