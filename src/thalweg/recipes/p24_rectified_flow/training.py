"""The training of every flow of the run: Adam on batches of pairs, in a loop that a user would write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.flows import Coupling, Field, rectified_loss
from thalweg.noise import Key

Loss = Callable[..., Tensor]
# calls of a seed's keys, apart from those that draw the points
_BATCHES, _TIMES = 100, 200


def fit(
    field: Field,
    pairs: Coupling,
    *,
    updates: int,
    batch: int,
    learning_rate: float,
    seed: int,
    loss: Loss = rectified_loss,
) -> tuple[Field, float]:
    """Train a field on pairs, in place.

    Args:
        field: with a module as its network.
        pairs: what its batches are drawn from.
        updates: steps of Adam, whose step size falls to 0 along a cosine.
        batch: pairs in one of them.
        learning_rate: at the beginning.
        seed: names batches and times.
        loss: `loss(field, data, source, conditions=..., key=...)`, one number per pair.

    Returns:
        The field, and the mean loss of the last tenth of the updates.
    """
    network = field.network
    assert isinstance(network, nn.Module)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    last: list[Tensor] = []
    for update in range(updates):
        pair = pairs.draw(batch, Key(seed, update, _BATCHES))
        told: dict[str, Any] = {"conditions": pair.conditions, "key": Key(seed, update, _TIMES)}
        optimizer.zero_grad()
        mean = loss(field, pair.data, pair.source, **told).mean()
        mean.backward()
        optimizer.step()
        falling.step()
        if update >= updates - max(1, updates // 10):
            last.append(mean.detach())
    return field, float(torch.stack(last).mean())


def copy_of(field: Field) -> Field:
    """The same field with a copy of its network: where a distillation or a longer training begins."""
    return replace(field, network=copy.deepcopy(field.network))
