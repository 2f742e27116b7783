"""`thalweg.compare` on a step of one's own."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg as tw
from thalweg.errors import ArgumentError, ArgumentTypeError


def smooth_step(batch: int = 16) -> tuple[nn.Module, Any, list[nn.Parameter]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    x, y = torch.randn(batch, 6), torch.randint(3, (batch,))
    return model, lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters())


def unit_step() -> tuple[nn.Module, Any, list[nn.Parameter]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), tw.BinaryNeuron(gradient=None), nn.Linear(4, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    losses = lambda: nn.functional.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    return model, losses, list(model.parameters())


class SignRule:
    """Somebody's own rule: one method is enough."""

    needs = "backward"

    def estimate(self, closure: Any, parameters: Any, key: tw.Key) -> tw.Estimate:
        exact = tw.Backprop().estimate(closure, parameters, key)
        return tw.Estimate(exact.loss, tuple(g.sign() for g in exact.gradients if g is not None), 1)


class LocalPhase:
    """One layer and a loss of its own."""

    def __init__(self, name: str, layer: nn.Linear, inputs: Tensor, target: Tensor) -> None:
        self.name, self.layer, self.inputs, self.target = name, layer, inputs, target
        self.parameters = tuple(layer.parameters())

    def backward(self) -> Tensor:
        loss = (self.layer(self.inputs) - self.target).square().mean()
        loss.backward()
        return loss.detach()


class LocalLearner(nn.Module):
    """A learner: two layers, each with its own loss, no gradient between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def phases(self, batch: tuple[Tensor, Tensor]) -> Iterator[LocalPhase]:
        inputs, target = batch
        yield LocalPhase("first", self.first, inputs, inputs.repeat(1, 2)[:, :5])
        yield LocalPhase("second", self.second, self.first(inputs).detach(), target)

    def predict(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def test_backprop_is_exact_and_the_others_are_measured() -> None:
    model, closure, parameters = smooth_step()
    model.eval()
    table = tw.compare(None, (model, closure, parameters), limit=64)
    rows = {row.route: row for row in table.rows}
    assert rows["backprop"].cosine == pytest.approx(1.0, abs=1e-12)
    assert rows["backprop"].bias == 0.0
    assert rows["spsa"].saved_bytes == 0
    assert rows["spsa"].evaluations == 2
    assert rows["evolution-strategies"].evaluations == 16
    assert rows["backprop"].saved_bytes > 0
    assert set(rows["spsa"].cosine_by_layer) == {"0", "1", "4"}
    assert "backprop keeps" in table.verdict


def test_nothing_of_the_users_is_changed() -> None:
    model, closure, parameters = smooth_step()
    closure().backward()
    gradients = [p.grad for p in parameters]
    values = [g.clone() for g in gradients]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    tw.compare(None, (model, closure, parameters), limit=8)
    assert all(p.grad is g for p, g in zip(parameters, gradients))
    assert all(torch.equal(g, v) for g, v in zip(gradients, values))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_a_rule_of_ones_own_is_a_row_like_any_other() -> None:
    row = tw.compare({"sign": SignRule()}, smooth_step).rows[0]
    assert 0 < row.cosine < 1
    assert row.needs == "backward"


def test_a_route_may_be_a_step_of_its_own() -> None:
    """Another policy of a process, here checkpointing, over the same parameters."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Tanh())])
    x = torch.randn(64, 16)
    parameters = list(model.parameters())
    plain = (model, lambda: model(x).square().mean(), parameters)
    kept = (model, lambda: checkpoint(model, x, use_reentrant=False).square().mean(), parameters)
    rows = tw.compare({"plain": tw.Backprop(), "checkpointed": kept}, plain).rows
    assert rows[1].bias == pytest.approx(0, abs=1e-6)
    assert rows[1].saved_bytes < rows[0].saved_bytes / 4
    assert rows[1].operations > rows[0].operations


