"""One row per route, and the table they make."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from thalweg.table import align, scaled, short

COLUMNS = (
    "route",
    "network",
    "accuracy",
    "equal operations",
    "cosine",
    "norm ratio",
    "bias ± se",
    "variance",
    "needs",
    "evaluations",
    "operations",
    "kept",
    "peak",
    "ms/step",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What one route costs and how right it is; None where a route has no such number.

    Args:
        route: its name.
        network: what it was measured on.
        reference: where the exact gradient comes from that it is held against.
        accuracy: of the trained network on data it has not seen, in [0, 1]; mean over seeds.
        accuracy_sd: standard deviation of the accuracy over seeds.
        cosine: between one draw of the route's gradient and the exact one, mean over draws.
        cosine_by_layer: the same by layer.
        norm_ratio: norm of one draw over the norm of the exact gradient, mean over draws.
        bias: mean of <g^ - g, g> / |g|^2.
        bias_se: standard error of the bias.
        variance: E|g^ - E g^|^2 / |g|^2.
        needs: what the route asks of the computation.
        evaluations: forward passes a step.
        operations: floating-point operations a step, forward and backward.
        saved_bytes: bytes kept for the backward pass.
        peak_bytes: most bytes alive at one time beyond the parameters and the batch.
        ms_per_step: milliseconds a step takes.
        squared_bias: unbiased estimate of |E g^ - g|^2 / |g|^2; negative by chance where that is near 0.
        draws: how many gradients the fidelity was measured on.
        accuracy_equal_operations: after as many operations as the reference spent, in place of as many steps;
            mean over seeds.
        note: why a number is missing, or a warning; empty when there is nothing to say.
    """

    route: str
    network: str
    reference: str | None = None
    accuracy: float | None = None
    accuracy_sd: float | None = None
    cosine: float | None = None
    cosine_by_layer: dict[str, float] | None = None
    norm_ratio: float | None = None
    bias: float | None = None
    bias_se: float | None = None
    variance: float | None = None
    needs: str | None = None
    evaluations: int | None = None
    operations: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    ms_per_step: float | None = None
    squared_bias: float | None = None
    draws: int | None = None
    accuracy_equal_operations: float | None = None
    note: str = ""

    def cells(self) -> dict[str, str]:
        """The row as text, by the names of `COLUMNS`."""
        bias = "-"
        if self.bias is not None and self.bias_se is not None:
            bias = f"{self.bias:+.3f} ± {self.bias_se:.3f}" if self.bias or self.bias_se else "0"
        accuracy = "-"
        if self.accuracy is not None:
            accuracy = f"{100 * self.accuracy:.1f}"
            accuracy += f" ± {100 * self.accuracy_sd:.1f} %" if self.accuracy_sd is not None else " %"
        return {
            "route": self.route,
            "network": self.network,
            "accuracy": accuracy,
            "equal operations": "-"
            if self.accuracy_equal_operations is None
            else f"{100 * self.accuracy_equal_operations:.1f} %",
            "cosine": short(self.cosine),
            "norm ratio": short(self.norm_ratio),
            "bias ± se": bias,
            "variance": short(self.variance),
            "needs": self.needs or "-",
            "evaluations": short(self.evaluations),
            "operations": scaled(self.operations),
            "kept": scaled(self.saved_bytes, "B"),
            "peak": scaled(self.peak_bytes, "B"),
            "ms/step": short(self.ms_per_step),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Routes side by side: `print` it, or take `to_dict()` for JSON.

    Args:
        task: what was compared on.
        verdict: the outcome in one line.
        rows: one per route.
        settings: what the rows were measured with.
        headings: which cells of the rows make the table, in order.
    """

    task: str
    verdict: str
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    headings: tuple[str, ...] = COLUMNS

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: numbers that are nan or infinite become None, which they must not silently be."""
        rows = [{name: _json_number(value) for name, value in asdict(row).items()} for row in self.rows]
        return {"task": self.task, "verdict": self.verdict, "rows": rows, "settings": self.settings}

    def columns(self) -> tuple[str, ...]:
        """The columns in which at least one row has something to say."""
        cells = [row.cells() for row in self.rows]
        same_network = len({row.network for row in self.rows}) == 1
        return tuple(
            name
            for name in self.headings
            if any(line[name] != "-" for line in cells) and not (name == "network" and same_network)
        )

    def __str__(self) -> str:
        columns = self.columns()
        table = align(columns, [[row.cells()[name] for name in columns] for row in self.rows])
        notes = [f"{row.route}: {row.note}" for row in self.rows if row.note]
        return "\n".join([self.verdict, "", table, *(["", *notes] if notes else [])])


def _json_number(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_number(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
