"""The recipe of paper 15 runs from end to end, and the panels of orders and objective do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thalweg as tw
from thalweg.errors import ArgumentError
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.noise import Key
from thalweg.recipes import find
from thalweg.recipes.p15_zeroth_order import objective, orders
from thalweg.recipes.p15_zeroth_order.controls import Directionless
from thalweg.recipes.p15_zeroth_order.recipe import Config

RECIPE = find()[15]
ROWS = orders.orders()
BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "15"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


def test_smoke_decides_nothing_that_takes_training(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    assert len(claims["claims"]) >= 20


def test_smoke_draws_the_figures_of_the_panels(finished: Path) -> None:
    names = {path.stem for path in (finished / "figures").iterdir()}
    assert {"orders", "orders_learning", "preparation", "neuro", "objective"} <= names


def _accuracies(**changed: float) -> dict[str, list[dict[str, Any]]]:
    good = {
        "backprop": 98.0,
        "node perturbation": 97.0,
        "activity perturbation": 97.0,
        "SPSA": 93.0,
        "forward gradient": 92.0,
    }
    rows = (
        {row.name: 94.0 for row in ROWS} | good | {name.replace("_", " "): v for name, v in changed.items()}
    )
    return {name: [{"accuracy": value}] for name, value in rows.items()}


def test_the_lines_that_must_hold_are_asserted_and_hold_where_they_should() -> None:
    asserted = [claim for claim in orders.claims(_accuracies(), decisive=True) if claim.asserted]
    assert len(asserted) == 6
    assert all(claim.holds for claim in asserted)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"backprop": 96.9}, "backprop is at least"),
        ({"node_perturbation": 94.9, "SPSA": 92.0}, "at least 95 %"),
        ({"SPSA": 95.0, "forward_gradient": 95.0, "node_perturbation": 97.5}, "below 95 %"),
        ({"SPSA": 94.9, "node_perturbation": 96.8, "forward_gradient": 94.0}, "2 points ahead"),
        ({"forward_gradient": 90.9}, "forward gradient"),
        ({"activity_perturbation": 96.4}, "within 1.5 points"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_line_fails_just_beyond_its_threshold(changed: dict[str, float], failing: str) -> None:
    claims = orders.claims(_accuracies(**changed), decisive=True)
    failed = [claim.statement for claim in claims if claim.failed]
    assert len(failed) == 1
    assert failing in failed[0]


@pytest.mark.parametrize(("after", "wrong", "failed"), [(92.0, 0.01, 0), (91.9, 0.01, 2), (92.0, 0.05, 2)])
def test_the_objective_may_lose_nothing_and_must_gain(after: float, wrong: float, failed: int) -> None:
    good = {"before": {"test": 92.0, "zero_one": 0.05}, "after": {"test": 93.0, "zero_one": 0.01}}
    edge = {"before": good["before"], "after": {"test": after, "zero_one": wrong}}
    found = {row.name: [good, edge] for row in objective.objectives()}
    claims = objective.claims(found, decisive=True)
    assert sum(claim.asserted for claim in claims) == 4
    assert sum(claim.failed for claim in claims) == failed


def test_the_network_is_the_panel_s() -> None:
    model = orders.network(seed=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == orders.SIZE == 4736
    first = next(model.parameters()).detach()
    # He: variance 2 / fan in, known to 5 standard errors of a variance of so many normal numbers
    assert abs(float(first.var()) * 32 - 1) < 5 * (2 / first.numel()) ** 0.5


@pytest.mark.parametrize("inputs", ["raw", "centred", "standardised"])
def test_the_pixels_are_prepared_by_the_training_part(inputs: orders.Inputs) -> None:
    train = orders.prepared(inputs).train_inputs.double()
    if inputs == "raw":
        assert float(train.min()) == 0
        assert float(train.max()) == 1
        return
    assert float(train.mean(dim=0).abs().max()) < 1e-5
    spread = train.std(dim=0)
    if inputs == "standardised":
        assert torch.allclose(spread[spread > 0], torch.ones(()).double(), atol=1e-4)
    else:
        assert float(spread.max()) < 0.5


def test_rows_share_weights_and_batches_but_for_the_rule() -> None:
    """The forward gradient and SPSA, with the same directions, go the same way for a few steps."""
    data = orders.prepared("centred")
    ends = [
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for name in ("SPSA", "forward gradient")
        for model in [orders.train(BY_NAME[name], data, learning_rate=0.003, steps=5, seed=100)]
    ]
    start = torch.cat([p.detach().flatten() for p in orders.network(seed=100).parameters()])
    assert float((ends[0] - ends[1]).norm()) < 0.02 * float((ends[0] - start).norm())


def test_a_run_that_leaves_the_finite_numbers_ends_and_counts() -> None:
    row = BY_NAME["SPSA"]
    found = orders.learn(row, 1e30, steps=20, seed=100)
    assert found["accuracy"] < 50
    assert found["curve"][-1][0] == 20


def test_only_backprop_keeps_bytes_for_backward() -> None:
    kept = {name: orders.step_cost(BY_NAME[name]) for name in ("backprop", "SPSA", "node perturbation")}
    assert kept["backprop"]["saved_bytes"] > 0
    assert kept["SPSA"]["saved_bytes"] == kept["node perturbation"]["saved_bytes"] == 0
    assert [cost["evaluations"] for cost in kept.values()] == [1, 2, 2]


def test_after_reads_the_curve_at_or_before_a_step() -> None:
    run = {"curve": [[0, 10.0], [100, 50.0], [200, 90.0]]}
    assert [orders.after(run, step) for step in (0, 99, 100, 150.5, 1000)] == [10.0, 10.0, 50.0, 50.0, 90.0]


def test_the_control_keeps_the_length_and_forgets_the_direction() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 50), torch.randn(8, 200)

    def losses() -> torch.Tensor:
        return layer(x).square().sum(1)

    exact = tw.Backprop().estimate(losses, tuple(layer.parameters()), Key(1))
    turned = Directionless(tw.Backprop()).estimate(losses, tuple(layer.parameters()), Key(1))
    for one, other in zip(exact.gradients, turned.gradients):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.norm(), other.norm())
    weight, noise = exact.gradients[0], turned.gradients[0]
    assert weight is not None
    assert noise is not None
    cosine = float((weight * noise).sum() / weight.norm() / noise.norm())
    assert abs(cosine) < 5 / weight.numel() ** 0.5


def test_the_share_of_wrong_answers_has_no_gradient() -> None:
    model = orders.network(seed=100)
    losses = objective.zero_one(model, torch.randn(16, 64), torch.randint(10, (16,)))
    assert not losses.requires_grad
    assert set(losses.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("panels", [(), ("orders", "else")], ids=["none", "unknown"])
def test_panels_are_checked(panels: Any) -> None:
    with pytest.raises(ArgumentError, match="panels"):
        Config(panels=panels)


def test_the_default_has_the_spec_s_steps() -> None:
    assert Config().orders_steps == 4000
    assert Config() == RECIPE.config("small")
