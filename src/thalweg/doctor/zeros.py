"""Gradients that exist and are exactly zero: rounding, signs, dead units (D1, L2).

A zero is not always sick: a masked loss or a layer behind a zero-initialised one has it by right. The loss
itself decides: its difference along a direction in these parameters, which must vanish if the zero is true.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thalweg.borrowed import borrowed
from thalweg.doctor.close_up import CloseUp
from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient, common_path, total
from thalweg.doctor.recording import Origin
from thalweg.doctor.remedies import remedy
from thalweg.noise import Key, normal

FLAT = ("Round", "Floor", "Ceil", "Sign", "Trunc", "Frac", "Heaviside")
DEAD = ("Relu", "Threshold", "Hardtanh", "Clamp", "Hardsigmoid", "Hardswish", "ClampMin", "ClampMax")
# relative length of the direction: long enough to step over the plateau of a rounding
STRETCH = 0.1
SOURCE = "exact zero, checked by differences of the loss along a direction 0.1 of the weights' length"


def difference(patient: Patient, parameters: Sequence[Tensor], base: float) -> float | None:
    """|L(w + d) - L(w - d)| for one random direction d in the given parameters, or None.

    None when the loss at the unchanged parameters does not come back as `base`: then the closure is not
    repeatable and a difference means nothing. Three forwards.
    """
    if any(id(a) == id(b) for i, a in enumerate(parameters) for b in parameters[:i]):
        return None
    directions: list[Tensor] = []
    for index, parameter in enumerate(parameters):
        direction = normal(parameter, Key(seed=0, step=index))
        length: Tensor = torch.linalg.vector_norm(parameter.detach()) + parameter.numel() ** 0.5 * 1e-2
        directions.append(direction * (STRETCH * length / direction.norm().clamp_min(1e-12)))

    def at(sign: float) -> Tensor:
        def moved(index: int, value: Tensor) -> Tensor:
            return value + sign * directions[index]

        # gradients stay enabled: a loss with a derivative in it (PINNs, gradient penalties) needs them
        with patient.visit(), borrowed(parameters, moved):
            value: Tensor = total(patient.terms()).detach().double()
        return value

    ahead, behind, again = torch.stack([at(1.0), at(-1.0), at(0.0)]).tolist()
    change = float(abs(ahead - behind))
    # kernels that sum in no fixed order may move the last digits; a new batch moves more than that
    return change if abs(again - base) <= 0.1 * change or again == base else None


def findings(
    patient: Patient, seen: CloseUp, zero: Sequence[Tensor], change: float | None, base: float
) -> list[Finding]:
    """D1 at flat operations and lying backwards, L2 at dead units.

    Args:
        patient: the step.
        seen: a close-up that looked for these parameters.
        zero: parameters whose gradient is exactly zero.
        change: what `difference` found, None when it could not.
        base: the loss.
    """
    noise = 64 * torch.finfo(zero[0].dtype).eps * max(abs(base), 1e-6)
    moved = change is not None and change > noise
    out = []
    left = {id(p) for p in zero}
    # nodes come in backward order: the first to zero a gradient is to blame, those behind it only pass it on
    for origin, node, ids in seen.zeroed:
        behind = ids & left
        if not behind:
            continue
        left -= behind
        out.append(
            _finding(patient, origin, node, [p for p in zero if id(p) in behind], moved, change, noise)
        )
    if left:
        rest = [p for p in zero if id(p) in left]
        origin = Origin(common_path(patient.owner(p) for p in rest), "an operation", "")
        out.append(_finding(patient, origin, "", rest, moved, change, noise))
    return out


def _finding(
    patient: Patient,
    origin: Origin,
    node: str,
    parameters: list[Tensor],
    moved: bool,
    change: float | None,
    noise: float,
) -> Finding:
    flat, dead = node.startswith(FLAT), node.startswith(DEAD)
    code, key = ("L2", "L2") if dead else ("D1", "D1 flat" if flat else "D1 weight")
    # a flat operation explains the zero by itself; anything else needs the differences to speak against it
    severity = (2 if dead else 3) if moved else (2 if flat or dead else 0)
    names = patient.listing(parameters)
    name = f"{origin.operation} ({node})" if node else origin.operation
    at = f" at {origin.line}" if origin.line else ""
    verdict = "the loss does depend on them" if moved else "the loss does not move along them here either"
    if change is None:
        verdict = "whether the loss depends on them could not be checked: the closure is not repeatable"
    title = f"{name}{at} makes the gradient of {names} exactly zero; {verdict}"
    sign = Evidence("change of the loss where the gradient says 0", change or 0.0, noise, SOURCE)
    mend = remedy(key)
    confidence = 1.0 if moved else 0.6
    return Finding(code, severity, origin.path, title, sign, mend.use, mend.cost, confidence)
