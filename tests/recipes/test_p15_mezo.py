"""The panel on fine-tuning a language model by forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thalweg as tw
from thalweg.blackbox.estimate import Evaluations
from thalweg.noise import Key
from thalweg.recipes.p15_zeroth_order import figures_mezo, memory, mezo
from thalweg.recipes.p15_zeroth_order.language_model import (
    ALPHABET,
    LanguageModel,
    LowRankAdapter,
    adapt_,
    corpus,
    windows,
)


def _small(seed: int = 0) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(width=8, layers=1, heads=2, longest=12)


def _letters(indices: torch.Tensor) -> str:
    return "".join(ALPHABET[index] for index in indices.tolist())


def test_the_parts_of_the_corpus_are_one_text_dealt_out() -> None:
    parts = corpus(100)
    sizes = [len(part) for part in (parts.train, parts.held_out, parts.test)]
    assert 0.75 < sizes[0] / sum(sizes) < 0.85
    assert abs(sizes[1] - sizes[2]) <= 2000
    pieces = [_letters(part[:300]) for part in (parts.train, parts.held_out, parts.test)]
    whole = [_letters(part) for part in (parts.train, parts.held_out, parts.test)]
    for index, piece in enumerate(pieces):
        assert [piece in text for text in whole] == [place == index for place in range(3)]


def test_the_task_is_the_same_text_written_otherwise() -> None:
    plain, shifted = corpus(100), corpus(100, mezo.SHIFT)
    assert _letters(plain.test).replace(" ", "_") == _letters(shifted.test)
    assert " " not in _letters(shifted.train)


def test_windows_are_pieces_of_the_text() -> None:
    text = torch.arange(50)
    pieces = windows(text, 200, 9, torch.Generator().manual_seed(0))
    assert pieces.shape == (200, 10)
    assert bool((pieces.diff(dim=1) == 1).all())
    assert (int(pieces.min()), int(pieces.max())) == (0, 49)


def test_the_model_does_not_see_the_future() -> None:
    model, letters = _small(), torch.arange(12)[None]
    changed = letters.clone()
    changed[0, 7:] = 90
    before, after = model(letters), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_adapters_change_nothing_until_they_learn() -> None:
    model, letters = _small(), torch.arange(12)[None]
    before, count = model(letters), len(list(model.parameters()))
    learned = adapt_(model, 1)
    torch.testing.assert_close(model(letters), before, rtol=0, atol=0)
    adapters = [module for module in model.modules() if isinstance(module, LowRankAdapter)]
    assert len(adapters) == 5
    assert len(list(model.parameters())) == count + 2 * len(adapters)
    assert not any(adapter.layer.weight.requires_grad for adapter in adapters)
    assert not model.letters.weight.requires_grad
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    tw.MeZO(learned, lr=0.1, seed=0).step(lambda: model.loss(torch.arange(13)[None]))
    assert not torch.equal(model(letters), before)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())


def test_tossed_signs_keep_the_length_and_lose_the_way() -> None:
    model = _small()
    learned, pieces = list(model.parameters()), torch.arange(13)[None]
    rule = tw.SPSA(directions="gaussian")
    signs = []
    for step in range(64):
        key = Key(100, step=step)
        slopes = [
            float(
                each.measure(Evaluations(lambda: model.loss(pieces), learned), learned, key).coefficients[0]
            )
            for each in (rule, mezo.CoinFlipped(rule))
        ]
        assert abs(slopes[0]) == abs(slopes[1])
        signs.append(slopes[0] * slopes[1] > 0)
    # five standard errors of a fair coin
    assert abs(sum(signs) - 32) < 5 * 4


@pytest.mark.parametrize("route", mezo.ROUTES, ids=lambda route: route.name)
def test_a_route_spends_its_evaluations_and_comes_out_the_same_again(route: mezo.Route) -> None:
    pretrained = mezo.model_of(5).state_dict()
    before = {name: value.clone() for name, value in pretrained.items()}
    found = mezo.fine_tune(route, pretrained, 1, seed=100)
    assert found["evaluations"] == (1 if route.optimizer == "Adam" else mezo.BUDGET)
    assert found["final"] != found["start"]
    assert len(found["sample"]) == 100
    assert found == mezo.fine_tune(route, pretrained, 1, seed=100)
    assert all(torch.equal(pretrained[name], value) for name, value in before.items())


def test_routes_from_one_start_begin_with_one_loss() -> None:
    pretrained = mezo.model_of(5).state_dict()
    starts = {
        route.name: mezo.fine_tune(route, pretrained, 1, seed=100)["start"]
        for route in (mezo.ADAM, mezo.LORA, mezo.RANDOM)
    }
    assert starts[mezo.LORA.name] == pytest.approx(starts[mezo.ADAM.name], rel=1e-6)
    assert starts[mezo.RANDOM.name] != pytest.approx(starts[mezo.ADAM.name], rel=1e-3)


def test_pretraining_learns_the_text() -> None:
    held_out = corpus(100).held_out
    assert mezo.judge(mezo.pretrain(100, 30), held_out) < mezo.judge(mezo.model_of(100), held_out) - 1


def _found(**finals: float) -> dict[str, list[dict[str, Any]]]:
    losses = {route.name: 2.5 for route in mezo.ROUTES} | {mezo.ADAM.name: 1.0}
    losses |= {getattr(mezo, name).name: value for name, value in finals.items()}
    return {
        name: [{"start": 3.0, "final": final, "evaluations": 1 if name == mezo.ADAM.name else 50}] * 3
        for name, final in losses.items()
    }


@pytest.mark.parametrize(
    ("finals", "verdicts"),
    [
        ({"LORA": 1.7, "ALL": 2.0, "RANDOM": 3.5}, [True, True]),
        ({"LORA": 2.0, "ALL": 1.7, "RANDOM": 2.4}, [True, True]),
        ({"LORA": 1.9, "ALL": 1.9, "RANDOM": 2.4}, [False, False]),
        ({"LORA": 1.7, "ALL": 3.2, "RANDOM": 3.15}, [True, False]),
    ],
    ids=["adapters", "all", "neither", "worse than its start"],
)
def test_exactly_the_lines_of_acceptance_are_asserted(finals: dict[str, float], verdicts: list[bool]) -> None:
    claims = mezo.claims(_found(**finals), decisive=True)
    assert [claim.holds for claim in claims if claim.asserted] == verdicts
    assert not any(claim.asserted for claim in mezo.claims(_found(**finals), decisive=False))


def test_more_evaluations_than_allowed_do_not_count() -> None:
    found = _found(LORA=1.5, ALL=1.5, RANDOM=3.0)
    found[mezo.LORA.name] = [each | {"evaluations": 51} for each in found[mezo.LORA.name]]
    assert not mezo.claims(found, decisive=True)[0].holds


def test_memory_is_that_of_inference_and_the_claims_can_fail() -> None:
    rows = memory.memory()
    assert [claim.holds for claim in memory.claims(rows)] == [True, True, None]
    heavier = [row | {"MeZO": row["backprop"]} for row in rows]
    assert [claim.holds for claim in memory.claims(heavier)][:2] == [False, False]
    lighter = [row | {"backprop": row["inference"] + 1000} for row in rows]
    assert [claim.holds for claim in memory.claims(lighter)][:2] == [True, False]


def test_the_picture_shows_losses_and_bytes() -> None:
    found = _found(LORA=1.7, ALL=2.0, RANDOM=3.5)
    for results in found.values():
        results[:] = [
            each | {"curve": [(0, each["start"]), (each["evaluations"], each["final"] + shift)]}
            for each, shift in zip(results, (0.0, 0.1, 0.2))
        ]
    figure = figures_mezo.mezo_figure(found, memory.memory())
    assert len(figure.axes) == 2
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)
