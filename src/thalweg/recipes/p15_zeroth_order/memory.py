"""What a step of training takes in memory beside a forward pass, counted on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

import thalweg as tw
from thalweg.lab import Claim
from thalweg.ledger.storages import StorageCounter
from thalweg.recipes.p15_zeroth_order.language_model import ALPHABET, LanguageModel
from thalweg.recipes.p15_zeroth_order.orders import SOURCE

SIZES = ((8, 16), (8, 32), (8, 64), (8, 128), (8, 256), (8, 512), (2, 64), (4, 64), (16, 64), (32, 64))
"""(batch, length) of the pieces that the claims are about."""
TINY = (1, 16)
"""Where the activations are smaller than the largest weight, which MeZO has to draw a second time."""


def memory() -> list[dict[str, int]]:
    """Weights, and the most bytes that lived beside them at once, of each route at each size.

    A step moves all weights: MeZO in place; backprop by plain gradient descent, which keeps nothing from step
    to step.

    Returns:
        Rows of `batch`, `length` and total bytes by route: "inference", "MeZO", "backprop".
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LanguageModel(longest=max(length for _, length in SIZES))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows = []
    for batch, length in (TINY, *SIZES):
        pieces = torch.arange(batch * (length + 1)).view(batch, -1) % len(ALPHABET)
        steps = _steps(model, pieces)
        peaks = {name: weights + _peak(step) for name, step in steps.items()}
        rows.append({"batch": batch, "length": length, **peaks})
    return rows


def _steps(model: LanguageModel, pieces: torch.Tensor) -> dict[str, Callable[[], object]]:
    parameters = list(model.parameters())
    mezo = tw.MeZO(parameters, lr=1e-7, seed=0)

    def inference() -> None:
        with torch.no_grad():
            model.loss(pieces)

    def descend() -> None:
        model.loss(pieces).backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-7)
                parameter.grad = None

    return {
        "inference": inference,
        "MeZO": lambda: mezo.step(lambda: model.loss(pieces)),
        "backprop": descend,
    }


def _peak(step: Callable[[], object]) -> int:
    counter = StorageCounter()
    with counter:
        step()
    return counter.peak_bytes


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The line of acceptance on memory, in its two halves; counted, so asserted at every preset."""
    tiny, sizes = rows[0], rows[1:]
    most = max(row["MeZO"] / row["inference"] for row in sizes)
    beyond = [row["MeZO"] - row["inference"] for row in sizes]
    excess = [row["backprop"] - row["inference"] for row in sizes]
    grows = all(_grows(rows, other, along) for other, along in (("batch", "length"), ("length", "batch")))
    return [
        Claim(
            "MeZO's training memory is at most 1.05x inference's at every size",
            SOURCE,
            most,
            None,
            most <= 1.05,
        ),
        Claim(
            "what MeZO adds to inference is the same at every batch x length, and what backprop adds grows "
            f"({min(excess) / 2**20:.2g} to {max(excess) / 2**20:.2g} MiB): largest of MeZO's by smallest",
            SOURCE,
            max(beyond) / min(beyond),
            None,
            grows and max(beyond) == min(beyond),
        ),
        Claim(
            f"{TINY[0]} piece of {TINY[1]} letters, where activations are smaller than the largest weight: "
            "MeZO's memory by inference's",
            None,
            tiny["MeZO"] / tiny["inference"],
            None,
            None,
            asserted=False,
        ),
    ]


def _grows(rows: Sequence[dict[str, Any]], fixed: str, along: str) -> bool:
    """Whether what backprop adds to inference grows along one side, at each value of the other."""
    for value in {row[fixed] for row in rows}:
        line = sorted((row for row in rows if row[fixed] == value), key=lambda row: row[along])
        if any(b["backprop"] - b["inference"] <= a["backprop"] - a["inference"] for a, b in pairwise(line)):
            return False
    return True
