"""`integrate`: values, exact gradients under every policy, captured tensors, and bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.ledger import cost, price, saved_bytes
from thalweg.rollouts.backsolve import Backsolve
from thalweg.rollouts.checkpointed import Checkpointed
from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.ode import METHODS, integrate
from thalweg.rollouts.reversible import Reversible
from thalweg.rollouts.tableaus import Tableau
from thalweg.step import Backprop

KUTTA3 = Tableau("kutta3", ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3)
HEUN3 = Tableau("heun3", ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3)  # b_2 = 0
MIDPOINT = Tableau("midpoint", ((), (0.5,)), (0.0, 1.0), 2)  # b_1 = 0
FIXED = ["euler", "heun", "rk4", "adams_bashforth_2", KUTTA3, HEUN3, MIDPOINT]
EXACT = [
    *[(m, p) for m in [*FIXED, "dopri5"] for p in (Discrete(), Discrete(recompute="stage"))],
    *[(m, Checkpointed(slots=3)) for m in [*FIXED, "reversible_heun"]],
    ("reversible_heun", Reversible()),
]
SWEPT = [
    ("rk4", Discrete()),
    ("reversible_heun", Reversible()),
    ("heun", Backsolve()),
    ("dopri5", Discrete()),
]


def name(value: object) -> str:
    return value.name if isinstance(value, Tableau) else str(value)


class Net(nn.Module):
    """A small field of (x, t) with a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.layers(torch.cat([x, t.expand(len(x), 1)], 1))
        return result


