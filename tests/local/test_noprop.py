"""NoProp in discrete time: the exact checks."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_noprop import CLASSES, Oracle, Plain, batch, learner

from thalweg.local import (
    LabelEmbedding,
    NoProp,
    cosine,
    learned_labels,
    one_hot_labels,
)
from thalweg.local.noprop_schedule import deterministic_transition, signal_to_noise, transition
from thalweg.noise import Key, normal
from thalweg.step import Learner

LEVELS = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8, unique=True).map(sorted)


def train(net: NoProp, optimizer: Any, steps: int = 3, order: Any = None, dtype: Any = torch.float32) -> None:
    x, y = batch()
    for step in range(steps):
        for phase in net.phases((x.to(dtype), y), key=Key(5, step), only=order):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()


@settings(max_examples=50, deadline=None)
@given(LEVELS)
def test_exact_weight_is_the_kl_of_two_gaussians(levels: list[float]) -> None:
    """a^2 / (2 c) = (SNR(t) - SNR(t - 1)) / 2 for any increasing levels."""
    for before, after in pairwise(levels):
        step = transition(before, after)
        ratio = 0.5 * step.guess**2 / step.noise**2
        assert math.isclose(
            ratio, 0.5 * (signal_to_noise(after) - signal_to_noise(before)), rel_tol=1e-6, abs_tol=1e-9
        )


@settings(max_examples=50, deadline=None)
@given(LEVELS)
def test_exact_a_right_guess_stays_on_the_path(levels: list[float]) -> None:
    """a + b sqrt(l) = sqrt(l'), b^2 (1 - l) + c = 1 - l'; also of the deterministic step."""
    for before, after in pairwise(levels):
        for step in (transition(before, after), deterministic_transition(before, after)):
            assert math.isclose(step.guess + step.state * before**0.5, after**0.5, rel_tol=1e-9)
            assert math.isclose(step.state**2 * (1 - before) + step.noise**2, 1 - after, rel_tol=1e-9)


def test_exact_products_and_telescoping() -> None:
    levels = cosine(10)
    for t in range(11):
        product = levels.levels[-1]
        for s in range(10, t, -1):
            product *= levels.levels[s - 1] / levels.levels[s]
        assert math.isclose(product, levels.levels[t], rel_tol=1e-12)
    total = sum(levels.weight(t) for t in range(10))
    ends = signal_to_noise(levels.levels[-1]) - signal_to_noise(levels.levels[0])
    assert math.isclose(total, ends, rel_tol=1e-12)


def test_exact_weights_converge_to_the_slope_of_the_snr() -> None:
    """T -> infinity: the weight of a step over SNR'(t) dt goes to 1, at the first order in dt."""
    away = []
    for steps in (100, 200, 400):
        step = steps // 2
        angle = 0.5 * math.pi * (0.5 + 0.008) / 1.008
        # SNR = cot^2 of the angle, whose slope in time is -pi / (2 * 1.008)
        slope = 2 * math.cos(angle) / math.sin(angle) ** 3 * 0.5 * math.pi / 1.008
        away.append(abs(cosine(steps).weight(step) * steps / slope - 1))
    assert away[-1] < 0.02
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(away))


def test_exact_cosine_levels_of_the_spec() -> None:
    wanted = [1e-4, 0.024, 0.094, 0.203, 0.341, 0.494, 0.647, 0.787, 0.899, 0.972, 0.9998]
    assert all(abs(a - b) < 6e-4 for a, b in zip(cosine(10).levels, wanted))


@pytest.mark.parametrize(
    "labels", [one_hot_labels(CLASSES), learned_labels(CLASSES, 5)], ids=["fixed", "learned"]
)
def test_exact_oracle_blocks_reach_the_class_from_any_start(labels: LabelEmbedding) -> None:
    net = NoProp([Oracle() for _ in range(4)], labels)
    count = 20_000
    y = torch.arange(count) % CLASSES
    x = torch.eye(CLASSES)[y]
    # the readout of an ideal classifier: nearest point
    points = labels.weight.detach()
    net.readout.linear = nn.Linear(points.shape[1], CLASSES)
    with torch.no_grad():
        net.readout.linear.weight.copy_(points)
        net.readout.linear.bias.copy_(-0.5 * points.square().sum(1))
    latents: list[Tensor] = []
    net.readout.register_forward_pre_hook(lambda module, inputs: latents.append(inputs[0]))
    assert torch.equal(net.predict(x, key=Key(2)).argmax(1), y)
    level = net.levels.levels[-1]
    away = latents[-1] - level**0.5 * points[y]
    # mean 0 and variance 1 - level, within five standard errors
    assert away.mean().abs() < 5 * ((1 - level) / away.numel()) ** 0.5
    assert abs(away.square().mean() / (1 - level) - 1) < 5 * (2 / away.numel()) ** 0.5


