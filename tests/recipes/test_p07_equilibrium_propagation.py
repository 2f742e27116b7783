"""The recipe of paper 07 runs from end to end, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.data import Classification, digits
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.recipes import find
from thalweg.recipes.p07_equilibrium_propagation import digits_panel, images_panel, verdicts
from thalweg.recipes.p07_equilibrium_propagation.digits_panel import gradient, spoiled
from thalweg.recipes.p07_equilibrium_propagation.exact import identities
from thalweg.recipes.p07_equilibrium_propagation.mnist_panel import MNIST_ROUTES, train_mnist
from thalweg.recipes.p07_equilibrium_propagation.recipe import Config, _mnist_name
from thalweg.recipes.p07_equilibrium_propagation.routes import CENTERED, THROUGH_TIME, Route, make, routes
from thalweg.recipes.p07_equilibrium_propagation.tables import digits_row

RECIPE = find()[7]
IDENTITIES = 3 + 3 + 2 + 3 + 2
"""Bias of three forms, of three numbers of points, geometric fall and radius, stepwise, product."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "07"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


@pytest.fixture(scope="module")
def few() -> Classification:
    data = digits()
    return Classification(
        data.train_inputs[:100],
        data.train_labels[:100],
        data.test_inputs[:50],
        data.test_labels[:50],
        10,
        "few",
    )