def problem(method: Any, gradient: Any, between: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Values and all gradients of one solve whose loss looks at every output time."""
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    condition = weight.sin()  # the result of an operation, captured as it is

    def field(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t) * condition + 0.1 * weight

    times = torch.tensor([1.0, 0.9, 0.4, 0.1, 0.0], dtype=torch.float64)
    steps = None if method == "dopri5" else between
    y = integrate(field, x, times, method=method, gradient=gradient, steps_between=steps)
    loss = (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)).sum()
    wanted = [x, weight, condition, *net.parameters()]
    return y.detach(), list(torch.autograd.grad(loss, wanted))


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("method", "gradient"), EXACT, ids=name)
def test_exact_policies_equal_backprop(method: Any, gradient: Any) -> None:
    y, found = problem(method, gradient)
    reference, wanted = problem(method, Backprop())
    assert torch.equal(y, reference)
    assert distance(found, wanted) < 1e-10


def test_reversible_steps_are_undone_to_round_off() -> None:
    """Spec: back at the start after hundreds of steps, and the gradient still that of autograd."""
    y, found = problem("reversible_heun", Reversible(), between=100)
    reference, wanted = problem("reversible_heun", Backprop(), between=100)
    assert torch.equal(y, reference)
    assert distance(found, wanted) < 1e-10


@pytest.mark.parametrize("method", [*METHODS, KUTTA3, HEUN3, MIDPOINT], ids=name)
def test_values_converge_at_the_order_of_the_method(method: Any) -> None:
    """dx/dt = x cos t, whose solution is x0 exp(sin t)."""
    x = torch.tensor([1.0, -0.5], dtype=torch.float64)
    errors = []
    for n in (10, 20, 40):
        options = {"rtol": 10.0 ** (-n / 5), "atol": 1e-12} if method == "dopri5" else {"steps_between": n}
        times = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
        y = integrate(lambda x, t: x * t.cos(), x, times, method=method, **options)
        errors.append(float((y - x * times.sin().exp()[:, None]).abs().max()))
    if method == "dopri5":
        assert errors[0] < 1e-1
        assert errors[1] < 1e-3
        assert errors[2] < 1e-7
        return
    order = {"adams_bashforth_2": 2, "reversible_heun": 2}.get(method) if isinstance(method, str) else None
    tableau = METHODS[method] if isinstance(method, str) else method
    expected = order or (tableau.order if isinstance(tableau, Tableau) else 0)
    slope = torch.tensor(errors[1] / errors[2]).log2()
    assert abs(float(slope) - expected) < 0.35


@pytest.mark.parametrize(("method", "gradient"), [*SWEPT, ("adams_bashforth_2", Discrete())], ids=name)
def test_tuple_states_and_increasing_times(method: str, gradient: Any) -> None:
    def solve(gradient: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        torch.manual_seed(1)
        q = torch.randn(4, dtype=torch.float64, requires_grad=True)
        p = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        stiffness = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

        def field(state: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
            return state[1].view(4) * (1 + t), -stiffness * state[0].view(2, 2).sin()

        times = torch.linspace(0, 1, 33, dtype=torch.float64)
        out = integrate(field, (q, p), times, method=method, gradient=gradient)
        return out, torch.autograd.grad(out[0].square().sum() + out[1][-1].sum(), [q, p, stiffness])

    out, found = solve(gradient)
    _, wanted = solve(Backprop())
    assert isinstance(out, tuple)
    assert (out[0].shape, out[1].shape) == ((33, 4), (33, 2, 2))
    bound = 1e-2 if isinstance(gradient, Backsolve) else 1e-10
    assert distance(list(found), list(wanted)) < bound


@pytest.mark.parametrize(("method", "gradient"), SWEPT, ids=name)
def test_a_field_that_uses_other_tensors_later_loses_none(method: str, gradient: Any) -> None:
    def solve(gradient: Any) -> tuple[Tensor, ...]:
        early, late = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.7))
        table = torch.stack([early * 2, late])  # below, a leaf and a result of it are captured together

        def field(x: Tensor, t: Tensor) -> Tensor:
            return x * (early if float(t) < 0.5 else late) + table[1]

        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        times = torch.linspace(0, 1, 41, dtype=torch.float64)
        y = integrate(field, x, times, method=method, gradient=gradient)
        return torch.autograd.grad(y[-1].sum(), [x, early, late, table], allow_unused=True)

    found, wanted = solve(gradient), solve(Backprop())
    # the jump in time lowers the order of the adjoint's own solve
    bound = 5e-2 if isinstance(gradient, Backsolve) else 1e-10
    assert distance(list(found), list(wanted)) < bound


@pytest.mark.parametrize(("method", "gradient"), SWEPT, ids=name)
def test_a_field_may_return_what_it_captured(method: str, gradient: Any) -> None:
    for make in (lambda w: w, lambda w: w * 2):
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        captured = make(w)
        times = torch.linspace(0, 2, 30, dtype=torch.float64)
        start = torch.zeros(2, dtype=torch.float64)
        y = integrate(lambda x, t, c=captured: c, start, times, method=method, gradient=gradient)
        y[-1].sum().backward()
        assert w.grad is not None
        assert torch.allclose(w.grad, torch.full_like(w, 2.0 if make(1) == 1 else 4.0))


@pytest.mark.parametrize("kind", ["argument", "copy", "func"])
@pytest.mark.parametrize(("method", "gradient"), SWEPT[:3], ids=name)
def test_a_field_that_is_itself_a_gradient(method: str, gradient: Any, kind: str) -> None:
    energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def field(x: Tensor, t: Tensor) -> Tensor:
        if kind == "func":
            return -torch.func.grad(lambda z: energy(z).sum())(x)
        with torch.enable_grad():
            # the copy is a leaf of the field's own, which is no captured tensor
            point = x.detach().requires_grad_() if kind == "copy" else x
            point = point if point.requires_grad else point.requires_grad_()
            return -torch.autograd.grad(energy(point).sum(), point, create_graph=True)[0] - x

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0, 1, 40, dtype=torch.float64)
    wanted = [x, *list(energy.parameters())[:3]]
    found = []
    for policy in (gradient, Backprop()):
        y = integrate(field, x, times, method=method, gradient=policy)
        found.append(list(torch.autograd.grad(y[-1].square().sum(), wanted)))
    assert distance(*found) < (1e-3 if isinstance(gradient, Backsolve) else 1e-10)


def test_backward_twice_and_a_parameter_changed_between() -> None:
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x, times = torch.ones(2, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    for method, gradient in SWEPT:
        loss = integrate(lambda x, t: w * x, x, times, method=method, gradient=gradient)[-1].sum()
        first, second = (torch.autograd.grad(loss, w, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        with torch.no_grad():
            w.add_(1.0)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_backprop_stays_inside_torch_func() -> None:
    times = torch.linspace(0, 1, 9, dtype=torch.float64)

    def loss(x: Tensor, times: Tensor) -> Tensor:
        return integrate(lambda x, t: -(x**2) * t, x, times, method="rk4")[-1].sum()

    x = torch.rand(3, 2, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(x, times)
    assert torch.allclose(each, torch.func.grad(loss)(x, times), rtol=1e-12)
    # forward mode by the times, against reverse mode
    direction = torch.randn(9, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda t: loss(x, t), (times,), (direction,))
    assert torch.allclose(tangent, torch.func.grad(loss, argnums=1)(x, times) @ direction, rtol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(times, direction)
        assert torch.allclose(
            torch.autograd.forward_ad.unpack_dual(loss(x, dual)).tangent, tangent, rtol=1e-12
        )


def test_hooks_of_a_parameter_see_its_whole_gradient_once() -> None:
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    w.register_hook(lambda g: seen.append(g) or 0.5 * g)
    x = torch.ones(1, dtype=torch.float64)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    integrate(lambda x, t: w * x, x, times, gradient=Discrete())[-1].sum().backward()
    assert len(seen) == 1
    expected = (1 + 0.5 / 4) ** 3  # of (1 + w / 4)^4
    assert torch.allclose(seen[0], torch.tensor(expected, dtype=torch.float64))
    assert w.grad is not None
    assert torch.allclose(w.grad, 0.5 * seen[0])


@pytest.mark.parametrize(("method", "gradient"), SWEPT, ids=name)
def test_a_second_derivative_is_refused_in_every_way_of_asking(method: str, gradient: Any) -> None:
    times = torch.linspace(0, 1, 9, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return integrate(lambda x, t: -(x**2), x, times, method=method, gradient=gradient)[-1].sum()

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(first.sum(), x)
    loss(x).backward(create_graph=True)
    assert x.grad is not None
    with pytest.raises(UnsupportedError, match="second derivative"):
        x.grad.sum().backward()
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())


def test_checkpoints_and_backprop_have_second_derivatives() -> None:
    times = torch.linspace(0, 1, 9, dtype=torch.float64)

    def loss(x: Tensor, gradient: Any) -> Tensor:
        return integrate(lambda x, t: -(x**2), x, times, method="rk4", gradient=gradient)[-1].sum()

    second = []
    for gradient in (Backprop(), Checkpointed(slots=2)):
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(loss(x, gradient), x, create_graph=True)
        second.append(torch.autograd.grad(first.sum(), x)[0])
    assert torch.allclose(second[0], second[1], rtol=1e-12)
    nested = torch.func.grad(lambda x: torch.func.grad(lambda y: loss(y, Backprop()))(x).sum())
    assert torch.allclose(nested(torch.ones(2, dtype=torch.float64)), second[0], rtol=1e-12)


@pytest.mark.parametrize("method", ["euler", "rk4", "adams_bashforth_2"])
def test_dropout_is_replayed_with_the_same_bits(method: str) -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    times = torch.linspace(0, 1, 8, dtype=torch.float64)
    found = []
    for gradient in (Backprop(), Discrete(), Discrete(recompute="stage")):
        torch.manual_seed(3)
        y = integrate(lambda x, t: net(x), x, times, method=method, gradient=gradient)
        after = torch.rand(1)
        found.append([y.detach(), after, *torch.autograd.grad(y[-1].square().sum(), [*net.parameters()])])
    assert all(torch.allclose(a, b, rtol=1e-10) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize(
    ("method", "gradient"),
    [("reversible_heun", Reversible()), ("heun", Backsolve()), ("dopri5", Discrete())],
    ids=name,
)
def test_dropout_is_refused_where_it_cannot_be_replayed(method: str, gradient: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(UnsupportedError, match="random numbers"):
        integrate(
            lambda x, t: net(x), torch.ones(2, 3), torch.linspace(0, 1, 8), method=method, gradient=gradient
        )


def test_running_statistics_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x, times = torch.randn(4, 3), torch.linspace(0, 1, 3)
    with pytest.raises(UnsupportedError, match="batch norm"):
        integrate(lambda x, t: net(x), x, times, gradient=Discrete())
    net.eval()
    integrate(lambda x, t: net(x), x, times, gradient=Discrete())


def test_autocast_of_the_forward_is_that_of_the_backward() -> None:
    net = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    times = torch.linspace(0, 1, 6)
    found = []
    for gradient in (Backprop(), Discrete()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = integrate(lambda x, t: net(x).tanh(), x, times, method="heun", gradient=gradient)
        found.append([y.detach(), *torch.autograd.grad(y[-1].sum(), [x, net.weight])])
    assert torch.equal(found[0][0], found[1][0])
    # autograd sums a part of the weight's gradient in bfloat16, the sweep all of it in float32
    assert all(float((a - b).norm() / a.norm()) < 2**-7 for a, b in zip(*found))


def kept(method: str, gradient: Any, steps: int) -> int:
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 64))
    x = torch.randn(8, 64)
    times = torch.tensor([0.0, 1.0])

    def run() -> Tensor:
        return integrate(
            lambda x, t: net(x), x, times, method=method, gradient=gradient, steps_between=steps
        )[-1].sum()

    return saved_bytes(run, net)


def test_kept_bytes() -> None:
    state = 8 * 64 * 4
    assert kept("reversible_heun", Reversible(), 20) == kept("reversible_heun", Reversible(), 200)
    assert kept("heun", Backsolve(restore="solve"), 20) == kept("heun", Backsolve(restore="solve"), 200)
    for method in ("euler", "rk4", "adams_bashforth_2"):
        assert kept(method, Discrete(), 50) - kept(method, Discrete(), 20) == 30 * state
    assert kept("euler", Discrete(), 50) < 0.1 * kept("euler", Backprop(), 50)


def test_dense_output_is_its_own_store() -> None:
    """With an output at every step, what is kept is what was handed out."""
    w, x = torch.ones(64, requires_grad=True), torch.ones(64)
    times = torch.linspace(0, 1, 101)
    outputs = 101 * 64 * 4

    def run() -> Tensor:
        return integrate(lambda x, t: w * x, x, times, method="rk4", gradient=Discrete()).square().sum()

    # the square keeps the outputs too
    assert saved_bytes(run) == outputs


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        ("heun", Backprop()),
        ("heun", Discrete()),
        ("heun", Checkpointed(slots=3)),
        ("adams_bashforth_2", Discrete()),
        ("heun", Backsolve(restore="solve")),
        ("reversible_heun", Reversible()),
    ],
    ids=name,
)
def test_a_price_under_fake_tensors_is_the_cost(method: str, gradient: Any) -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    x, times = torch.randn(8, 16), torch.linspace(0, 1, 3)

    def closure() -> Tensor:
        y = integrate(lambda x, t: net(x), x, times, method=method, gradient=gradient, steps_between=20)
        return y[-1].square().mean()

    step = (net, closure, list(net.parameters()))
    told, counted = price(step)[0], cost(step, repeats=0)
    assert (told.saved_bytes, told.peak_bytes) == (counted.saved_bytes, counted.peak_bytes)
    assert told.operations == counted.operations


@pytest.mark.parametrize(("method", "gradient"), SWEPT[:2], ids=name)
@pytest.mark.parametrize("derived", [False, True])
def test_a_compiled_network(method: str, gradient: Any, derived: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    compiled = torch.compile(net, backend="aot_eager")
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x, times = torch.randn(4, 3, dtype=torch.float64), torch.linspace(0, 1, 30, dtype=torch.float64)
    found = []
    for run, policy in ((net, Backprop()), (compiled, gradient)):
        scale = weight.sin() if derived else weight
        y = integrate(lambda x, t, run=run, s=scale: run(x) * s, x, times, method=method, gradient=policy)
        found.append(torch.autograd.grad(y[-1].square().sum(), [weight, *net.parameters()]))
    assert distance(list(found[1]), list(found[0])) < 1e-10


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(slots=2)], ids=name)
def test_times_get_a_gradient_where_it_is_promised(gradient: Any) -> None:
    """d x(T) / d T is the slope at T, up to the error of the method."""
    x = torch.ones(1, dtype=torch.float64)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = integrate(lambda x, t: x * t.cos(), x, times, method="rk4", gradient=gradient, steps_between=20)
    (found,) = torch.autograd.grad(y[-1].sum(), times)
    value = times[1].sin().exp()
    expected = torch.stack([-value * times[0].cos(), value * times[1].cos()]).detach()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("method", "gradient"), [*SWEPT, ("dopri5", Backprop())], ids=name)
def test_times_that_require_grad_are_refused_elsewhere(method: str, gradient: Any) -> None:
    times = torch.linspace(0, 1, 3, requires_grad=True)
    with pytest.raises(ArgumentError, match="times"):
        integrate(lambda x, t: -x, torch.ones(1), times, method=method, gradient=gradient)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"field": 3}, ArgumentTypeError, "field"),
    ({"field": lambda x, t: x[:1]}, ArgumentError, "field"),
    ({"field": lambda x, t: (x,)}, ArgumentTypeError, "field"),
    ({"field": lambda x, t: x / 0}, NonFiniteError, "times"),
    ({"state": torch.ones(2, dtype=torch.int64)}, ArgumentTypeError, "state"),
    ({"state": ()}, ArgumentTypeError, "state"),
    ({"state": [torch.ones(2)]}, ArgumentTypeError, "state"),
    ({"times": [0.0, 1.0]}, ArgumentTypeError, "times"),
    ({"times": torch.tensor([0.0])}, ArgumentError, "times"),
    ({"times": torch.tensor([0.0, 1.0, 0.5])}, ArgumentError, "times"),
    ({"times": torch.tensor([0.0, float("nan")])}, NonFiniteError, "times"),
    ({"method": "rk5"}, ArgumentError, "method"),
    ({"method": 4}, ArgumentTypeError, "method"),
    ({"gradient": Discrete}, ArgumentTypeError, "gradient"),
    ({"gradient": "discrete"}, ArgumentTypeError, "gradient"),
    ({"gradient": Reversible()}, ArgumentError, "gradient"),
    ({"gradient": Discrete(), "method": "reversible_heun"}, ArgumentError, "gradient"),
    ({"gradient": Backsolve(), "method": "reversible_heun"}, ArgumentError, "gradient"),
    ({"gradient": Checkpointed(slots=2), "method": "dopri5"}, ArgumentError, "gradient"),
    ({"steps_between": 0}, ArgumentError, "steps_between"),
    ({"steps_between": 2, "method": "dopri5"}, ArgumentError, "steps_between"),
    ({"rtol": 1e-3}, ArgumentError, "rtol"),
    ({"rtol": 0.0, "method": "dopri5"}, ArgumentError, "rtol"),
]


@pytest.mark.parametrize(("wrong", "error", "argument"), BAD)
def test_bad_input_is_refused_by_name(wrong: dict[str, Any], error: type[Exception], argument: str) -> None:
    good: dict[str, Any] = {
        "field": lambda x, t: -x,
        "state": torch.ones(2),
        "times": torch.linspace(0, 1, 3),
    }
    with pytest.raises(error, match=argument):
        integrate(**(good | wrong))


def test_bad_policies_and_tableaus() -> None:
    makers: list[Callable[[], object]] = [
        lambda: Discrete(recompute="all"),  # type: ignore[arg-type]
        lambda: Backsolve(restore="never"),  # type: ignore[arg-type]
        lambda: Tableau("x", ((),), (2.0,), 1),
        lambda: Tableau("x", ((0.5,),), (1.0,), 1),
        lambda: Tableau("x", ((),), (1.0,), 1, error=(0.5,)),
    ]
    for make in makers:
        with pytest.raises(ArgumentError):
            make()


def test_a_solution_that_runs_away_is_caught() -> None:
    times = torch.linspace(0, 20, 30)
    for method in ("euler", "dopri5"):
        with pytest.raises((NonFiniteError, ArgumentError)):
            integrate(lambda x, t: x**3, torch.full((1,), 2.0), times, method=method)


@pytest.mark.filterwarnings("ignore:Reversible:RuntimeWarning")  # three digits of bfloat16 do drift
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    nodes=st.integers(2, 6),
    backwards=st.booleans(),
)
def test_shapes_and_dtypes(shape: list[int], dtype: torch.dtype, nodes: int, backwards: bool) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    times = torch.linspace(0, 1, nodes)
    times = times.flip(0) if backwards else times
    for method, gradient in [("heun", Backprop()), ("heun", Discrete()), ("reversible_heun", Reversible())]:
        with torch.no_grad():
            plain = integrate(lambda x, t: -x * t, x, times, method=method, gradient=gradient)
        y = integrate(lambda x, t: -x * t, x, times, method=method, gradient=gradient)
        assert y.shape == (nodes, *shape)
        assert y.dtype == dtype
        assert torch.equal(y, plain)
        (found,) = torch.autograd.grad(y[-1].sum(), x)
        assert found.shape == x.shape


def test_nothing_to_differentiate_leaves_no_graph() -> None:
    x, times = torch.ones(2), torch.linspace(0, 1, 4)
    assert not integrate(lambda x, t: -x, x, times, gradient=Discrete()).requires_grad
