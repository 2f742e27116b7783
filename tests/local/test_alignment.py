"""Backward weights of one's own: the same forward, gradients written out by hand, any loop, refusals."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.comparison import compare
from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.ledger import cost
from thalweg.local import (
    DirectFeedbackAlignment,
    FeedbackAlignment,
    PredictiveCoding,
    SignSymmetry,
    align,
)
from thalweg.noise import Key
from thalweg.step import Step, backward

DOUBLE = torch.float64
RULES = {
    "random": FeedbackAlignment(),
    "direct": DirectFeedbackAlignment(),
    "sign": SignSymmetry(),
    "sign, one": SignSymmetry("one"),
    "sign, random": SignSymmetry("random"),
}
CONVOLUTIONS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "left over": lambda: nn.Conv2d(4, 6, 2, stride=3),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "three dimensions": lambda: nn.Conv3d(4, 6, 3, padding=1),
}


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=g, dtype=DOUBLE), torch.randn(8, 3, generator=g, dtype=DOUBLE)


def loss_of(module: nn.Module) -> Tensor:
    x, y = batch()
    return (module(x) - y).square().sum()


def gradients(module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(module), list(module.parameters())))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_forward_and_last_layer_are_exact_and_the_rest_is_not(rule: Any) -> None:
    net = dense()
    aligned = align(net, gradient=rule)
    x, _ = batch()
    assert torch.equal(aligned(x), net(x))
    assert [id(p) for p in aligned.parameters()] == [id(p) for p in net.parameters()]
    for index, (ours, exact) in enumerate(zip(gradients(aligned), gradients(net))):
        assert ours.shape == exact.shape
        assert torch.allclose(ours, exact) == (index >= 4)


def test_feedback_alignment_written_out() -> None:
    net = dense()
    aligned: Any = align(net, gradient=FeedbackAlignment(scale=2.0))
    x, y = batch()
    first = net[1](net[0](x))
    second = net[2](first)
    error = 2 * (net[4](second.relu()) - y)
    at_second = (error @ aligned[4].feedback) * (second > 0)
    at_first = (at_second @ aligned[2].feedback) * (1 - first.square())
    wanted = [at_first.T @ x, at_first.sum(0), at_second.T @ first, at_second.sum(0)]
    assert all(torch.allclose(a, b) for a, b in zip(gradients(aligned), wanted))


def test_direct_feedback_written_out() -> None:
    net = dense()
    aligned: Any = align(net, gradient=DirectFeedbackAlignment())
    x, y = batch()
    first = net[1](net[0](x))
    second = net[2](first)
    out = net[4](second.relu())
    error = 2 * (out - y)
    at_second = (error @ aligned.feedback(1, second, out)) * (second > 0)
    at_first = (error @ aligned.feedback(0, first, out)) * (1 - first.square())
    wanted = [at_first.T @ x, at_first.sum(0), at_second.T @ first, at_second.sum(0)]
    assert all(torch.allclose(a, b) for a, b in zip(gradients(aligned), wanted))


def test_sign_symmetry_written_out_follows_the_weights() -> None:
    net = dense()
    aligned = align(net, gradient=SignSymmetry())
    with torch.no_grad():
        net[4].weight.neg_()
    x, y = batch()
    hidden = net[2](net[1](net[0](x)))
    error = 2 * (net[4](hidden.relu()) - y)
    weight = net[4].weight.detach()
    at = (error @ (weight.sign() * weight.abs().mean())) * (hidden > 0)
    assert torch.allclose(gradients(aligned)[3], at.sum(0))


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolutions_with_their_own_weights_as_feedback_are_backpropagation(make: Any) -> None:
    torch.manual_seed(0)
    layer = make().double()
    aligned: Any = align(layer, gradient=FeedbackAlignment())
    x = torch.randn(2, 4, *[9] * len(layer.stride), dtype=DOUBLE, requires_grad=True)
    probe = torch.randn_like(layer(x))
    exact = torch.autograd.grad((layer(x) * probe).sum(), [x, *layer.parameters()])
    assert torch.allclose(aligned(x), layer(x))
    aligned.feedback.copy_(layer.weight.detach())
    ours = torch.autograd.grad((aligned(x) * probe).sum(), [x, *layer.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(ours, exact))


def test_linear_layers_on_tokens() -> None:
    layer = nn.Linear(4, 5).double()
    aligned: Any = align(layer, gradient=FeedbackAlignment())
    for shape in [(4,), (3, 4), (2, 5, 4)]:
        x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
        aligned(x).sum().backward()
        assert torch.allclose(x.grad, aligned.feedback.sum(0).expand(shape))


def test_any_module_is_rebuilt_and_the_original_stays() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.norm(self.conv(x)).relu()).mean((2, 3)))

    net = Residual()
    before = copy.deepcopy(net.state_dict())
    aligned = align(net, gradient=FeedbackAlignment())
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(aligned.eval()(x), net.eval()(x))
    assert list(before) == list(net.state_dict())
    assert set(aligned.state_dict()) - set(before) == {"conv.feedback", "head.feedback"}
    assert type(net.conv) is nn.Conv2d
    seen: list[int] = []
    aligned.register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert not seen
    again = pickle.loads(pickle.dumps(align(dense(), gradient=FeedbackAlignment())))
    assert again[2].feedback.shape == (6, 7)


def test_feedback_weights_come_from_their_key_and_the_name_of_the_layer() -> None:
    first, same, other = (align(dense(), gradient=FeedbackAlignment(Key(k))) for k in (1, 1, 2))
    for index in (0, 2, 4):
        ours: Any = first[index]  # type: ignore[index]
        assert torch.equal(ours.feedback, same[index].feedback)  # type: ignore[index]
        assert not torch.equal(ours.feedback, other[index].feedback)  # type: ignore[index]
    wide: Any = align(nn.Linear(300, 200), gradient=FeedbackAlignment(scale=2.0))
    spread = 2 * (3 * 300) ** -0.5
    count = wide.feedback.numel()
    assert abs(wide.feedback.std() / spread - 1) < 5 * (0.5 / count) ** 0.5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_learns(rule: Any) -> None:
    net = dense()
    aligned = align(net, gradient=rule)
    start = loss_of(net).detach()
    optimizer = torch.optim.Adam(aligned.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        backward(lambda: loss_of(aligned), aligned.parameters())
        optimizer.step()
    assert loss_of(net) < 0.5 * start


def test_a_linear_network_aligns_with_its_feedback() -> None:
    """Lillicrap's demonstration: the forward weights learn to agree with random feedback."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 10, bias=False)).double()
    teacher = torch.randn(10, 30, dtype=DOUBLE) / 30**0.5
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.1)
    aligned: Any = align(net, gradient=FeedbackAlignment())
    optimizer = torch.optim.SGD(aligned.parameters(), lr=0.2)

    def angle() -> float:
        agreed = F.cosine_similarity(net[1].weight.flatten(), aligned[1].feedback.flatten(), 0)
        return float(agreed.detach().acos().rad2deg())

    start = angle()
    for _ in range(300):
        x = torch.randn(64, 30, dtype=DOUBLE)
        optimizer.zero_grad()
        (aligned(x) - x @ teacher.T).square().sum(1).mean().backward()
        optimizer.step()
    assert start > 80
    assert angle() < 60


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_operations_are_those_of_backpropagation(rule: Any) -> None:
    net = dense()
    aligned = align(net, gradient=rule)
    found = [
        cost(Step(m, lambda m=m: loss_of(m), tuple(m.parameters())), repeats=0).operations
        for m in (aligned, net)
    ]
    if isinstance(rule, DirectFeedbackAlignment):
        # from the three outputs to 6 and 7 units in place of 3 x 6 and 6 x 7
        assert found[1] - found[0] == 2 * 8 * (6 * 7 - 3 * 7)
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_transforms(rule: Any) -> None:
    """Compiled in one graph, per-example gradients by vmap, autocast, other dtypes."""
    net = dense()
    net[3] = nn.ReLU()
    aligned = align(net, gradient=rule)
    eager = gradients(aligned)
    compiled = torch.compile(aligned, backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(a, b) for a, b in zip(gradients(compiled), eager))
    x, y = batch()
    names = dict(aligned.named_parameters())

    def single(weights: Any, x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(aligned, weights, (x[None],))
        return (out - y).square().sum()

    each = torch.func.vmap(torch.func.grad(single), (None, 0, 0))(names, x, y)
    assert all(torch.allclose(g.sum(0), e) for g, e in zip(each.values(), eager))
    with torch.autocast("cpu", torch.bfloat16):
        loss = aligned.float()(x.float()).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in aligned.parameters())


