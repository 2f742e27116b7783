"""Bidirectional learning and hybrid adversarial networks: the exact checks, and the refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.attacks import robustness
from thalweg.data import mnist_5k
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import Adversarial, Bidirectional, BidirectionalNet, Reconstruct, bidirectional_mlp
from thalweg.noise import Key
from thalweg.step import Learner, Phase

KEY = Key(seed=11)


def batch(examples: int = 6, shape: tuple[int, ...] = (12,), classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.rand(examples, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(examples) % classes


def mlp(*sizes: int, seed: int = 0) -> BidirectionalNet:
    return bidirectional_mlp(sizes or [12, 8, 3], std=0.5, seed=seed).double()


def cnn() -> BidirectionalNet:
    layers = [
        nn.Conv2d(1, 4, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ]
    net = BidirectionalNet(layers, [1, 8, 8], backward_activation=nn.ReLU(), backward_norms=[0, 1])
    return net.start_(std=0.3).double()


def discriminator(pixels: int = 12) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()


def train(learner: Bidirectional, data: Any, steps: int, **options: Any) -> None:
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(steps):
        for phase in learner.phases(data, key=KEY.at(step=step)):
            make = torch.optim.Adam
            optimizer = optimizers.setdefault(phase.name, make(phase.parameters, **({"lr": 0.01} | options)))
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()


def test_tying_one_tensor_in_both_directions() -> None:
    net, (inputs, labels) = mlp(), batch()
    classes = torch.eye(3, dtype=torch.float64)
    assert {w.data_ptr() for w in net.shared()} == {
        layer.weight.data_ptr() for layer in net.layers if isinstance(layer, nn.Linear)
    }
    seen: list[int] = []

    def spy(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append(weight.data_ptr())
        return torch.addmm(bias, state, weight.T)

    whole = net.generate(classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thalweg.local.bidirectional_net.F.linear", spy)
        torch.testing.assert_close(net.generate(classes), whole)
    assert seen == [weight.data_ptr() for weight in reversed(net.shared())]
    forward, backward = list(Bidirectional(net).phases((inputs, labels)))
    for phase, moved in ((backward, lambda: net.classify(inputs)), (forward, lambda: net.generate(classes))):
        before = moved().detach()
        optimizer = torch.optim.SGD(phase.parameters, lr=0.1)
        optimizer.zero_grad()
        phase.backward()
        optimizer.step()
        assert not torch.allclose(moved(), before, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_adjointness_of_every_supported_convolution(
    size: Any, kernel: Any, stride: Any, padding: int, dilation: int, groups: int
) -> None:
    assume(all(n + 2 * padding >= dilation * (k - 1) + 1 for n, k in zip(size, kernel)))
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias=False)
    features = conv(torch.zeros(1, 2, *size)).numel()
    net = BidirectionalNet([conv, nn.Flatten(), nn.Linear(features, 2)], [2, *size]).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    through = conv(x)
    z = torch.randn_like(through)
    back = net._transposed(z, 0, torch.zeros(2, dtype=torch.float64))
    assert back.shape == x.shape
    torch.testing.assert_close((through * z).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_adjointness_with_padding_by_name(padding: str) -> None:
    conv = nn.Conv2d(1, 2, 3, padding=padding, bias=False)
    features = conv(torch.zeros(1, 1, 5, 5)).numel()
    net = BidirectionalNet([conv, nn.Flatten(), nn.Linear(features, 2)], [1, 5, 5]).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    z = torch.randn_like(conv(x))
    back = net._transposed(z, 0, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close((conv(x) * z).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


def untied(
    net: BidirectionalNet, inputs: Tensor, labels: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Both losses of a fully connected net written out, on copies of its weights."""
    up, down = ([w.detach().clone().requires_grad_() for w in net.shared()] for _ in range(2))
    first, second = (layer for layer in net.layers if isinstance(layer, nn.Linear))
    logits = (inputs @ up[0].T + first.bias).sigmoid() @ up[1].T + second.bias
    classified = F.cross_entropy(logits, labels)
    onehot = F.one_hot(labels, 3).double()
    hidden = (onehot @ down[1] + net.backward_biases[0]).sigmoid()
    made = (hidden @ down[0] + net.backward_biases[1]).sigmoid()
    return up, down, classified, F.binary_cross_entropy(made, inputs)


