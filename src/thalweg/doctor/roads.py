"""Broken roads: parameters that no gradient reaches, and the place where the graph was cut (D1, D2, H3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from thalweg.doctor.findings import Evidence, Finding, NotMeasured
from thalweg.doctor.graph import Node, is_leaf, leaves
from thalweg.doctor.patient import Patient, common_path
from thalweg.doctor.recording import OUTSIDE, Cut, Recording
from thalweg.doctor.remedies import remedy

EXACT = "exact: a walk of the graph"


@dataclass(frozen=True, slots=True)
class Roads:
    """What the walk of the graph found.

    Args:
        unreached: parameters that no gradient of the loss reaches.
        blamed: the cuts to blame, with the parameters each took away.
        unused: unreached parameters with no cut between them and the loss.
        deliberate: cuts the loss depends on that took no parameter away, such as a stopped target.
        guessed: the `id` of blamed cuts whose values left torch: that the loss depends on them is not known.
    """

    unreached: tuple[Tensor, ...]
    blamed: tuple[tuple[Cut, tuple[Tensor, ...]], ...]
    unused: tuple[Tensor, ...]
    deliberate: tuple[Cut, ...]
    guessed: frozenset[int]


def walk(patient: Patient, recording: Recording, terms: Iterable[Tensor], order: list[Node]) -> Roads:
    """Compare the learned parameters with the leaves of the graph and lay the difference at the cuts.

    Args:
        patient: whose parameters are looked for.
        recording: the forward that led to `terms`.
        terms: the loss terms.
        order: the nodes of their graph, as `graph.upstream` lists them.
    """
    terms = list(terms)
    reached = {id(node.variable) for node in order if is_leaf(node)}
    reached |= {id(term) for term in terms if term.grad_fn is None and term.requires_grad}
    unreached = tuple(p for p in patient.parameters if id(p) not in reached)
    tainted = recording.taint(terms)
    on_the_way = [cut for index, cut in enumerate(recording.cuts) if tainted >> index & 1]
    blamed, left = _blame(on_the_way, unreached) if unreached else ([], {})
    guessed: frozenset[int] = frozenset()
    if left:
        # what left torch through numpy or a Python number can no longer be followed to the loss
        escaped = [cut for cut in recording.cuts if cut.escaped and cut not in on_the_way]
        more, left = _blame(escaped, tuple(left.values()))
        blamed += more
        guessed = frozenset(id(cut) for cut, _ in more)
    known = {id(cut) for cut, _ in blamed}
    deliberate = tuple(cut for cut in on_the_way if id(cut) not in known)
    return Roads(unreached, tuple(blamed), tuple(left.values()), deliberate, guessed)


def _blame(
    cuts: list[Cut], unreached: tuple[Tensor, ...]
) -> tuple[list[tuple[Cut, tuple[Tensor, ...]]], dict[int, Tensor]]:
    left = {id(p): p for p in unreached}
    blamed: list[tuple[Cut, tuple[Tensor, ...]]] = []
    for cut in cuts:
        ends = cut.parameters | leaves(cut.nodes)
        taken = tuple(p for p in unreached if id(p) in ends)
        if taken:
            blamed.append((cut, taken))
            for parameter in taken:
                left.pop(id(parameter), None)
    return blamed, left


def findings(patient: Patient, recording: Recording, roads: Roads) -> list[Finding]:
    """D1 and D2 at the cuts, H3 for what is never used."""
    silenced = [(cut, taken) for cut, taken in roads.blamed if cut.kind == "no_grad"]
    groups = [[pair] for pair in roads.blamed if pair[0].kind != "no_grad"]
    sampled = [pair for pair in silenced if _is_sample(pair[0])]
    groups += [[pair] for pair in sampled]
    if len(silenced) > len(sampled):
        # one region without gradient silences many operations: one finding, at the module that holds them
        groups.append([pair for pair in silenced if not _is_sample(pair[0])])
    out = [_cut_finding(patient, recording, roads, group) for group in groups]
    return out + _unused(patient, recording, roads.unused)


def _is_sample(cut: Cut) -> bool:
    return cut.origin.operation in ("normal", "bernoulli", "multinomial", "poisson", "rand", "binomial")


def _cut_finding(
    patient: Patient, recording: Recording, roads: Roads, group: list[tuple[Cut, tuple[Tensor, ...]]]
) -> Finding:
    first = group[0][0]
    everything = len(roads.unreached) == len(patient.parameters)
    taken = {id(p): p for _, parameters in group for p in parameters}
    where = common_path([cut.origin.path for cut, _ in group])
    code, key, what = _diagnosis(first)
    at = f" ({first.origin.line})" if first.origin.line else ""
    after = _before(recording, first)
    origin = f" after '{after}'" if after and after != where else ""
    lost = (
        f"all {len(taken)} parameters"
        if everything
        else f"{len(taken)} of {len(patient.parameters)} parameters"
    )
    examples = patient.listing(list(taken.values()))
    title = f"{what}{at} cuts the graph{origin}: no gradient reaches {lost} ({examples})"
    sign = Evidence("learned parameters behind the cut", float(len(taken)), 0.0, EXACT)
    mend = remedy(key)
    confidence = 0.7 if first.kind in ("number", "black box") else 1.0
    # a head that is only logged looks the same, unless nothing at all is reached
    severity = 2 if id(first) in roads.guessed and not everything else 3
    confidence = 0.5 if severity == 2 else confidence
    return Finding(code, severity, where, title, sign, mend.use, mend.cost, confidence)


def _diagnosis(cut: Cut) -> tuple[str, str, str]:
    name = cut.origin.operation
    if cut.kind == "black box" or (cut.escaped and cut.kind in ("detach", "no_grad") and name != "item"):
        return "D2", "D2", f"a black box ({name})" if cut.kind == "black box" else f"{name} into a black box"
    if cut.kind == "number":
        if name in ("numpy", "__array__"):
            return "D2", "D2", f"{name}()"
        return "D1", "D1", f".{name}()"
    if cut.kind == "integer":
        return "D1", "D1 integer", f"{name}, whose result is not a real number,"
    if cut.kind == "no_grad":
        return (
            ("D1", "D1 sample", f"sampling ({name})") if _is_sample(cut) else ("D1", "D1", "torch.no_grad()")
        )
    if cut.kind == "grad":
        return "D1", "D1 grad", "torch.autograd.grad without create_graph"
    return "D1", "D1", {"tensor": f"torch.{name}(x)", "detach": f".{name}"}[cut.kind]


def _before(recording: Recording, cut: Cut) -> str:
    paths = {recording.origins[node].path for node in cut.nodes if node in recording.origins}
    return common_path(paths) if paths and OUTSIDE not in paths else ""


def _unused(patient: Patient, recording: Recording, unused: tuple[Tensor, ...]) -> list[Finding]:
    by_module: dict[str, list[Tensor]] = {}
    for parameter in unused:
        by_module.setdefault(patient.owner(parameter), []).append(parameter)
    called = {call.path for call in recording.calls}
    mend = remedy("H3")
    out = []
    for path, parameters in by_module.items():
        how = "the loss does not use its output" if path in called else "the module never ran"
        names = ", ".join(patient.name(p) for p in parameters)
        sign = Evidence("learned parameters never used", float(len(parameters)), 0.0, EXACT)
        title = f"no gradient reaches {names}: {how}"
        # nothing at all reached is no matter of a spare head
        severity = 3 if len(unused) == len(patient.parameters) else 1
        out.append(Finding("H3", severity, path, title, sign, mend.use, mend.cost, 0.9))
    return out


def hidden(order: list[Node]) -> list[NotMeasured]:
    """What the graph itself hides from a walk."""
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in order):
        why = "a reentrant torch.utils.checkpoint hides the graph inside it: pass use_reentrant=False"
        return [NotMeasured("parameters inside checkpointed segments", why)]
    return []
