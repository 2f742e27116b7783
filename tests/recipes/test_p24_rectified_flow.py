"""The recipe of paper 24 runs from end to end, and its panels do what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import ArgumentError
from thalweg.flows import Euler, Field, Independent, Pair, Straight, sample
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.noise import Key
from thalweg.recipes import find
from thalweg.recipes.p24_rectified_flow import verdicts
from thalweg.recipes.p24_rectified_flow.baselines import BASELINES, baseline
from thalweg.recipes.p24_rectified_flow.digits_panel import DigitNetwork
from thalweg.recipes.p24_rectified_flow.exact import curved_balance, straight_balance
from thalweg.recipes.p24_rectified_flow.judging import judged, tangents
from thalweg.recipes.p24_rectified_flow.nearest import nearest_flows
from thalweg.recipes.p24_rectified_flow.recipe import Config
from thalweg.recipes.p24_rectified_flow.stages import stages
from thalweg.recipes.p24_rectified_flow.toy import (
    TOY,
    Training,
    fresh_points,
    new_field,
    stratified_pairs,
    training_points,
)
from thalweg.recipes.p24_rectified_flow.training import copy_of, fit

RECIPE = find()[24]
TINY = Training(pairs=64, width=8, updates=4, batch=16, simulation=5, distillation=3, judged=40)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "24"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


def test_smoke_asserts_what_is_exact_and_shows_the_rest(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    asserted = [claim["statement"] for claim in claims["claims"] if claim["asserted"]]
    assert len(asserted) == 2
    assert all("mean |y|" in statement for statement in asserted)
    assert len(claims["claims"]) >= 20


def test_smoke_draws_every_figure(finished: Path) -> None:
    names = {path.stem for path in (finished / "figures").iterdir()}
    assert names == {"balance", "straightening", "few_steps", "tangents", "digits"}


def test_stratified_pairs_have_the_mixtures_means_to_round_off() -> None:
    pairs = stratified_pairs(64, seed=100)
    torch.testing.assert_close(pairs.data.mean(0), torch.tensor([15.0, 0.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.source.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-12)
    # ends are independent: each side of the source meets both sides of the data, equally often
    sides = torch.stack([pairs.source[:, 1] > 0, pairs.data[:, 1] > 0], 1).unique(dim=0, return_counts=True)
    assert sides[1].tolist() == [16] * 4
    assert not torch.equal(pairs.data, stratified_pairs(64, seed=101).data)


def test_the_balance_is_one_of_straight_lines() -> None:
    straight, curved = straight_balance(256, 100, seed=100), curved_balance(256, 100, seed=100)
    assert straight["gap"] < 0.05 < 0.2 < curved["gap"]
    assert all(straight["after"][cost] < straight["before"][cost] for cost in straight["before"])
    assert straight["single_height"] < 1e-6
    assert straight["height"] == pytest.approx(7.5, abs=0.05)


def test_stored_pairs_become_straight_without_training() -> None:
    first, second = nearest_flows(200, 1, seed=100)
    assert second["straightness"] < 0.1 * first["straightness"]
    # forty points are about 0.7 away by chance
    assert second["once"] < 0.5 * first["once"]
    assert verdicts.nearest([[first, second]]).measured == second["straightness"] / first["straightness"]


def test_what_judges_a_flow_is_not_what_it_learnt_from() -> None:
    points, (fresh, again) = training_points(50, seed=100), fresh_points(50, seed=100)
    assert isinstance(points.data, Tensor)
    for first, second in ((points.data, fresh.data), (points.data, again), (fresh.data, again)):
        assert not set(first[:, 0].tolist()) & set(second[:, 0].tolist())
    assert not torch.equal(fresh.data, fresh_points(50, seed=101)[0].data)


def test_a_perfect_flow_is_judged_perfect() -> None:
    """Every point moves by (15, 0): straight, and one step is as good as a hundred."""
    field = Field(lambda x, t: x.new_tensor([-15.0, 0.0]).expand_as(x), Straight(), coupled=True)
    fresh, _ = fresh_points(300, seed=100)
    found = judged(field, fresh, 20)
    assert found["straightness"] < 1e-8
    assert found["cost"] == pytest.approx(225.0, rel=1e-5)
    assert found["excess"] < 1e-3
    values = list(found["distances"].values())
    assert max(values) - min(values) < 1e-5
    assert len(found["paths"]) == len(found["single"])
    assert torch.tensor(tangents(field, fresh, 10)).std(1).max() < 1e-3


def test_the_exact_first_flow_is_judged_far_from_the_data_in_one_step_only() -> None:
    fresh, _ = fresh_points(200, seed=100)
    found = judged(TOY.field(Straight()), fresh, 200)
    assert found["straightness"] > 50
    assert found["distances"]["1"] > 10 * found["distances"]["100"]


def test_standardised_networks_work_in_units_of_the_points() -> None:
    points = training_points(200, seed=100)
    torch.manual_seed(0)
    field = new_field(TINY, Straight(), points)
    scaled = Independent(10 * points.data + 3, 10 * points.source + 3)
    torch.manual_seed(0)
    other = new_field(TINY, Straight(), scaled)
    x = torch.randn(5, 2)
    torch.testing.assert_close(other(10 * x + 3, 0.3), 10 * field(x, 0.3), rtol=1e-4, atol=1e-4)
    seen = torch.cat([points.data, points.source])
    assert torch.equal(field.network.centre, torch.cat([seen.mean(0), torch.tensor([0.5])]))
    torch.manual_seed(0)
    raw = new_field(Training(width=8, standardised=False), Straight(), points)
    assert torch.equal(raw(x, 0.3), raw.network.inner(torch.cat([x, torch.full((5, 1), 0.3)], 1)))


class Counting:
    """A coupling that remembers how often it was drawn from, and under which keys."""

    def __init__(self) -> None:
        self.inner = training_points(32, seed=100)
        self.keys: list[Key] = []

    def draw(self, count: int, key: Key) -> Pair:
        self.keys.append(key)
        return self.inner.draw(count, key)


def test_training_draws_a_new_batch_for_each_update_and_lowers_the_loss() -> None:
    pairs = Counting()
    torch.manual_seed(0)
    field = new_field(TINY, Straight(), pairs.inner)
    kept = copy_of(field)
    first = fit(copy_of(field), pairs, updates=1, batch=32, learning_rate=1e-3, seed=100)[1]
    pairs.keys.clear()
    fitted, last = fit(field, pairs, updates=60, batch=32, learning_rate=1e-2, seed=100)
    assert fitted is field
    assert len(set(pairs.keys)) == 60
    assert last < 0.8 * first
    before, after = kept.network.state_dict(), field.network.state_dict()
    assert not torch.equal(before["inner.0.weight"], after["inner.0.weight"])


@pytest.mark.parametrize("name", list(BASELINES))
def test_each_baseline_is_trained_and_judged_like_the_flows(name: str) -> None:
    torch.manual_seed(0)
    found = baseline(name, TINY, seed=100)
    assert found["distances"].keys() == {"1", "2", "4", "8", "100"}
    assert all(value > 0 for value in found["distances"].values())
    assert found["loss"] > 0


def test_stages_hand_on_their_pairs_and_compare_with_shuffled_ones() -> None:
    torch.manual_seed(0)
    found = stages(TINY, 2, seed=100)
    assert [len(found[name]) for name in ("flows", "distilled")] == [3, 3]
    starts = [torch.tensor(flow["pairs"])[:, 0] for flow in found["flows"][1:]]
    # flows 2 and 3 learn from one and the same source, and from other ends
    assert torch.equal(*starts)
    ends = [torch.tensor(flow["pairs"])[:, 1] for flow in found["flows"][1:]]
    assert not torch.equal(*ends)
    assert found["shuffled"]["loss"] > found["flows"][2]["loss"]


def test_the_digits_network_is_told_label_and_time() -> None:
    torch.manual_seed(0)
    network = DigitNetwork(16, 1)
    x, t, label = torch.randn(3, 64), torch.full((3,), 0.5), torch.tensor([0, 1, 2])
    found = network(x, t, label)
    assert found.shape == (3, 64)
    assert not torch.equal(found, network(x, t, label.flip(0)))
    assert not torch.equal(found, network(x, t / 2, label))
    made = sample(Field(network, Straight()), x, [1.0, 0.5, 0.0], solver=Euler(), conditions={"label": label})
    assert made.shape == x.shape


def _flow(straightness: float, cost: float, once: float, often: float) -> dict[str, Any]:
    between = (once + often) / 2
    distances = {"1": once, "2": between, "4": between, "8": between, "100": often}
    return {"straightness": straightness, "cost": cost, "distances": distances}


def _good() -> tuple[list[Any], dict[str, list[Any]]]:
    flows = [_flow(80, 226, 4.0, 0.2), _flow(0.5, 225, 0.2, 0.2), _flow(0.5, 225, 0.2, 0.2)]
    found = {"flows": flows, "shuffled": flows[0], "floor": 0.001, "distilled": [{"1": 0.2}] * 3}
    return [found, copy.deepcopy(found)], {name: [_flow(80, 230, 4.0, 0.3)] * 2 for name in BASELINES}


def test_the_lines_that_must_hold_are_asserted_and_hold_where_they_should() -> None:
    claims = verdicts.trained(*_good(), decisive=True)
    asserted = [claim for claim in claims if claim.asserted]
    assert len(asserted) == 5 + 2
    assert all(claim.holds for claim in asserted)
    assert not any(claim.asserted for claim in verdicts.trained(*_good(), decisive=False))


@pytest.mark.parametrize(
    ("flow", "name", "value", "failing"),
    [
        (0, "straightness", 4.99, "S of flow 2"),
        (2, "straightness", 0.76, "S of flow 3"),
        (0, "1", 1.99, "0.1 of flow 1's"),
        (1, "100", 0.15, "1.3 times that of 100"),
        (1, "cost", 230.6, "cost by more than 2 %"),
        (2, "cost", 229.6, "cost by more than 2 %"),
    ],
    ids=["S2", "S3", "one-step", "steps", "cost", "cost of the last"],
)
def test_each_line_fails_just_beyond_its_threshold_in_any_one_seed(
    flow: int, name: str, value: float, failing: str
) -> None:
    found, baselines = _good()
    target = found[1]["flows"][flow]
    (target["distances"] if name in target["distances"] else target)[name] = value
    failed = [claim.statement for claim in verdicts.trained(found, baselines, decisive=True) if claim.failed]
    assert len(failed) == 1
    assert failing in failed[0]


def test_the_many_step_line_is_judged_and_never_asserted() -> None:
    found, baselines = _good()
    found[1]["flows"][0]["distances"]["100"] = 0.26
    claims = verdicts.trained(found, baselines, decisive=True)
    (line,) = [claim for claim in claims if claim.statement.startswith("100 steps")]
    assert (line.holds, line.asserted) == (False, False)
    assert line.measured == pytest.approx(0.2 / 0.26)


@pytest.mark.parametrize("path", verdicts.WORSE)
@pytest.mark.parametrize("steps", verdicts.FEW)
def test_another_path_may_not_come_as_near_as_flow_2_in_one_step(path: str, steps: str) -> None:
    found, baselines = _good()
    near = _flow(80, 230, 4.0, 0.3)
    near["distances"][steps] = 0.2
    baselines[path] = [baselines[path][0], near]
    failed = [claim.statement for claim in verdicts.trained(found, baselines, decisive=True) if claim.failed]
    assert [statement.split(":")[0] for statement in failed] == [path]


@pytest.mark.parametrize(
    ("name", "value", "failed"),
    [
        ("gap", 0.011, 1),
        ("gap", 0.009, 0),
        ("height", 7.475, 1),
        ("height", 7.525, 1),
        ("height", 7.485, 0),
        ("single_height", 1e-5, 1),
    ],
)
def test_the_exact_lines_fail_just_beyond_their_thresholds(name: str, value: float, failed: int) -> None:
    good = {"gap": 0.001, "height": 7.5, "single_height": 0.0}
    claims = verdicts.exact([good, good | {name: value}], [good | {"gap": 0.5}], decisive=True)
    assert sum(claim.asserted for claim in claims) == 3
    assert sum(claim.failed for claim in claims) == failed


def test_presets_and_bad_fields() -> None:
    assert RECIPE.presets == ("smoke", "small", "gpu")
    assert Config() == RECIPE.config("small")
    toy = RECIPE.config("small").training
    assert (toy.pairs, toy.width, toy.layers, toy.updates, toy.batch) == (20_000, 64, 2, 2500, 512)
    images = RECIPE.config("gpu").digits_training
    assert (images.updates, images.batch) == (60_000, 1024)
    network = DigitNetwork(images.width, images.blocks)
    assert 0.9e6 < sum(parameter.numel() for parameter in network.parameters()) < 1.2e6
    for field in ({"panels": ()}, {"updates": 0}, {"exact_pairs": 100}, {"digit_rate": 0.0}):
        with pytest.raises(ArgumentError) as refusal:
            Config(**field)
        assert refusal.value.argument == next(iter(field))
