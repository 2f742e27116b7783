"""One route measured on one step: the ledger's numbers, by the names of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from thalweg.errors import ArgumentError, NonFiniteError
from thalweg.ledger import cost, fidelity
from thalweg.noise import Key
from thalweg.step import Rule, Step


def measure(
    step: Step,
    rule: Rule | None,
    reference: Rule | Sequence[Tensor] | None,
    *,
    judged: Sequence[Tensor] | None = None,
    faithful: bool = True,
    standard_error: float = 0.05,
    limit: int = 60_000,
    seconds: float | None = None,
    key: Key | None = None,
) -> dict[str, Any]:
    """Cost and fidelity of a route.

    Args:
        step: the user's step.
        rule: fills `.grad`; None for backprop, or for what the step's own learner does.
        reference: the exact gradient, or the rule that computes it.
        judged: the parameters whose gradient is held against the exact one; all of the step's by default.
        faithful: hold it against the exact gradient; False for what follows another objective.
        standard_error: draw until the bias is known this well.
        limit: at most this many draws ...
        seconds: ... and no more than fit into about this time, but at least 8; None for any time.
        key: names the random draws.

    Returns:
        Fields of `Row`.
    """
    price = cost(step, gradient=rule)
    found = {
        "evaluations": price.evaluations,
        "operations": price.operations,
        "saved_bytes": price.saved_bytes,
        "peak_bytes": price.peak_bytes,
        "ms_per_step": price.milliseconds,
    }
    if not faithful:
        return found
    if seconds is not None:
        limit = max(8, min(limit, int(1000 * seconds / max(price.milliseconds, 1e-3))))
    try:
        right = fidelity(
            step if judged is None else step._replace(parameters=judged),
            gradient=rule,
            reference=reference,
            standard_error=standard_error,
            limit=limit,
            key=key if key is not None else Key(0),
        )
    except (ArgumentError, NonFiniteError, RuntimeError) as refusal:
        return found | {"note": f"no exact gradient to hold it against: {refusal}"}
    return found | {
        "cosine": right.cosine,
        "cosine_by_layer": right.cosine_by_layer,
        "norm_ratio": right.norm_ratio,
        "bias": right.bias,
        "bias_se": right.bias_se,
        "variance": right.variance,
        "squared_bias": right.squared_bias,
        "draws": right.draws,
    }
