"""What the optimizer holds against what the step learns: missing (H1) and stale (H2) parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient, common_path
from thalweg.doctor.remedies import remedy
from thalweg.errors import ArgumentTypeError

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None


def held(optimizer: Optimizers) -> tuple[Tensor, ...] | None:
    """The parameters that one or several optimizers step, each once; None without an optimizer."""
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = (optimizer,)
    expected = "a torch.optim.Optimizer, several of them, or None"
    if not isinstance(optimizer, Iterable):
        raise ArgumentTypeError("optimizer", optimizer, expected)
    found: dict[int, Tensor] = {}
    for each in optimizer:
        if not isinstance(each, torch.optim.Optimizer):
            raise ArgumentTypeError("optimizer", each, expected)
        found |= {id(p): p for group in each.param_groups for p in group["params"]}
    return tuple(found.values())


def findings(patient: Patient, stepped: tuple[Tensor, ...], reached: set[int]) -> list[Finding]:
    """H1 and H2.

    Args:
        patient: what the step learns.
        stepped: what the optimizers hold.
        reached: the `id` of every leaf that a gradient of the loss reaches.
    """
    out = []
    inside = {id(p) for p in stepped}
    missing = [p for p in patient.parameters if id(p) not in inside]
    ours = {id(p) for p in patient.model.parameters()} | {id(p) for p in patient.parameters} | reached
    stale = [p for p in stepped if id(p) not in ours]
    nothing = len(missing) == len(patient.parameters)
    if missing:
        names = patient.listing(missing)
        sign = Evidence(
            "learned parameters the optimizer does not hold", float(len(missing)), 0.0, "exact: a count"
        )
        mend = remedy("H1")
        title = f"the optimizer never steps {names}"
        where = common_path(patient.owner(p) for p in missing)
        out.append(Finding("H1", 3 if nothing else 2, where, title, sign, mend.use, mend.cost, 1.0))
    if stale:
        sign = Evidence("parameters held that nothing uses", float(len(stale)), 0.0, "exact: a count")
        mend = remedy("H2")
        shapes = {p.shape for p in stale}
        twins = [p for p in missing if p.shape in shapes]
        hint = " (the model's were replaced after it was built)" if twins else ""
        title = f"the optimizer holds {len(stale)} parameters that are not in the model{hint}"
        where = common_path(patient.owner(p) for p in twins)
        out.append(Finding("H2", 2, where, title, sign, mend.use, mend.cost, 1.0))
    return out