@pytest.mark.parametrize("anchor", ["every", "own"])
def test_exact_locality(anchor: Any) -> None:
    """The loss of block t leaves the gradient of every other block None."""
    net = learner(anchor=anchor)
    assert isinstance(net, Learner)
    names = [phase.name for phase in net.phases(batch())]
    assert names == ["block 0", "block 1", "block 2"] + ["readout"] * (anchor == "own")
    for index, phase in enumerate(net.phases(batch())):
        net.zero_grad()
        phase.backward()
        for name, parameter in net.named_parameters():
            own = name.startswith(f"blocks.{index}.")
            out = name.startswith("readout") and (anchor == "every" or index == 3)
            assert (parameter.grad is not None) == (own or out), name


def test_exact_order_of_blocks_does_not_matter() -> None:
    """Fixed labels, keyed draws: permuting the blocks leaves the final parameters identical."""
    nets = [learner(anchor="own") for _ in range(2)]
    for net in nets:
        for block in net.blocks:
            block.input_path.append(nn.Dropout(0.3))
    nets[1] = copy.deepcopy(nets[0])
    for net, order in zip(nets, ([0, 1, 2, 3], [2, 3, 0, 1])):
        train(net, torch.optim.Adam(net.parameters(), lr=0.01), order=order)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_exact_order_of_blocks_with_the_readout_in_every_phase() -> None:
    nets = [learner() for _ in range(2)]
    for net, order in zip(nets, ([0, 1, 2], [2, 0, 1])):
        train(net, torch.optim.Adam(net.parameters(), lr=0.01), order=order)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].blocks.parameters(), nets[1].blocks.parameters()))


def test_exact_adam_does_not_see_the_weights() -> None:
    """Scaling the weight of denoising leaves the updates of blocks unchanged, epsilon aside."""
    nets = []
    for eta in (0.1, 10.0):
        torch.manual_seed(0)
        # no batch norm: the gradients of the biases before it are rounding alone, which Adam would blow up
        nets.append(NoProp([Plain() for _ in range(3)], one_hot_labels(CLASSES), eta=eta).double())
    for net in nets:
        train(net, torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-30), dtype=torch.float64)
    for a, b in zip(nets[0].blocks.parameters(), nets[1].blocks.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_exact_guesses_lie_in_the_hull_of_the_labels() -> None:
    net = learner(labels=learned_labels(CLASSES, 4))
    guess = net.denoised(torch.randn(20, CLASSES))
    coefficients = torch.linalg.lstsq(net.embedding.weight.T, guess.T).solution
    assert torch.allclose(coefficients.sum(0), torch.ones(20), atol=1e-5)
    assert bool((coefficients > -1e-5).all())


def test_exact_prior_vanishes_at_level_zero_and_is_the_divergence() -> None:
    net = learner()
    target = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(net.prior(target, 0.0), torch.zeros(4, dtype=torch.float64))
    level = 0.3
    first = torch.distributions.Normal(level**0.5 * target, (1 - level) ** 0.5)
    second = torch.distributions.Normal(torch.zeros_like(target), 1.0)
    assert torch.allclose(net.prior(target, level), torch.distributions.kl_divergence(first, second).sum(1))


def test_the_loss_is_equation_8() -> None:
    """Written out from the same draws; the squared norm is a sum over dimensions."""
    net = learner(labels=learned_labels(CLASSES, 5)).double()
    x, y = batch()
    x = x.double()
    key = Key(7)
    phase = list(net.phases((x, y), key=key))[1]
    before, after, last = net.levels.levels[1], net.levels.levels[2], net.levels.levels[-1]
    u = net.embedding.weight[y]
    like = torch.empty(12, 5, dtype=torch.float64)
    z = before**0.5 * u + (1 - before) ** 0.5 * normal(like, key.at(call=4))
    z_last = last**0.5 * u + (1 - last) ** 0.5 * normal(like, key.at(call=5))
    guess = net.blocks[1](z, x).softmax(1) @ net.embedding.weight
    snr = after / (1 - after) - before / (1 - before)
    wanted = 3 / 2 * 0.1 * snr * (guess - u).square().sum(1)
    wanted = wanted + nn.functional.cross_entropy(net.readout.linear(z_last), y, reduction="none")
    wanted = wanted + net.prior(u, net.levels.levels[0])
    assert torch.allclose(phase.loss(), wanted)
    gradient = torch.autograd.grad(wanted.mean(), net.embedding.weight)[0]
    phase.backward()
    assert torch.allclose(net.embedding.weight.grad, gradient)