def test_second_derivative_is_that_of_the_stand_in() -> None:
    layer = nn.Linear(3, 2).double()
    aligned: Any = align(layer, gradient=FeedbackAlignment())
    x = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)

    def stand_in(x: Tensor) -> Tensor:
        by = F.linear(x, aligned.feedback)
        return F.linear(x.detach(), layer.weight, layer.bias) + by - by.detach()

    found = []
    for function in (aligned, stand_in):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    assert all(torch.allclose(a, b) for a, b in zip(*found))


def test_joins_a_comparison_with_backpropagation() -> None:
    """Rules and learners over the same parameters, each held against the exact gradient of the same step."""
    net = dense()
    parts = [net[0:2], net[2:4], net[4]]
    parameters = tuple(net.parameters())
    x, y = batch()

    def squared(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().sum(1)

    def step(module: nn.Module) -> Step:
        return Step(module, lambda: squared(module(x), y).mean(), parameters)

    exact = PredictiveCoding(parts, squared, steps=2, rate=1.0, prediction="fixed")
    table = compare(
        {
            "random": step(align(net, gradient=FeedbackAlignment())),
            "sign": step(align(net, gradient=SignSymmetry())),
            "settled": Step(exact, lambda: exact.phases((x, y)), parameters),
        },
        step(net),
        seconds=0.1,
    )
    cosines = {row.route: row.cosine for row in table.rows}
    assert cosines["settled"] == pytest.approx(1.0)
    assert 0 < cosines["random"] < cosines["sign"] < 1  # type: ignore[operator]


def test_bad_input_is_refused() -> None:
    net = dense()
    for module, rule, error in [
        ("net", FeedbackAlignment(), ArgumentTypeError),
        (net, "random", ArgumentTypeError),
        (net, FeedbackAlignment, ArgumentTypeError),
        (nn.ReLU(), FeedbackAlignment(), ArgumentError),
        (nn.LSTM(3, 3), FeedbackAlignment(), UnsupportedError),
        (nn.MultiheadAttention(4, 2), SignSymmetry(), UnsupportedError),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 3)), FeedbackAlignment(), UnsupportedError),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), FeedbackAlignment(), UnsupportedError),
        (nn.Linear(2, 2), DirectFeedbackAlignment(), ArgumentTypeError),
        (nn.Sequential(nn.Linear(2, 2)), DirectFeedbackAlignment(), ArgumentError),
        (nn.Sequential(*[nn.Linear(2, 2)] * 2), DirectFeedbackAlignment(), ArgumentError),
    ]:
        with pytest.raises(error):
            align(module, gradient=rule)  # type: ignore[arg-type]
    for make in (
        lambda: FeedbackAlignment(key=3),  # type: ignore[arg-type]
        lambda: DirectFeedbackAlignment(scale=0.0),
        lambda: FeedbackAlignment(scale=float("inf")),
        lambda: SignSymmetry("two"),  # type: ignore[arg-type]
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            make()
