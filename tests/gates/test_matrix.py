"""Every gate and straight-through under every transform, dtype and way of use that the docstrings promise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from thalweg import gates
from thalweg.errors import UnsupportedError

LIMIT = 2.0


@dataclass(frozen=True)
class Case:
    """A gate, its value, and what it should do to a cotangent, written in plain torch."""

    run: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]
    linear: bool = True
    # without the tangent of the gate itself: rules for cotangents let tangents pass
    tangent_passes: bool = False


def same(x: Tensor) -> Tensor:
    return x


def step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def by_infinity(x: Tensor, g: Tensor) -> Tensor:
    return g * (LIMIT / g.abs().amax(-1, keepdim=True)).clamp(max=1)


def by_length(x: Tensor, g: Tensor) -> Tensor:
    return g * (LIMIT / g.norm(dim=-1, keepdim=True)).clamp(max=1)


def by_sigmoid(x: Tensor, g: Tensor) -> Tensor:
    return g * torch.sigmoid(x) * torch.sigmoid(-x)


def by_atan(x: Tensor, g: Tensor) -> Tensor:
    return g / (1 + (torch.pi * x) ** 2)


def by_fast_sigmoid(x: Tensor, g: Tensor) -> Tensor:
    return g / (1 + 2 * x.abs()) ** 2


def by_triangle(x: Tensor, g: Tensor) -> Tensor:
    # not relu(...) * g: the test's point at infinity would make it -0 there
    return g * torch.where(x.abs() < 2, 1 - x.abs() / 2, 0.0)


def by_steep_sigmoid(x: Tensor, g: Tensor) -> Tensor:
    return g * 1.5 * torch.sigmoid(1.5 * x) * torch.sigmoid(-1.5 * x)


def clipping(**options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: gates.clip(x, LIMIT, **options)


CASES = {
    "clip by value": Case(clipping(per="value"), same, lambda x, g: g.clamp(-LIMIT, LIMIT), False, True),
    "clip by pixel": Case(clipping(per="pixel", dim=-1), same, by_infinity, False, True),
    "clip by pixel, l2": Case(clipping(dim=-1, norm="l2"), same, by_length, False, True),
    "clip by tensor, l2": Case(
        clipping(per="tensor", norm="l2"), same, lambda x, g: g * (LIMIT / g.norm()).clamp(max=1), False, True
    ),
    "clip by sample": Case(
        clipping(per="sample"),
        same,
        lambda x, g: (
            g * (LIMIT / g.abs().reshape(len(g), -1).amax(1).reshape(-1, *[1] * (g.ndim - 1))).clamp(max=1)
        ),
        False,
        True,
    ),
    "normalize": Case(
        clipping(mode="normalize", dim=-1),
        same,
        lambda x, g: g * LIMIT / (g.abs().amax(-1, keepdim=True) + LIMIT),
        False,
        True,
    ),
    "scale": Case(lambda x: gates.scale(x, 0.3), same, lambda x, g: 0.3 * g),
    "scale by a tensor": Case(
        lambda x: gates.scale(x, torch.tensor([0.3], dtype=torch.float64)), same, lambda x, g: 0.3 * g
    ),
    "reverse": Case(lambda x: gates.reverse(x, 2.0), same, lambda x, g: -2 * g),
    "stop a part": Case(lambda x: gates.stop(x, 0.75), same, lambda x, g: 0.25 * g),
    "straight-through": Case(lambda x: gates.straight_through(x, step(x)), step, lambda x, g: g),
    "straight-through, sigmoid": Case(
        lambda x: gates.straight_through(x, step(x), slope="sigmoid"), step, by_sigmoid
    ),
    "round": Case(gates.round, torch.round, lambda x, g: g),
    "sign": Case(gates.sign, lambda x: 2 * (x >= 0).to(x.dtype) - 1, lambda x, g: g),
    "threshold": Case(gates.threshold, step, lambda x, g: g),
    "spike, atan": Case(lambda x: gates.threshold(x, "atan", 2.0), step, by_atan),
    "spike, fast": Case(lambda x: gates.threshold(x, "fast_sigmoid", 2.0), step, by_fast_sigmoid),
    "spike, triangle": Case(lambda x: gates.threshold(x, "triangle", 0.5), step, by_triangle),
    "spike, steep": Case(
        lambda x: gates.threshold(x, "sigmoid", torch.tensor([1.5], dtype=torch.float64)),
        step,
        by_steep_sigmoid,
    ),
}
# functions whose first derivative is the gate's slope, where that is not constant
STAND_INS: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through, sigmoid": torch.sigmoid,
    "spike, atan": lambda x: torch.atan(torch.pi * x) / torch.pi,
    "spike, fast": lambda x: x / (1 + 2 * x.abs()),
    "spike, triangle": lambda x: torch.where(x.abs() < 2, x - x * x.abs() / 4, torch.sign(x)),
    "spike, steep": lambda x: torch.sigmoid(1.5 * x),
}
each = pytest.mark.parametrize("name", CASES)
SHAPE = (4, 3, 5)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def data(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A point and a cotangent, some of whose pixels lie above the limit and some below."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    spread = torch.rand(*SHAPE[:-1], 1, generator=generator, dtype=torch.float64) * 4
    cotangent = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * spread
    return x.to(device, dtype), cotangent.to(device, dtype)


def check(name: str, loss: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]) -> None:
    """The gradient of `loss(gate, x, weight)` at x is what the case says it should be."""
    x, weight = data()
    leaf = x.clone().requires_grad_()
    loss(CASES[name].run, leaf, weight).backward()
    torch.testing.assert_close(leaf.grad, CASES[name].pull(x, weight))


def pulled(gate: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    return (gate(x) * weight).sum()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_bit_for_bit_and_gradient_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, weight = data(dtype)
    x[0, 0, 0], x[0, 0, 1] = float("inf"), -0.0
    leaf = x.clone().requires_grad_()
    out = case.run(leaf)
    expected = case.value(x)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())
    out.backward(weight)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(leaf.grad.double(), case.pull(x.double(), weight.double()), **tolerance)


@each
def test_second_derivative_is_right_or_refused_in_all_three_ways(name: str) -> None:
    case = CASES[name]
    x, weight = data()
    leaf = x.clone().requires_grad_()

    def squared(y: Tensor) -> Tensor:
        return (case.run(torch.sin(y)) ** 2 * weight).sum()

    def through_graph() -> Tensor:
        (first,) = torch.autograd.grad(squared(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.sum(), leaf)[0]

    def through_backward() -> Tensor:
        squared(leaf).backward(create_graph=True)
        first, leaf.grad = leaf.grad, None
        first.sum().backward()
        return leaf.grad

    def through_func() -> Tensor:
        return grad(lambda y: grad(squared)(y).sum())(x)

    ways = [through_graph, through_backward, through_func]
    if not case.linear:
        for way in ways:
            with pytest.raises(UnsupportedError, match="second derivative"):
                way()
        return

    # the stand-in whose ordinary derivatives the gate promises: value and slope written with detach
    def stand_in(y: Tensor) -> Tensor:
        u = torch.sin(y)
        smooth = STAND_INS.get(name, lambda u: case.pull(u.detach(), torch.ones_like(u)) * u)(u)
        return ((case.value(u).detach() + smooth - smooth.detach()) ** 2 * weight).sum()

    (first,) = torch.autograd.grad(stand_in(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), leaf)
    for way in ways:
        torch.testing.assert_close(way(), expected)


@each
def test_gradcheck_of_the_cotangent_rule(name: str) -> None:
    case = CASES[name]
    x, weight = data()
    # a gate's gradient is not the slope of its value: what can be checked numerically is the rule it replaces
    leaf = x.clone().requires_grad_()
    out = case.run(leaf)
    columns = torch.autograd.grad(out, leaf, torch.stack([weight, 2 * weight]), is_grads_batched=True)[0]
    torch.testing.assert_close(columns[0], case.pull(x, weight))
    torch.testing.assert_close(columns[1], case.pull(x, 2 * weight))


@pytest.mark.parametrize("name", ["round", "straight-through"])
def test_gradgradcheck_where_the_gradient_has_a_slope(name: str) -> None:
    x, _ = data()
    leaf = x[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(CASES[name].run, leaf)


def test_gradgradcheck_with_the_sigmoid_slope() -> None:
    x, _ = data()
    leaf = x[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(CASES["straight-through, sigmoid"].run, leaf)


@pytest.mark.parametrize("name", ["scale", "reverse", "stop a part"])
def test_gradgradcheck_of_linear_gates(name: str) -> None:
    x, _ = data()
    assert torch.autograd.gradgradcheck(CASES[name].run, x[0].clone().requires_grad_())


@pytest.mark.parametrize("per", ["value", "pixel", "sample", "tensor"])
def test_gradcheck_of_a_clip_that_never_clips_in_every_mode(per: str) -> None:
    x, _ = data()
    gate = clipping(per=per, norm="l2")
    leaf = (x[0] / 10).clone().requires_grad_()

    def run(y: Tensor) -> Tensor:
        return gate(y * 0.1)

    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(run, leaf, **modes)


@each
def test_jvp(name: str) -> None:
    case = CASES[name]
    x, tangent = data()
    value, moved = jvp(case.run, (x,), (tangent,))
    assert torch.equal(value, case.value(x))
    torch.testing.assert_close(moved, tangent if case.tangent_passes else case.pull(x, tangent))


def stacked_pull(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([case.pull(one, each) for one, each in zip(x, weight)])


@each
def test_vmap_of_grad_and_grad_of_vmap(name: str) -> None:
    case = CASES[name]
    x, weight = data()
    expected = stacked_pull(case, x, weight)

    def loss(one: Tensor, each: Tensor) -> Tensor:
        return pulled(case.run, one, each)

    torch.testing.assert_close(vmap(case.run)(x), case.value(x))
    torch.testing.assert_close(vmap(grad(loss))(x, weight), expected)
    torch.testing.assert_close(grad(lambda y: vmap(loss)(y, weight).sum())(x), expected)
    leaf = x.clone().requires_grad_()
    vmap(loss, in_dims=(1, 1))(leaf, weight).sum().backward()
    torch.testing.assert_close(
        leaf.grad, stacked_pull(case, x.transpose(0, 1), weight.transpose(0, 1)).transpose(0, 1)
    )


@each
def test_compiled_whole(name: str) -> None:
    def loss(gate: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return torch.compile(lambda y, w: pulled(gate, y, w), fullgraph=True, backend="aot_eager")(x, weight)

    check(name, loss)


@each
def test_compiled_when_the_gate_is_what_the_graph_returns(name: str) -> None:
    # a view of the graph's input would be made anew outside of the graph, without the gate
    def loss(gate: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return (torch.compile(gate, fullgraph=True, backend="aot_eager")(x) * weight).sum()

    check(name, loss)


@each
def test_compiled_vmap_of_grad_and_jvp(name: str) -> None:
    case = CASES[name]
    x, weight = data()

    def loss(one: Tensor, each: Tensor) -> Tensor:
        return pulled(case.run, one, each)

    def whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    expected = stacked_pull(case, x, weight)
    torch.testing.assert_close(whole(vmap(grad(loss)))(x, weight), expected)
    torch.testing.assert_close(whole(grad(lambda y: vmap(loss)(y, weight).sum()))(x), expected)
    moved = whole(lambda y, t: jvp(case.run, (y,), (t,))[1])(x, weight)
    torch.testing.assert_close(moved, weight if case.tangent_passes else case.pull(x, weight))


def test_compiled_by_inductor_all_at_once() -> None:
    x, weight = data(torch.float32)
    runs = [case.run for case in CASES.values()]
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda y: tuple(run(y * 1) for run in runs), fullgraph=True)
    outs = compiled(leaf)
    for out, case in zip(outs, CASES.values(), strict=True):
        assert torch.equal(out, case.value(x))
        (gradient,) = torch.autograd.grad(out, leaf, weight, retain_graph=True)
        torch.testing.assert_close(gradient, case.pull(x, weight), rtol=1e-5, atol=1e-6)


@each
def test_in_place_afterwards(name: str) -> None:
    def on_a_leaf(gate: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        before = x.detach().clone()
        loss = (gate(x).mul_(1.0).add_(3.0) * weight).sum()
        assert torch.equal(x.detach(), before)
        return loss

    def on_a_result(gate: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        y = x * 1
        out = gate(y)
        y.mul_(3.0)  # neither changes what the gate returned nor takes its gate away
        return (out * weight).sum()

    check(name, on_a_leaf)
    check(name, on_a_result)


@each
def test_reuse_on_a_leaf_adds_up_and_does_not_gate_twice(name: str) -> None:
    case = CASES[name]
    x, weight = data()
    leaf = x.clone().requires_grad_()
    for _ in range(3):
        pulled(case.run, leaf, weight).backward()
    torch.testing.assert_close(leaf.grad, 3 * case.pull(x, weight))


@each
def test_under_autocast_and_checkpoint(name: str) -> None:
    case = CASES[name]
    x, weight = data(torch.float32)
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(lambda y: case.run(y), leaf, use_reentrant=reentrant)
        assert out.dtype == torch.float32
        out.backward(weight)
        torch.testing.assert_close(leaf.grad, case.pull(x, weight))


@each
def test_without_a_gradient_it_is_the_value(name: str) -> None:
    case = CASES[name]
    x, _ = data()
    assert not case.run(x).requires_grad
    with torch.no_grad():
        assert torch.equal(case.run(x.clone().requires_grad_()), case.value(x))
    with torch.inference_mode():
        assert torch.equal(case.run(x), case.value(x))


@each
def test_shapes_without_elements_and_without_contiguity(name: str) -> None:
    case = CASES[name]
    empty = torch.zeros(0, 3, 5, requires_grad=True)
    case.run(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    x, weight = data()
    leaf = x.transpose(0, 1).clone().transpose(0, 1).requires_grad_()
    case.run(leaf).backward(weight)
    torch.testing.assert_close(leaf.grad, case.pull(x, weight))


@each
def test_fake_tensors_pass(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        leaf = torch.zeros(SHAPE, requires_grad=True)
        CASES[name].run(leaf).sum().backward()
        assert leaf.grad.shape == SHAPE


@each
def test_refuses_what_has_no_gradient(name: str) -> None:
    for wrong in (torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(SHAPE, dtype=torch.complex64), [1.0]):
        with pytest.raises(TypeError, match="floating-point tensor"):
            CASES[name].run(wrong) if "straight" not in name else gates.straight_through(wrong, wrong)


@pytest.mark.gpu
@each
def test_on_cuda(name: str) -> None:
    case = CASES[name]
    x, weight = data(torch.float32, "cuda")
    run = (
        case.run
        if "by a tensor" not in name
        else (lambda y: gates.scale(y, torch.tensor(0.3, device="cuda")))
    )
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        assert torch.equal(out, case.value(x))
        out.backward(weight)
        torch.testing.assert_close(leaf.grad, case.pull(x, weight))
