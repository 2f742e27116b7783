"""What must hold to the last digit: tied weights, and attacks on a net whose worst case is known."""

from __future__ import annotations

from collections.abc import Callable

import torch

from thalweg.attacks import fgsm, margin, pgd
from thalweg.local import Bidirectional, bidirectional_mlp
from thalweg.noise import Key

PIXELS, CLASSES, EXAMPLES, RADIUS, SCALE = 20, 3, 64, 0.1, 1e4


def identities(seed: int) -> dict[str, float]:
    """The largest deviation from each identity; `moved` is how far one direction's step moves the other."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(EXAMPLES, PIXELS, generator=draw, dtype=torch.float64)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=draw)
    net = bidirectional_mlp([PIXELS, CLASSES], std=0.5, seed=seed).double()
    weight = net.shared()[0]
    with torch.no_grad():
        clean = net(x)
        zero = float((net(fgsm(net, x, y, radius=0.0)) - clean).abs().max())
        rival = clean.clone().scatter_(1, y[:, None], -torch.inf).argmax(1)
        # no box: then the worst that a linear net can meet is known for each rival
        loss = _rival_loss(rival)
        moved = net(fgsm(net, x, y, radius=RADIUS, loss=loss, bounds=None))
        rows = torch.arange(EXAMPLES)
        reach = RADIUS * (weight[rival] - weight[y]).abs().sum(1)
        gap = moved[rows, rival] - moved[rows, y] - (clean[rows, rival] - clean[rows, y]) - reach

    def louder(inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = SCALE * net(inputs)
        return found

    scale = max(
        float(
            (fgsm(net, x, y, radius=RADIUS, loss=margin) - fgsm(louder, x, y, radius=RADIUS, loss=margin))
            .abs()
            .max()
        ),
        float(
            (pgd(net, x, y, radius=RADIUS, key=Key(seed)) - pgd(louder, x, y, radius=RADIUS, key=Key(seed)))
            .abs()
            .max()
        ),
    )
    return {
        "zero": zero,
        "worst case": float(gap.abs().max()),
        "scale": scale,
        "tied": _tied(x, y, seed),
    }


def _rival_loss(rival: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(labels))
        return logits[rows, rival] - logits[rows, labels]

    return loss


def _tied(x: torch.Tensor, y: torch.Tensor, seed: int) -> float:
    """The backward direction against the transpose of the forward weights, after a step of each."""
    net = bidirectional_mlp([PIXELS, CLASSES], std=0.5, seed=seed).double()
    learner = Bidirectional(net, bias=False)
    for phase in learner.phases((x, y)):
        optimizer = torch.optim.SGD(phase.parameters, lr=1.0)
        optimizer.zero_grad()
        phase.backward()
        optimizer.step()
    with torch.no_grad():
        found = net.generate(torch.eye(CLASSES, dtype=x.dtype))
        return float((found - net.shared()[0].sigmoid()).abs().max())
