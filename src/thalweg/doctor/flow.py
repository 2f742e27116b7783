"""How the gradient travels through depth: gain per block of chains of same-role blocks (V1, V2).

Weight gradients cannot show this: where the forward shrinks as fast as the backward, the ratio of the first
to the last weight gradient stays near 1 while the signal is gone. Activation gradients are read instead.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.graph import Node, marks_upstream
from thalweg.doctor.recording import Call, Recording
from thalweg.doctor.remedies import remedy

SHORTEST = 4
# healthy 20-block twins read .93 to 1.02 a block and .25 to 1.5 over the depth (tests/doctor/test_flow.py)
GAIN, TOTAL = (0.7, 1.4), (1e-3, 1e3)
MILD_GAIN, MILD_TOTAL = (0.8, 1.25), (1e-2, 1e2)
SOURCE = "ours: healthy twins of 20 blocks read .93 to 1.02"


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls of same-role blocks, each fed by the one before.

    Args:
        role: the common path with "#" for the number of the block, for example "encoder.layer.#".
        paths: the blocks in order of execution.
        activations: Euclidean norm of each block's output.
        gradients: Euclidean norm of the gradient of the loss with respect to each block's output.
    """

    role: str
    paths: tuple[str, ...]
    activations: tuple[float, ...]
    gradients: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Backward gain per block, (‖δ_1‖/‖δ_L‖)^(1/(L-1)): 1 is lossless, below 1 vanishing."""
        return _rate(self.gradients[0], self.gradients[-1], len(self.gradients))

    @property
    def activation_gain(self) -> float:
        """Forward gain per block, (‖a_L‖/‖a_1‖)^(1/(L-1))."""
        return _rate(self.activations[-1], self.activations[0], len(self.activations))


def chains(recording: Recording, order: list[Node], values: list[float]) -> list[Chain]:
    """Find the chains of a step: same class, role and output shape, in series, the outermost ones only.

    Args:
        recording: after its backward.
        order: the nodes of the loss as `graph.upstream` lists them.
        values: what `recording.readings.read()` returned.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[Call]] = {}
    for call in recording.calls:
        if call.parametric and call.node is not None and call.gradient is not None:
            key = (re.sub(r"\d+", "#", call.path), call.kind, call.shape)
            groups.setdefault(key, []).append(call)
    candidates = {key: calls for key, calls in groups.items() if len(calls) >= SHORTEST}
    members = {call for calls in candidates.values() for call in calls}
    outermost = {key: calls for key, calls in candidates.items() if not _inside(calls[0], members)}
    bits: dict[Node, int] = {}
    for index, call in enumerate(call for calls in outermost.values() for call in calls):
        bits[call.node] = bits.get(call.node, 0) | 1 << index
    marks = marks_upstream(order, lambda node: bits.get(node, 0))
    found = []
    for (role, _, _), calls in outermost.items():
        if all(marks.get(b.node, 0) & bits[a.node] == bits[a.node] for a, b in pairwise(calls)):
            found.append(
                Chain(
                    role,
                    tuple(call.path for call in calls),
                    tuple(values[call.activation] for call in calls if call.activation is not None),
                    tuple(values[call.gradient] for call in calls if call.gradient is not None),
                )
            )
    return found


def findings(found: list[Chain]) -> list[Finding]:
    """V1 and V2: chains whose gradient shrinks or grows too much on its way back."""
    out = []
    for chain in found:
        gain, steps = chain.gain, len(chain.gradients) - 1
        if not math.isfinite(gain):
            continue
        overall = gain**steps
        severity = 3 if _outside(gain, GAIN) and _outside(overall, TOTAL) else 0
        bounds = GAIN
        if not severity and _outside(gain, MILD_GAIN) and _outside(overall, MILD_TOTAL):
            severity, bounds = 2, MILD_GAIN
        if not severity:
            continue
        code, verb = ("V1", "shrinks") if gain < 1 else ("V2", "grows")
        title = (
            f"gradient {verb} by {gain:.3g} a block, {overall:.2g} in all, on its way back through "
            f"{steps + 1} blocks '{chain.role}' (forward: {chain.activation_gain:.3g} a block)"
        )
        sign = Evidence("activation-gradient gain per block", gain, bounds[gain > 1], SOURCE)
        mend = remedy(code)
        out.append(Finding(code, severity, chain.paths[0], title, sign, mend.use, mend.cost, 0.95))
    return out


def measurements(found: list[Chain]) -> dict[str, Any]:
    """The gains by role, and the norms block by block."""
    named = {chain.role or "(the model)": chain for chain in found}
    return {
        "A.gain": {role: chain.gain for role, chain in named.items()},
        "A.activation_gain": {role: chain.activation_gain for role, chain in named.items()},
        "A.blocks": {
            role: {
                "paths": list(chain.paths),
                "activations": list(chain.activations),
                "gradients": list(chain.gradients),
            }
            for role, chain in named.items()
        },
    }


def _rate(end: float, start: float, count: int) -> float:
    if not (math.isfinite(end) and math.isfinite(start)) or start == 0:
        return math.nan
    # by logarithms: the ratio itself may not be a number that float64 has
    return math.exp((math.log(end) - math.log(start)) / (count - 1)) if end > 0 else 0.0


def _outside(value: float, bounds: tuple[float, float]) -> bool:
    return not bounds[0] <= value <= bounds[1]


def _inside(call: Call, members: set[Call]) -> bool:
    parent = call.parent
    while parent is not None and parent not in members:
        parent = parent.parent
    return parent is not None
