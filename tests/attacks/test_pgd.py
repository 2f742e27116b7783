"""Attacks on models whose worst case is known, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.attacks import cross_entropy, fgsm, margin, pgd, square
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.noise import Key

KEY = Key(seed=5)


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(12, 4).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        # in the middle of the box no class is ahead
        model.bias.copy_(-0.5 * model.weight.sum(1))
    inputs = torch.rand(40, 12, generator=generator, dtype=dtype)
    return model, inputs, torch.randint(4, (40,), generator=generator)


def accuracy(model: Any, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())


ATTACKS = {
    "fgsm": lambda *args, **kw: fgsm(*args, **kw),
    "fgsm-margin": lambda *args, **kw: fgsm(*args, loss="margin", **kw),
    "pgd": lambda *args, **kw: pgd(*args, steps=5, restarts=2, key=KEY, **kw),
    "pgd-l2": lambda *args, **kw: pgd(*args, norm="l2", steps=5, restarts=2, key=KEY, **kw),
    "square": lambda *args, **kw: square(*args, queries=20, key=KEY, **kw),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_sanity_radius_0_gives_clean_inputs(attack: str) -> None:
    model, inputs, labels = problem()
    assert torch.equal(ATTACKS[attack](model, inputs, labels, radius=0.0), inputs)


@pytest.mark.parametrize("rival", range(4))
def test_attack_sanity_fgsm_on_one_rival_is_the_exact_worst_case_of_a_linear_net(rival: int) -> None:
    model, inputs, labels = problem()
    chosen = labels != rival
    inputs, labels = inputs[chosen], labels[chosen]

    def against(logits: Tensor, truth: Tensor) -> Tensor:
        return logits[:, rival] - logits.gather(1, truth[:, None]).squeeze(1)

    moved = fgsm(model, inputs, labels, radius=0.2, loss=against, bounds=None)
    with torch.no_grad():
        worst = against(model(inputs), labels) + 0.2 * (model.weight[rival] - model.weight[labels]).abs().sum(
            1
        )
        torch.testing.assert_close(against(model(moved), labels), worst, rtol=0, atol=1e-12)


def test_one_step_on_two_classes_is_the_exact_worst_case_in_both_norms() -> None:
    model, inputs, _ = problem()
    pair = lambda x: model(x)[:, :2]  # noqa: E731
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    difference = (model.weight[1] - model.weight[0]).detach()
    before = margin(pair(inputs), labels)
    for norm, slope in (("linf", difference.abs().sum()), ("l2", difference.norm())):
        moved = pgd(pair, inputs, labels, radius=0.1, norm=norm, steps=1, step_size=0.1, bounds=None)
        torch.testing.assert_close(margin(pair(moved), labels), before + 0.1 * slope)


def test_attack_sanity_scaling_the_logits_changes_no_margin_attack_and_blinds_the_cross_entropy() -> None:
    model, inputs, labels = problem(torch.float32)
    labels = model(inputs).argmax(1)
    scaled = lambda x: 1e4 * model(x)  # noqa: E731
    exactly = lambda x: 2**13 * model(x)  # noqa: E731
    for attack in (fgsm, pgd):
        plain = attack(model, inputs, labels, radius=0.1, loss="margin")
        # a power of two is exact; another factor may turn a tie of two rounded margins
        assert torch.equal(attack(exactly, inputs, labels, radius=0.1, loss="margin"), plain)
        other = attack(scaled, inputs, labels, radius=0.1, loss="margin")
        assert accuracy(model, other, labels) == accuracy(model, plain, labels)
    assert accuracy(model, fgsm(model, inputs, labels, radius=0.1), labels) < 0.7
    # but for an input whose margin is below 1e-2
    assert accuracy(model, fgsm(scaled, inputs, labels, radius=0.1), labels) > 0.95


@settings(max_examples=25, deadline=None)
@given(
    radius=st.floats(0.0, 2.0),
    norm=st.sampled_from(["linf", "l2"]),
    restarts=st.integers(1, 3),
    loss=st.sampled_from(["margin", "cross_entropy"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_attacked_inputs_stay_in_the_ball_and_the_box_and_never_do_better(
    radius: float, norm: Any, restarts: int, loss: Any, dtype: torch.dtype
) -> None:
    model, inputs, labels = problem(dtype)
    moved = pgd(
        model, inputs, labels, radius=radius, norm=norm, steps=4, restarts=restarts, loss=loss, key=KEY
    )
    assert moved.dtype == dtype
    assert not moved.requires_grad
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    offset = (moved - inputs).abs()
    reached = offset.amax(1) if norm == "linf" else offset.norm(dim=1)
    assert float(reached.max()) <= radius * (1 + 1e-5) + 1e-7
    assert bool((margin(model(moved), labels) >= margin(model(inputs), labels) - 1e-6).all())


def test_restarts_never_do_worse_and_the_key_names_them() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    _, inputs, labels = problem(torch.float32)
    options: dict[str, Any] = {"radius": 0.4, "steps": 3, "key": KEY}
    one, many, again = (pgd(model, inputs, labels, restarts=count, **options) for count in (1, 4, 4))
    assert torch.equal(many, again)
    assert bool((margin(model(many), labels) >= margin(model(one), labels)).all())
    assert not torch.equal(one, many)


def test_no_labels_means_the_models_own_predictions() -> None:
    model, inputs, _ = problem()
    predicted = model(inputs).argmax(1)
    assert torch.equal(fgsm(model, inputs, radius=0.1), fgsm(model, inputs, predicted, radius=0.1))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_module_is_attacked_in_evaluation_mode_and_left_as_it_was(attack: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 4))
    model[0].running_mean += 0.3
    _, inputs, labels = problem(torch.float32)
    model[2].weight.grad = torch.ones(4, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawing = torch.get_rng_state()
    first = ATTACKS[attack](model, inputs, labels, radius=0.1)
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[2].weight.grad, torch.ones(4, 12))
    assert model[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), drawing)
    model.eval()
    assert torch.equal(first, ATTACKS[attack](model, inputs, labels, radius=0.1))


def test_square_search_takes_images_and_comes_near_the_gradient() -> None:
    model, inputs, labels = problem(torch.float32)
    images = inputs.view(40, 3, 2, 2)
    flat = nn.Sequential(nn.Flatten(), model)
    found = square(flat, images, labels, radius=0.2, queries=300, key=KEY)
    assert found.shape == images.shape
    assert float((found - images).abs().max()) <= 0.2 + 1e-6
    exact = margin(flat(pgd(flat, images, labels, radius=0.2, steps=20)), labels)
    reached = margin(flat(found), labels)
    before = margin(flat(images), labels)
    assert bool((reached - before).sum() > 0.8 * (exact - before).sum())


def test_losses_are_one_value_per_example() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 5.0]])
    labels = torch.tensor([1, 0])
    assert margin(logits, labels).tolist() == [-2.0, 5.0]
    torch.testing.assert_close(
        cross_entropy(logits, labels), nn.functional.cross_entropy(logits, labels, reduction="none")
    )


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"model": 3}, "model"),
        ({"model": lambda x: x.sum()}, "model"),
        ({"model": lambda x: x[:, 0]}, "model"),
        ({"model": lambda x: x[:, :1]}, "model"),
        ({"model": lambda x: x.detach()}, "model"),
        ({"inputs": torch.zeros(4, 3, dtype=torch.int64)}, "inputs"),
        ({"inputs": torch.full((4, 3), 1.5)}, "inputs"),
        ({"inputs": torch.zeros(0, 3)}, "inputs"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels"),
        ({"labels": torch.zeros(4)}, "labels"),
        ({"radius": -0.1}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"radius": "0.1"}, "radius"),
        ({"norm": "l1"}, "norm"),
        ({"steps": 0}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"restarts": 0}, "restarts"),
        ({"loss": "dlr"}, "loss"),
        ({"loss": 3}, "loss"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"bounds": 1.0}, "bounds"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_cannot_be_attacked_is_named(change: dict[str, Any], argument: str) -> None:
    good: dict[str, Any] = {
        "model": lambda x: 2 * x,
        "inputs": torch.full((4, 3), 0.5),
        "labels": torch.tensor([0, 1, 2, 0]),
        "radius": 0.1,
    }
    pgd(**good)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        pgd(**(good | change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    inputs, labels = torch.full((2, 3), 0.5), torch.tensor([0, 1])
    with pytest.raises(NonFiniteError, match="logits"):
        fgsm(lambda x: x * value, inputs, labels, radius=0.1)
    with pytest.raises(NonFiniteError, match="inputs"):
        fgsm(lambda x: x, torch.full((2, 3), value), labels, radius=0.1)
