"""Units whose gradient is known exactly, repeated in many rows: one estimate is as many draws."""

import itertools

import torch

from thalweg.noise import Key
from thalweg.problems import BernoulliNet
from thalweg.score import bernoulli_log_probability
from thalweg.stochastic import BinaryNeuron


def per_draw(rule, closure, leaves):
    """One estimate of each leaf's gradient per row, in float64, where every row is an example of its own."""
    found = rule.estimate(closure, leaves, Key(0))
    return [gradient.double() * len(gradient) for gradient in found.gradients]


def repeated(tensor, rows):
    return tensor.detach().expand(rows, *tensor.shape).clone().requires_grad_()


class OneLayer:
    """K gates of a `BernoulliNet` with one example, repeated."""

    def __init__(self, gates, rows, seed=0, gradient=None):
        net = BernoulliNet(gates=gates, batch=1, seed=seed)
        self.exact = net.exact_logit_gradient()[0]
        self.logits = repeated(net.logits()[0], rows)
        self.probabilities = torch.sigmoid(self.logits[0]).detach()
        self.unit = BinaryNeuron(gradient)
        self._net = net

    def __call__(self):
        return self._net.losses(self.unit(self.logits)[:, None, :])[:, 0]

    def draws(self, rule):
        return per_draw(rule, self, [self.logits])[0]


class TwoLayersAndMasks:
    """Two layers of two units, a random mask between them that is no unit, and a layer on top; repeated."""

    def __init__(self, rows):
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(shape, generator=generator).double() for shape in [(2,), (2, 2), (2,), (4,)]]
        self.leaves = [repeated(tensor, rows) for tensor in drawn]
        self.one, self.two = BinaryNeuron(gradient=None), BinaryNeuron(gradient=None)

    def __call__(self):
        below = self.leaves[0]
        first = self.one(below) * (torch.rand(below.shape) < 0.5)
        return self._losses(first, self.two(self._between(self.leaves, first)), self.leaves)

    @staticmethod
    def _between(leaves, first):
        return (first[:, :, None] * leaves[1]).sum(1) + leaves[2]

    @staticmethod
    def _losses(first, second, leaves):
        h = torch.cat([first, second], 1)
        return (torch.tanh((h * leaves[3]).sum(1)) - 1.5) ** 2

    def exact(self):
        """The gradient of the expected loss of one row, by running all outcomes under all masks."""
        leaves = [leaf[:1].detach().requires_grad_() for leaf in self.leaves]
        total = 0.0
        for bits in itertools.product([0.0, 1.0], repeat=6):
            bits = torch.tensor(bits, dtype=torch.float64)[None]
            first, second, mask = bits[:, :2], bits[:, 2:4], bits[:, 4:]
            between = self._between(leaves, first * mask)
            log = bernoulli_log_probability(first, leaves[0]).sum()
            log = log + bernoulli_log_probability(second, between).sum()
            total = total + log.exp() * self._losses(first * mask, second, leaves).sum() / 4
        return [gradient[0] for gradient in torch.autograd.grad(total, leaves)]


def standard_errors_off(draws, exact):
    """How many standard errors the mean of the draws lies off, at the worst entry."""
    error = draws.std(0) / len(draws) ** 0.5
    off = (draws.mean(0) - exact).abs()
    return float((off[off > 1e-12] / error[off > 1e-12]).max()) if (off > 1e-12).any() else 0.0


def assert_mean_is(draws, exact, precision):
    """Within 5 standard errors, which are at most `precision` of the largest entry."""
    error = draws.std(0) / len(draws) ** 0.5
    assert error.max() <= precision * exact.abs().max()
    assert standard_errors_off(draws, exact) <= 5
