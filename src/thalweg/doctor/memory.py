"""Bytes kept for backward by module, and those kept for modules that do not learn (M2)."""

from __future__ import annotations

from collections.abc import Mapping

from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient
from thalweg.doctor.recording import Call
from thalweg.doctor.remedies import remedy
from thalweg.ledger.cost import cost
from thalweg.ledger.storages import written_name

WASTE = 0.5


def kept(patient: Patient) -> dict[str, int]:
    """Bytes by module path, largest first, as `thalweg.ledger.cost` counts them."""
    with patient.visit():
        found = cost((patient.model, patient.terms, patient.parameters), repeats=0)
    patient.backwards += 1
    return dict(sorted(found.by_module.items(), key=lambda item: -item[1]))


def findings(patient: Patient, by_module: Mapping[str, int], calls: list[Call]) -> list[Finding]:
    """M2: a module that learns nothing, fed by nothing that learns, still keeps its activations.

    Args:
        patient: what the step learns.
        by_module: what `kept` returned.
        calls: the recorded calls, for whether a module was given a tensor that requires grad.
    """
    learned = {id(p) for p in patient.parameters}
    fed = {call.path for call in calls if call.given_gradient}
    idle: list[str] = []
    for raw, module in patient.model.named_modules():
        path = written_name(raw)
        parameters = list(module.parameters())
        if not parameters or any(id(p) in learned for p in parameters) or path in fed:
            continue
        if not any(path == other or path.startswith(f"{other}.") for other in idle):
            idle.append(path)
    everything = sum(by_module.values())
    out = []
    for path in idle:
        size = sum(b for name, b in by_module.items() if name == path or name.startswith(f"{path}."))
        share = size / everything if everything else 0.0
        if share > WASTE:
            sign = Evidence("share of the bytes kept for backward", share, WASTE, "ours")
            mend = remedy("M2")
            title = f"'{path}' learns nothing, and {size} bytes of its activations are kept for backward"
            out.append(Finding("M2", 2, path, title, sign, mend.use, mend.cost, 0.9))
    return out