def test_gradient_of_both_losses_is_the_sum_over_an_untied_copy() -> None:
    net, (inputs, labels) = mlp(), batch()
    losses = [phase.backward() for phase in Bidirectional(net).phases((inputs, labels))]
    up, down, classified, reconstructed = untied(net, inputs, labels)
    torch.testing.assert_close(torch.stack(losses), torch.stack([classified, reconstructed]).detach())
    forward = torch.autograd.grad(classified, up)
    backward = torch.autograd.grad(reconstructed, down)
    for weight, a, b in zip(net.shared(), forward, backward):
        torch.testing.assert_close(weight.grad, a + b, rtol=0, atol=1e-14)


def test_without_backward_phases_the_trajectory_is_plain_backpropagation_bit_for_bit() -> None:
    net, (inputs, labels) = mlp(), batch()
    twin = copy.deepcopy(nn.Sequential(*net.layers))
    train(Bidirectional(net, stop_backward_after=0), (inputs, labels), 10)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(twin(inputs), labels, reduction="none").mean().backward()
        optimizer.step()
    for ours, theirs in zip(net.layers.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_linear_net_generator_gradient_in_closed_form() -> None:
    net, (inputs, labels) = mlp(12, 3), batch()
    _, backward = Bidirectional(net, bias=False).phases((inputs, labels))
    backward.backward()
    (weight,) = net.shared()
    onehot = F.one_hot(labels, 3).double()
    closed = onehot.T @ ((onehot @ weight).sigmoid() - inputs) / inputs.numel()
    torch.testing.assert_close(weight.grad, closed.detach(), rtol=0, atol=1e-15)


def test_linear_net_generator_rests_at_the_logit_of_the_class_means() -> None:
    net, (inputs, labels) = mlp(12, 3), batch(9)
    (weight,) = net.shared()
    means = torch.stack([inputs[labels == c].mean(0) for c in range(3)])
    with torch.no_grad():
        weight.copy_(means.logit())
    _, backward = Bidirectional(net, bias=False).phases((inputs, labels))
    backward.backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), rtol=0, atol=1e-16)
    torch.testing.assert_close(net.generate(torch.eye(3, dtype=torch.float64)), means)


def test_generator_alone_learns_the_class_means() -> None:
    net, (inputs, labels) = mlp(12, 3), batch(9)
    means = torch.stack([inputs[labels == c].mean(0) for c in range(3)])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(800):
        _, backward = Bidirectional(net, bias=False).phases((inputs, labels))
        optimizer.zero_grad()
        backward.backward()
        optimizer.step()
    torch.testing.assert_close(net.generate(torch.eye(3).double()).detach(), means, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["reconstruct", "adversarial"])
