"""What closed gates save: the gathering backend against the masked one."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from thalweg.ledger.operations import FORMULAS
from thalweg.stochastic import ConditionalLinear

BATCHES = (1, 64)


@torch.no_grad()
def compare_backends(layer: ConditionalLinear, x: Tensor, repeats: int) -> dict[str, Any]:
    """Outputs, multiply-adds of the expert layer, and times of both backends.

    Args:
        layer: calibrated, in evaluation mode.
        x: inputs, at least as many as the largest of `BATCHES`.
        repeats: alternating timings of each.

    Returns:
        `difference` (largest, of the outputs), `multiply_adds` (of gather by those of masked), `milliseconds`
        by batch and backend (medians).
    """
    masked, gathered = layer(x, backend="masked"), layer(x, backend="gather")
    gater = _multiply_adds(lambda: layer.logits(x))
    counts = {
        name: _multiply_adds(lambda name=name: layer(x, backend=name)) - gater
        for name in ("masked", "gather")
    }
    times: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        taken: dict[str, list[float]] = {"masked": [], "gather": []}
        for _ in range(repeats):
            for name, found in taken.items():
                begun = time.perf_counter()
                layer(x[:batch], backend=name)
                found.append(1000 * (time.perf_counter() - begun))
        times[str(batch)] = {name: median(found) for name, found in taken.items()}
    return {
        "difference": float((masked - gathered).abs().max()),
        "multiply_adds": counts["gather"] / counts["masked"],
        "timing": times,
    }


def _multiply_adds(function: Any) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={_SAMPLED: FORMULAS[_SAMPLED]})
    with counter:
        function()
    return int(counter.get_total_flops()) // 2


_SAMPLED = torch.ops.aten.sparse_sampled_addmm
