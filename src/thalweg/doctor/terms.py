"""Several loss terms on shared parameters: who dominates (T1), who contradicts whom (T2).

Each term gets its own backward on the parameters it shares with another; splitting one summed gradient
afterwards cannot tell the terms apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from thalweg.doctor.findings import Evidence, Finding
from thalweg.doctor.patient import Patient, common_path
from thalweg.doctor.readings import Readings
from thalweg.doctor.remedies import remedy

IMBALANCE, SEVERE_IMBALANCE = 100.0, 1e4
COSINE, RATE = -0.2, 0.3
# below this share of their length two terms undo most of what the other does
CANCELLED = 0.1


@dataclass(frozen=True, slots=True)
class Terms:
    """The gradients of the loss terms, compared.

    Args:
        norms: Euclidean norm of each term's gradient on the parameters that at least two terms share; without
            the terms that share none and have some of their own.
        cosines: cosine of each pair of terms on the parameters the two share.
        alignments: for each pair, norm of the sum over sum of the norms on those parameters.
        rates: share of those parameter tensors where the pair's cosine is below -0.2.
        alignment: norm of the sum over the sum of the norms; 1 when the terms agree, 0 when they cancel.
        largest, mean: greatest and mean absolute entry of each term's gradient.
        where: path of the module that holds all shared parameters.
    """

    norms: dict[str, float]
    cosines: dict[tuple[str, str], float]
    alignments: dict[tuple[str, str], float]
    rates: dict[tuple[str, str], float]
    alignment: float
    largest: dict[str, float]
    mean: dict[str, float]
    where: str


def compare(patient: Patient, terms: dict[str, Tensor]) -> Terms | None:
    """Differentiate each term on its own and compare; None when no parameter is shared.

    Args:
        patient: inside a visit.
        terms: scalars of one evaluation, whose graphs are kept.
    """
    gradients = {name: patient.gradients(term, keep=True) for name, term in terms.items()}
    held = [
        sum(each[index] is not None for each in gradients.values())
        for index in range(len(patient.parameters))
    ]
    shared = [index for index, count in enumerate(held) if count > 1]
    if not shared:
        return None
    readings = Readings()
    slots: dict[tuple[str, int], int] = {}
    extremes: dict[str, tuple[int, int]] = {}
    for name, each in gradients.items():
        present = [gradient for index in shared if (gradient := each[index]) is not None]
        slots |= {(name, i): readings.norm(g) for i in shared if (g := each[i]) is not None}
        if present:
            size = sum(gradient.numel() for gradient in present)
            top = torch.stack([gradient.abs().amax().float() for gradient in present]).amax()
            absolute = torch.stack([gradient.abs().sum(dtype=torch.float32) for gradient in present]).sum()
            extremes[name] = readings.add(top), readings.add(absolute / size)
    products: dict[tuple[str, str, int], int] = {}
    for a, b in combinations(terms, 2):
        for i in shared:
            one, other = gradients[a][i], gradients[b][i]
            if one is not None and other is not None:
                scaled = _unit(one), _unit(other)
                products[a, b, i] = readings.add((scaled[0] * scaled[1]).sum())
    summed = [_sum([each[i] for each in gradients.values()]) for i in shared]
    whole = [readings.norm(gradient) for gradient in summed if gradient is not None]
    values = readings.read()
    norms = {
        name: math.hypot(*[values[slots[name, i]] for i in shared if (name, i) in slots])
        for name, each in gradients.items()
        # a term that only moves parameters of its own is not silent, it has no part in this
        if name in extremes or not any(gradient is not None for gradient in each)
    }
    cosines, alignments, rates = _pairs(terms, shared, slots, products, values)
    length = sum(norms.values())
    return Terms(
        norms,
        cosines,
        alignments,
        rates,
        math.hypot(*[values[slot] for slot in whole]) / length if length else math.nan,
        {name: values[slot[0]] for name, slot in extremes.items()},
        {name: values[slot[1]] for name, slot in extremes.items()},
        common_path(patient.owner(patient.parameters[index]) for index in shared),
    )


def _unit(gradient: Tensor) -> Tensor:
    wide = gradient.to(torch.float32 if gradient.device.type == "mps" else torch.float64)
    length: Tensor = torch.linalg.vector_norm(wide)
    return wide / length.clamp_min(torch.finfo(wide.dtype).tiny)


def _sum(gradients: list[Tensor | None]) -> Tensor | None:
    present = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(present).sum(0) if present else None


def _pairs(
    terms: dict[str, Tensor],
    shared: list[int],
    slots: dict[tuple[str, int], int],
    products: dict[tuple[str, str, int], int],
    values: list[float],
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    cosines, alignments, rates = {}, {}, {}
    for a, b in combinations(terms, 2):
        common = [i for i in shared if (a, b, i) in products]
        sizes = {name: [values[slots[name, i]] for i in common] for name in (a, b)}
        one, other = math.hypot(*sizes[a]), math.hypot(*sizes[b])
        length = one * other
        if not length or not math.isfinite(length):
            continue
        local = [values[products[a, b, i]] for i in common]
        cosines[a, b] = sum(c * x * y for c, x, y in zip(local, sizes[a], sizes[b])) / length
        squared = one**2 + other**2 + 2 * cosines[a, b] * length
        alignments[a, b] = math.sqrt(max(squared, 0.0)) / (one + other)
        rates[a, b] = sum(c < COSINE for c in local) / len(local)
    return cosines, alignments, rates


def findings(terms: Terms) -> list[Finding]:
    """T1 and T2."""
    out = []
    alive = {name: norm for name, norm in terms.norms.items() if norm > 0 and math.isfinite(norm)}
    for name, norm in terms.norms.items():
        if norm == 0:
            sign = Evidence("norm of the term's gradient on shared parameters", 0.0, 0.0, "exact")
            mend = remedy("T1 silent")
            title = f"term '{name}' sends no gradient to the shared parameters"
            out.append(Finding("T1", 2, terms.where, title, sign, mend.use, mend.cost, 0.8))
    if len(alive) > 1:
        great, small = max(alive, key=alive.__getitem__), min(alive, key=alive.__getitem__)
        ratio = alive[great] / alive[small]
        if ratio > IMBALANCE:
            sign = Evidence("gradient norm, largest term over smallest", ratio, IMBALANCE, "ours")
            mend = remedy("T1")
            title = f"term '{great}' outweighs '{small}' {ratio:.3g} times on the shared parameters"
            severity = 3 if ratio > SEVERE_IMBALANCE else 2
            out.append(Finding("T1", severity, terms.where, title, sign, mend.use, mend.cost, 0.9))
    for (a, b), cosine in terms.cosines.items():
        rate = terms.rates[a, b]
        if cosine < COSINE and rate > RATE:
            source = "sign: PCGrad (arXiv 2001.06782); -0.2 on more than 30 % of the tensors: ours"
            sign = Evidence("cosine of the two gradients", cosine, COSINE, source)
            mend = remedy("T2")
            kept = terms.alignments[a, b]
            title = (
                f"terms '{a}' and '{b}' pull against each other, in {rate:.0%} of the shared tensors, and "
                f"{1 - kept:.0%} of their length cancels (at a minimum of a sum its terms always cancel)"
            )
            # never severe: whether two terms fight or have found their balance, one reading cannot tell
            severity = 2 if kept < CANCELLED else 1
            out.append(Finding("T2", severity, terms.where, title, sign, mend.use, mend.cost, 0.9))
    return out


def measurements(terms: Terms) -> dict[str, Any]:
    """Norms, shares, cosines by pair "a | b", alignment, and the statistic of gradient-annealed PINNs."""
    length = sum(terms.norms.values())
    first = next(iter(terms.norms))
    return {
        "C.norm": terms.norms,
        "C.share": {name: norm / length if length else math.nan for name, norm in terms.norms.items()},
        "C.cosine": {f"{a} | {b}": cosine for (a, b), cosine in terms.cosines.items()},
        "C.conflict_rate": {f"{a} | {b}": rate for (a, b), rate in terms.rates.items()},
        "C.alignment": terms.alignment,
        # max |grad of the first term| / mean |grad of each other term|, arXiv 2001.04536
        "C.annealed_weight": {
            name: terms.largest[first] / mean
            for name, mean in terms.mean.items()
            if name != first and first in terms.largest and mean > 0
        },
    }
