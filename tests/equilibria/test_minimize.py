"""Equilibrium propagation as a vector-Jacobian product: the exact checks."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_network import DOUBLE, Toy, error, slope

from thalweg.equilibria import (
    Activation,
    ConvergenceError,
    ConvergenceWarning,
    Descent,
    Implicit,
    Nudged,
    OneStep,
    Status,
    half_clip,
    minimize,
)
from thalweg.equilibria.nudged import contrast
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.ledger import cost, price, saved_bytes
from thalweg.noise import Key
from thalweg.step import Backprop, Step

STRENGTHS = [0.1, 0.03, 0.01, 0.001]
POLICIES = [Backprop(), Implicit(), OneStep(), Nudged(0.1)]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def exact(toy: Toy) -> Tensor:
    """Through 400 recorded steps."""
    return toy.gradient(Backprop(), tolerance=None)


@pytest.mark.parametrize(
    ("form", "order"), [("positive", 1), ("negative", 1), ("random", 1), ("centered", 2)]
)
def test_ep_exact_bias_slopes(toy: Toy, exact: Tensor, form: Any, order: int) -> None:
    """Spec: the error against autograd through 400 steps falls as the nudge (one-sided) or its square."""
    errors = [error(toy.gradient(Nudged(b, form)), exact) for b in STRENGTHS]
    assert abs(slope(errors, STRENGTHS) - order) < 0.05
    assert errors[-1] < (1e-2 if order == 1 else 1e-5)


def test_ep_exact_holomorphic_is_geometric_in_the_points(toy: Toy, exact: Tensor) -> None:
    points = [2, 4, 6, 8, 12]
    errors = [error(toy.gradient(Nudged(0.3, "holomorphic", points=n)), exact) for n in points]
    logs = torch.tensor(errors).log()
    rates = (logs[1:] - logs[:-1]) / (torch.tensor(points[1:]) - torch.tensor(points[:-1]))
    assert bool((rates < -0.25).all())
    assert errors[-1] < 1e-4
    # its order at fixed points: the error of N points falls as the N-th power
    strengths = [0.2, 0.1, 0.05]
    errors = [error(toy.gradient(Nudged(b, "holomorphic", points=4)), exact) for b in strengths]
    assert abs(slope(errors, strengths) - 4) < 0.4


def test_ep_exact_holomorphic_fails_outside_its_radius(toy: Toy, exact: Tensor) -> None:
    """Spec: beyond the radius of convergence more points do not help."""
    options = {"tolerance": None, "max_steps": 80}
    errors = [error(toy.gradient(Nudged(2.0, "holomorphic", points=n), **options), exact) for n in (4, 8, 12)]
    assert min(errors) > 0.1


def test_ep_exact_holomorphic_with_two_points_is_centered(toy: Toy) -> None:
    two, centered = (toy.gradient(Nudged(0.2, form, points=2)) for form in ("holomorphic", "centered"))
    assert error(two, centered) < 1e-14


def test_ep_exact_conjugate_points_say_the_same(toy: Toy) -> None:
    """The listed half of the circle weighs as much as the whole of it."""
    for count in (2, 3, 4, 5, 8):
        listed = contrast(Nudged(0.3, "holomorphic", points=count), torch.zeros(1), None)
        assert len(listed) == count // 2 + 1
        for power in range(count):
            taylor = sum((complex(w) * complex(at) ** power).real for at, w in listed)
            assert math.isclose(taylor, float(power == 1), abs_tol=1e-12)


def test_ep_exact_centered_is_the_mean_of_positive_and_negative(toy: Toy) -> None:
    one, other, both = (toy.gradient(Nudged(0.1, form)) for form in ("positive", "negative", "centered"))
    assert error((one + other) / 2, both) < 1e-12


def test_ep_exact_random_sign_averages_to_centered(toy: Toy) -> None:
    found = {}
    for seed in range(12):
        gradient = toy.gradient(Nudged(0.1, "random"), key=Key(seed))
        found[float(gradient.norm())] = gradient
    signs = list(found.values())
    assert len(signs) == 2
    assert error((signs[0] + signs[1]) / 2, toy.gradient(Nudged(0.1))) < 1e-12


@pytest.mark.parametrize(("strength", "limit"), [(1e-2, 4e-2), (1e-4, 4e-4), (1e-6, 4e-6)])
def test_gdu_identity(toy: Toy, strength: float, limit: float) -> None:
    """Spec: the k-th nudged step's increment is the gradient by the copy of the weights used k - 1 steps
    before the end, to first order in the nudge; 12 steps."""
    rest = tuple(part.detach() for part in toy.rest(Backprop()))
    nudge, through = [], []

    def cost(out: Tensor) -> Tensor:
        target = torch.eye(3, dtype=DOUBLE)[torch.arange(7) % 3]
        return 0.5 * (out - target).square().sum()

    for k in range(1, 13):
        policy = Nudged(strength, "positive", steps=k, normalize=False)
        nudge.append(toy.gradient(policy, cost, start=rest, tolerance=None, max_steps=1))
        through.append(toy.gradient(Backprop(), cost, start=rest, tolerance=None, max_steps=k))
    increments = [
        torch.stack([b - a for a, b in zip([torch.zeros_like(g[0]), *g], g)]) for g in (nudge, through)
    ]
    assert error(*increments) <= limit
    assert all(float(part.norm()) > 0 for part in increments[1])


@pytest.mark.parametrize(
    "loss", [None, lambda out: out.exp().mean(), lambda out: out.softmax(1)[:, 0].log().sum()]
)
def test_vjp_identity(toy: Toy, loss: Any) -> None:
    """Spec: the product with any cotangent, by weights and by the input, at slope 2 for the centred form."""
    wanted = toy.gradient(Backprop(), loss, tolerance=None)
    inputs = toy.x.numel()
    strengths = [1e-2, 1e-3, 1e-4]
    for part in (slice(None, -inputs), slice(-inputs, None)):
        errors = [error(toy.gradient(Nudged(b), loss)[part], wanted[part]) for b in strengths]
        assert abs(slope(errors, strengths) - 2) < 0.1
        assert errors[-1] < 1e-7


@pytest.mark.parametrize("solver", ["neumann", "anderson", "gmres"])
def test_implicit_is_the_exact_gradient(toy: Toy, exact: Tensor, solver: Any) -> None:
    status = Status()
    assert error(toy.gradient(Implicit(solver, 1e-12), status=status), exact) < 1e-10
    assert status.adjoint_residual is not None
    assert status.adjoint_residual.shape == (7,)
    assert bool((status.adjoint_residual <= 1e-12).all())
    assert 5 < status.adjoint_iterations < 100


def test_one_step_is_the_first_term_of_the_neumann_series(toy: Toy) -> None:
    rest = tuple(part.detach() for part in toy.rest(Backprop()))
    once = toy.gradient(Backprop(), start=rest, tolerance=None, max_steps=1)
    assert error(toy.gradient(OneStep()), once) < 1e-10


class Bowl:
    """E = (s - x)^T (s - x) / 2 + s^T A s / 2 - s^T (B x + c), with everything by hand."""

    def __init__(self, size: int = 4, batch: int = 3) -> None:
        g = torch.Generator().manual_seed(3)
        square = torch.randn(size, size, generator=g, dtype=DOUBLE)
        self.a = (square @ square.T / size).requires_grad_()
        self.b = torch.randn(size, size, generator=g, dtype=DOUBLE).requires_grad_()
        self.c = torch.randn(size, generator=g, dtype=DOUBLE).requires_grad_()
        self.x = torch.randn(batch, size, generator=g, dtype=DOUBLE).requires_grad_()
        self.v = torch.randn(batch, size, generator=g, dtype=DOUBLE)
        self.zero = torch.zeros(batch, size, dtype=DOUBLE)

    def energy(self, s: Tensor) -> Tensor:
        curved = 0.5 * (s - self.x).square() + 0.5 * s * (s @ self.a) - s * (self.x @ self.b.T + self.c)
        return curved.sum(1)

    def closed_form(self) -> list[Tensor]:
        """-v^T (d2E/ds2)^-1 d2E/dsdtheta, by every parameter."""
        a, b, x = self.a.detach(), self.b.detach(), self.x.detach()
        inverse = torch.linalg.inv(torch.eye(len(a), dtype=DOUBLE) + (a + a.T) / 2)
        s = (x @ b.T + self.c.detach() + x) @ inverse
        u = self.v @ inverse
        return [-(s.T @ u + u.T @ s) / 2, u.T @ x, u.sum(0), u @ b + u]

    def gradient(self, policy: Any) -> list[Tensor]:
        s = minimize(
            self.energy, self.zero, gradient=policy, relaxation=Descent(0.2), tolerance=1e-14, max_steps=4000
        )
        return list(torch.autograd.grad((self.v * s).sum(), [self.a, self.b, self.c, self.x]))


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_quadratic_centered_is_exact_at_every_strength(strength: float) -> None:
    bowl = Bowl()
    for found, wanted in zip(bowl.gradient(Nudged(strength)), bowl.closed_form()):
        assert error(found, wanted) < 1e-9


def test_quadratic_one_sided_is_exact_for_what_multiplies_the_state_linearly() -> None:
    bowl = Bowl()
    errors = [error(f, w) for f, w in zip(bowl.gradient(Nudged(1.0, "positive")), bowl.closed_form())]
    assert errors[0] > 1e-2  # A multiplies it twice
    assert max(errors[1:]) < 1e-9


@pytest.mark.parametrize(
    "policy", [Implicit("gmres", 1e-13), Implicit("anderson", 1e-12), Backprop()], ids=str
)
def test_quadratic_implicit_and_backprop_meet_the_closed_form(policy: Any) -> None:
    bowl = Bowl()
    for found, wanted in zip(bowl.gradient(policy), bowl.closed_form()):
        assert error(found, wanted) < 1e-9


def test_double_backward_is_right_or_refused() -> None:
    a = torch.tensor([0.7], dtype=DOUBLE, requires_grad=True)
    start = torch.zeros(1, dtype=DOUBLE)

    def first(policy: Any) -> Tensor:
        # s = a^2, so the second derivative of s by a is 2
        s = minimize(
            lambda s: (0.5 * s.square() - s * a.square()).sum(), start, gradient=policy, tolerance=1e-12
        )
        (slope,) = torch.autograd.grad(s.sum(), a, create_graph=True)
        return slope

    (second,) = torch.autograd.grad(first(Backprop()), a)
    assert math.isclose(float(second), 2.0, rel_tol=1e-9)
    for policy in (Implicit(), OneStep(), Nudged(0.1)):
        with pytest.raises(UnsupportedError, match="no second derivative"):
            torch.autograd.grad(first(policy), a)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_torch_func_transforms_are_refused(policy: Any) -> None:
    def loss(a: Tensor) -> Tensor:
        found: Tensor = minimize(
            lambda s: (0.5 * s.square() - s * a).sum(),
            torch.zeros(2),
            gradient=policy,
            tolerance=None,
            max_steps=3,
        )
        return found.sum()

    with pytest.raises(UnsupportedError, match=type(policy).__name__):
        torch.func.grad(loss)(torch.ones(2))


def test_zero_cost_gives_zero_update(toy: Toy) -> None:
    for form in ("positive", "negative", "centered", "holomorphic"):
        assert not toy.gradient(Nudged(0.1, form), lambda out: (out * 0).sum()).any()  # type: ignore[arg-type]


def test_a_frozen_unit_is_unmoved_by_its_own_nudge() -> None:
    bias = torch.tensor([0.3, 0.6], dtype=DOUBLE, requires_grad=True)

    def gradient(v: Tensor) -> Tensor:
        s = minimize(
            lambda s: tuple_energy(s, bias),
            (torch.zeros(1, 1, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE)),
            gradient=Nudged(0.1, normalize=False),
            relaxation=Descent(0.5, lower=(0.25, None), upper=(0.25, None)),
            tolerance=1e-12,
        )
        return torch.autograd.grad((torch.cat(s, 1) * v).sum(), bias)[0]

    def tuple_energy(s: tuple[Tensor, ...], bias: Tensor) -> Tensor:
        joint = torch.cat(s, 1)
        return (0.5 * joint.square() - joint * bias).sum(1) - 0.3 * s[0][:, 0] * s[1][:, 0]

    own = gradient(torch.tensor([[1.0, 0.0]], dtype=DOUBLE))
    both = gradient(torch.tensor([[1.0, 1.0]], dtype=DOUBLE))
    assert not own.any()
    assert torch.allclose(both, torch.tensor([0.0, 1.0], dtype=DOUBLE))


@pytest.mark.parametrize("rate", [0.3, 0.9, 1.9])
def test_energy_never_rises_below_twice_the_inverse_curvature(rate: float) -> None:
    bowl = Bowl()
    with torch.no_grad():
        largest = float(torch.linalg.eigvalsh(torch.eye(4, dtype=DOUBLE) + bowl.a).max())
        energies = [
            bowl.energy(
                minimize(
                    bowl.energy, bowl.zero, relaxation=Descent(rate / largest), tolerance=None, max_steps=n
                )
            )
            for n in range(1, 30)
        ]
    steps = torch.stack(energies).diff(dim=0)
    assert bool((steps <= 1e-12).all())
    assert bool((steps[0] < -1e-3).all())


def test_kept_bytes_do_not_grow_with_the_steps() -> None:
    toy = Toy()

    def kept(policy: Any, steps: int) -> int:
        return saved_bytes(lambda: toy.rest(policy, tolerance=None, max_steps=steps)[-1].sum())

    for policy in (Implicit(), OneStep(), Nudged(0.1), Nudged(0.1, "holomorphic", steps=20)):
        assert 0 < kept(policy, 5) == kept(policy, 50)
    assert kept(Nudged(0.1), 50) < kept(Implicit(), 50)
    assert kept(Backprop(), 50) > 8 * kept(Backprop(), 5)


def test_nothing_is_kept_alive_by_a_cycle() -> None:
    toy = Toy()
    gc.collect()
    gc.disable()
    try:
        for policy in (Implicit(), OneStep(), Nudged(0.1)):
            out = toy.rest(policy)
            watched = [weakref.ref(part.grad_fn) for part in out]
            del out
            assert not any(ref() is not None for ref in watched), policy
    finally:
        gc.enable()


def test_everything_closed_over_gets_its_gradient_whatever_it_is() -> None:
    """A leaf, the result of earlier operations, parameters; hooks fire once, `.grad` accumulates."""
    layer = torch.nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    scale = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    found = {}
    for policy in (Backprop(), Implicit(tolerance=1e-12), Nudged(0.01)):
        seen: list[Tensor] = []
        handle = layer.weight.register_hook(seen.append)
        hidden = torch.tanh(x) * scale
        s = minimize(
            lambda s, h=hidden: (0.5 * s.square() - s * layer(h)).sum(1),
            torch.zeros(5, 2, dtype=DOUBLE),
            gradient=policy,
            tolerance=1e-13,
        )
        for leaf in (x, scale, layer.weight, layer.bias):
            leaf.grad = torch.zeros_like(leaf)
        s.square().sum().backward()
        handle.remove()
        assert len(seen) == 1
        found[type(policy).__name__] = torch.cat(
            [leaf.grad.reshape(-1) for leaf in (x, scale, layer.weight, layer.bias) if leaf.grad is not None]
        )
    assert error(found["Implicit"], found["Backprop"]) < 1e-9
    assert error(found["Nudged"], found["Backprop"]) < 1e-9  # a quadratic energy


def test_examples_do_not_see_each_other() -> None:
    """The gradient of a batch is the sum of those of its examples, at any scale of the loss."""
    toy = Toy(batch=3)
    whole = toy.gradient(Nudged(0.1), lambda out: 1e-6 * (toy.v * out).sum())
    assert error(whole * 1e6, toy.gradient(Nudged(0.1))) < 1e-9
    one = torch.zeros(3, 1, dtype=DOUBLE)
    parts = []
    for index in range(3):
        mask = one.clone()
        mask[index] = 1
        parts.append(toy.gradient(Nudged(0.1), lambda out, mask=mask: (mask * toy.v * out).sum()))  # type: ignore[misc]
    assert error(torch.stack(parts).sum(0), toy.gradient(Nudged(0.1))) < 1e-9


def test_a_scalar_energy_is_one_example() -> None:
    bowl = Bowl()
    s = minimize(
        lambda s: bowl.energy(s).sum(),
        bowl.zero,
        gradient=Nudged(0.1),
        relaxation=Descent(0.2),
        tolerance=1e-13,
    )
    found = torch.autograd.grad((bowl.v * s).sum(), [bowl.a, bowl.x])
    for gradient, wanted in zip(found, (bowl.closed_form()[0], bowl.closed_form()[3])):
        assert error(gradient, wanted) < 1e-8


def test_cancelling_the_drift_helps_a_state_that_does_not_rest() -> None:
    toy = Toy()
    exact = toy.gradient(Backprop(), tolerance=None)
    options = {"tolerance": None, "max_steps": 4}
    plain, cancelled = (
        error(toy.gradient(Nudged(1e-3, "positive", steps=30, cancel_drift=c), **options), exact)
        for c in (False, True)
    )
    assert cancelled < 0.3 < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_dtypes(dtype: torch.dtype, policy: Any) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    if isinstance(policy, Implicit):
        policy = Implicit(tolerance=tolerance)
    x = torch.tensor([[0.2, 0.4], [0.6, 0.8]], dtype=dtype, requires_grad=True)
    s = minimize(
        lambda s: (0.5 * s.square() - s * x.sin()).sum(1),
        torch.zeros(2, 2, dtype=dtype),
        gradient=policy,
        relaxation=Descent(1.0),
        tolerance=tolerance,
    )
    s.sum().backward()
    assert s.dtype == dtype
    assert x.grad is not None
    assert torch.allclose(x.grad, x.detach().cos(), atol=10 * tolerance)


def test_autocast_of_the_forward_holds_in_the_backward() -> None:
    layer = torch.nn.Linear(8, 6)
    x = torch.randn(4, 8)
    for policy in (*POLICIES[:3], Nudged(1.0)):
        layer.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            s = minimize(
                lambda s: (0.5 * s.square() - s * layer(x)).sum(1),
                torch.zeros(4, 6),
                gradient=policy,
                relaxation=Descent(1.0),
            )
        s.sum().backward()
        assert layer.weight.grad is not None
        assert torch.allclose(layer.weight.grad, x.sum(0).expand(6, 8), atol=0.1), policy


def quadratic(s: Tensor) -> Tensor:
    return (0.5 * s.square()).sum(1)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"gradient": Nudged}, ArgumentTypeError, "Make one"),
        ({"gradient": "nudged"}, ArgumentError, "OneStep"),
        ({"tolerance": 0.0}, ArgumentError, "tolerance"),
        ({"max_steps": 0}, ArgumentError, "max_steps"),
        ({"relaxation": "descent"}, ArgumentTypeError, "relaxation"),
        ({"relaxation": Descent(lower=(0.0, 0.0))}, ArgumentError, "one entry per part"),
        ({"relaxation": Activation((torch.tanh, torch.tanh))}, ArgumentError, "one entry per part"),
        ({"status": {}}, ArgumentTypeError, "status"),
        ({"key": 3}, ArgumentTypeError, "key"),
    ],
    ids=["class", "text", "tolerance", "steps", "relaxation", "bounds", "activations", "status", "key"],
)
def test_wrong_arguments(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        minimize(quadratic, torch.zeros(2, 3), **options)


@pytest.mark.parametrize(
    ("energy", "kind", "match"),
    [
        (lambda s: 0.5 * s.square(), ArgumentError, r"shape \(2,\), or a scalar"),
        (lambda s: 3.0, ArgumentTypeError, "energy"),
        (lambda s: torch.zeros(2), ArgumentError, "depends on the state"),
        (lambda s: s.square().sum(1) * float("nan"), NonFiniteError, "nan"),
        ("energy", ArgumentTypeError, "energy"),
    ],
    ids=["per value", "a number", "constant", "nan", "text"],
)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_wrong_energies(policy: Any, energy: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        minimize(energy, torch.zeros(2, 3), gradient=policy)


def test_an_unused_part_of_the_state_is_named() -> None:
    with pytest.raises(ArgumentError, match="part 1 is unused"):
        minimize(lambda s: s[0].square().sum(1), (torch.zeros(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize(
    "start", [torch.zeros(2, 3, dtype=torch.int64), (), torch.zeros(0, 3), "zeros", 1.0], ids=str
)
def test_wrong_starts(start: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match="start"):
        minimize(quadratic, start)


@pytest.mark.parametrize(
    "fields",
    [
        {"strength": 0.0},
        {"strength": -0.1},
        {"strength": float("nan")},
        {"strength": "a lot"},
        {"strength": 0.1, "form": "two-sided"},
        {"strength": 0.1, "steps": 0},
        {"strength": 0.1, "points": 1},
        {"strength": 0.1, "normalize": 1},
        {"strength": 0.1, "cancel_drift": True},
    ],
    ids=str,
)
def test_wrong_nudges(fields: dict[str, Any]) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=list(fields)[-1]):
        Nudged(**fields)


@pytest.mark.parametrize(
    "energy", [lambda s: s.abs().square().sum(1), lambda s: (s.clamp(0, 1) ** 2).sum(1)], ids=["abs", "clip"]
)
def test_holomorphic_refuses_what_is_not(energy: Any) -> None:
    x = torch.rand(2, 3, requires_grad=True)
    s = minimize(
        lambda s: energy(s) + ((s - x) * (s - x)).sum(1),
        torch.zeros(2, 3),
        gradient=Nudged(0.1, "holomorphic"),
        relaxation=Descent(0.2),
    )
    with pytest.raises(UnsupportedError, match="holomorphic"):
        s.sum().backward()


def test_holomorphic_refuses_activations_and_bounds_that_clip() -> None:
    toy = Toy()
    for relaxation in (Activation(half_clip), Descent(0.1, 0.0, 1.0)):
        s = minimize(
            toy.energy,
            toy.zeros,
            gradient=Nudged(0.1, "holomorphic"),
            relaxation=relaxation,
            tolerance=None,
            max_steps=20,
        )
        with pytest.raises(UnsupportedError, match="holomorphic"):
            s[-1].sum().backward()


def test_the_status_counts_the_nudged_relaxations() -> None:
    toy, status = Toy(), Status()
    toy.gradient(Nudged(0.1), status=status)
    free, nudged = status.iterations, status.adjoint_iterations
    assert 10 < free < nudged < 3 * free
    assert status.residual is not None
    assert status.adjoint_residual is not None
    assert float(torch.maximum(status.residual, status.adjoint_residual).max()) <= 1e-13
    toy.gradient(Nudged(0.3, "holomorphic", points=6, steps=9), status=status)
    assert status.adjoint_iterations == 4 * 9


@pytest.mark.parametrize("policy", [*POLICIES, Nudged(0.1, "random"), Implicit("gmres")], ids=str)
def test_a_price_tells_the_bytes_before_anything_runs(policy: Any) -> None:
    def make() -> Step:
        layer, x, coupling = torch.nn.Linear(6, 5), torch.rand(4, 6), torch.full((5, 5), 0.02)

        def closure() -> Tensor:
            s: Tensor = minimize(
                lambda s: (0.5 * s.square() - s * layer(x) - s * (s @ coupling)).sum(1),
                torch.zeros(4, 5),
                gradient=policy,
                tolerance=None,
                max_steps=7,
            )
            return s.square().mean()

        return Step(layer, closure, tuple(layer.parameters()))

    told, real = price(make)[0], cost(make, repeats=0)
    assert told.saved_bytes == real.saved_bytes > 0
    assert told.operations >= real.operations > 0


def test_what_does_not_converge_is_refused_loudly() -> None:
    toy = Toy()
    with pytest.raises(ConvergenceError, match=r"residual .* in 7 of 7 examples"):
        toy.rest(Nudged(0.1), max_steps=2)
    with pytest.warns(ConvergenceWarning, match="residual"):
        toy.rest(Nudged(0.1), max_steps=2, strict=False)
    for solver in ("neumann", "anderson", "gmres"):
        with pytest.raises(ConvergenceError, match="adjoint"):
            toy.gradient(Implicit(solver, 1e-12, max_steps=3))  # type: ignore[arg-type]


def test_an_energy_that_draws_random_numbers_is_refused() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedError, match="random"):
        minimize(
            lambda s: (0.5 * s.square() - torch.dropout(s, 0.5, True) * x).sum(1),
            torch.zeros(2, 3),
            gradient=Nudged(0.1),
            tolerance=None,
            max_steps=3,
        )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bad=st.sampled_from([float("nan"), float("inf"), None]),
)
def test_any_shapes_and_non_finite_cotangents(batch: int, sizes: list[int], bad: float | None) -> None:
    x = torch.rand(batch, 1, dtype=DOUBLE).requires_grad_()
    start = [torch.zeros(batch, n, dtype=DOUBLE) for n in sizes]

    def energy(parts: list[Tensor]) -> Tensor:
        terms = [(0.5 * s.square() - s * x).sum(1) for s in parts]
        return sum(terms[1:], terms[0])

    for policy in (Implicit(), Nudged(0.1)):
        s = minimize(energy, start, gradient=policy, tolerance=1e-10)
        assert isinstance(s, list)
        loss = sum(part.sum() for part in s)
        if bad is not None:
            with pytest.raises(NonFiniteError):
                torch.autograd.grad(loss * bad, x)
        else:
            (gradient,) = torch.autograd.grad(loss, x)
            assert torch.allclose(gradient, torch.full_like(x, float(sum(sizes))), rtol=1e-5)
