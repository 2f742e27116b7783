"""A budget stops whatever asks for evaluations, and leaves nothing half done."""

import pytest
import torch
from torch import nn

from thalweg.blackbox import (
    PGPE,
    SPSA,
    Budget,
    BudgetSpent,
    EvolutionStrategies,
    ForwardGradient,
    MeZO,
    OnePoint,
    Streamed,
)
from thalweg.step import Backprop, backward

RULES = [
    Backprop(),
    SPSA(2),
    SPSA(2, restore="swap"),
    ForwardGradient(2),
    EvolutionStrategies(2),
    OnePoint(),
    PGPE(2),
    Streamed(SPSA(2, restore="swap")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_any_rule_stops_at_the_budget_and_changes_nothing(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    x, calls = torch.randn(5, 3), []
    with Budget(evaluations=7) as budget:
        closure = budget.counted(lambda: calls.append(1) or net(x).pow(2).mean())
        while True:
            net.zero_grad()
            state = {name: value.clone() for name, value in net.state_dict().items()}
            backward(closure, net.parameters(), gradient=rule)
    assert len(calls) == budget.spent == 7
    assert budget.left == 0
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_it_stops_an_optimizer_and_says_so_without_a_with():
    weight = torch.ones(3, requires_grad=True)
    optimizer = MeZO([weight], lr=0.01, gradient=SPSA())
    closure = Budget(5).counted(lambda: (weight**2).sum())
    for _ in range(2):
        optimizer.step(closure)
    before = weight.detach().clone()
    with pytest.raises(BudgetSpent, match="all 5 evaluations are spent"):
        optimizer.step(closure)
    assert torch.equal(weight.detach(), before)
    assert len(optimizer.log) == 2


def test_a_with_block_ends_quietly_for_its_own_signal_only():
    with Budget(1) as inner:
        pass
    assert inner.left == 1
    with pytest.raises(KeyError), Budget(1):
        raise KeyError
    spent = Budget(1).counted(lambda: 0)
    spent()
    with pytest.raises(BudgetSpent), Budget(3):
        spent()


@pytest.mark.parametrize("evaluations", [0, -1, 1.5, True])
def test_bad_budgets_are_refused(evaluations):
    with pytest.raises((ValueError, TypeError), match=r"^evaluations: expected"):
        Budget(evaluations)


def test_what_is_no_closure_is_refused():
    with pytest.raises(TypeError, match=r"^closure: expected"):
        Budget(1).counted(3)
