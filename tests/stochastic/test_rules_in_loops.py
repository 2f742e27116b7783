"""Every rule for random units in a user's own loop: scaler, accumulation, hooks, dtypes, learning."""

import copy

import pytest
import torch
from torch import nn

from thalweg.ledger import cost, price
from thalweg.noise import Key
from thalweg.step import backward
from thalweg.stochastic import (
    ARM,
    REBAR,
    RELAX,
    BinaryNeuron,
    DisARM,
    Enumeration,
    MinimumVariance,
    ScoreFunction,
)

MAKE = {
    "mean": lambda: ScoreFunction("mean"),
    "minimum variance": lambda: ScoreFunction("minimum_variance"),
    "moving": lambda: ScoreFunction(MinimumVariance()),
    "leave one out": lambda: ScoreFunction("leave_one_out", samples=3),
    "arm": ARM,
    "disarm": DisARM,
    "rebar": REBAR,
    "relax": lambda: RELAX([nn.Linear(6, 1), nn.Linear(5, 1)]),
}
every_rule = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), BinaryNeuron(gradient=None)),
        *(nn.Linear(6, 5), BinaryNeuron(gradient=None), nn.Linear(5, 1)),
    ).to(dtype)


@every_rule
def test_scaler_accumulation_and_hooks(make):
    net, x, seen, rule = network(), torch.randn(8, 4), [], make()
    parameters = list(net.parameters())
    torch.manual_seed(3)
    once = copy.deepcopy(rule).estimate(lambda: net(x).squeeze(1) ** 2, parameters, Key(0))
    # a hook that changes the gradient, which two calls of it would give away
    parameters[0].register_hook(lambda gradient: (seen.append(gradient), gradient / 2)[1])
    # a control network is not scaled with the losses
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0 if isinstance(rule, RELAX) else 256.0)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for _ in range(2):
        torch.manual_seed(3)
        again = copy.deepcopy(rule)
        loss = backward(lambda: net(x).squeeze(1) ** 2, parameters, gradient=again, scaler=scaler, key=Key(0))
    scaler.unscale_(optimizer)
    assert len(seen) == 2
    torch.testing.assert_close(loss, once.loss)
    for index, (parameter, gradient) in enumerate(zip(parameters, once.gradients)):
        torch.testing.assert_close(parameter.grad, gradient if index == 0 else 2 * gradient)


def test_enumeration_fires_hooks_once_and_leaves_them():
    logits, seen = torch.zeros(4, 1, requires_grad=True), []
    handle = logits.register_hook(lambda gradient: (seen.append(gradient), gradient / 2)[1])
    unit = BinaryNeuron(gradient=None)
    for _ in range(2):
        backward(lambda: 8 * unit(logits).sum(1), [logits], gradient=Enumeration())
    assert len(seen) == 2
    assert torch.equal(logits.grad, torch.full((4, 1), 0.5))
    handle.remove()
    backward(lambda: 8 * unit(logits).sum(1), [logits], gradient=Enumeration())
    assert torch.equal(logits.grad, torch.full((4, 1), 1.0))


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make, dtype):
    net, x = network(dtype), torch.randn(8, 4, dtype=dtype)
    rule = make().to(dtype) if isinstance(make(), RELAX) and dtype == torch.float64 else make()
    loss = backward(lambda: net(x).squeeze(1) ** 2, net.parameters(), gradient=rule)
    assert torch.isfinite(loss)
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in net.parameters())


@every_rule
def test_two_layers_learn(make):
    """To put out zero, where two random layers and a bias first put out one."""
    net, rule, x = network(), make(), torch.ones(64, 4)
    parameters = [*net[:4].parameters()]
    own = list(rule.parameters()) if isinstance(rule, nn.Module) else []
    optimizer = torch.optim.Adam([*parameters, *own], lr=0.05)
    nn.init.constant_(net[4].weight, 1.0)
    nn.init.constant_(net[4].bias, 0.0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(float(backward(lambda: net(x).squeeze(1) ** 2, parameters, gradient=rule)))
        optimizer.step()
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@every_rule
def test_price_foretells_cost(make):
    def step():
        net, x = network(), torch.zeros(8, 4)
        return net, lambda: net(x).squeeze(1) ** 2, net.parameters()

    rule = make()
    foretold, counted = price(step, routes={"rule": rule})[0], cost(step, gradient=rule)
    assert foretold.evaluations == counted.evaluations
    assert foretold.saved_bytes == counted.saved_bytes
