"""The adjoint equation: its order, the field it is exact on, and the case that published code got wrong."""

import warnings
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import UnsupportedError
from thalweg.rollouts.backsolve import Backsolve
from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.ode import integrate
from thalweg.step import Backprop

Restore = Literal["stored", "solve"]
RESTORES: list[Restore] = ["stored", "solve"]
DOUBLE = torch.float64


def gradients(method: str, gradient: Any, steps: int | None, **options: float) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)

    def field(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = 3 * net(torch.cat([x, t.expand(4, 1)], 1))
        return result

    times = torch.tensor([0.0, 0.6, 1.0], dtype=DOUBLE)
    y = integrate(field, x, times, method=method, gradient=gradient, steps_between=steps, **options)
    return list(torch.autograd.grad(y[1].sum() + y[2].square().sum(), [x, *net.parameters()]))


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (difference / sum(float(b.square().sum()) for b in wanted)) ** 0.5


@pytest.mark.filterwarnings("ignore:Backsolve:UserWarning", "ignore:Backsolve:RuntimeWarning")
@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth_2", 2), ("rk4", 4)]
)
def test_its_error_falls_at_the_order_of_the_method(method: str, order: int, restore: Restore) -> None:
    exact = gradients("rk4", Discrete(), 400)
    coarse, fine = (distance(gradients(method, Backsolve(restore), n), exact) for n in (40, 80))
    slope = torch.tensor(coarse / fine).log2()
    assert abs(float(slope) - order) < 0.3


@pytest.mark.parametrize("restore", RESTORES)
def test_its_error_follows_the_tolerance(restore: Restore) -> None:
    exact = gradients("rk4", Discrete(), 400)
    loose, tight = (
        distance(gradients("dopri5", Backsolve(restore), None, rtol=r, atol=r), exact) for r in (1e-4, 1e-9)
    )
    assert tight < 1e-7
    assert tight < 1e-3 * loose


@pytest.mark.parametrize("method", ["heun", "rk4"])
@pytest.mark.parametrize("restore", RESTORES)
def test_on_a_linear_field_solving_and_transposing_commute(method: str, restore: Restore) -> None:
    """Spec: on Gaussian data (a field linear in x) the adjoint equals the gradient of the solve exactly."""
    rates = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE)
    found = []
    for gradient in (Backsolve(restore), Backprop()):
        x = torch.ones(3, dtype=DOUBLE, requires_grad=True)
        times = torch.linspace(1, 0, 9, dtype=DOUBLE)
        y = integrate(lambda x, t: rates * x, x, times, method=method, gradient=gradient)
        with warnings.catch_warnings():
            # eight coarse steps do not find the way back; the Jacobian is the same everywhere
            warnings.simplefilter("ignore", RuntimeWarning)
            found.append(torch.autograd.grad(y[-1].sum(), x)[0])
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def test_the_released_euler_adjoint_is_far_from_the_gradient_of_its_sampler() -> None:
    """Spec: at 20 steps of DDIM the stored Euler adjoint of the paper's code is off by more than 0.3.

    The field is the exact noise prediction for 400 digits with a little blur, in s = sigma / alpha of the
    linear variance-preserving schedule, where Euler's method is DDIM.
    """
    sklearn = pytest.importorskip("sklearn.datasets")
    data = torch.as_tensor(sklearn.load_digits().data[:400] / 8 - 1, dtype=DOUBLE)
    t = torch.linspace(1, 1e-3, 21, dtype=DOUBLE)
    log_alpha = -(0.1 * t + (20 - 0.1) * t**2 / 2) / 2
    s = torch.expm1(-2 * log_alpha).sqrt()
    torch.manual_seed(1)
    start = (torch.randn(8, 64, dtype=DOUBLE) * (1 + s[0] ** 2).sqrt()).requires_grad_()

    def noise(y: Tensor, s: Tensor) -> Tensor:
        variance = s**2 + 0.05**2
        weights = torch.softmax(-torch.cdist(y, data).square() / (2 * variance), 1)
        return s * (y - weights @ data) / variance

    def gradient(policy: Any) -> list[Tensor]:
        sample = integrate(noise, start, s, gradient=policy)[-1]
        return list(torch.autograd.grad((sample * data[:8]).sum(), [start]))

    exact = gradient(Backprop())
    assert distance(gradient(Discrete()), exact) < 1e-10
    with pytest.warns(UserWarning, match="euler"):
        released = gradient(Backsolve(restore="stored"))
    assert distance(released, exact) > 0.3


def test_a_solve_that_misses_the_start_warns() -> None:
    x = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    times = torch.linspace(0, 4, 9, dtype=DOUBLE)
    y = integrate(lambda x, t: -3 * x, x, times, method="heun", gradient=Backsolve(restore="solve"))
    with pytest.warns(RuntimeWarning, match="off by"):
        y[-1].sum().backward()


def test_a_parameter_first_met_in_the_backward_is_refused() -> None:
    late = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return late * x if torch.is_grad_enabled() and field.backward else -x  # type: ignore[attr-defined]

    field.backward = False  # type: ignore[attr-defined]
    x = torch.ones(1, dtype=DOUBLE, requires_grad=True)
    y = integrate(field, x, torch.linspace(0, 1, 5, dtype=DOUBLE), method="heun", gradient=Backsolve())
    field.backward = True  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="captured tensor"):
        y[-1].sum().backward()
