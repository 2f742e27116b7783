"""Streamed gradients: the same `.grad`, one at a time, and no more memory than the largest parameter."""

import pytest
import torch
from torch import nn

from thalweg.blackbox import (
    PGPE,
    SPSA,
    Blocks,
    EvolutionStrategies,
    ForwardGradient,
    OnePoint,
    Streamed,
)
from thalweg.errors import NonFiniteError
from thalweg.ledger import price
from thalweg.ledger.storages import StorageCounter
from thalweg.noise import Key
from thalweg.step import Backprop, backward

RULES = [
    SPSA(3),
    SPSA(restore="swap", directions="gaussian"),
    SPSA(2, directions=Blocks(), restore="swap"),
    EvolutionStrategies(4, weights="ranks"),
    ForwardGradient(2),
    OnePoint(2, decay=None),
]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_hooks_the_gradients_are_those_of_the_rule(rule, dtype):
    one, other = network(dtype), network(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    for _ in range(2):
        a = backward(lambda: one(x).pow(2).mean(), one.parameters(), gradient=rule, key=Key(1))
        b = backward(lambda: other(x).pow(2).mean(), other.parameters(), gradient=Streamed(rule), key=Key(1))
        assert torch.equal(a, b)
    for p, q in zip(one.parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad)


def fused_adam(net):
    optimizers = {p: torch.optim.Adam([p], lr=0.01) for p in net.parameters()}
    alive = []

    def step_and_free(parameter):
        alive.append(sum(p.grad is not None for p in net.parameters()))
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_free)
    return alive


def test_hooks_step_each_parameter_before_the_next_gradient_is_made():
    net, twin = network(), network()
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    alive = fused_adam(net)
    x = torch.randn(5, 4)
    rule = SPSA(restore="swap", directions="gaussian")
    for step in range(5):
        backward(lambda: net(x).pow(2).mean(), net.parameters(), gradient=Streamed(rule), key=Key(0, step))
        adam.zero_grad()
        backward(lambda: twin(x).pow(2).mean(), twin.parameters(), gradient=rule, key=Key(0, step))
        adam.step()
    assert alive == [1] * 4 * 5
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)


def test_memory_is_that_of_inference_and_the_largest_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    x, largest = torch.randn(2, 64), 64 * 64 * 4

    def step_and_free(parameter):
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_free)

    def peak(run):
        counter = StorageCounter(None, None)
        with counter:
            run()
        return counter.peak_bytes

    def infer():
        with torch.no_grad():
            net(x).pow(2).mean()

    def closure():
        return net(x).pow(2).mean()

    rule = SPSA(restore="swap", directions="gaussian")
    inference = peak(infer)
    streamed = peak(lambda: backward(closure, net.parameters(), gradient=Streamed(rule), key=Key(0)))
    whole = peak(lambda: backward(closure, net.parameters(), gradient=rule, key=Key(0)))
    assert streamed <= inference + largest + 1024
    assert whole >= inference + 8 * largest


def test_an_overflow_is_refused_before_any_parameter_moves():
    net = network(torch.float16)
    alive = fused_adam(net)
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.ones(5, 4, dtype=torch.float16)
    rule = Streamed(SPSA(scale=1e-2, directions="gaussian", restore="swap"))
    with pytest.raises(NonFiniteError, match="overflow"):
        backward(lambda: net(x).float().sum() * 1e6, net.parameters(), gradient=rule)
    assert not alive
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_price_counts_it_on_fake_tensors():
    net = network()
    x = torch.randn(5, 4)
    rule = Streamed(SPSA())
    table = price((net, lambda: net(x).pow(2).mean(), net.parameters()), routes=[rule])
    assert "Streamed" in str(table)


@pytest.mark.parametrize("gradient", [Backprop(), SPSA, PGPE(), 3], ids=["backprop", "class", "pgpe", "3"])
def test_rules_without_keyed_directions_are_refused(gradient):
    with pytest.raises(TypeError, match=r"^gradient: expected a rule over keyed directions"):
        Streamed(gradient)
