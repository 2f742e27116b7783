"""A rule that learns (a baseline, a control variate) is the same after it was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import thalweg as tw
from thalweg.noise import Key

MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "cost": lambda step, rule: tw.cost(step, gradient=rule, repeats=1),
    "fidelity": lambda step, rule: tw.fidelity(step, gradient=rule, reference=tw.Enumeration(), samples=10),
    "price": lambda step, rule: tw.price(step, routes=[rule]),
}


def hard_step() -> tw.Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), tw.BinaryNeuron(gradient=None), nn.Linear(2, 1))
    x = torch.randn(4, 3)
    return tw.Step(model, lambda: model(x).square().sum(dim=1), tuple(model.parameters()))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_a_control_variate_keeps_its_parameters_and_gets_no_gradient(measure: Callable[..., Any]) -> None:
    rule = tw.REBAR()
    before = [p.detach().clone() for p in rule.parameters()]
    assert before
    measure(hard_step(), rule)
    assert all(torch.equal(p, old) for p, old in zip(rule.parameters(), before))
    assert all(p.grad is None for p in rule.parameters())


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_a_moving_baseline_does_not_move(measure: Callable[..., Any]) -> None:
    """After it was measured a rule estimates what its twin estimates that nobody measured."""
    step, used, fresh = hard_step(), *(tw.ScoreFunction(baseline=tw.MinimumVariance()) for _ in range(2))

    def estimate(rule: Any, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        found = rule.estimate(step.closure, step.parameters, Key(seed))
        return [gradient for gradient in found.gradients if gradient is not None]

    estimate(used, 1), estimate(fresh, 1)
    measure(step, used)
    assert all(torch.equal(a, b) for a, b in zip(estimate(used, 2), estimate(fresh, 2), strict=True))


def test_a_rule_that_holds_the_model_is_measured_on_that_model() -> None:
    """Copying the rule must not copy the model it looks at."""
    step = hard_step()
    seen: list[nn.Module] = []

    class Looking:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def estimate(self, closure: Any, parameters: Any, key: Key) -> tw.Estimate:
            seen.append(self.model)
            return tw.Enumeration().estimate(closure, parameters, key)

    tw.cost(step, gradient=Looking(step.model), repeats=0)
    assert seen
    assert all(model is step.model for model in seen)
