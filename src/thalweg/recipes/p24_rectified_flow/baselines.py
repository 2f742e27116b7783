"""What the second flow is held against: other paths, another coupling, and flow 1 with more training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from thalweg.flows import (
    Cosine,
    Coupling,
    Independent,
    MinibatchTransport,
    Paired,
    Straight,
    UniformTime,
    VariancePreserving,
    rectified_loss,
)
from thalweg.flows.path import Path
from thalweg.noise import Key
from thalweg.recipes.p24_rectified_flow.judging import judged
from thalweg.recipes.p24_rectified_flow.toy import (
    Training,
    fit_toy,
    fresh_points,
    new_field,
    training_points,
)
from thalweg.recipes.p24_rectified_flow.training import Loss

_COUPLED = 300
Learned = dict[str, Any]


def variance_preserving(points: Independent, training: Training, seed: int) -> Learned:
    """The velocity of the variance-preserving path; its rate is infinite at t = 0, where no time is."""
    loss = partial(rectified_loss, law=UniformTime(1e-3, 1.0))
    path = VariancePreserving(beta_min=0.1, beta_max=20.0)
    return _learned(path, points, points, training, seed, loss=loss)


def cosine(points: Independent, training: Training, seed: int) -> Learned:
    """The velocity of the cosine path."""
    return _learned(Cosine(), points, points, training, seed)


def minibatch_transport(points: Independent, training: Training, seed: int) -> Learned:
    """Flow 1 on pairs that are dealt out anew, a batch at a time, so that their cost is least."""
    coupling = MinibatchTransport(points)
    draws = range(-(-training.pairs // training.batch))
    drawn = [coupling.draw(training.batch, Key(seed, draw, _COUPLED)) for draw in draws]
    pairs = Paired(torch.cat([each.data for each in drawn]), torch.cat([each.source for each in drawn]))
    return _learned(Straight(), pairs, points, training, seed)


def more_training(points: Independent, training: Training, seed: int) -> Learned:
    """Flow 1 with as many updates as flows 1 and 2 together: what reflow has to beat at equal training."""
    return _learned(Straight(), points, points, training, seed, updates=2 * training.updates)


def baseline(name: str, training: Training, seed: int) -> Learned:
    """Train one of `BASELINES`; what `judged` says of it, and its `loss`."""
    return BASELINES[name](training_points(training.pairs, seed), training, seed)


def _learned(
    path: Path,
    coupling: Coupling,
    points: Independent,
    training: Training,
    seed: int,
    *,
    updates: int | None = None,
    loss: Loss = rectified_loss,
) -> Learned:
    field, last = fit_toy(
        new_field(training, path, points), coupling, training, seed, updates=updates, loss=loss
    )
    return {**judged(field, fresh_points(training.judged, seed)[0], training.simulation), "loss": last}


BASELINES: dict[str, Callable[[Independent, Training, int], Learned]] = {
    "VP path": variance_preserving,
    "cosine path": cosine,
    "minibatch transport": minibatch_transport,
    "flow 1, twice the updates": more_training,
}
