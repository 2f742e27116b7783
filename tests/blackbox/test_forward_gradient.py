"""Forward gradients: right for every way in which a closure may use its parameters, or refused by name."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from thalweg.blackbox import ForwardGradient
from thalweg.blackbox.directions import direction
from thalweg.errors import ArgumentError, UnsupportedError
from thalweg.noise import Key

X = torch.linspace(-1, 1, 40).view(2, 5, 4)


def assert_right(closure, parameters):
    """Compare with reverse mode: the estimate must be (gradient . v) v, and the parameters untouched."""
    parameters = list(parameters)
    state = torch.get_rng_state()
    exact = torch.autograd.grad(closure(), parameters, allow_unused=True)
    torch.set_rng_state(state)
    v = [direction("rademacher", p.detach(), Key(0), 0, i) for i, p in enumerate(parameters)]
    slope = sum((g * z).sum() for g, z in zip(exact, v) if g is not None)
    before = [(p.detach().clone(), p._version) for p in parameters]
    found = ForwardGradient().estimate(closure, parameters, Key(0))
    for gradient, z in zip(found.gradients, v):
        torch.testing.assert_close(gradient, slope * z, rtol=1e-4, atol=1e-5)
    for parameter, (value, version) in zip(parameters, before):
        assert torch.equal(parameter.detach(), value)
        assert parameter._version == version
        assert parameter.requires_grad


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.GELU()),
        nn.LSTM(4, 3, batch_first=True),
        nn.GRU(4, 3, num_layers=2, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        nn.Sequential(nn.Conv1d(5, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules(module):
    def closure():
        out = module(X)
        return (out[0] if isinstance(out, tuple) else out).pow(2).mean()

    assert_right(closure, module.parameters())


def test_functional_use_views_and_ties():
    weight = nn.Parameter(torch.randn(4, 4))
    outside = weight.view(16)
    assert_right(lambda: (X @ weight @ weight.T).tanh().sum() + (outside * 2).pow(2).sum(), [weight])


def test_functional_call():
    net = nn.Linear(4, 3)
    assert_right(
        lambda: torch.func.functional_call(net, dict(net.named_parameters()), (X,)).pow(2).mean(),
        net.parameters(),
    )


def test_no_grad_and_detach_cut_as_in_a_backward_pass():
    net = nn.Linear(4, 3)

    def closure():
        with torch.no_grad():
            target = net(X).tanh()
        return (net(X) - target).pow(2).mean() + net.weight.detach().sum() * net.bias.sum()

    assert_right(closure, net.parameters())


def test_derivatives_with_respect_to_inputs():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def closure():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (slope - 1).pow(2).mean()

    assert_right(closure, net.parameters())


def test_checkpoint():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    assert_right(lambda: checkpoint(net, X, use_reentrant=False).pow(2).mean(), net.parameters())


def test_fused_attention_runs_on_the_math_kernel():
    net = nn.Linear(4, 12)

    def closure():
        q, k, v = net(X)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).pow(2).mean()

    assert_right(closure, net.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_nothing_is_stored_for_a_backward_pass():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t), lambda t: t):
        ForwardGradient().estimate(lambda: net(X).pow(2).mean(), list(net.parameters()), Key(0))
    assert packed == []


def test_a_live_graph_of_the_user_stays_valid():
    net = nn.Linear(4, 3)
    kept = net(X.requires_grad_()).pow(2).mean()
    ForwardGradient().estimate(lambda: net(X).pow(2).mean(), list(net.parameters()), Key(0))
    kept.backward()
    assert net.weight.grad is not None
    X.requires_grad_(False)
    X.grad = None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent * ctx.saved_tensors[0]


@torch.library.custom_op("thalweg_test::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, cotangent: 2 * cotangent * ctx.x,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda net: Square.apply(net(X)), "jvp"),
        (lambda net: square(net(X)) + net(X), "thalweg_test::square"),
        (
            lambda net: checkpoint(net, X.clone().requires_grad_(), use_reentrant=True) + net(X),
            "use_reentrant",
        ),
        (
            lambda net: torch._weight_norm_interface(net.weight, net.weight[:, :1])[0],
            "_weight_norm_interface",
        ),
    ],
)
def test_what_would_lose_a_tangent_is_refused_by_name(spoil, name):
    net = nn.Linear(4, 3)
    before = net.weight.detach().clone()
    with pytest.raises(UnsupportedError, match=name):
        ForwardGradient().estimate(lambda: spoil(net).pow(2).mean(), list(net.parameters()), Key(0))
    assert torch.equal(net.weight.detach(), before)
    assert net.weight.requires_grad
    # the next estimate works again
    assert_right(lambda: net(X).pow(2).mean(), net.parameters())


def test_a_loss_without_parameters_is_refused():
    net = nn.Linear(4, 3)
    with pytest.raises(ArgumentError, match="depends on the parameters"):
        ForwardGradient().estimate(lambda: net(X).detach().sum(), list(net.parameters()), Key(0))


def test_errors_of_the_closure_are_passed_on():
    def closure():
        raise RuntimeError("out of patience")

    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="out of patience"):
        ForwardGradient().estimate(closure, [weight], Key(0))
    assert weight.requires_grad


def test_an_lstm_runs_without_a_warning_and_leaves_the_kernels_on():
    net = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForwardGradient().estimate(lambda: net(x)[0].pow(2).mean(), list(net.parameters()), Key(0))
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


def test_group_norm_in_channels_last_equals_contiguous():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU())
    x = torch.randn(2, 3, 6, 6)
    want = ForwardGradient().estimate(lambda: net(x).pow(3).mean(), list(net.parameters()), Key(0))
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    got = ForwardGradient().estimate(lambda: net(x).pow(3).mean(), list(net.parameters()), Key(0))
    torch.testing.assert_close(got.gradients, want.gradients)
