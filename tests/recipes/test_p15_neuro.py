"""The panel on learning in continuous time: its tasks are what they say, and its controls cannot learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from thalweg.recipes.p15_zeroth_order import cart_pole, figures_neuro, neuro

ADAPTATION, UNMODULATED, SHUFFLED = neuro.ROUTES


def test_the_toy_is_found_by_reward_alone() -> None:
    found = neuro.toy(ADAPTATION, 2500, seed=100)
    assert found["start"] == 2.5
    assert found["curve"][0] == (0, pytest.approx(2.5))
    assert found["curve"][-1] == (2500, found["distance"])
    assert found["distance"] < 0.5


def test_means_stay_where_no_reward_moves_them() -> None:
    assert neuro.toy(UNMODULATED, 200, seed=100)["distance"] == pytest.approx(2.5)
    assert neuro.track(UNMODULATED, 50, seed=100)["weights"] == [0.0, 0.0]


def test_shuffled_rewards_move_the_means_nowhere_in_particular() -> None:
    found = neuro.toy(SHUFFLED, 2500, seed=100)
    assert 1.0 < found["distance"] != found["start"]


def test_kalmans_filter_is_the_best_of_its_kind() -> None:
    best = neuro.kalman()
    signal, seen = neuro._signal(4000, torch.Generator().manual_seed(100))

    def error(weights: list[float]) -> float:
        return neuro._error(neuro._filtered(torch.tensor(weights), seen), signal)

    for index in (0, 1):
        for by in (-0.1, 0.1):
            assert error(best) < error([value + by * (place == index) for place, value in enumerate(best)])


def test_the_signal_has_variance_one_and_its_memory() -> None:
    signal, seen = neuro._signal(20000, torch.Generator().manual_seed(100))
    # one standard error of a variance estimated from so many correlated values
    count = signal.numel() * (1 - neuro.MEMORY**2) / (1 + neuro.MEMORY**2)
    assert abs(float(signal.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((seen - signal).var()) - neuro.NOISE) < 5 * math.sqrt(2 / signal.numel())
    memory = float((signal[1:] * signal[:-1]).mean() / signal.square().mean())
    assert abs(memory - neuro.MEMORY) < 5 * math.sqrt((1 - neuro.MEMORY**2) / signal.numel())


def test_an_upright_pole_stays_and_a_pushed_one_falls() -> None:
    state = torch.zeros(2, 4, dtype=torch.float64)
    state[1, 2] = 0.05
    stood, angles = cart_pole.balanced(torch.zeros(5, dtype=torch.float64), state, 5.0)
    assert stood[0] == 1
    assert stood[1] < 0.5
    assert torch.equal(angles, torch.zeros(250, dtype=torch.float64))


def test_the_pole_falls_as_the_linear_equations_say() -> None:
    """Near upright, angle'' = g / (l (4/3 - m / (m + M))) angle: it grows like cosh."""
    rate = math.sqrt(
        cart_pole.GRAVITY
        / (cart_pole.HALF_LENGTH * (4 / 3 - cart_pole.POLE / (cart_pole.CART + cart_pole.POLE)))
    )
    state = torch.zeros(1, 4, dtype=torch.float64)
    state[0, 2] = 1e-6
    angles = cart_pole.balanced(torch.zeros(5, dtype=torch.float64), state, 0.4)[1]
    # Euler's own steps of the linear equation, whose eigenvalues are 1 ± step x rate
    steps = len(angles)
    up, down = (1 + cart_pole.STEP * rate) ** steps, (1 - cart_pole.STEP * rate) ** steps
    assert float(angles[-1]) == pytest.approx(1e-6 * (up + down) / 2, rel=1e-6)


def test_a_known_policy_balances() -> None:
    weights = torch.tensor([0.5, 0.3, 2.0, 1.0, 0.0])
    starts = cart_pole.starts(16, torch.Generator().manual_seed(100))
    assert bool((cart_pole.balanced(weights, starts, 5.0)[0] == 1).all())
    assert bool((cart_pole.balanced(-weights, starts, 5.0)[0] < 0.2).all())


def _results(distance: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    toys = {route: [{"distance": distance, "start": 2.5}] * 3 for route in neuro.ROUTES}
    tracked = {route: [{"error": 0.3, "best_constant": 1.0, "kalman": 0.25}] * 3 for route in neuro.ROUTES}
    poles = {route: [{"stood": 1.0, "best_constant": 0.2}] * 3 for route in neuro.ROUTES}
    return toys, tracked, poles


@pytest.mark.parametrize(
    ("distance", "verdicts"), [(0.25, [True, True]), (0.3, [False, True]), (0.375, [False, False])]
)
def test_exactly_the_line_of_acceptance_is_asserted(distance: float, verdicts: list[bool]) -> None:
    claims = neuro.claims(*_results(distance), decisive=True)
    assert [claim.holds for claim in claims if claim.asserted] == verdicts
    assert all(claim.holds is None for claim in claims if not claim.asserted)
    assert not any(claim.asserted for claim in neuro.claims(*_results(distance), decisive=False))


def test_the_picture_shows_every_task() -> None:
    found = [
        {route: [function(route, ticks, 100)] for route in neuro.ROUTES}
        for function, ticks in ((neuro.toy, 5), (neuro.track, 5), (neuro.balance, 1))
    ]
    figure = figures_neuro.neuro_figure(*found)
    assert len(figure.axes) == 5
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)
