"""Fixed points: the same state and gradient by every policy and solver, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.equilibria import (
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    Nudged,
    OneStep,
    Status,
    fixed_point,
)
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.ledger import price, saved_bytes
from thalweg.step import Backprop, Step, backward

DOUBLE = torch.float64
SOLVERS: list[Any] = ["neumann", "anderson", "gmres"]


class Cell(nn.Module):
    """A deep equilibrium cell with spectral norm `norm`: not symmetric, so no energy."""

    def __init__(self, norm: float, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(width, width, bias=False).double()
        self.outer = nn.Linear(3, width).double()
        with torch.no_grad():
            self.inner.weight.mul_(norm / torch.linalg.matrix_norm(self.inner.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


def gradient(cell: Cell, policy: Any, **options: Any) -> Tensor:
    x = torch.linspace(-1, 1, 15, dtype=DOUBLE).reshape(5, 3).requires_grad_()
    options = {"tolerance": 1e-12, "max_steps": 5000, **options}
    z = fixed_point(lambda z: cell(z, x), torch.zeros(5, 8, dtype=DOUBLE), gradient=policy, **options)
    found = torch.autograd.grad(z.square().sum(), [*cell.parameters(), x])
    return torch.cat([g.reshape(-1) for g in found])


@pytest.mark.parametrize("norm", [0.3, 0.9])
@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_is_the_limit_of_unrolling(solver: Any, norm: float) -> None:
    cell = Cell(norm)
    wanted = gradient(cell, Backprop())
    assert torch.allclose(gradient(cell, Implicit(solver, 1e-11)), wanted, rtol=1e-7, atol=1e-9)


def test_a_linear_fixed_point_in_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=DOUBLE)
    a = (0.8 * a / torch.linalg.matrix_norm(a, 2)).requires_grad_()
    b, v = torch.randn(2, 3, 4, dtype=DOUBLE)
    b.requires_grad_()
    u = v @ torch.linalg.inv(torch.eye(4, dtype=DOUBLE) - a.detach())
    z = b.detach() @ torch.linalg.inv(torch.eye(4, dtype=DOUBLE) - a.detach()).T
    for solver in SOLVERS:
        found = fixed_point(
            lambda z: z @ a.T + b, torch.zeros_like(b), gradient=Implicit(solver, 1e-13), tolerance=1e-14
        )
        by_a, by_b = torch.autograd.grad((v * found).sum(), [a, b])
        assert torch.allclose(found, z, rtol=1e-10)
        assert torch.allclose(by_b, u, rtol=1e-10)
        assert torch.allclose(by_a, u.T @ z, rtol=1e-10)


def test_gmres_solves_what_a_series_cannot() -> None:
    """Newton's iteration finds the rest state of a map that is no contraction; its adjoint has no series."""
    a = torch.tensor([[-3.0, 1.0], [0.0, -2.0]], dtype=DOUBLE).requires_grad_()
    b = torch.ones(1, 2, dtype=DOUBLE)
    rest = b @ torch.linalg.inv(torch.eye(2, dtype=DOUBLE) - a.detach()).T
    start = rest.clone()  # it rests already, so that the forward takes one step
    found = fixed_point(lambda z: z @ a.T + b, start, gradient=Implicit("gmres", 1e-12))
    (by_a,) = torch.autograd.grad(found.sum(), a)
    u = torch.ones(1, 2, dtype=DOUBLE) @ torch.linalg.inv(torch.eye(2, dtype=DOUBLE) - a.detach())
    assert torch.allclose(by_a, u.T @ rest, rtol=1e-9)
    found = fixed_point(lambda z: z @ a.T + b, start, gradient=Implicit("neumann"))
    with pytest.raises((ConvergenceError, NonFiniteError)):
        torch.autograd.grad(found.sum(), a)


def test_one_step_is_biased_and_in_the_right_half() -> None:
    cell = Cell(0.3)
    wanted, found = gradient(cell, Backprop()), gradient(cell, OneStep())
    assert float(torch.nn.functional.cosine_similarity(found, wanted, dim=0)) > 0.9
    assert float((found - wanted).norm() / wanted.norm()) > 1e-3


def test_anderson_needs_fewer_steps_for_the_same_state() -> None:
    """Parity with the other way to the rest state, forward and backward."""
    cell = Cell(0.95)
    plain, mixed = Status(), Status()
    wanted = gradient(cell, Implicit("neumann", 1e-11, 5000), status=plain)
    found = gradient(cell, Implicit("anderson", 1e-11), solver="anderson", status=mixed)
    assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-9)
    assert mixed.iterations < 0.6 * plain.iterations
    assert mixed.adjoint_iterations < 0.6 * plain.adjoint_iterations


