"""What an examination hands back: ranked findings, every number read, and what could not be read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from thalweg.errors import ArgumentError

_WORDS = ("note", "mild", "serious", "severe")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The sign behind a finding: a number, where worry begins, and who drew that line.

    Args:
        quantity: what was measured, for example "gradient gain per block".
        number: the value read.
        threshold: the value at which worry begins.
        source: where the threshold comes from: a paper, a number format, or our own calibration.
    """

    quantity: str
    number: float
    threshold: float
    source: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a gradient, and what mends it.

    Args:
        code: V1 vanishing, V2 exploding, V3 lost in 16 bits, V4 not finite, T1 unbalanced terms, T2 opposed
            terms, D1 graph cut or flat operation, D2 black box in the path, L2 dead units, M2 memory kept for
            frozen modules, H1 missing from the optimizer, H2 stale in the optimizer, H3 never used,
            H4 backward raises.
        severity: 0 a note, 1 mild, 2 serious, 3 severe.
        where: path of the module as `model.named_modules()` spells it; "" is the model itself,
            "(outside)" what the closure does around it.
        title: one line in words.
        evidence: the sign.
        remedy: the piece that mends it, with one line of use.
        cost: what the remedy costs.
        confidence: between 0 and 1; 1 where the sign is exact (a walk of the graph, a count).
    """

    code: str
    severity: int
    where: str
    title: str
    evidence: Evidence
    remedy: str
    cost: str
    confidence: float


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A reading that was not taken, and why."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Examination:
    """The doctor's report. Print it, index it by measurement, or turn it into JSON.

    Args:
        findings: the most severe first, then the most certain.
        measurements: every number read, by section and name: "A.gain", "C.share", "G.bytes", "H.unreached".
        not_measured: what could not be read, with the reason.

    Example:
        >>> report = Examination((), {"A.gain": 1.0}, ())
        >>> report["A.gain"], report.worst
        (1.0, 0)
    """

    findings: tuple[Finding, ...]
    measurements: dict[str, Any]
    not_measured: tuple[NotMeasured, ...]

    def __getitem__(self, name: str) -> Any:
        if name not in self.measurements:
            raise ArgumentError("name", name, "one of " + ", ".join(sorted(self.measurements)))
        return self.measurements[name]

    @property
    def worst(self) -> int:
        """The highest severity found, 0 when nothing was."""
        return max((finding.severity for finding in self.findings), default=0)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, in their order."""
        return tuple(finding.code for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain lists, dictionaries, strings and numbers, ready for `json.dumps`.

        Numbers that JSON does not know (nan, infinity) come as the strings "nan", "inf" and "-inf".
        """
        return {
            "findings": [_plain(asdict(finding)) for finding in self.findings],
            "measurements": _plain(self.measurements),
            "not_measured": [asdict(each) for each in self.not_measured],
        }

    def __str__(self) -> str:
        lines = [_headline(self.findings)]
        if self.findings:
            lines += ["", *_table(self.findings)]
        lines += ["", *_summary(self.measurements)]
        if self.not_measured:
            lines += ["", "not measured"]
            lines += [f"  {each.what}: {each.why}" for each in self.not_measured]
        return "\n".join(lines)


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Order findings: most severe first, then most certain, then as they were found."""
    return tuple(sorted(findings, key=lambda finding: (-finding.severity, -finding.confidence)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _headline(findings: tuple[Finding, ...]) -> str:
    if not findings:
        return "nothing found"
    counts = [sum(finding.severity == level for finding in findings) for level in range(4)]
    told = ", ".join(f"{counts[level]} {_WORDS[level]}" for level in (3, 2, 1, 0) if counts[level])
    return f"{len(findings)} finding{'s' if len(findings) > 1 else ''}: {told}"


def _table(findings: tuple[Finding, ...]) -> list[str]:
    rows = [("severity", "code", "where", "read", "worry at")]
    rows += [
        (
            f"{finding.severity} {_WORDS[finding.severity]}",
            finding.code,
            finding.where or "(the model)",
            number(finding.evidence.number),
            number(finding.evidence.threshold),
        )
        for finding in findings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for index, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column > 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
        if index:
            finding = findings[index - 1]
            lines.append(f"    {finding.title}")
            lines.append(f"    sign: {finding.evidence.quantity}; threshold: {finding.evidence.source}")
            lines.append(f"    mend: {finding.remedy}")
            lines.append(f"    cost: {finding.cost}; confidence {finding.confidence:.2f}")
    return lines


def _summary(measurements: dict[str, Any]) -> list[str]:
    lines = ["measured"]
    for name, value in measurements.items():
        if isinstance(value, dict):
            flat = {k: v for k, v in value.items() if isinstance(v, int | float | str)}
            shown = ", ".join(
                f"{key or '(the model)'} {number(each)}" for key, each in list(flat.items())[:4]
            )
            more = f", and {len(value) - 4} more" if len(value) > 4 else ""
            text = shown + more if flat else ""
        elif isinstance(value, list):
            text = ", ".join(map(number, value[:4])) + (
                f", and {len(value) - 4} more" if len(value) > 4 else ""
            )
        else:
            text = number(value)
        if text:
            lines.append(f"  {name:<28}{text}")
    return lines


def number(value: Any) -> str:
    """A number in at most four significant digits; anything else by `str`.

    Example:
        >>> number(0.40824), number(3), number(1234567.0)
        ('0.4082', '3', '1.235e+06')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
