"""Ornstein-Uhlenbeck adaptation: its stationary law, a toy, and its state."""

import io
import math

import pytest
import torch

from thalweg.blackbox.ornstein_uhlenbeck import OrnsteinUhlenbeck
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError

SIGMAS = 5


def zero():
    return torch.zeros(())


@pytest.mark.parametrize("tick", [0.05, 0.5])
def test_stationary_variance_without_learning(tick):
    spread, pull, count = 0.3, 2.0, 20000
    theta = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    adaptation = OrnsteinUhlenbeck([theta], spread=spread, pull=pull, rate=0.0, tick=tick, seed=1)
    for _ in range(math.ceil(8 / (pull * tick))):
        adaptation.step(zero)
    law = spread**2 / (2 * pull) / (1 - pull * tick / 2)
    error = law * math.sqrt(2 / count)
    assert abs(theta.detach().var() - law) < SIGMAS * error
    assert abs(theta.detach().mean()) < SIGMAS * math.sqrt(law / count)
    assert not adaptation.state[theta]["mean"].any()


def test_stationary_variance_in_continuous_time():
    """Sigma^2 / (2 lambda), to within five standard errors, at a tick whose own error is far below one."""
    spread, pull, count, tick = 0.3, 2.0, 5000, 0.0005
    theta = torch.empty(count, dtype=torch.float64)
    law = spread**2 / (2 * pull)
    # a start that is not stationary, forgotten by a factor of exp(-8) in the variance
    theta.normal_(std=2 * math.sqrt(law), generator=torch.Generator().manual_seed(0)).requires_grad_()
    adaptation = OrnsteinUhlenbeck([theta], spread=spread, pull=pull, rate=0.0, tick=tick, seed=2)
    # mu starts at the parameters: here at 0 instead
    adaptation.state[theta]["mean"].zero_()
    for _ in range(round(2 / tick)):
        adaptation.step(zero)
    assert abs(theta.detach().var() - law) < SIGMAS * law * math.sqrt(2 / count)


def toy(seed, ticks=4000):
    target = torch.ones(5, dtype=torch.float64) * 2.5 / math.sqrt(5)
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    adaptation = OrnsteinUhlenbeck([theta], seed=seed)
    mean, distances = adaptation.state[theta]["mean"], []
    for _ in range(ticks):
        adaptation.step(lambda: (theta - target).square().sum())
        distances.append((mean - target).norm())
    return torch.stack(distances)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_toy_finds_its_target_and_stays(seed):
    distances = toy(seed)
    assert distances[0] > 2.4
    assert distances[-1] <= 0.25
    assert distances[-1] < 0.15 * 2.5
    assert distances[-500:].max() < 0.4


def test_one_tick_is_euler_maruyama():
    from thalweg.noise import Key, normal

    theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    groups = [{"params": [theta]}, {"params": [other], "spread": 0.1, "rate": 3.0}]
    adaptation = OrnsteinUhlenbeck(groups, spread=0.4, pull=1.5, rate=2.0, reward_rate=0.5, tick=0.1, seed=7)
    values, means, average = [theta.detach().clone(), other.detach().clone()], None, None
    means = [value.clone() for value in values]
    for tick in range(3):
        reward = -(values[0].square().sum() + values[1].sum())
        average = reward if average is None else average
        adaptation.step(lambda: theta.square().sum() + other.sum())
        for i, (spread, rate) in enumerate(((0.4, 2.0), (0.1, 3.0))):
            away = values[i] - means[i]
            kick = normal(values[i], Key(7, step=tick, call=i))
            values[i] = values[i] - 1.5 * 0.1 * away + spread * math.sqrt(0.1) * kick
            means[i] = means[i] + rate * 0.1 * (reward - average) * away
        average = average + 0.5 * 0.1 * (reward - average)
    torch.testing.assert_close(theta.detach(), values[0])
    torch.testing.assert_close(other.detach(), values[1])
    torch.testing.assert_close(adaptation.state[other]["mean"], means[1])


def test_a_run_goes_on_from_its_state():
    def start(seed):
        theta = torch.zeros(3, requires_grad=True)
        return theta, OrnsteinUhlenbeck([theta], seed=seed)

    def run(theta, adaptation, ticks):
        for _ in range(ticks):
            adaptation.step(lambda: (theta - 1).square().sum())

    theta, adaptation = start(3)
    run(theta, adaptation, 10)
    kept, file = theta.detach().clone(), io.BytesIO()
    torch.save(adaptation.state_dict(), file)
    run(theta, adaptation, 10)
    file.seek(0)
    other, again = start(4)
    again.load_state_dict(torch.load(file))
    other.data.copy_(kept)
    run(other, again, 10)
    assert torch.equal(other, theta)
    # the rest of the process cannot be told apart either: nothing was drawn from the global generator
    state = torch.get_rng_state()
    run(theta, adaptation, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_is_drawn_from_torchs_generator():
    def after(seed):
        torch.manual_seed(seed)
        theta = torch.zeros(3, requires_grad=True)
        OrnsteinUhlenbeck([theta]).step(zero)
        return theta.detach()

    assert torch.equal(after(0), after(0))
    assert not torch.equal(after(0), after(1))


def test_at_means_the_parameters_are_the_means_and_come_back():
    theta = torch.zeros(3, requires_grad=True)
    adaptation = OrnsteinUhlenbeck([theta])
    for _ in range(5):
        adaptation.step(lambda: (theta - 1).square().sum())
    before, mean = theta.detach().clone(), adaptation.state[theta]["mean"]
    with adaptation.at_means():
        assert torch.equal(theta, mean)
        assert not torch.equal(theta, before)
    assert torch.equal(theta, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_move(dtype):
    theta = torch.zeros(4, dtype=dtype, requires_grad=True)
    adaptation = OrnsteinUhlenbeck([theta], seed=0)
    for _ in range(5):
        loss = adaptation.step(lambda: (theta - 1).square())
    assert loss.ndim == 0
    assert theta.dtype == dtype
    assert theta.any()


def test_a_non_finite_loss_moves_nothing():
    theta = torch.zeros(3, requires_grad=True)
    adaptation = OrnsteinUhlenbeck([theta], seed=0)
    with pytest.raises(NonFiniteError):
        adaptation.step(lambda: torch.tensor(float("nan")))
    assert not theta.any()
    assert adaptation.state["shared"]["ticks"] == 0
    with pytest.raises(ArgumentTypeError, match="closure"):
        adaptation.step(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"spread": 0.0}, ArgumentError, "spread"),
        ({"pull": -1.0}, ArgumentError, "pull"),
        ({"pull": 40.0}, ArgumentError, "pull"),
        ({"rate": float("inf")}, ArgumentError, "rate"),
        ({"reward_rate": 21.0}, ArgumentError, "reward_rate"),
        ({"tick": 0}, ArgumentError, "tick"),
        ({"tick": "slow"}, ArgumentTypeError, "tick"),
        ({"seed": -1}, ArgumentError, "seed"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        OrnsteinUhlenbeck([torch.zeros(1, requires_grad=True)], **arguments)
