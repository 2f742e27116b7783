"""The recipe of paper 06 runs from end to end, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.recipes import find
from thalweg.recipes.p06_stochastic_neurons.gaters import GatedNetwork, Gater, gaters
from thalweg.recipes.p06_stochastic_neurons.recipe import Config
from thalweg.step import backward

RECIPE = find()[6]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "06"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


def test_smoke_asserts_what_is_exact_and_shows_the_rest(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    asserted = [claim for claim in claims["claims"] if claim["asserted"]]
    assert ["gather" in claim["statement"] for claim in asserted] == [True, True]
    assert len(claims["claims"]) > len(asserted)


def test_smoke_draws_every_figure(finished: Path) -> None:
    names = {path.stem for path in (finished / "figures").iterdir()}
    assert names == {"error_and_work", "learning_curves", "estimators"}


def test_the_default_preset_asserts_the_lines_of_acceptance() -> None:
    from thalweg.recipes.p06_stochastic_neurons import recipe

    rows = [
        {
            "name": kind.name,
            "kind": kind,
            "error": 5.0,
            "spread": None,
            "open": 0.1,
            "open_spread": None,
            "reported": kind.reported,
        }
        for kind in gaters(0.1)
    ]
    claims = [claim for claim in recipe._claims(rows, decisive=True) if claim.asserted]
    assert len(claims) == 4 + 2 + 1 + 3
    failing = [claim.statement for claim in claims if not claim.holds]
    assert len(failing) == 1
    assert "worst" in failing[0]


COSTED = [kind for kind in gaters(0.1) if kind.sparsity is not None and kind.rule is None]


@pytest.mark.parametrize("kind", COSTED, ids=lambda kind: kind.name)
def test_the_sparsity_cost_adds_its_gradient_and_not_its_value(kind: Gater) -> None:
    torch.manual_seed(0)
    network = GatedNetwork(kind, inputs=6, classes=3, experts=20, bottleneck=5, target=0.1)
    x, labels = torch.randn(8, 6), torch.randint(3, (8,))
    torch.manual_seed(1)
    losses = network.losses(x, labels)
    torch.manual_seed(1)
    plain = torch.nn.functional.cross_entropy(network(x), labels, reduction="none")
    assert torch.equal(losses, plain)
    with_cost = torch.autograd.grad(losses.mean(), network.gater_parameters())
    wanted = torch.autograd.grad(plain.mean() + network.layer.penalty(), network.gater_parameters())
    for found, expected in zip(with_cost, wanted):
        torch.testing.assert_close(found, expected)


def test_no_gradient_of_the_loss_enters_the_gater_of_the_score_function() -> None:
    """What its gater learns from is a number per example: hiding every derivative changes nothing."""
    torch.manual_seed(0)
    kind = next(each for each in gaters(0.1) if each.name == "score function")
    network = GatedNetwork(kind, inputs=6, classes=3, experts=20, bottleneck=5, target=0.1)
    network.layer.sparsity = None
    x, labels = torch.randn(8, 6), torch.randint(3, (8,))
    found = []
    for hidden in (False, True):
        for parameter in network.parameters():
            parameter.grad = None
        torch.manual_seed(1)

        def losses(hidden: bool = hidden) -> torch.Tensor:
            value = network.losses(x, labels)
            return value.detach() if hidden else value

        assert kind.rule is not None
        backward(losses, network.parameters(), gradient=kind.rule())
        found.append([parameter.grad for parameter in network.gater_parameters()])
    for shown, without in zip(*found):
        assert shown is not None
        assert torch.equal(shown, without)


def test_presets_have_the_sizes_of_the_paper() -> None:
    paper = RECIPE.config("paper")
    assert (paper.experts, paper.bottleneck, paper.data) == (2000, 400, "mnist")
    assert Config() == RECIPE.config("small")
