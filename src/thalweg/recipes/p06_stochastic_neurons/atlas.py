"""The estimator atlas: every estimator on a net so small that its gradient is known by enumeration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thalweg.problems import BernoulliNet
from thalweg.step import Rule
from thalweg.stochastic import (
    ARM,
    REBAR,
    RELAX,
    Concrete,
    DisARM,
    ScoreFunction,
    StraightThrough,
    estimator_report,
)

UNBIASED = (
    "score function",
    "score function, mean",
    "score function, minimum variance",
    "score function, leave one out of 4",
    "ARM",
    "DisARM",
    "REBAR",
    "RELAX",
)


def atlas(gates: int, seed: int, samples: int) -> list[dict[str, Any]]:
    """Bias, variance, cosine and evaluations of every estimator on one Bernoulli net.

    Args:
        gates: K, at most 16: the exact gradient takes 2^K runs.
        seed: names weights, inputs and targets.
        samples: draws of each estimator.

    Returns:
        One row for each estimator; all relative to the exact gradient's length.
    """

    def net(gradient: Any = None) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        # the gradient below the gates: what lies above them is differentiated alike by all
        model = BernoulliNet(gates=gates, batch=8, seed=seed, gradient=gradient)
        return model, model, [model.gate_weights]

    control = nn.Sequential(nn.Linear(gates, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    rules: dict[str, Rule | tuple[Any, Rule | None]] = {
        "score function": ScoreFunction(),
        "score function, mean": ScoreFunction(baseline="mean"),
        "score function, minimum variance": ScoreFunction(baseline="minimum_variance"),
        "score function, leave one out of 4": ScoreFunction(baseline="leave_one_out", samples=4),
        "ARM": ARM(),
        "DisARM": DisARM(),
        "REBAR": REBAR(),
        "RELAX": RELAX(control),
        "straight-through": (net(StraightThrough()), None),
        "straight-through, sigmoid slope": (net(StraightThrough(slope="sigmoid")), None),
        "straight-through Gumbel": (net(Concrete(temperature=0.5, hard=True)), None),
        "Concrete": (net(Concrete(temperature=0.5, hard=False)), None),
    }
    with torch.random.fork_rng(devices=[]):
        report = estimator_report(net(), rules, samples=samples)
    return [
        {
            "estimator": row.name,
            "bias": row.fidelity.bias,
            "bias_se": row.fidelity.bias_se,
            "squared_bias": row.fidelity.squared_bias,
            "variance": row.fidelity.variance,
            "cosine": row.fidelity.cosine,
            "evaluations": row.evaluations,
        }
        for row in report.rows
    ]