def test_no_bias_biases_stay_exactly_zero(kind: str) -> None:
    net = cnn()
    with torch.no_grad():
        for bias in net.backward_biases:
            bias.normal_()
    norms = [copy.deepcopy(norm.state_dict()) for norm in (net.layers[3], net.backward_norms[0])]
    chosen = Reconstruct() if kind == "reconstruct" else Adversarial(discriminator(64))
    learner = Bidirectional(net, backward=chosen, bias=False)
    weights = [weight.detach().clone() for weight in net.shared()]
    train(learner, batch(shape=(1, 8, 8)), 3)
    biases = [layer.bias for layer in net.layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    for bias in [*biases, *net.backward_biases]:
        assert bool((bias == 0).all())
    for norm, before in zip((net.layers[3], net.backward_norms[0]), norms):
        assert torch.equal(norm.weight, before["weight"])
        assert torch.equal(norm.bias, before["bias"])
    assert not any(torch.equal(a, b) for a, b in zip(net.shared(), weights))


def test_adversarial_steps_touch_only_their_own() -> None:
    net, judge = mlp(), discriminator()
    learner = Bidirectional(net, backward=Adversarial(judge))
    names = []
    for phase in learner.phases(batch(), key=KEY):
        names.append(phase.name)
        learner.zero_grad()
        phase.backward()
        touched = {name for name, p in learner.named_parameters() if p.grad is not None}
        assert (phase.name == "discriminator") == any(name.startswith("discriminator") for name in touched)
        assert (phase.name != "discriminator") == any(name.startswith("net") for name in touched)
    assert names == ["forward", "discriminator", "backward"]


def test_adversarial_losses_are_those_of_the_paper() -> None:
    net, judge, (inputs, labels) = mlp(), discriminator(), batch()
    fixed = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
    learner = Bidirectional(net, backward=Adversarial(judge, prior=lambda like, key: fixed))
    _, told, deceived = list(learner.phases((inputs, labels)))
    made = net.generate(fixed)
    real, fake = judge(inputs), judge(made)
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(told.backward(), (bce(real, one) + bce(fake, zero)).detach())
    torch.testing.assert_close(deceived.backward(), bce(fake, one).detach())
    keyed = Bidirectional(net, backward=Adversarial(judge))
    first, again = ([phase.backward() for phase in keyed.phases((inputs, labels), key=KEY)] for _ in range(2))
    assert first == again


def test_backward_phases_stop_and_a_saved_learner_goes_on_counting() -> None:
    learner = Bidirectional(mlp(), stop_backward_after=2)
    lengths = [len(list(learner.phases(batch()))) for _ in range(2)]
    other = Bidirectional(mlp(seed=1), stop_backward_after=2)
    other.load_state_dict(learner.state_dict())
    lengths += [len(list(each.phases(batch()))) for each in (learner, other)]
    assert lengths == [2, 2, 1, 1]


def test_a_convolutional_net_generates_images_and_learns() -> None:
    net = cnn()
    inputs, labels = batch(shape=(1, 8, 8))
    assert net.generate(torch.eye(3).double()).shape == (3, 1, 8, 8)
    assert [type(norm).__name__ for norm in net.backward_norms] == [
        "BatchNorm1d",
        "BatchNorm1d",
        "Identity",
        "Identity",
    ]
    learner = Bidirectional(net)
    assert isinstance(learner, Learner)
    before = [float(phase.loss().detach().mean()) for phase in learner.phases((inputs, labels))]
    assert all(isinstance(phase, Phase) for phase in learner.phases((inputs, labels)))
    train(learner, (inputs, labels), 40)
    after = [float(phase.loss().detach().mean()) for phase in learner.phases((inputs, labels))]
    assert all(b < a for a, b in zip(before, after))
    assert learner.predict(inputs).shape == (6, 3)


@pytest.mark.parametrize("kind", ["reconstruct", "adversarial"])
def test_price_and_cost_agree(kind: str) -> None:
    chosen = Reconstruct() if kind == "reconstruct" else Adversarial(discriminator())
    learner, data = Bidirectional(mlp(), backward=chosen), batch()
    step = (learner, lambda: learner.phases(data), list(learner.parameters()))
    (priced,) = price(step)
    assert priced.saved_bytes == cost(step, repeats=1).saved_bytes > 0


def test_norms_of_the_generator_answer_those_of_the_classifier() -> None:
    layers = [nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)]
    net = BidirectionalNet(layers, [12]).double()
    assert [type(norm).__name__ for norm in net.backward_norms] == ["BatchNorm1d", "Identity"]
    forward, backward = (
        {id(p) for p in found()} for found in (net.forward_parameters, net.backward_parameters)
    )
    assert forward & backward == {id(weight) for weight in net.shared()}
    assert len(forward | backward) == len(list(net.parameters()))


