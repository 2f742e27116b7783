"""Which order of derivative to buy: the same tasks by backprop, by one forward derivative, by values alone.

Four panels: digits by every order; a language model fine-tuned in the memory of inference; adaptation by
intrinsic noise; an objective without a derivative. Step sizes are chosen on held-out training data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from thalweg.errors import ArgumentError
from thalweg.lab import Claim, Lab

Panel = Literal["orders", "mezo", "neuro", "objective"]
PANELS: tuple[Panel, ...] = ("orders", "mezo", "neuro", "objective")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        panels: which parts to run.
    """

    panels: tuple[Panel, ...] = PANELS

    presets: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {}, "small": {}}

    def __post_init__(self) -> None:
        if not self.panels or not set(self.panels) <= set(PANELS):
            raise ArgumentError("panels", self.panels, f"some of {', '.join(PANELS)}")


def run(config: Config, lab: Lab) -> list[Claim]:
    """Run the panels asked for, in the order of `PANELS`."""
    judged: list[Claim] = []
    return judged
