"""Parity with torchdiffeq, in value and gradient."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.rollouts.backsolve import Backsolve
from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.ode import integrate
from thalweg.rollouts.tableaus import Tableau
from thalweg.step import Backprop

torchdiffeq = pytest.importorskip("torchdiffeq")

# torchdiffeq's "rk4" is Kutta's other method of order 4, the 3/8 rule
THREE_EIGHTHS = Tableau(
    "three_eighths", ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4
)
MIDPOINT = Tableau("midpoint", ((), (0.5,)), (0.0, 1.0), 2)
HEUN3 = Tableau("heun3", ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3)
FIXED = [
    ("euler", "euler"), ("heun", "heun2"), (MIDPOINT, "midpoint"), (HEUN3, "heun3"), (THREE_EIGHTHS, "rk4")
]  # fmt: skip


class Field(nn.Module):
    """A field that both libraries can call; torchdiffeq looks for parameters in a module only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        result: Tensor = 2 * self.net(torch.cat([x, t.expand(len(x), 1)], 1))
        return result


def start() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 2, dtype=torch.float64, requires_grad=True)


def ours(times: Tensor, method: Any, gradient: Any, **options: Any) -> list[Tensor]:
    field, x = Field(), start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = integrate(lambda x, t: field(t, x), x, times, method=method, gradient=gradient, **options)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *field.parameters()])]


def theirs(times: Tensor, method: str, solve: Any, **options: Any) -> list[Tensor]:
    field, x = Field(), start()
    y = solve(field, x, times, method=method, **options)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *field.parameters()])]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


TIMES = {
    "forwards": torch.tensor([0.0, 0.3, 0.4, 1.0], dtype=torch.float64),
    "backwards": torch.tensor([1.0, 0.5, 0.4, 0.0], dtype=torch.float64),
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize(("method", "peer"), FIXED, ids=[peer for _, peer in FIXED])
def test_fixed_steps(method: Any, peer: str, times: Tensor) -> None:
    wanted = theirs(times, peer, torchdiffeq.odeint)
    assert_close(ours(times, method, Backprop()), wanted, 1e-12)
    assert_close(ours(times, method, Discrete()), wanted, 1e-12)


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize(("method", "peer"), FIXED, ids=[peer for _, peer in FIXED])
def test_the_adjoint_with_the_states_of_every_step(method: Any, peer: str, times: Tensor) -> None:
    wanted = theirs(times, peer, torchdiffeq.odeint_adjoint)
    assert_close(ours(times, method, Backsolve(restore="stored")), wanted, 1e-12)


@pytest.mark.parametrize(("method", "peer"), FIXED, ids=[peer for _, peer in FIXED])
def test_the_adjoint_that_solves_the_state_back(method: Any, peer: str) -> None:
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    wanted = theirs(times, peer, torchdiffeq.odeint_adjoint, options={"step_size": 1 / 8})
    assert_close(ours(times, method, Backsolve(restore="solve"), steps_between=8), wanted, 1e-12)


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES.keys())
def test_dopri5(times: Tensor) -> None:
    tight = {"rtol": 1e-9, "atol": 1e-10}
    wanted = theirs(times, "dopri5", torchdiffeq.odeint, **tight)
    for gradient in (Backprop(), Discrete(), Backsolve(restore="stored"), Backsolve(restore="solve")):
        assert_close(ours(times, "dopri5", gradient, **tight), wanted, 1e-7)


def test_dopri5_takes_the_same_steps() -> None:
    times = torch.tensor([0.0, 0.11, 0.5, 2.0], dtype=torch.float64)
    calls = {"ours": 0, "theirs": 0}
    field = Field()

    def counted(t: Tensor, x: Tensor, who: str) -> Tensor:
        calls[who] += 1
        return field(t, x)

    options = {"rtol": 1e-6, "atol": 1e-8}
    x = start().detach()
    y = integrate(lambda x, t: counted(t, x, "ours"), x, times, method="dopri5", **options)
    z = torchdiffeq.odeint(lambda t, x: counted(t, x, "theirs"), x, times, method="dopri5", **options)
    assert torch.allclose(y[:-1], z[:-1], rtol=1e-12)  # the last step of ours is cut to end with the times
    assert torch.allclose(y, z, rtol=1e-5)
    assert calls["ours"] <= calls["theirs"]
