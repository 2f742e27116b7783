"""Parity with torchode, in value and gradient, where it is installed: its pins keep it out of the extras."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.ode import integrate
from thalweg.rollouts.tableaus import DOPRI5, Tableau
from thalweg.step import Backprop

torchode = pytest.importorskip("torchode")


class Field(nn.Module):
    """A field of one time per sample, as torchode calls it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        slope: Tensor = 2 * self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], 1))
        return slope


def start() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 2, dtype=torch.float64, requires_grad=True)


def ours(method: str | Tableau, gradient: object, **options: float) -> list[Tensor]:
    field, x = Field(), start()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = integrate(lambda x, t: field(t, x), x, times, method=method, gradient=gradient, **options)[-1]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *field.parameters()])]


def theirs(method: str, controller: object, length: Tensor | None) -> list[Tensor]:
    field, x = Field(), start()
    stepper = getattr(torchode, method)(term=torchode.ODETerm(field, with_stats=False))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(x), 2)
    problem = torchode.InitialValueProblem(y0=x, t_eval=ends)
    y = (
        torchode.AutoDiffAdjoint(stepper, controller, backprop_through_step_size_control=False)
        .solve(problem, dt0=length)
        .ys[:, -1]
    )
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *field.parameters()])]


FIXED_DOPRI5 = replace(DOPRI5, error=(), middle=())
FIXED = [("euler", "Euler"), ("heun", "Heun"), (FIXED_DOPRI5, "Dopri5")]


@pytest.mark.parametrize("gradient", [Backprop(), Discrete()], ids=str)
@pytest.mark.parametrize(("method", "peer"), FIXED, ids=[peer for _, peer in FIXED])
def test_fixed_steps(method: str | Tableau, peer: str, gradient: object) -> None:
    length = torch.full((4,), 1 / 16, dtype=torch.float64)
    wanted = theirs(peer, torchode.FixedStepController(), length)
    torch.testing.assert_close(ours(method, gradient, steps_between=16), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", [Backprop(), Discrete()], ids=str)
def test_dopri5_with_steps_of_its_own(gradient: object) -> None:
    tight = {"rtol": 1e-9, "atol": 1e-10}
    term = torchode.ODETerm(Field(), with_stats=False)
    wanted = theirs("Dopri5", torchode.IntegralController(**tight, term=term), None)
    found = ours("dopri5", gradient, **tight)
    # the final state and the gradient of the start; for the parameters torchode 1.0.1 leaves out what the
    # slope with which it begins owes to them
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-7, atol=1e-8)
    fine = ours("rk4", Discrete(), steps_between=400)
    torch.testing.assert_close(found, fine, rtol=1e-6, atol=1e-8)