def test_smoke_asserts_what_is_exact_and_shows_the_rest(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    asserted = [claim for claim in claims["claims"] if claim["asserted"]]
    assert len(asserted) == IDENTITIES
    assert all(claim["holds"] for claim in asserted)
    assert len(claims["claims"]) > len(asserted) + 6


def test_smoke_draws_every_figure(finished: Path) -> None:
    names = {path.stem for path in (finished / "figures").iterdir()}
    assert names == {"bias", "digits", "gradients", "mnist"}


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    return identities(101, 60)


def test_the_identities_hold_on_another_network(toy: dict[str, Any]) -> None:
    claims = verdicts.identity_claims([toy])
    assert [claim.statement for claim in claims if claim.failed] == []


def test_a_wrong_gradient_would_fail_the_identities(toy: dict[str, Any]) -> None:
    """Each line of acceptance refuses numbers outside of it."""
    broken = {
        **toy,
        "slopes": {"positive": 0.0, "negative": 0.85, "centered": 1.0},
        "orders": {"2": 1.0, "3": 2.0, "4": 2.0},
        "geometric": 0.0,
        "outside": [0.05, 1.0, 1.0],
        "unfolded": [0.05, 5e-4, 5e-6],
        "vjp_slopes": {"weights": 1.0, "input": 1.0},
    }
    claims = verdicts.identity_claims([toy, broken])
    assert sum(claim.failed for claim in claims) == IDENTITIES


def _digit_rows(centered: float, through_time: float) -> list[dict[str, Any]]:
    accuracies = {CENTERED: centered, THROUGH_TIME: through_time}
    result = {"last_accuracy": 0.0, "loss": [0.1], "operations": 1, "kept": 1, "epochs": 1, "steps": 1}
    return [
        digits_row(kind, [{**result, "accuracy": accuracies.get(kind.name, 90.0) + d} for d in (-1, 0, 1)])
        for kind in routes()
    ]


@pytest.mark.parametrize(
    ("one", "other", "holds"), [(97, 98, True), (98.4, 97, True), (96, 98, False), (99, 97, False)]
)
def test_digits_accept_a_gap_of_at_most_one_and_a_half_points(one: float, other: float, holds: bool) -> None:
    asserted = [c for c in verdicts.digits_claims(_digit_rows(one, other), decisive=True) if c.asserted]
    assert [claim.holds for claim in asserted] == [holds]


def _mnist_results(test: float, train: float) -> dict[str, list[dict[str, Any]]]:
    # what comes after the fifth epoch must not count
    errors = {"test_error": [9.0] * 4 + [test, 0.0], "train_error": [9.0] * 4 + [train, 0.0]}
    return {route.name: [errors] for route in MNIST_ROUTES}


@pytest.mark.parametrize(
    ("test", "train", "failing"), [(3.5, 1.49, 0), (3.51, 1.4, 1), (3.0, 1.5, 1), (4.0, 2.0, 2)]
)
def test_mnist_accepts_the_errors_after_five_epochs(test: float, train: float, failing: int) -> None:
    claims = verdicts.mnist_claims(_mnist_results(test, train), "mnist", 6, 500, decisive=True)
    assert sum(claim.asserted for claim in claims) == 2
    assert sum(claim.failed for claim in claims) == failing


@pytest.mark.parametrize(
    ("data", "epochs", "hidden"), [("mnist_5k", 5, 500), ("mnist", 4, 500), ("mnist", 5, 100)]
)
def test_less_than_the_papers_experiment_decides_nothing(data: str, epochs: int, hidden: int) -> None:
    claims = verdicts.mnist_claims(_mnist_results(9.0, 9.0), data, epochs, hidden, decisive=True)
    assert not any(claim.asserted or claim.holds is not None for claim in claims)


@pytest.mark.parametrize(
    ("centred", "positive", "truncated", "failing"),
    [(30, 40, 28, 0), (32, 40, 28, 1), (30, 29, 28, 1), (40, 30, 28, 2)],
)
def test_images_accept_what_must_hold(
    centred: float, positive: float, truncated: float, failing: int
) -> None:
    errors = zip(images_panel.IMAGE_ROUTES, (centred, positive, truncated), strict=True)
    results = {name: {"test_error": [error]} for name, error in errors}
    claims = verdicts.image_claims(results, decisive=True)
    assert all(claim.asserted for claim in claims)
    assert sum(claim.failed for claim in claims) == failing


@pytest.mark.parametrize("route", routes(), ids=lambda route: route.name)
def test_every_route_starts_alike_and_moves_what_it_says(route: Route, few: Classification) -> None:
    first, again = (make(route, 64, 12, 10, seed=3) for _ in range(2))
    plain = make(Route("", None, clipped=route.clipped), 64, 12, 10, seed=3)
    if not route.clipped:
        for one, other in zip(first.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(one, other)
    assert all(map(torch.equal, first.model.state_dict().values(), again.model.state_dict().values()))
    gradient(first, few.train_inputs, few.train_labels)
    moved = [p.grad is not None and bool(p.grad.any()) for p in first.model.parameters()]
    frozen = {"": [], "hidden": [0, 1], "output": [2, 3]}[route.frozen]
    # one recorded step reaches the output link alone
    still = [0, 1] if route.name == "backprop through one step" else frozen
    assert moved == [index not in still for index in range(4)]


def test_shuffled_labels_are_the_same_labels_elsewhere(few: Classification) -> None:
    changed = spoiled(few, "labels", seed=5)
    assert not torch.equal(changed.train_labels, few.train_labels)
    assert torch.equal(changed.train_labels.bincount(), few.train_labels.bincount())
    assert torch.equal(changed.test_labels, few.test_labels)
    assert torch.equal(changed.train_inputs, few.train_inputs)


def test_shuffled_pixels_keep_each_images_values_and_nothing_else(few: Classification) -> None:
    changed = spoiled(few, "pixels", seed=5)
    for part in ("train_inputs", "test_inputs"):
        before, after = getattr(few, part), getattr(changed, part)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert not torch.equal(before, after)
    assert torch.equal(changed.train_labels, few.train_labels)


def test_equal_operations_means_equal_operations(few: Classification) -> None:
    options: dict[str, Any] = {"hidden": 12, "epochs": 3, "batch": 50, "seed": 4, "tick": lambda: None}
    by_name = {route.name: route for route in routes()}
    centered = digits_panel.train(by_name[CENTERED], few, **options)
    longer = digits_panel.train(by_name[verdicts.TWIN_LONGER], few, **options)
    ratio = longer["operations"] * longer["steps"] / (centered["operations"] * centered["steps"])
    assert abs(ratio - 1) < 0.5 / longer["epochs"] + 1e-9
    assert longer["epochs"] > 3


def test_training_is_repeatable(few: Classification) -> None:
    route = next(route for route in routes() if route.name == "positive nudging")
    runs = [
        digits_panel.train(route, few, hidden=12, epochs=2, batch=50, seed=4, tick=lambda: None)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("route", MNIST_ROUTES, ids=lambda route: route.name)
def test_mnist_rows_learn(route: Any, few: Classification) -> None:
    found = train_mnist(route, few, hidden=24, epochs=6, batch=5, seed=4, tick=lambda: None)
    assert found["train_error"][-1] < found["train_error"][0]
    # twenty-four random features are few
    assert found["train_error"][-1] < (85 if route.frozen else 50)
    assert found["at"][-1] == 6


@pytest.mark.parametrize("route", images_panel.IMAGE_ROUTES)
def test_image_routes_take_large_images(route: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(25, 3, 32, 32, generator=draw), torch.randint(10, (25,), generator=draw)
    data = Classification(x, y, x[:5], y[:5], 10, "noise")
    options: dict[str, Any] = {"width": 2, "free": 4, "epochs": 2, "batch": 10, "seed": 1}
    found = images_panel.train_images(route, data, **options, device=torch.device("cpu"), tick=lambda: None)
    assert len(found["test_error"]) == 2
    assert all(0 <= error <= 100 for error in found["test_error"])


def test_the_data_of_the_papers_panel_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    assert _mnist_name(Config()) == "mnist_5k"
    monkeypatch.setenv("THALWEG_DATA", "somewhere")
    assert _mnist_name(Config()) == "mnist"
    assert _mnist_name(Config(mnist_data="mnist_5k")) == "mnist_5k"


def test_presets_have_the_sizes_of_the_paper() -> None:
    small, paper, gpu = (RECIPE.config(preset) for preset in ("small", "paper", "gpu"))
    assert Config() == small
    assert (small.digits_hidden, small.digits_epochs, small.digits_batch) == (128, 20, 50)
    assert (small.mnist_hidden, small.mnist_epochs, small.mnist_batch) == (500, 5, 20)
    assert (paper.mnist_hidden, paper.mnist_epochs, paper.mnist_data) == (500, 25, "mnist")
    assert gpu.image_epochs in (3, 4, 5)


@pytest.mark.parametrize(
    "fields",
    [{"relax_steps": 0}, {"mnist_data": "fashion"}, {"image_data": "cifar100"}, {"mnist_seeds": -1}],
    ids=lambda fields: next(iter(fields)),
)
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Config(**fields)
