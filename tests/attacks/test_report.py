"""The report on robustness, and its verdict on masked gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.attacks import fgsm, pgd, robustness
from thalweg.data import digits
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.noise import Key

KEY = Key(seed=3)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    data = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train_inputs), data.train_labels).backward()
        optimizer.step()
    model.zero_grad()
    return model, data.test_inputs, data.test_labels


def test_an_ordinary_network_is_not_masked(trained: Any) -> None:
    model, inputs, labels = trained
    report = robustness(model, inputs, labels, radii=[0.05, 0.2], queries=100, key=KEY)
    assert not report.masked
    assert report.signs == ()
    assert report.zero_gradients == 0.0
    assert report.clean > 0.9
    assert report.worst(0.05) >= report.worst(0.2)
    assert "gradient masking: no sign of it" in str(report)


def test_scaled_logits_are_found_out(trained: Any) -> None:
    model, inputs, labels = trained
    plain = robustness(model, inputs, labels, radii=[0.2], key=KEY)
    masked = robustness(lambda x: 1e4 * model(x), inputs, labels, radii=[0.2], key=KEY)
    assert masked.masked
    assert masked.accuracy("fgsm", 0.2) > plain.accuracy("fgsm", 0.2) + 0.25
    for attack in ("fgsm-margin", "pgd-margin"):
        assert masked.accuracy(attack, 0.2) == plain.accuracy(attack, 0.2)
    assert masked.zero_gradients > 0.5


def test_a_shattered_gradient_is_found_out_by_search(trained: Any) -> None:
    model, inputs, labels = trained

    def rounded(x: Tensor) -> Tensor:
        # a gradient exists and points nowhere
        return model((8 * x).round() / 8) + 1e-6 * x[:, :10].sin()

    report = robustness(rounded, inputs, labels, radii=[0.2], queries=300, key=KEY)
    assert any("random search" in sign for sign in report.signs)
    assert report.worst(0.2) == report.accuracy("square", 0.2)


def test_the_numbers_are_those_of_the_attacks(trained: Any) -> None:
    model, inputs, labels = trained
    report = robustness(model, inputs, labels, radii=[0.1], batch=100, steps=7, key=KEY)
    attacks = {
        "fgsm": fgsm(model, inputs, labels, radius=0.1),
        "fgsm-margin": fgsm(model, inputs, labels, radius=0.1, loss="margin"),
        "pgd": pgd(model, inputs, labels, radius=0.1, steps=7, loss="cross_entropy"),
        "pgd-margin": pgd(model, inputs, labels, radius=0.1, steps=7),
    }
    for name, moved in attacks.items():
        right = int((model(moved).argmax(1) == labels).sum())
        assert report.accuracy(name, 0.1) == right / len(labels)
    assert report.largest_logit == float(model(inputs).detach().abs().max())
    own = robustness(model, inputs, labels, radii=[0.1], against="predictions", key=KEY)
    moved = fgsm(model, inputs, radius=0.1)
    assert own.accuracy("fgsm", 0.1) == int((model(moved).argmax(1) == labels).sum()) / len(labels)


def test_the_key_names_the_noise_and_no_noise_leaves_the_row_out(trained: Any) -> None:
    model, inputs, labels = trained
    options: dict[str, Any] = {"radii": [0.0], "noise": 0.5, "steps": 1}
    first = robustness(model, inputs, labels, key=KEY, **options)
    assert first == robustness(model, inputs, labels, key=KEY, **options)
    assert first.noisy != robustness(model, inputs, labels, key=Key(seed=4), **options).noisy
    assert all(row.accuracy == first.clean for row in first.rows)
    quiet = robustness(model, inputs, labels, radii=[0.0], noise=None, steps=1)
    assert quiet.noisy is None
    assert "noisy" not in str(quiet)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"radii": []}, "radii"),
        ({"radii": 0.1}, "radii"),
        ({"radii": [-1.0]}, "radius"),
        ({"noise": -0.1}, "radius"),
        ({"against": "nobody"}, "against"),
        ({"batch": 0}, "batch"),
        ({"queries": -1}, "queries"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"labels": torch.tensor([0])}, "labels"),
        ({"labels": [0, 1]}, "labels"),
        ({"inputs": torch.full((2, 3), 2.0)}, "inputs"),
        ({"inputs": [0.0]}, "inputs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_wrong_argument_is_named(change: dict[str, Any], argument: str) -> None:
    good: dict[str, Any] = {
        "model": lambda x: 2 * x,
        "inputs": torch.full((2, 3), 0.5),
        "labels": torch.tensor([0, 1]),
    }
    report = robustness(**good)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        robustness(**(good | change))
    with pytest.raises(ArgumentError, match="one of"):
        report.accuracy("pgd-100", 0.1)
    with pytest.raises(ArgumentError, match="radius"):
        report.worst(0.7)
