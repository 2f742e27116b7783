"""NoProp in discrete time: the exact checks of its specification, then digits, refusals and the ledger."""

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.blackbox import SPSA
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import (
    BackpropNoProp,
    DenoisingBlock,
    LabelEmbedding,
    NoiseLevels,
    NoProp,
    cosine,
    learned_labels,
    one_hot_labels,
    prototype_labels,
)
from thalweg.local.noprop_schedule import deterministic_transition, signal_to_noise, transition
from thalweg.noise import Key, normal
from thalweg.step import Learner, Step, backward

CLASSES = 3
LEVELS = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8, unique=True).map(sorted)


class Oracle(nn.Module):
    """Knows the class: the input is the one-hot label."""

    def forward(self, latent: Tensor, inputs: Tensor, time: Tensor | None = None) -> Tensor:
        return 1e4 * inputs


class Plain(nn.Module):
    """Two layers on latent and input together."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(CLASSES + 4, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, latent: Tensor, inputs: Tensor) -> Tensor:
        return self.net(torch.cat([latent, inputs], 1))


def learner(depth: int = 3, labels: LabelEmbedding | None = None, **options: Any) -> NoProp:
    torch.manual_seed(0)
    labels = one_hot_labels(CLASSES) if labels is None else labels
    blocks = [DenoisingBlock(labels, 4, width=6, dropout=0.0) for _ in range(depth)]
    return NoProp(blocks, labels, **options)


def batch(examples: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(examples, 4, generator=g), torch.randint(0, CLASSES, (examples,), generator=g)


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


def test_learned_labels_start_orthonormal_and_say_when_they_cannot() -> None:
    assert torch.allclose(
        learned_labels(4, 9).weight @ learned_labels(4, 9).weight.T, torch.eye(4), atol=1e-5
    )
    assert not torch.equal(learned_labels(4, 9).weight, learned_labels(4, 9, seed=1).weight)
    with pytest.warns(UserWarning, match="orthogonal"):
        narrow = learned_labels(5, 2).weight
    assert torch.allclose(narrow.T @ narrow, torch.eye(2), atol=1e-5)


def test_prototypes_are_the_most_central_examples() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, 3, 3, generator=g), torch.arange(40) % 2
    labels = prototype_labels(x, y, 2)
    for label in range(2):
        members = x[y == label].flatten(1)
        medians = torch.cdist(members, members).quantile(0.5, 1)
        assert torch.equal(labels.weight[label].flatten(), members[medians.argmin()])
    assert labels.shape == (2, 3, 3)
    assert labels.learned


def test_prototype_latents_take_a_path_of_convolutions() -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    labels = prototype_labels(x, y, 2)
    net = NoProp([DenoisingBlock(labels, (1, 8, 8), width=8, channels=(2, 2, 4)) for _ in range(2)], labels)
    for phase in net.phases((x, y)):
        phase.backward()
    assert labels.weight.grad is not None
    assert net.eval().predict(x).shape == (8, 2)
    with pytest.raises(ArgumentError, match="prototypes"):
        DenoisingBlock(labels, (1, 8, 9))


def test_the_first_block_alone_and_several_starts() -> None:
    net = learner().eval()
    x, _ = batch()
    key = Key(3)
    like = torch.empty(12, CLASSES)
    with torch.no_grad():
        wanted = net.blocks[0](normal(like, key.at(call=0)), x)
    assert torch.equal(net.predict(x, blocks=1, key=key), wanted)
    assert torch.equal(net.predict(x, key=key), net.predict(x, key=key))
    assert not torch.equal(net.predict(x, key=key), net.predict(x, key=key, noise=False))
    together = net.predict(x, samples=4, key=key)
    assert torch.allclose(together.exp().sum(1), torch.ones(12), atol=1e-5)


def test_distance_readout_and_equal_weights() -> None:
    for options in ({"readout": "distance"}, {"weights": "one"}):
        net = learner(labels=learned_labels(CLASSES, 4), **options)  # type: ignore[arg-type]
        for phase in net.phases(batch()):
            phase.backward()
        assert net.eval().predict(batch()[0]).shape == (12, CLASSES)
    near = learner(labels=one_hot_labels(CLASSES), readout="distance")
    logits = near.readout(torch.randn(2, CLASSES), near.embedding)
    mixed = near.embedding.mix(near.readout.linear(torch.zeros(2, CLASSES)).softmax(1))
    assert logits.shape == (2, CLASSES)
    assert mixed.shape == (2, CLASSES)
    assert bool((logits <= 0).all())


def test_kept_bytes_do_not_grow_with_depth_and_are_priced_as_measured() -> None:
    x, y = batch(64)

    def step(depth: int) -> Step:
        net = learner(depth)
        return Step(net, lambda: net.phases((x, y)), tuple(net.parameters()))

    kept = [cost(step(depth), repeats=0).saved_bytes for depth in (2, 4, 16)]
    assert kept[0] == kept[1] == kept[2] > 0
    (priced,), measured = price(step(2)), cost(step(2), repeats=0)
    assert priced.operations == measured.operations
    assert priced.saved_bytes == measured.saved_bytes


def test_another_rule_sees_the_same_draws_at_each_evaluation() -> None:
    net = learner(1)
    (phase,) = net.phases(batch())
    assert torch.equal(phase.loss(), phase.loss())
    backward(phase.loss, phase.parameters, gradient=SPSA(samples=2))
    assert all(p.grad is not None for p in phase.parameters)


def test_keyed_draws_leave_the_default_generator_alone() -> None:
    net = learner(1)
    net.blocks[0].input_path.append(nn.Dropout(0.5))
    state = torch.get_rng_state()
    (phase,) = net.phases(batch(), key=Key(1))
    assert torch.equal(phase.loss(), phase.loss())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    net = learner(2).to(dtype)
    x, y = batch()
    for phase in net.phases((x.to(dtype), y)):
        assert phase.backward().dtype == dtype
    assert net.eval().predict(x.to(dtype)).dtype == dtype


def test_blocks_may_be_compiled() -> None:
    plain = learner(2)
    whole = copy.deepcopy(plain)
    for index, block in enumerate(whole.blocks):
        whole.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(whole.phases(batch(), key=Key(1)), plain.phases(batch(), key=Key(1))):
        assert torch.allclose(ours.backward(), theirs.backward(), rtol=1e-5)


def test_the_baseline_trains_end_to_end() -> None:
    labels = one_hot_labels(CLASSES)
    net = BackpropNoProp([DenoisingBlock(labels, 4, width=6) for _ in range(2)], labels)
    x, y = batch()
    assert torch.equal(net(x, key=Key(1)), net(x, key=Key(1)))
    nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ArgumentError, match="start"):
        BackpropNoProp(net.blocks, labels, start=1.0)


def test_bad_input_is_refused() -> None:
    labels = one_hot_labels(CLASSES)
    block = DenoisingBlock(labels, 4, width=6)
    for change, error in [
        ({"blocks": []}, ArgumentError),
        ({"blocks": [block, block]}, ArgumentError),
        ({"blocks": [len]}, ArgumentTypeError),
        ({"embedding": "onehot"}, ArgumentTypeError),
        ({"levels": cosine(2)}, ArgumentError),
        ({"levels": [0.1, 0.9]}, ArgumentTypeError),
        ({"eta": 0.0}, ArgumentError),
        ({"readout": "linear"}, ArgumentError),
        ({"anchor": "none"}, ArgumentError),
        ({"weights": "two"}, ArgumentError),
    ]:
        with pytest.raises(error):
            NoProp(**{"blocks": [block], "embedding": labels, **change})  # type: ignore[arg-type]
    for levels in [(0.1,), (0.5, 0.1), (0.1, 0.1), (0.0, 0.5), (0.5, 1.0), (0.5, float("nan"))]:
        with pytest.raises(ArgumentError, match="levels"):
            NoiseLevels(levels)
    with pytest.raises(ArgumentTypeError):
        NoiseLevels([0.1, 0.5])  # type: ignore[arg-type]
    for arguments in ({"steps": 0}, {"offset": 0.0}, {"margin": 0.6}):
        with pytest.raises(ArgumentError):
            cosine(**arguments)  # type: ignore[arg-type]
    net = learner()
    x, y = batch()
    for wrong, error in [
        (x, ArgumentTypeError),
        ((x, y.float()), ArgumentTypeError),
        ((x, y[:3]), ArgumentError),
        ((x, y + 1), ArgumentError),
        ((x, -y), ArgumentError),
        ((None, y), ArgumentTypeError),
    ]:
        with pytest.raises(error):
            net.phases(wrong)
    with pytest.raises(ArgumentError, match="only"):
        net.phases((x, y), only=[3])
    with pytest.raises(ArgumentTypeError, match="key"):
        net.phases((x, y), key=3)  # type: ignore[arg-type]
    for options in ({"blocks": 0}, {"blocks": 4}, {"samples": 0}):
        with pytest.raises(ArgumentError):
            net.predict(x, **options)
    for shape in [(12,), (12, CLASSES + 1)]:
        wrong_block = nn.Module()
        wrong_block.forward = lambda z, x, shape=shape: torch.zeros(shape)  # type: ignore[method-assign]
        with pytest.raises(ArgumentError, match="logits"):
            NoProp([wrong_block], labels).predict(x)
    with pytest.raises(ArgumentError, match="class 2"):
        prototype_labels(x, y.clamp(max=1), CLASSES)
    for wrong_inputs in (0, (1, 3, 8), (1, 8)):
        with pytest.raises(ArgumentError):
            DenoisingBlock(labels, wrong_inputs)  # type: ignore[arg-type]


def test_predicting_in_training_mode_with_batch_norm_warns() -> None:
    net = learner(1)
    with pytest.warns(UserWarning, match="eval"):
        net.predict(batch()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval().predict(batch()[0])
