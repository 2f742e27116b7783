"""The recipe of paper 12 runs from end to end, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.data import digits
from thalweg.errors import ArgumentError
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.local import NoiseLevels
from thalweg.noise import Key
from thalweg.recipes import find
from thalweg.recipes.p12_noprop import exact, verdicts
from thalweg.recipes.p12_noprop.recipe import Config, _name, _squares
from thalweg.recipes.p12_noprop.routes import (
    DIGIT_ROUTES,
    DISCRETE,
    IMAGE_ROUTES,
    STACK,
    Shape,
    answers,
    kept,
    make,
    step,
)

RECIPE = find()[12]
IDENTITIES = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "12"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


def test_smoke_asserts_what_is_exact_and_shows_the_rest(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    assert sum(claim["asserted"] for claim in claims["claims"]) == IDENTITIES
    assert len(claims["claims"]) > IDENTITIES + 15


def test_smoke_draws_every_figure(finished: Path) -> None:
    assert {path.stem for path in (finished / "figures").iterdir()} >= {"accuracy", "memory"}


def test_the_identities_hold_and_see_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(exact.identities(101).values()) < verdicts.ROUNDING
    original = NoiseLevels.transition
    monkeypatch.setattr(NoiseLevels, "transition", lambda self, index: original(self, max(0, index - 1)))
    found = exact.identities(101)
    assert found["levels"] > 1e-3
    assert found["oracle"] > 1e-3


@pytest.mark.parametrize("route", DIGIT_ROUTES, ids=lambda route: route.name)
def test_every_route_learns_and_answers(route: Any) -> None:
    data = digits()
    if route.labels == "prototype":
        data = _squares(data)
    model = make(route, data, Shape(2, 4, (2, 2, 4)), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(route, model, optimizer, data.train_inputs[:20], data.train_labels[:20], Key(100))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    found = answers(model.eval(), data, 100, 3)
    assert 0 <= found["accuracy"] <= 100
    assert (found["first"] is None) == (route.kind != "discrete")


def test_what_a_step_keeps_is_one_blocks() -> None:
    data = _squares(digits())
    discrete, stack = IMAGE_ROUTES[:2]
    few, many = (Shape(blocks, 8, (2, 2, 4)) for blocks in (2, 6))
    assert kept(discrete, data, few, 64, 100) == kept(discrete, data, many, 64, 100)
    assert kept(stack, data, many, 64, 100) > 2.5 * kept(stack, data, few, 64, 100)


def test_verdicts_follow_the_numbers() -> None:
    def rows(accuracy: float) -> list[dict[str, Any]]:
        return [{"accuracy": accuracy, "quiet": accuracy, "first": accuracy, "steps": 1}] * 2

    results = {route.name: rows(96.0) for route in DIGIT_ROUTES}
    found = verdicts.digits_claims(results, decisive=True)
    assert [claim.holds for claim in found[:5]] == [True, True, True, False, True]
    images = {route.name: rows(90.0) for route in IMAGE_ROUTES}
    assert [claim.holds for claim in verdicts.image_claims("toy", images, decisive=True)[:2]] == [True, False]
    memory = verdicts.memory_claims([2, 4], {DISCRETE: [10, 10], STACK: [20, 29]}, decisive=True)
    assert memory[0].holds is False


def test_the_images_are_the_papers_where_their_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    assert _name(Config()) == "mnist_5k"
    monkeypatch.setenv("THALWEG_DATA", "somewhere")
    assert _name(Config()) == "mnist"


def test_fields_are_checked() -> None:
    with pytest.raises(ArgumentError, match="image_data"):
        Config(image_data="svhn")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batch"):
        Config(batch=0)
    with pytest.raises(ArgumentError, match="depths"):
        Config(depths=())