def test_the_status_tells_each_example_apart() -> None:
    rates = torch.tensor([[0.1], [0.9]], dtype=DOUBLE)
    status = Status()
    fixed_point(
        lambda z: rates * z + 1, torch.zeros(2, 1, dtype=DOUBLE), tolerance=None, max_steps=20, status=status
    )
    assert status.iterations == 20
    assert status.residual is not None
    moved = rates[:, 0] ** 19 / (1 + (1 - rates[:, 0] ** 20) / (1 - rates[:, 0]))
    assert torch.allclose(status.residual, moved)


def test_without_a_tolerance_it_is_the_plain_loop() -> None:
    cell = Cell(0.9)
    x = torch.ones(2, 3, dtype=DOUBLE)
    z = torch.zeros(2, 8, dtype=DOUBLE)
    for _ in range(7):
        z = cell(z, x)
    for policy in (Backprop(), Implicit(), OneStep()):
        found = fixed_point(
            lambda z: cell(z, x),
            torch.zeros(2, 8, dtype=DOUBLE),
            gradient=policy,
            tolerance=None,
            max_steps=7,
        )
        assert torch.equal(found, z)


def test_transforms_of_the_plain_loop() -> None:
    def rest(a: Tensor) -> Tensor:
        found: Tensor = fixed_point(
            lambda z: a * z.cos(),
            torch.zeros(1, dtype=DOUBLE),
            gradient=Backprop(),
            tolerance=None,
            max_steps=60,
        )
        return found.sum()

    a = torch.tensor([0.5, 0.7], dtype=DOUBLE)
    first = torch.vmap(torch.func.grad(rest))(a)
    for value, slope in zip(a, first):
        leaf = value.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(
            fixed_point(
                lambda z, leaf=leaf: leaf * z.cos(), torch.zeros(1, dtype=DOUBLE), gradient=Implicit()
            ).sum(),
            leaf,
        )
        assert math.isclose(float(slope), float(wanted), rel_tol=1e-5)
    _, tangent = torch.func.jvp(rest, (a[0],), (torch.ones((), dtype=DOUBLE),))
    assert torch.allclose(tangent, first[0])
    for policy in (Implicit(), OneStep(), Backprop()):
        with pytest.raises(UnsupportedError, match=r"torch\.func"):
            torch.func.grad(lambda a, p=policy: fixed_point(lambda z: a * z.cos(), a, gradient=p))(a[0])


def test_double_backward_is_right_or_refused() -> None:
    a = torch.tensor([0.5], dtype=DOUBLE, requires_grad=True)  # z = 1 / (1 - a), z'' = 2 / (1 - a)^3

    def slope(policy: Any) -> Tensor:
        z = fixed_point(lambda z: a * z + 1, torch.zeros(1, dtype=DOUBLE), gradient=policy, tolerance=1e-14)
        return torch.autograd.grad(z.sum(), a, create_graph=True)[0]

    (second,) = torch.autograd.grad(slope(Backprop()), a)
    assert math.isclose(float(second), 16.0, rel_tol=1e-9)
    for policy in (Implicit(), OneStep()):
        with pytest.raises(UnsupportedError, match="no second derivative"):
            torch.autograd.grad(slope(policy), a)


def test_kept_bytes_do_not_grow_with_the_steps() -> None:
    cell = Cell(0.9)
    x = torch.ones(16, 3, dtype=DOUBLE)

    def kept(policy: Any, steps: int) -> int:
        def run() -> Tensor:
            z: Tensor = fixed_point(
                lambda z: cell(z, x),
                torch.zeros(16, 8, dtype=DOUBLE),
                gradient=policy,
                tolerance=None,
                max_steps=steps,
            )
            return z.sum()

        return saved_bytes(run)

    assert kept(Implicit(), 5) == kept(Implicit(), 100) < kept(Backprop(), 5)
    assert kept(OneStep(), 5) == kept(OneStep(), 100) < kept(Backprop(), 5)
    assert kept(Backprop(), 100) > 15 * kept(Backprop(), 5)