def test_masking_the_published_attack_fails_where_the_margin_does_not() -> None:
    """The paper's linear net on MNIST's digits: what it withstands is the cross-entropy attack alone."""
    data = mnist_5k()
    inputs, labels = data.train_inputs, data.train_labels
    reports = {}
    for stop in (0, None):
        learner = Bidirectional(bidirectional_mlp([784, 10], seed=3), bias=False, stop_backward_after=stop)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        order = torch.Generator().manual_seed(0)
        for _ in range(200):
            chosen = torch.randint(len(inputs), (100,), generator=order)
            for phase in learner.phases((inputs[chosen], labels[chosen])):
                optimizer = optimizers.setdefault(phase.name, torch.optim.Adam(phase.parameters, lr=0.03))
                optimizer.zero_grad()
                phase.backward()
                optimizer.step()
        reports[stop] = robustness(
            learner.net, data.test_inputs, data.test_labels, radii=[0.3], steps=5, key=KEY
        )
    plain, both = reports[0], reports[None]
    assert both.largest_logit > plain.largest_logit
    assert both.accuracy("fgsm", 0.3) > plain.accuracy("fgsm", 0.3) + 0.25
    assert both.masked
    assert not plain.masked
    assert plain.accuracy("fgsm-margin", 0.3) <= 0.05
    assert both.accuracy("fgsm-margin", 0.3) <= 0.05


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: BidirectionalNet([nn.Conv2d(1, 1, 3), nn.MaxPool2d(2)], [1, 8, 8]), r"layers\[1\]"),
        (lambda: BidirectionalNet([nn.Linear(4, 4), nn.Dropout()], [4]), r"layers\[1\]"),
        (lambda: BidirectionalNet([SHARED, nn.ReLU(), SHARED], [4]), r"layers\[2\]"),
        (lambda: BidirectionalNet([nn.Linear(4, 4), nn.ReLU()], [4]), "layers"),
        (lambda: BidirectionalNet([nn.Linear(4, 4)], [5]), r"layers\[0\]"),
        (lambda: BidirectionalNet([nn.Linear(4, 1)], [4]), "layers"),
        (lambda: BidirectionalNet([nn.Linear(4, 3)], [0]), "input_shape"),
        (lambda: convolved(nn.Conv2d(1, 1, 2, padding="same")), r"layers\[0\]"),
        (lambda: convolved(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), r"layers\[0\]"),
        (lambda: BidirectionalNet([SHARED], [4], backward_activation=DROPOUT), "backward_activation"),
        (lambda: BidirectionalNet([nn.Linear(4, 3)], [4], backward_norms=[0]), "backward_norms"),
        (lambda: bidirectional_mlp([4]), "sizes"),
        (lambda: mlp().start_(std=-1.0), "std"),
        (lambda: mlp().classify(torch.zeros(2, 5)), "inputs"),
        (lambda: mlp().generate(torch.zeros(2, 5)), "classes"),
        (lambda: Bidirectional(nn.Linear(2, 2)), "net"),  # type: ignore[arg-type]
        (lambda: Bidirectional(mlp(), backward="bce"), "backward"),  # type: ignore[arg-type]
        (lambda: Bidirectional(mlp(), bias=0), "bias"),  # type: ignore[arg-type]
        (lambda: Bidirectional(mlp(), stop_backward_after=-1), "stop_backward_after"),
        (lambda: Bidirectional(SELF, backward=Adversarial(SELF)), "discriminator"),
        (lambda: Adversarial(lambda x: x), "discriminator"),  # type: ignore[arg-type]
        (lambda: Bidirectional(mlp()).phases(torch.zeros(2, 12)), "batch"),
        (lambda: Bidirectional(mlp()).phases((torch.full((2, 12), 1.5), torch.tensor([0, 1]))), "inputs"),
        (lambda: Bidirectional(mlp()).phases((torch.zeros(2, 12), torch.tensor([0.0, 1.0]))), "labels"),
        (lambda: [phase.backward() for phase in WIDE.phases(batch(), key=KEY)], "prior"),
        (lambda: [phase.backward() for phase in MANY.phases(batch(), key=KEY)], "discriminator"),
    ],
    ids=[
        "pooling", "dropout", "twice", "no logits", "size", "one class", "no size", "even same", "circular",
        "activation", "norm of the image", "sizes", "std", "other inputs", "other classes", "net", "backward",
        "bias", "stop", "own judge", "no judge", "batch", "range", "labels", "prior", "two logits",
    ],
)  # fmt: skip
def test_what_has_no_way_back_is_named(make: Any, argument: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"^{argument}"):
        make()


def convolved(conv: nn.Conv2d) -> BidirectionalNet:
    return BidirectionalNet([conv, nn.Flatten(), nn.Linear(16, 3)], [1, 4, 4])


SHARED = nn.Linear(4, 4)
DROPOUT = nn.Dropout()
SELF = mlp()
WIDE = Bidirectional(
    mlp(), backward=Adversarial(discriminator(), prior=lambda like, key: like.new_zeros(6, 4))
)
MANY = Bidirectional(mlp(), backward=Adversarial(nn.Linear(12, 2).double()))
