"""NoProp in continuous time and by flow matching: the exact checks, and refusals."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import (
    ContinuousNoProp,
    DenoisingBlock,
    FlowNoProp,
    LabelEmbedding,
    LearnedSchedule,
    NoiseLevels,
    NoProp,
    learned_labels,
    one_hot_labels,
    prototype_labels,
)
from thalweg.local.noprop_schedule import deterministic_transition, signal_to_noise
from thalweg.noise import Key, normal, uniform
from thalweg.step import Learner, Step

CLASSES = 3
DOUBLE = torch.float64


class Straight(nn.Module):
    """The right velocity (u - z) / (1 - t) in one-hot coordinates; the input is the one-hot label."""

    def forward(self, latent: Tensor, inputs: Tensor, time: Tensor) -> Tensor:
        return (inputs - latent) / (1 - time[:, None])


class Oracle(nn.Module):
    """Knows the class."""

    def forward(self, latent: Tensor, inputs: Tensor, time: Tensor | None = None) -> Tensor:
        return 1e4 * inputs


class AtTime(nn.Module):
    """A block of discrete time out of one that is told the time."""

    def __init__(self, block: nn.Module, time: float) -> None:
        super().__init__()
        self.held = [block]
        self.time = time
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, latent: Tensor, inputs: Tensor) -> Tensor:
        found: Tensor = self.held[0](latent, inputs, latent.new_full((len(latent),), self.time))
        return found


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=g).to(dtype), torch.randint(0, CLASSES, (12,), generator=g)


def learner(kind: Any, labels: LabelEmbedding | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    labels = one_hot_labels(CLASSES) if labels is None else labels
    return kind(DenoisingBlock(labels, 4, width=6, timed=True), labels, **options)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-8, 0), st.floats(0.5, 8), st.integers(1, 20))
def test_exact_learned_schedule(seed: int, low: float, gap: float, width: int) -> None:
    """Monotone, positive slopes, its ends at sigmoid(-high) and sigmoid(-low), whatever it has learned."""
    torch.manual_seed(seed)
    schedule = LearnedSchedule(low, low + gap, width).double()
    with torch.no_grad():
        for parameter in (schedule.raw_inner, schedule.raw_outer, schedule.shift):
            parameter.add_(torch.randn_like(parameter))
    time = torch.linspace(0, 1, 101, dtype=DOUBLE)
    levels = schedule.level(time)
    assert bool((levels.diff() > 0).all())
    assert bool((schedule.weight(time) > 0).all())
    assert torch.allclose(levels[0], torch.sigmoid(torch.tensor(-(low + gap), dtype=DOUBLE)), rtol=1e-5)
    assert torch.allclose(levels[-1], torch.sigmoid(torch.tensor(-low, dtype=DOUBLE)), rtol=1e-5)


def test_exact_slope_of_the_snr_is_what_autograd_finds() -> None:
    schedule = LearnedSchedule().double()
    time = torch.linspace(0.01, 0.99, 9, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(signal_to_noise(schedule.level(time)).sum(), time)
    assert torch.allclose(schedule.weight(time), slope, rtol=1e-9)


def test_exact_discrete_blocks_are_ancestral_continuous_on_the_same_grid() -> None:
    """NoProp with T blocks = the ancestral sampler on the same grid; its weights = those of the grid."""
    net = learner(ContinuousNoProp).double().eval()
    steps = 5
    times = torch.linspace(0, 1, steps + 1, dtype=DOUBLE)
    levels = NoiseLevels(tuple(net.schedule.level(times).tolist()))
    blocks = [AtTime(net.block, float(time)) for time in times[:-1]]
    discrete = NoProp(blocks, net.embedding, levels=levels)
    discrete.readout = net.readout
    x, _ = batch(DOUBLE)
    for noise in (True, False):
        ours = net.predict(x, steps=steps, noise=noise, key=Key(4))
        assert torch.allclose(discrete.predict(x, noise=noise, key=Key(4)), ours, atol=1e-9)
    many = 2000
    grid = net.schedule.level(torch.linspace(0, 1, many + 1, dtype=DOUBLE)).detach()
    per_step = signal_to_noise(grid[1:]) - signal_to_noise(grid[:-1])
    middle = net.schedule.weight((torch.arange(many, dtype=DOUBLE) + 0.5) / many).detach() / many
    assert torch.allclose(per_step, middle, rtol=1e-3)


def test_exact_deterministic_steps_keep_the_law_of_the_latents() -> None:
    """A latent sqrt(l) u + sqrt(1 - l) e goes to sqrt(l') u + sqrt(1 - l') e with the same e."""
    u, e = torch.randn(2, 6, dtype=DOUBLE)
    step = deterministic_transition(0.3, 0.8)
    latent = 0.3**0.5 * u + 0.7**0.5 * e
    assert torch.allclose(step.guess * u + step.state * latent, 0.8**0.5 * u + 0.2**0.5 * e)


@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_exact_oracle_reaches_the_class_from_any_start(sampler: Any, steps: int) -> None:
    net = ContinuousNoProp(Oracle(), one_hot_labels(CLASSES))
    with torch.no_grad():
        net.readout.linear.weight.copy_(torch.eye(CLASSES))
        net.readout.linear.bias.zero_()
    y = torch.arange(60) % CLASSES
    found = net.predict(torch.eye(CLASSES)[y], steps=steps, sampler=sampler, key=Key(1))
    # the last level is 0.993: the point is six standard deviations of the noise away from a mistake
    assert torch.equal(found.argmax(1), y)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_exact_flow_oracle_lands_on_the_label_with_any_number_of_steps(steps: int) -> None:
    net = FlowNoProp(Straight(), one_hot_labels(CLASSES)).double()
    y = torch.arange(12) % CLASSES
    x = torch.eye(CLASSES, dtype=DOUBLE)[y]
    start = torch.randn(12, CLASSES, dtype=DOUBLE)
    assert torch.allclose(net.transported(x, start, steps), x, atol=1e-9)
    assert torch.equal(net.predict(x, steps=steps, key=Key(2)).argmax(1), y)


def test_the_loss_of_continuous_time_written_out() -> None:
    net = learner(ContinuousNoProp, learned_labels(CLASSES, 5), eta=0.7).double()
    x, y = batch(DOUBLE)
    key = Key(7)
    (phase,) = net.phases((x, y), key=key)
    like = torch.empty(12, 5, dtype=DOUBLE)
    time = uniform(torch.empty(12, dtype=DOUBLE), key.at(call=3)).requires_grad_()
    level = net.schedule.level(time)[:, None]
    (slope,) = torch.autograd.grad((level / (1 - level)).sum(), time, create_graph=True)
    u = net.embedding.weight[y]
    z = level.sqrt() * u + (1 - level).sqrt() * normal(like, key.at(call=0))
    guess = net.block(z, x, time).softmax(1) @ net.embedding.weight
    first, last = net.schedule.level(torch.tensor([0.0, 1.0], dtype=DOUBLE))
    end = last.sqrt() * u + (1 - last).sqrt() * normal(like, key.at(call=1))
    wanted = nn.functional.cross_entropy(net.readout.linear(end), y, reduction="none")
    prior = torch.distributions.Normal(first.sqrt() * u, (1 - first).sqrt().expand(12, 5))
    unit = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    wanted = wanted + torch.distributions.kl_divergence(prior, unit).sum(1)
    wanted = wanted + 0.5 * 0.7 * slope * (guess - u).square().sum(1)
    assert torch.allclose(phase.loss(), wanted)
    exact = torch.autograd.grad(wanted.mean(), phase.parameters)
    phase.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-9) for p, g in zip(phase.parameters, exact))
    assert len(phase.parameters) == len(list(net.parameters()))


def test_the_loss_of_flow_matching_written_out() -> None:
    net = learner(FlowNoProp, learned_labels(CLASSES, 5), sigma=0.3).double()
    x, y = batch(DOUBLE)
    key = Key(7)
    (phase,) = net.phases((x, y), key=key)
    like = torch.empty(12, 5, dtype=DOUBLE)
    start, noise = normal(like, key.at(call=0)), normal(like, key.at(call=1))
    time = uniform(torch.empty(12, dtype=DOUBLE), key.at(call=3))
    t, u = time[:, None], net.embedding.weight[y]
    z = t * u + (1 - t) * start + 0.3 * noise
    velocity = net.block(z, x, time) @ net.embedding.weight
    wanted = (velocity - (u - start)).square().sum(1)
    end = z + (1 - t) * velocity
    wanted = wanted + nn.functional.cross_entropy(net.readout.linear(end), y, reduction="none")
    assert torch.allclose(phase.loss(), wanted)


def test_learned_labels_collapse_without_the_anchor_and_not_with_it() -> None:
    def spread(anchor: Any) -> float:
        net = learner(FlowNoProp, learned_labels(CLASSES, 4), anchor=anchor)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        y = torch.arange(12) % CLASSES
        x = nn.functional.one_hot(y, 4).float()
        for step in range(400):
            (phase,) = net.phases((x, y), key=Key(3, step))
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()
        return float(torch.pdist(net.embedding.weight.detach()).min())

    # orthonormal at the start: sqrt(2) apart
    assert spread("collapse") < 0.2 * math.sqrt(2)
    assert spread(True) > 0.5 * math.sqrt(2)
    with pytest.raises(ArgumentError, match="collapse"):
        learner(FlowNoProp, learned_labels(CLASSES, 4), anchor=False)


def test_the_anchor_is_there_exactly_where_labels_learn() -> None:
    fixed, learned = learner(FlowNoProp), learner(FlowNoProp, learned_labels(CLASSES, 4))
    names = [
        {
            name
            for name, p in net.named_parameters()
            if any(p is q for q in next(net.phases(batch())).parameters)
        }
        for net in (fixed, learned)
    ]
    assert not any(name.startswith(("readout", "embedding")) for name in names[0])
    assert {"readout.linear.weight", "embedding.weight"} <= names[1]


@pytest.mark.parametrize("kind", [ContinuousNoProp, FlowNoProp], ids=["continuous", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_learners_of_any_dtype(kind: Any, dtype: torch.dtype) -> None:
    net = learner(kind).to(dtype)
    assert isinstance(net, Learner)
    (phase,) = net.phases(batch(dtype))
    assert phase.backward().dtype == dtype
    assert net.predict(batch(dtype)[0], steps=3, samples=2).dtype == dtype


@pytest.mark.parametrize("kind", [ContinuousNoProp, FlowNoProp], ids=["continuous", "flow"])
def test_prototypes_compile_and_price(kind: Any) -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    labels = prototype_labels(x, y, 2)
    block = DenoisingBlock(labels, (1, 8, 8), width=8, channels=(2, 2, 4), timed=True, dropout=0.0)
    net = kind(block, labels)
    step = Step(net, lambda: net.phases((x, y)), tuple(net.parameters()))
    (priced,), measured = price(step), cost(step, repeats=0)
    assert priced.operations == measured.operations > 0
    plain = next(net.phases((x, y), key=Key(1))).loss()
    net.block = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.allclose(next(net.phases((x, y), key=Key(1))).loss(), plain, rtol=1e-4)
    assert net.predict(x, steps=3).shape == (8, 2)


def test_bad_input_is_refused() -> None:
    labels = one_hot_labels(CLASSES)
    block = DenoisingBlock(labels, 4, width=6, timed=True)
    for kind, options, error in [
        (ContinuousNoProp, {"block": "block"}, ArgumentTypeError),
        (ContinuousNoProp, {"schedule": nn.Linear(1, 1)}, ArgumentTypeError),
        (ContinuousNoProp, {"eta": -1.0}, ArgumentError),
        (ContinuousNoProp, {"weights": "no"}, ArgumentError),
        (FlowNoProp, {"block": 3}, ArgumentTypeError),
        (FlowNoProp, {"sigma": -0.1}, ArgumentError),
        (FlowNoProp, {"sigma": "much"}, ArgumentTypeError),
        (FlowNoProp, {"anchor": "maybe"}, ArgumentError),
    ]:
        with pytest.raises(error):
            kind(**{"block": block, "embedding": labels, **options})
    for arguments in ({"low": 1.0, "high": 1.0}, {"low": float("nan")}, {"width": 0}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            LearnedSchedule(**arguments)  # type: ignore[arg-type]
    x, _ = batch()
    for net in (learner(ContinuousNoProp), learner(FlowNoProp)):
        with pytest.raises(ArgumentError, match="steps"):
            net.predict(x, steps=0)
    with pytest.raises(ArgumentError, match="sampler"):
        learner(ContinuousNoProp).predict(x, sampler="euler")
    with pytest.raises(ArgumentTypeError, match="time"):
        block(torch.zeros(2, CLASSES), torch.zeros(2, 4))