def test_it_trains_by_backward_and_is_priced() -> None:
    cell = Cell(0.5)
    x = torch.ones(4, 3, dtype=DOUBLE)

    def closure() -> Tensor:
        z: Tensor = fixed_point(lambda z: cell(z, x), torch.zeros(4, 8, dtype=DOUBLE))
        return z.square().mean()

    optimizer = torch.optim.SGD(cell.parameters(), 0.5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(float(backward(closure, cell.parameters())))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert price(Step(cell, closure, tuple(cell.parameters())))[0].saved_bytes > 0


def test_a_backward_can_run_twice_over_a_kept_graph() -> None:
    a = torch.tensor([0.5], requires_grad=True)
    z = fixed_point(lambda z: a * z + 1, torch.zeros(1), gradient=Implicit())
    (one,) = torch.autograd.grad(z, a, retain_graph=True)
    (two,) = torch.autograd.grad(z, a)
    assert torch.equal(one, two)


def test_what_wants_no_gradient_gets_no_graph() -> None:
    for policy in (Backprop(), Implicit(), OneStep()):
        assert not fixed_point(torch.cos, torch.ones(2), gradient=policy).requires_grad
    with torch.no_grad():
        a = torch.tensor([0.5], requires_grad=True)
        assert not fixed_point(lambda z: a * z, torch.ones(1)).requires_grad


def test_nested_states_come_back_nested() -> None:
    a = torch.tensor(0.5, requires_grad=True)
    start = {"a": torch.zeros(2, 1), "b": (torch.zeros(2, 2), torch.zeros(2, 3))}
    found = fixed_point(
        lambda s: {"a": a * s["a"] + 1, "b": (s["a"] + 0 * s["b"][0], 0.5 * s["b"][1] + a)}, start
    )
    assert found["b"][1].shape == (2, 3)
    (found["a"].sum() + found["b"][0].sum()).backward()
    assert a.grad is not None
    assert torch.allclose(a.grad, torch.tensor(2 * 4.0 + 4 * 4.0), rtol=1e-4)


def test_compiled_functions_inside() -> None:
    a = torch.tensor([0.5], requires_grad=True)
    cell = torch.compile(lambda z: a * z + 1, backend="aot_eager")
    fixed_point(cell, torch.zeros(1), gradient=Implicit()).backward()
    assert a.grad is not None
    assert torch.allclose(a.grad, torch.tensor([4.0]), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_dtypes(dtype: torch.dtype, solver: Any) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    a = torch.full((3, 2), 0.25, dtype=dtype, requires_grad=True)
    z = fixed_point(
        lambda z: a * z + 1,
        torch.zeros(3, 2, dtype=dtype),
        gradient=Implicit(solver, tolerance),
        tolerance=tolerance,
    )
    (found,) = torch.autograd.grad(z.sum(), a)
    assert found.dtype == dtype
    assert torch.allclose(found, torch.full_like(found, 16 / 9), rtol=10 * tolerance)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"gradient": Nudged(0.1)}, ArgumentError, r"minimize\(energy"),
        ({"gradient": Implicit}, ArgumentTypeError, "Make one"),
        ({"gradient": "implicit"}, ArgumentError, "OneStep"),
        ({"gradient": Backprop(), "solver": "anderson"}, ArgumentError, "anderson"),
        ({"solver": "newton"}, ArgumentError, "solver"),
        ({"tolerance": -1.0}, ArgumentError, "tolerance"),
        ({"max_steps": 1.5}, ArgumentTypeError, "max_steps"),
        ({"status": 1}, ArgumentTypeError, "status"),
    ],
    ids=["nudged", "class", "text", "unrolled anderson", "newton", "tolerance", "steps", "status"],
)
def test_wrong_arguments(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        fixed_point(torch.cos, torch.ones(2), **options)


@pytest.mark.parametrize(
    "fields", [{"solver": "cg"}, {"tolerance": None}, {"tolerance": 0.0}, {"max_steps": 0}], ids=str
)
def test_wrong_implicits(fields: dict[str, Any]) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=next(iter(fields))):
        Implicit(**fields)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda z: z[:1], ArgumentError),
        (lambda z: z.double(), ArgumentError),
        (lambda z: (z, z), ArgumentTypeError),
        (lambda z: 1.0, ArgumentTypeError),
        ("cos", ArgumentTypeError),
    ],
    ids=["shape", "dtype", "structure", "number", "text"],
)
def test_wrong_functions(function: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="function"):
        fixed_point(function, torch.ones(2, 2))


def test_what_diverges_or_oscillates_is_refused() -> None:
    for solver in ("iterate", "anderson"):
        with pytest.raises((NonFiniteError, ConvergenceError)):
            fixed_point(lambda z: z * z + 1, torch.ones(2, 2), solver=solver, max_steps=500)  # type: ignore[arg-type]
    with pytest.raises(ConvergenceError, match=r"residual .* after 50 steps, in 1 of 2 examples"):
        fixed_point(lambda z: torch.tensor([[1.0], [0.5]]) * z + 1, torch.zeros(2, 1), max_steps=50)
    with pytest.warns(ConvergenceWarning, match="residual"):
        fixed_point(lambda z: z + 1, torch.zeros(2, 1), max_steps=5, strict=False)
    with pytest.raises(NonFiniteError, match="rest state"):
        fixed_point(lambda z: z / 0, torch.ones(1), tolerance=None, max_steps=2)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    solver=st.sampled_from(SOLVERS),
    forward=st.sampled_from(["iterate", "anderson"]),
)
def test_any_shape(shape: list[int], solver: Any, forward: Any) -> None:
    a = torch.full(shape, 0.3, dtype=DOUBLE).requires_grad_()
    z = fixed_point(
        lambda z: a * z + 1,
        torch.zeros(shape, dtype=DOUBLE),
        gradient=Implicit(solver),
        solver=forward,
        tolerance=1e-10,
    )
    (found,) = torch.autograd.grad(z.sum(), a)
    assert torch.allclose(found, 1 / (1 - a.detach()) ** 2, rtol=1e-4)
