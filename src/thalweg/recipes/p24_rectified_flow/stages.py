"""Three flows, each trained on the pairs of the one before, and one-step copies of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.flows import (
    Coupling,
    Euler,
    Field,
    Paired,
    Straight,
    distillation_loss,
    energy_distance,
    reflow,
    reflow_pairs,
)
from thalweg.recipes.p24_rectified_flow.judging import distances, judged, some_pairs, tangents
from thalweg.recipes.p24_rectified_flow.toy import (
    Training,
    fit_toy,
    fresh_points,
    new_field,
    training_points,
)
from thalweg.recipes.p24_rectified_flow.training import copy_of


def stages(training: Training, rounds: int, seed: int) -> dict[str, Any]:
    """Train flow 1 on independent pairs, and each further one, begun alike, on the pairs of the one before.

    Args:
        training: of each.
        rounds: how often to reflow, at least 1.
        seed: of data, batches and times.

    Returns:
        `flows` (what `judged` says of each, its `loss`, some `pairs` and `tangents`), `distilled` (distances
        of one step), `shuffled` (flow 2 trained on pairs whose ends were shuffled apart: the control),
        `floor` (the distance of two draws of the data).
    """
    points, (fresh, again) = training_points(training.pairs, seed), fresh_points(training.judged, seed)
    times = torch.linspace(1, 0, training.simulation + 1, dtype=torch.float64)
    couplings: list[Coupling] = [points]
    losses = []

    def learn(field: Field, pairs: Coupling) -> Field:
        fitted, loss = fit_toy(field, pairs, training, seed)
        losses.append(loss)
        return fitted

    def learn_again(field: Field, pairs: Coupling) -> Field:
        couplings.append(pairs)
        return learn(field, pairs)

    # all flows of a seed begin with the same weights, so that these are not what tells them apart
    untrained = new_field(training, Straight(), points)

    def start(_: Field) -> Field:
        return copy_of(untrained)

    source = points.source
    assert isinstance(source, Tensor)
    first = learn(copy_of(untrained), points)
    fields = [first, *reflow(first, source, learn_again, times, rounds=rounds, solver=Euler(), start=start)]
    last = reflow_pairs(fields[-1], source, times, solver=Euler())
    simulated = [pairs for pairs in (*couplings, last) if isinstance(pairs, Paired)]
    flows = [
        {
            **judged(field, fresh, training.simulation),
            "loss": loss,
            "pairs": some_pairs(pairs),
            "tangents": tangents(field, fresh, 60),
        }
        for field, loss, pairs in zip(fields, losses, couplings, strict=True)
    ]
    distilled = []
    for field, pairs in zip(fields, simulated, strict=True):
        student, _ = fit_toy(
            copy_of(field), pairs, training, seed, updates=training.distillation, loss=distillation_loss
        )
        distilled.append(distances(student, fresh, (1,)))
    order = torch.randperm(training.pairs, generator=torch.Generator().manual_seed(seed))
    apart = Paired(simulated[0].data[order], simulated[0].source)
    shuffled, loss = fit_toy(start(first), apart, training, seed)
    return {
        "flows": flows,
        "distilled": distilled,
        "shuffled": {**judged(shuffled, fresh, training.simulation), "loss": loss},
        "floor": float(energy_distance(fresh.data, again)),
    }
