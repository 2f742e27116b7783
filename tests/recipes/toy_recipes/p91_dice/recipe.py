"""Throw a die: the smallest recipe that uses everything a lab offers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure

from thalweg.lab import Claim, Lab


@dataclass(frozen=True, slots=True)
class Config:
    """How to throw.

    Args:
        throws: how often, per cell.
        sides: of the die.
        pause: seconds that a throw takes.
        bound: the mean that is claimed not to be passed.
    """

    throws: int = 200
    sides: int = 6
    pause: float = 0.0
    bound: float = 6.0

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"smoke": {"throws": 20}, "small": {}}


def run(config: Config, lab: Lab) -> list[Claim]:
    """Throw the die with two hands, for every seed."""
    print("a recipe may print; --json must not mind")
    hands = ("left", "right")
    lab.plan(len(hands) * len(lab.seeds))

    def throw(hand: str) -> dict[str, Any]:
        tick = lab.progress(config.throws, "throwing")
        faces = []
        for step in range(config.throws):
            faces.append(int(torch.randint(1, config.sides + 1, ())))
            lab.log(step=step, face=faces[-1], timing={"at": time.time()})
            time.sleep(config.pause)
            tick()
        lab.save(f"faces-{hand}-{int(torch.randint(10**9, ()))}", {"faces": torch.tensor(faces)})
        return {"mean": sum(faces) / len(faces), "faces": tuple(faces)}

    cells = [
        lab.cell(f"{hand} hand", lambda hand=hand: throw(hand), seed=s) for hand in hands for s in lab.seeds
    ]
    means = [cell["mean"] for cell in cells]
    lab.table("Means", ["cell", "mean"], [[index, mean] for index, mean in enumerate(means)])
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot()
    axes.plot(means, marker="o")
    axes.set(xlabel="cell", ylabel="mean face (pips)")
    lab.figure("means", figure, "The mean face of each cell.")
    lab.log(worst=max(means))
    return [
        Claim(f"mean face at most {config.bound:g}", "no paper", max(means), 0.0, max(means) <= config.bound),
        Claim("mean face", "3.5", sum(means) / len(means), holds=None, asserted=False),
    ]
