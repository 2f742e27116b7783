"""Nan and infinity: the first operation that made one, forward and backward (V4)."""

from __future__ import annotations

from thalweg.doctor.close_up import CloseUp
from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient
from thalweg.doctor.recording import Origin
from thalweg.doctor.remedies import remedy


def finding(patient: Patient, seen: CloseUp, loss_finite: bool, bad: list[str]) -> Finding:
    """V4, where the first non-finite value was made.

    Args:
        patient: the step.
        seen: a close-up of it.
        loss_finite: whether the loss itself is finite.
        bad: names of the parameters whose gradient is not finite.
    """
    origin: Origin | None
    if loss_finite and seen.backward is not None:
        origin, key = seen.backward, "V4 backward"
    else:
        # a loss that is not finite was spoilt by the forward: what the backward does after that says nothing
        origin, key = seen.forward, "V4 forward"
    if origin is None:
        key = "V4 data"
    told = [
        f"{way} first at {_told(each)}"
        for way, each in (("forward", seen.forward), ("backward", seen.backward))
        if each is not None and origin is not None
    ]
    what = "the loss is finite but gradients are not" if loss_finite else "the loss is not finite"
    title = f"{what}: {'; '.join(told) or 'the batch or the weights already hold nan or infinity'}"
    quantity = "gradients of parameters that are not finite, and the loss where it is not"
    sign = Evidence(quantity, float(len(bad) + (not loss_finite)), 0.0, "exact: a count")
    mend = remedy(key)
    where = origin.path if origin is not None else ""
    return Finding("V4", 3, where, title, sign, mend.use, mend.cost, 1.0 if origin is not None else 0.7)


def _told(origin: Origin) -> str:
    place = f" in '{origin.path}'" if origin.path else ""
    line = f" ({origin.line})" if origin.line else ""
    return f"{origin.operation}{place}{line}"
