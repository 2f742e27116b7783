"""What a trained net withstands: the published attack, and those that no scale of the logits can blind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.attacks import fgsm, robustness
from thalweg.local import BidirectionalNet
from thalweg.noise import Key

RADII = (0.05, 0.1, 0.2, 0.3)
NOISE = 0.1
SCALE = 1e4
ATTACKS = ("fgsm", "fgsm-margin", "pgd", "pgd-margin")


def judge(net: BidirectionalNet, inputs: Tensor, labels: Tensor, seed: int, queries: int) -> dict[str, Any]:
    """Accuracies in per cent.

    Returns:
        `clean`, `noisy`; `attacks` by name and radius, against the true labels; `published`, the one-step
        attack at 0.3 against the net's own answers; `random`, under random signs of that size; `scaled`, the
        one-step attacks at 0.3 with logits multiplied by 1e4; `largest` logit; `zero` gradients in per cent;
        `signs` of masking.
    """
    key = Key(seed)
    options: dict[str, Any] = {"radii": RADII, "noise": NOISE, "queries": queries, "key": key}
    report = robustness(net, inputs, labels, **options)

    def louder(x: Tensor) -> Tensor:
        found: Tensor = SCALE * net(x)
        return found

    scaled = {
        loss: _right(net, fgsm(louder, inputs, labels, radius=RADII[-1], loss=loss), labels)
        for loss in ("cross_entropy", "margin")
    }
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, inputs.shape, generator=draw).to(inputs) * 2 - 1
    names = (*ATTACKS, "square") if queries else ATTACKS
    return {
        "clean": 100 * report.clean,
        "noisy": 100 * (report.noisy or 0.0),
        "attacks": {name: [100 * report.accuracy(name, radius) for radius in RADII] for name in names},
        "published": _right(net, fgsm(net, inputs, radius=RADII[-1]), labels),
        "random": _right(net, (inputs + RADII[-1] * signs).clamp(0, 1), labels),
        "scaled": scaled,
        "largest": report.largest_logit,
        "zero": 100 * report.zero_gradients,
        "signs": list(report.signs),
    }


@torch.no_grad()
def _right(net: BidirectionalNet, inputs: Tensor, labels: Tensor) -> float:
    return 100 * float((net(inputs).argmax(1) == labels).double().mean())


@torch.no_grad()
def imagined(net: BidirectionalNet, classes: int) -> list[list[float]]:
    """What the backward direction makes of each class."""
    device = next(net.parameters()).device
    return [
        [round(float(v), 3) for v in row] for row in net.generate(torch.eye(classes, device=device)).cpu()
    ]
