"""The recipe of paper 10 runs from end to end, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.data import digits
from thalweg.errors import ArgumentError
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.recipes import find
from thalweg.recipes.p10_bidirectional_learning import exact, verdicts
from thalweg.recipes.p10_bidirectional_learning.recipe import Config, _name
from thalweg.recipes.p10_bidirectional_learning.routes import (
    BACKPROP,
    BOTH,
    CONVOLUTIONS,
    HYBRID,
    LINEAR,
    make,
    phases,
    shaped,
    train,
)

RECIPE = find()[10]
IDENTITIES = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "10"
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
    assert {path.stem for path in (finished / "figures").iterdir()} >= {"robustness", "imagined"}


def test_the_identities_hold_and_see_a_weaker_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(exact.identities(101).values()) < verdicts.ROUNDING
    original = exact.fgsm
    monkeypatch.setattr(exact, "fgsm", lambda *a, **k: original(*a, **{**k, "radius": 0.9 * k["radius"]}))
    assert exact.identities(101)["worst case"] > 1e-3


@pytest.mark.parametrize("route", [*LINEAR, *HYBRID, *CONVOLUTIONS], ids=lambda route: route.name)
def test_every_route_trains_and_leaves_biases_alone(route: Any) -> None:
    data = digits()
    found = train(route, data, width=4, steps=3, batch=20, seed=100, tick=lambda: None)
    out = found.last(shaped(route.net, data.test_inputs[:5]))
    assert out.shape == (5, 10)
    assert torch.isfinite(out).all()
    biases = [p for name, p in found.last.named_parameters() if name.endswith("0.bias")]
    assert biases
    assert all(not bias.any() for bias in biases)


def test_shuffled_classes_reach_the_backward_direction_alone() -> None:
    x = torch.rand(30, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    grads = []
    for shuffled in (False, True):
        learner = make(LINEAR[1], [16], 3, 0, 0, 10)
        found = {}
        for phase in phases(learner, x, y, shuffled, 1):
            learner.zero_grad()
            phase.backward()
            found[phase.name] = learner.net.shared()[0].grad.clone()
        grads.append(found)
    assert torch.equal(grads[0]["forward"], grads[1]["forward"])
    assert not torch.allclose(grads[0]["backward"], grads[1]["backward"])


def test_verdicts_follow_the_numbers() -> None:
    def rows(step: float, margin: float) -> list[dict[str, Any]]:
        attacks = {"fgsm": [step] * 4, "fgsm-margin": [margin] * 4, "pgd": [0.0] * 4, "pgd-margin": [0.0] * 4}
        kept = {
            "attacks": attacks, "clean": 90.0, "noisy": 80.0, "published": step, "signs": ["one"],
            "scaled": {"cross_entropy": 90.0},
        }  # fmt: skip
        return [{"kept": kept}] * 2

    found = verdicts.linear_claims("toy", {BOTH: rows(30.0, 0.0), BACKPROP: rows(5.0, 6.0)}, decisive=True)
    assert [claim.holds for claim in found[:3]] == [True, True, False]
    found = verdicts.linear_claims("toy", {BOTH: rows(29.0, 6.0), BACKPROP: rows(5.0, 0.0)}, decisive=True)
    assert [claim.holds for claim in found[:3]] == [False, False, True]


def test_the_digits_are_the_papers_where_their_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    assert _name(Config()) == "mnist_5k"
    monkeypatch.setenv("THALWEG_DATA", "somewhere")
    assert _name(Config()) == "mnist"


def test_fields_are_checked() -> None:
    with pytest.raises(ArgumentError, match="data"):
        Config(data="cifar")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batch"):
        Config(batch=0)