def test_a_learner_has_a_cost_and_says_why_it_has_no_cosine() -> None:
    torch.manual_seed(0)
    learner, batch = LocalLearner(), (torch.randn(8, 4), torch.randn(8, 2))
    assert isinstance(learner, tw.Learner)
    parameters = list(learner.parameters())

    def phases() -> Iterable[tw.Phase]:
        return learner.phases(batch)

    backprop = (learner, lambda: (learner.predict(batch[0]) - batch[1]).square().mean(), parameters)
    rows = tw.compare({"backprop": tw.Backprop(), "local": (learner, phases, parameters)}, backprop).rows
    assert rows[1].operations > 0
    assert rows[1].saved_bytes > 0
    assert rows[1].cosine is not None or rows[1].note


def test_units_that_wait_for_a_rule_get_score_functions_against_the_enumerated_gradient() -> None:
    table = tw.compare(None, unit_step, limit=200)
    assert {row.route for row in table.rows} == {"score-function", "score-function-mean"}
    for row in table.rows:
        assert row.reference == "Enumeration"
        assert abs(row.bias) <= 5 * row.bias_se


def test_a_route_that_refuses_the_step_says_so_in_its_row() -> None:
    rows = tw.compare({"backprop": tw.Backprop(), "score": tw.ScoreFunction()}, unit_step).rows
    assert rows[0].note.startswith("refused:")
    assert "BinaryNeuron" in rows[0].note
    assert rows[1].note == ""


@pytest.mark.parametrize(
    ("routes", "step", "error", "word"),
    [
        ({}, smooth_step, ArgumentTypeError, "routes"),
        ([tw.SPSA()], smooth_step, ArgumentTypeError, "routes"),
        ({"spsa": tw.SPSA}, smooth_step, ArgumentTypeError, "Make one: SPSA()"),
        ({"spsa": "spsa"}, smooth_step, ArgumentTypeError, "routes['spsa']"),
        (None, 3, ArgumentTypeError, "step"),
        (None, (nn.Linear(1, 1), lambda: 0), (ArgumentError, ArgumentTypeError), "step"),
    ],
)
def test_wrong_arguments_are_named(routes: Any, step: Any, error: Any, word: str) -> None:
    with pytest.raises(error) as caught:
        tw.compare(routes, step)
    assert word in str(caught.value)


def test_a_route_that_fails_has_a_row_that_says_why_and_the_others_go_on():
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.linspace(0, 1, 8)[:, None]

    def residual():
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return (slope + 1).square().mean()

    def enabled():
        with torch.enable_grad():
            return residual()

    routes = {"backprop": tw.Backprop(), "spsa": tw.SPSA()}
    parameters = list(model.parameters())
    exact, blind = tw.compare(routes, (model, residual, parameters), limit=40).rows
    assert (exact.cosine, exact.note) == (1.0, "")
    assert blind.cosine is None
    assert "torch.enable_grad() in the closure" in blind.note
    exact, sighted = tw.compare(routes, (model, enabled, parameters), limit=40).rows
    assert sighted.note == ""
    assert 0 < sighted.cosine < 1


def test_a_step_that_no_route_can_run_raises_its_own_error():
    model = nn.Linear(4, 1)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tw.compare(None, (model, lambda: model(torch.ones(2, 5)).sum(), list(model.parameters())))


def test_a_step_of_its_own_is_held_against_the_gradient_of_the_first_step():
    model = nn.Linear(4, 1)
    x, parameters = torch.randn(8, 4), list(model.parameters())

    def half():
        return 0.5 * model(x).square().mean()

    (row,) = tw.compare({"half": (model, half, parameters)}, (model, lambda: 2 * half(), parameters)).rows
    assert (row.cosine, row.norm_ratio, row.bias) == pytest.approx((1.0, 0.5, -0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [("standard_error", 0), ("seconds", -1.0), ("limit", 1), ("seed", -1), ("standard_error", float("nan"))],
)
def test_wrong_numbers_are_named_before_anything_runs(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=name):
        tw.compare(None, smooth_step, **{name: value})


def test_a_slow_step_is_drawn_less_often() -> None:
    """The time a route may take bounds its draws, and the row says how many they were."""
    rows = tw.compare({"spsa": tw.SPSA()}, smooth_step, seconds=1e-6).rows
    assert rows[0].draws == 8
