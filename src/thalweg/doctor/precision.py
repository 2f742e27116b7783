"""16-bit health: gradients that float16 flushes to zero, updates that 16-bit weights do not feel (V3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient, total
from thalweg.doctor.readings import Readings
from thalweg.doctor.remedies import remedy

LOST = 0.25
SCALE = 4096.0
NORMAL, FLUSHED, LARGEST = 6.103515625e-05, 5.960464477539063e-08, 65504.0


def fractions(gradients: Sequence[Tensor | None]) -> dict[str, float]:
    """Shares of the non-zero gradient entries that float16 would blur, lose or overflow."""
    readings = Readings()
    slots = []
    for gradient in gradients:
        if gradient is not None:
            size = gradient.detach().abs()
            counts = (size > 0, size < NORMAL, size < FLUSHED, size > LARGEST)
            slots.append([readings.add((part & counts[0]).sum()) for part in counts])
    values = readings.read()
    sums = [sum(values[slot[part]] for slot in slots) for part in range(4)]
    present = max(sums[0], 1.0)
    return {
        "below the normal numbers": sums[1] / present,
        "below the smallest number": sums[2] / present,
        "above the largest number": sums[3] / present,
    }


def flushed(patient: Patient) -> dict[str, tuple[float, float]]:
    """For each parameter, the gradient entries that appear only when the loss is scaled, and all that appear.

    One forward, two backwards. A ratio of two counts of the same graph: no guess about the lost values.
    """
    readings = Readings()
    with patient.visit():
        loss = total(patient.terms())
        plain = patient.gradients(loss, keep=True)
        large = patient.gradients(loss * SCALE)
        slots = {
            patient.name(p): (readings.add(((a == 0) & (b != 0)).sum()), readings.add((b != 0).sum()))
            for p, a, b in zip(patient.parameters, plain, large)
            if a is not None and b is not None
        }
        values = readings.read()
    return {name: (values[lost], values[all_]) for name, (lost, all_) in slots.items()}


def flush_findings(lost: dict[str, tuple[float, float]]) -> list[Finding]:
    """V3 when more than a quarter of the entries is flushed to zero."""
    share = sum(gone for gone, _ in lost.values()) / max(sum(present for _, present in lost.values()), 1.0)
    if share <= LOST:
        return []
    worst = max(lost, key=lambda name: lost[name][0])
    sign = Evidence(
        f"gradient entries that appear when the loss is scaled by {SCALE:.0f}", share, LOST, "ours"
    )
    mend = remedy("V3")
    title = f"{share:.0%} of the gradient entries are flushed to zero in float16, most in {worst}"
    severity = 3 if share > 0.75 else 2
    return [Finding("V3", severity, worst.rpartition(".")[0], title, sign, mend.use, mend.cost, 0.95)]


def unfelt(
    patient: Patient, gradients: Sequence[Tensor | None], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, tuple[float, float]]:
    """For each 16-bit weight, entries that a step of the optimizer leaves unchanged, and all with gradient.

    A copy of the optimizer steps copies of the weights, so the update is the optimizer's own.

    Raises:
        Exception: whatever copying or stepping this optimizer raises.
    """
    narrow = [p for p in patient.parameters if p.dtype in (torch.bfloat16, torch.float16)]
    memo: dict[int, Any] = {}
    twins = {id(p): copy.deepcopy(p, memo) for p in patient.parameters}
    steppers = [copy.deepcopy(optimizer, memo) for optimizer in optimizers]
    given = {id(p): g for p, g in zip(patient.parameters, gradients)}
    for stepper in steppers:
        stepper.zero_grad(set_to_none=True)
    for p in patient.parameters:
        gradient = given[id(p)]
        twins[id(p)].grad = None if gradient is None else gradient.detach().clone()
    for stepper in steppers:
        stepper.step()
    readings = Readings()
    slots = {}
    for p in narrow:
        gradient = given[id(p)]
        if gradient is not None:
            same = (twins[id(p)].detach() == p.detach()) & (gradient != 0)
            slots[patient.name(p)] = readings.add(same.sum()), readings.add((gradient != 0).sum())
    values = readings.read()
    return {name: (values[lost], values[present]) for name, (lost, present) in slots.items()}


def unfelt_findings(lost: dict[str, tuple[float, float]]) -> list[Finding]:
    """V3 when more than a quarter of the 16-bit weights does not move."""
    share = sum(gone for gone, _ in lost.values()) / max(sum(present for _, present in lost.values()), 1.0)
    if share <= LOST:
        return []
    worst = max(lost, key=lambda name: lost[name][0])
    source = "ours; the format keeps 8 bits (bfloat16) or 11 (float16)"
    sign = Evidence("weights with a gradient that one step leaves unchanged", share, LOST, source)
    mend = remedy("V3 updates")
    title = (
        f"{share:.0%} of the 16-bit weights are left unchanged by a step of the optimizer, most in {worst}"
    )
    return [Finding("V3", 2, worst.rpartition(".")[0], title, sign, mend.use, mend.cost, 0.95)]
