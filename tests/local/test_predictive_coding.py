"""Predictive coding: equal to backpropagation in its two limits, a descent of its energy, local, refusals."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.ledger import cost, price
from thalweg.local import PredictiveCoding
from thalweg.step import Learner, Step

DOUBLE = torch.float64


def blocks(depth: int = 4, width: int = 6) -> list[nn.Module]:
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(depth - 1)]
    return [*hidden, nn.Linear(width, 3).double()]


def batch(examples: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(examples, 6, generator=g, dtype=DOUBLE), torch.arange(examples) % 3


def exact(parts: list[nn.Module]) -> Tensor:
    x, y = batch()
    net = nn.Sequential(*parts)
    loss = nn.functional.cross_entropy(net(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def learned(learner: PredictiveCoding, data: Any = None) -> Tensor:
    learner.zero_grad()
    for phase in learner.phases(batch() if data is None else data):
        phase.backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_fixed_predictions_are_backpropagation_after_as_many_steps_as_hidden_blocks() -> None:
    parts = blocks(5)
    wanted = exact(parts)
    errors = [
        error(learned(PredictiveCoding(parts, steps=n, rate=1.0, prediction="fixed")), wanted)
        for n in range(1, 6)
    ]
    assert all(e > 1e-3 for e in errors[:3])
    assert all(e < 1e-14 for e in errors[3:])


def test_fixed_predictions_converge_at_any_rate_and_strength() -> None:
    parts = blocks()
    learner = PredictiveCoding(parts, steps=400, rate=0.2, prediction="fixed", strength=3.0)
    assert error(learned(learner), exact(parts)) < 1e-12


def test_free_predictions_approach_backpropagation_as_the_strength_goes_to_zero() -> None:
    """The error falls with the strength: slope 1."""
    parts = blocks()
    wanted = exact(parts)
    strengths = [0.1, 0.01, 0.001]
    errors = [
        error(learned(PredictiveCoding(parts, steps=600, rate=0.2, strength=s)), wanted) for s in strengths
    ]
    assert all(9 < a / b < 11 for a, b in pairwise(errors))


def test_the_first_step_moves_the_last_hidden_block_as_backpropagation_does() -> None:
    """One small step: the error of the last hidden block is rate times its cotangent, below it nothing."""
    parts = blocks()
    x, y = batch()
    learner = PredictiveCoding(parts, steps=1, rate=0.01)
    states, _ = learner.relaxed(x, y)
    hidden = nn.Sequential(*parts[:-1])(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(parts[-1](hidden), y, reduction="sum"), hidden)
    assert torch.allclose(states[-1], hidden - 0.01 * slope)
    assert torch.equal(states[1], parts[0](x))


def test_relaxation_descends_its_energy() -> None:
    parts = blocks()
    x, y = batch()

    def energy(steps: int) -> float:
        states, _ = PredictiveCoding(parts, steps=steps, rate=0.1).relaxed(x, y)
        total = nn.functional.cross_entropy(parts[-1](states[-1]), y, reduction="sum")
        for state, below, block in zip(states[1:], states, parts, strict=False):
            total = total + 0.5 * (state - block(below)).square().sum()
        return float(total.detach())

    energies = [energy(n) for n in (1, 2, 5, 20, 100)]
    assert energies == sorted(energies, reverse=True)


def test_locality_and_gradient_of_the_energy() -> None:
    """A block's gradient is that of the energy at settled activities; nobody else's is touched."""
    parts = blocks()
    learner = PredictiveCoding(parts, steps=5)
    assert isinstance(learner, Learner)
    x, y = batch()
    states, _ = learner.relaxed(x, y)
    for index, phase in enumerate(learner.phases((x, y))):
        learner.zero_grad()
        phase.backward()
        for name, parameter in learner.named_parameters():
            assert (parameter.grad is not None) == name.startswith(f"blocks.{index}.")
        if index < len(parts) - 1:
            away = states[index + 1] - parts[index](states[index])
            wanted = torch.autograd.grad(0.5 * away.square().sum() / len(x), phase.parameters)
            assert all(torch.allclose(p.grad, g) for p, g in zip(phase.parameters, wanted, strict=True))


def test_trains() -> None:
    parts = blocks(3)
    learner = PredictiveCoding(parts, steps=20)
    x, y = batch(30)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    for _ in range(150):
        for phase in learner.phases((x, y)):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()
    assert (learner.predict(x).argmax(1) == y).float().mean() > 0.9


def test_kept_bytes_grow_by_one_activity_per_block_and_are_priced_as_measured() -> None:
    data = batch(64)

    def step(depth: int, **options: Any) -> Step:
        learner = PredictiveCoding(blocks(depth), steps=2, **options)
        return Step(learner, lambda: learner.phases(data), tuple(learner.parameters()))

    for options, per_block in [({}, 1), ({"prediction": "fixed"}, 2)]:
        kept = [cost(step(depth, **options), repeats=0).saved_bytes for depth in (4, 8, 16)]
        activity = 64 * 6 * 8
        assert kept[1] - kept[0] <= per_block * 4 * activity
        assert kept[2] - kept[1] <= per_block * 8 * activity
    (priced,), measured = price(step(3)), cost(step(3), repeats=0)
    assert priced.operations == measured.operations


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x, y = batch()
    learner = PredictiveCoding([part.to(dtype) for part in blocks()])
    for phase in learner.phases((x.to(dtype), y)):
        assert phase.backward().dtype == dtype


def test_convolutions_frozen_blocks_and_another_loss() -> None:
    parts = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 3)),
    ]
    learner = PredictiveCoding(parts, lambda out, y: (out - y).square().sum(1), steps=3)
    parts[0].requires_grad_(False)
    names = [phase.name for phase in learner.phases((torch.rand(5, 1, 6, 6), torch.rand(5, 3)))]
    assert names == ["block 1"]


def test_bad_input_is_refused() -> None:
    part = nn.Linear(4, 3)
    for options, error_type in [
        ({"blocks": []}, ArgumentError),
        ({"blocks": [part, part]}, ArgumentError),
        ({"loss": 3}, ArgumentTypeError),
        ({"steps": 0}, ArgumentError),
        ({"rate": 0.0}, ArgumentError),
        ({"prediction": "some"}, ArgumentError),
        ({"strength": -1.0}, ArgumentError),
    ]:
        with pytest.raises(error_type):
            PredictiveCoding(**{"blocks": [part], **options})  # type: ignore[arg-type]
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    with pytest.raises(ArgumentTypeError, match="batch"):
        PredictiveCoding([part]).phases(x)
    for layer in (nn.Dropout(0.1), nn.BatchNorm1d(4)):
        learner = PredictiveCoding([nn.Sequential(layer, part)])
        with pytest.raises(UnsupportedError, match="training mode"):
            learner.phases((x, y))
        learner.eval()
        next(iter(learner.phases((x, y)))).backward()
    with pytest.raises(ArgumentError, match="per example"):
        next(iter(PredictiveCoding([part], nn.functional.cross_entropy).phases((x, y)))).backward()
