"""`examine`: what is wrong with the gradient of a training step, how sure that is, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.doctor import flow, memory, nonfinite, precision, roads, terms, zeros
from thalweg.doctor import optimizer as optimizers
from thalweg.doctor.close_up import look
from thalweg.doctor.findings import Evidence, Examination, Finding, NotMeasured, ranked
from thalweg.doctor.graph import Node, is_leaf, upstream
from thalweg.doctor.patient import Losses, Patient, total
from thalweg.doctor.recording import Recording
from thalweg.doctor.remedies import remedy
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer

CHECKS = ("flow", "terms", "memory", "roads")


def examine(
    model: nn.Module,
    losses: Losses,
    parameters: Iterable[Tensor] | None = None,
    *,
    optimizer: optimizers.Optimizers = None,
    checks: Sequence[str] | None = None,
    seed: int = 0,
) -> Examination:
    """Examine a training step and name what is wrong with its gradient; choose it when nothing is learned.

    It runs the step a few times (two forwards and two backwards, one backward more per loss term, and a
    closer look only where there is a sign) and leaves parameters, buffers, `.grad`, training flags and random
    states bit for bit as they were. `examine(*step)` takes a `thalweg.Step`.

    - *flow*: gain per block of chains of same-role blocks, read on activation gradients (V1, V2); the origin
      of nan and infinity (V4); gradients and updates lost in 16 bits (V3).
    - *terms*: each loss term's share of the gradient (T1) and their conflicts (T2).
    - *memory*: bytes kept for backward by module (M2).
    - *roads*: where the graph was cut (D1, D2), gradients that are exactly zero (D1, L2), parameters never
      used (H3), missing from the optimizer (H1) or stale in it (H2).

    Args:
        model: the module, in the mode it trains in; a compiled one is examined as the code it came from.
        losses: a function of no arguments on a fixed batch that returns a scalar loss, one loss per example
            of shape (batch,) or a mapping of named losses; or a mapping from names to such functions. It must
            not step anything.
        parameters: what the step learns; None for all parameters of the model that require grad.
        optimizer: what steps them: one `torch.optim.Optimizer`, several, or None to leave that out.
        checks: any of "flow", "terms", "memory", "roads"; None for all.
        seed: torch's random state at the start of every evaluation, at least 0.

    Returns:
        An `Examination`: ranked findings, all measurements, and what could not be measured.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument; nothing was changed.
        UnsupportedError: the model is wrapped in DistributedDataParallel or FSDP; pass the bare module.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(*[part for _ in range(20) for part in (nn.Linear(64, 64), nn.ReLU())])
        >>> x = torch.randn(32, 64)
        >>> report = examine(model, lambda: model(x).square().mean())
        >>> [(finding.code, finding.where) for finding in report.findings]
        [('V1', '0')]
        >>> round(report["A.gain"]["#"], 1)
        0.4
    """
    require_integer("seed", seed, 0)
    wanted = _wanted(checks)
    patient = Patient(model, losses, parameters, seed)
    stepped = optimizers.held(optimizer)
    return _Visit(patient, wanted, optimizer, stepped).report()


def _wanted(checks: Sequence[str] | None) -> frozenset[str]:
    if checks is None:
        return frozenset(CHECKS)
    if isinstance(checks, str) or not isinstance(checks, Sequence):
        raise ArgumentTypeError("checks", checks, f"a list of names among {', '.join(CHECKS)}")
    if not checks:
        raise ArgumentError("checks", checks, "at least one check")
    for check in checks:
        require_choice("checks", check, CHECKS)
    return frozenset(checks)


class _Visit:
    """One examination in the making: what the first look found decides which closer looks are taken."""

    def __init__(
        self,
        patient: Patient,
        wanted: frozenset[str],
        optimizer: optimizers.Optimizers,
        stepped: tuple[Tensor, ...] | None,
    ) -> None:
        self.patient = patient
        self.wanted = wanted
        self.steppers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
        self.stepped = stepped
        self.found: list[Finding] = []
        self.measured: dict[str, Any] = {}
        self.missed: list[NotMeasured] = []
        self.zero: list[Tensor] = []
        self.bad: list[str] = []
        self.loss = math.nan
        self.narrow = False

    def report(self) -> Examination:
        """Look, look closer where there is a sign, and write it up."""
        if self.patient.compiled:
            why = (
                "torch.compile's regions ran as the Python code they came from: hooks cannot see inside them"
            )
            self.missed.append(NotMeasured("the compiled code", why))
        calls = self._first_look()
        finite = math.isfinite(self.loss) and not self.bad
        if "flow" in self.wanted and not finite:
            seen = look(self.patient)
            self.found.append(nonfinite.finding(self.patient, seen, math.isfinite(self.loss), self.bad))
        if "roads" in self.wanted and self.zero and finite:
            self._explain_zeros()
        if "flow" in self.wanted and self.narrow and finite:
            self.found += precision.flush_findings(precision.flushed(self.patient))
        if "memory" in self.wanted:
            self._weigh(calls, finite)
        self.measured["evaluations"] = {
            "forwards": self.patient.forwards,
            "backwards": self.patient.backwards,
        }
        return Examination(ranked(self.found), self.measured, tuple(self.missed))

    def _first_look(self) -> list[Any]:
        recording = Recording(self.patient.model)
        with self.patient.visit(), recording.watching():
            with recording:
                named = self.patient.terms()
            recording.forward_done()
            order = upstream([term.grad_fn for term in named.values()])
            if "roads" in self.wanted:
                self._walk(recording, named, order)
            gradients = self._differentiate(recording, named, order)
            self._read_gradients(recording, named, gradients, order)
            if "terms" in self.wanted and len(named) > 1:
                self._compare(named)
            if "flow" in self.wanted and self.steppers:
                self._try_update(gradients)
        return recording.calls

    def _walk(self, recording: Recording, named: dict[str, Tensor], order: list[Node]) -> None:
        found = roads.walk(self.patient, recording, named.values(), order)
        opaque = roads.hidden(order)
        self.missed += opaque
        if not opaque:
            self.found += roads.findings(self.patient, recording, found)
        reached = {id(node.variable) for node in order if is_leaf(node)}
        if self.stepped is not None:
            self.found += optimizers.findings(self.patient, self.stepped, reached)
        else:
            self.missed.append(NotMeasured("parameters missing from the optimizer", "no optimizer was given"))
        self.measured["H.parameters"] = len(self.patient.parameters)
        self.measured["H.frozen"] = sum(not p.requires_grad for p in self.patient.model.parameters())
        self.measured["H.unreached"] = [self.patient.name(p) for p in found.unreached]
        self.measured["H.stopped"] = [
            f"{cut.origin.operation} in {cut.origin.path or '(the model)'} ({cut.origin.line})"
            for cut in found.deliberate
        ]

    def _differentiate(
        self, recording: Recording, named: dict[str, Tensor], order: list[Node]
    ) -> tuple[Tensor | None, ...]:
        recording.backward = True
        try:
            return self.patient.gradients(total(named), keep="terms" in self.wanted and len(named) > 1)
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            if roads.hidden(order):
                why = "a reentrant torch.utils.checkpoint only runs under a bare loss.backward()"
                self.missed.append(NotMeasured("gradients", f"{why}: pass use_reentrant=False"))
                return (None,) * len(self.patient.parameters)
            sign = Evidence("backwards that raised", 1.0, 0.0, "exact")
            mend = remedy("H4")
            self.found.append(
                Finding("H4", 3, "", f"backward raises: {message}", sign, mend.use, mend.cost, 1.0)
            )
            return (None,) * len(self.patient.parameters)
        finally:
            recording.backward = False

    def _read_gradients(
        self,
        recording: Recording,
        named: dict[str, Tensor],
        gradients: Sequence[Tensor | None],
        order: list[Node],
    ) -> None:
        readings = recording.readings
        loss = readings.add(total(named).to(torch.float64 if named else torch.float32))
        slots = {
            index: readings.norm(gradient) for index, gradient in enumerate(gradients) if gradient is not None
        }
        values = readings.read()
        self.loss = values[loss]
        self.measured["loss"] = self.loss
        names = [self.patient.name(p) for p in self.patient.parameters]
        self.measured["A.parameter_gradients"] = {names[index]: values[slot] for index, slot in slots.items()}
        self.bad = [names[index] for index, slot in slots.items() if not math.isfinite(values[slot])]
        reached = {id(node.variable) for node in order if is_leaf(node)}
        if slots:
            self.zero = [
                p
                for index, p in enumerate(self.patient.parameters)
                if id(p) in reached and (index not in slots or values[slots[index]] == 0)
            ]
        if "flow" in self.wanted:
            found = flow.chains(recording, order, values)
            self.found += flow.findings(found)
            self.measured |= flow.measurements(found)
            self.measured["A.float16"] = precision.fractions(gradients)
            self.narrow = any(call.narrow for call in recording.calls) or any(
                p.dtype == torch.float16 for p in self.patient.parameters
            )
            if not found:
                why = f"no {flow.SHORTEST} blocks of the same class and output shape in series"
                self.missed.append(NotMeasured("gain through depth", why))
            self.missed += [
                NotMeasured(
                    f"gain through the time steps of '{call.path}'", "they run inside one fused operation"
                )
                for call in recording.calls
                if call.kind in ("RNN", "LSTM", "GRU")
            ]

    def _compare(self, named: dict[str, Tensor]) -> None:
        live = {name: term for name, term in named.items() if term.requires_grad}
        for name in named.keys() - live.keys():
            sign = Evidence("norm of the term's gradient", 0.0, 0.0, "exact")
            mend = remedy("T1 silent")
            title = f"term '{name}' has no graph: nothing learns from it"
            self.found.append(Finding("T1", 2, "", title, sign, mend.use, mend.cost, 1.0))
        compared = terms.compare(self.patient, live) if len(live) > 1 else None
        if compared is None:
            self.missed.append(NotMeasured("balance and conflict of the terms", "they share no parameter"))
            return
        self.found += terms.findings(compared)
        self.measured |= terms.measurements(compared)

    def _try_update(self, gradients: Sequence[Tensor | None]) -> None:
        if not any(p.dtype in (torch.bfloat16, torch.float16) for p in self.patient.parameters):
            return
        try:
            lost = precision.unfelt(self.patient, gradients, self.steppers)
        except Exception as error:  # a user's optimizer may refuse to be copied, or want a closure
            why = f"a copy of the optimizer could not step: {type(error).__name__}: {error}"
            self.missed.append(NotMeasured("updates lost in 16 bits", why))
            return
        self.measured["A.unfelt_updates"] = {
            name: gone / present for name, (gone, present) in lost.items() if present
        }
        self.found += precision.unfelt_findings(lost)

    def _explain_zeros(self) -> None:
        seen = look(self.patient, self.zero, finite=False)
        change = zeros.difference(self.patient, self.zero, self.loss)
        self.found += zeros.findings(self.patient, seen, self.zero, change, self.loss)
        if change is None:
            why = "the closure does not return the same loss twice: fix its batch and its noise"
            self.missed.append(NotMeasured("differences of the loss", why))

    def _weigh(self, calls: list[Any], finite: bool) -> None:
        reaches = self.measured.get("A.parameter_gradients")
        if not finite or not reaches:
            why = "the step has no finite gradient" if not finite else "no gradient reaches any parameter"
            self.missed.append(NotMeasured("bytes kept for backward", why))
            return
        kept = memory.kept(self.patient)
        self.measured["G.bytes"] = kept
        self.measured["G.total_bytes"] = sum(kept.values())
        self.found += memory.findings(self.patient, kept, calls)
