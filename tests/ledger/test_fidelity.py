from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.ledger import fidelity
from thalweg.ledger.draws import Moments
from thalweg.losses import mean_loss
from thalweg.noise import Key, normal
from thalweg.step import Backprop, Estimate, Step


@dataclass(frozen=True)
class Noisy:
    """The exact gradient g, scaled, plus Gaussian noise of a known variance per entry, plus a constant."""

    scale: float = 1.0
    deviation: float = 0.0
    offset: float = 0.0

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        loss = mean_loss(closure())
        exact = torch.autograd.grad(loss, list(parameters))
        noise = [normal(g, key.at(call=i)) for i, g in enumerate(exact)]
        drawn = [self.scale * g + self.deviation * n + self.offset for g, n in zip(exact, noise)]
        return Estimate(loss.detach(), tuple(drawn), 1)


def quadratic() -> tuple[Step, Tensor]:
    torch.manual_seed(0)
    model = nn.ParameterDict({"a": torch.randn(6, dtype=torch.float64), "b": torch.randn(3, 2)})
    exact = torch.cat([model["a"].detach(), model["b"].detach().double().reshape(-1)])
    closure = lambda: (model["a"].square().sum() + model["b"].square().sum()) / 2  # noqa: E731
    return Step(model, closure, list(model.parameters())), exact


def network() -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 5)
    return Step(model, lambda: model(x).square().mean(dim=1), list(model.parameters()))


def test_backprop_against_itself_is_exact_after_two_draws() -> None:
    found = fidelity(network())
    assert (found.cosine, found.norm_ratio, found.bias, found.bias_se) == (1.0, 1.0, 0.0, 0.0)
    assert (found.squared_bias, found.variance, found.draws) == (0.0, 0.0, 2)
    assert found.converged
    assert not found.paired
    assert found.cosine_by_layer == {"0": 1.0, "2": 1.0}
    assert found.norm_ratio_by_layer == {"0": 1.0, "2": 1.0}


@dataclass(frozen=True)
class Twice:
    """Twice the gradient; reads of its key what `read` says."""

    read: Callable[[Key], object] = lambda key: None

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        self.read(key)
        found = Backprop().estimate(closure, parameters, key)
        return Estimate(found.loss, tuple(2 * g for g in found.gradients if g is not None), 1)


def test_a_rule_that_reads_no_randomness_is_done_after_two_draws() -> None:
    assert fidelity(network(), gradient=Twice()).draws == 2
    # equal draws by chance are no proof for a rule that could have drawn otherwise
    reads: list[Callable[[Key], object]] = [
        lambda key: key.seed,
        lambda key: key.bits(),
        lambda key: key.at(call=1),
        lambda key: normal(torch.empty(1), key),
        lambda key: torch.rand(1),
    ]
    for read in reads:
        found = fidelity(network(), gradient=Twice(read))
        assert (found.draws, found.bias_se) == (32, 0.0)
        assert found.bias == pytest.approx(1.0)


def test_scaling_is_bias_along_the_gradient() -> None:
    found = fidelity(network(), gradient=Noisy(scale=0.75), samples=2)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.norm_ratio == pytest.approx(0.75, rel=1e-6)
    assert found.bias == pytest.approx(-0.25, rel=1e-6)
    assert found.squared_bias == pytest.approx(0.0625, rel=1e-5)
    assert found.variance == pytest.approx(0.0, abs=1e-12)


def test_an_exact_gradient_given_as_tensors() -> None:
    step, _ = quadratic()
    exact = [p.detach().clone() for p in step.parameters]
    found = fidelity(step, reference=exact)
    assert (found.cosine, found.bias, found.draws) == (1.0, 0.0, 2)
    opposite = fidelity(step, reference=[-p for p in exact])
    assert (opposite.cosine, opposite.bias) == pytest.approx((-1.0, -2.0))
    assert opposite.squared_bias == pytest.approx(4.0)


def test_bias_variance_and_squared_bias_of_known_noise() -> None:
    step, exact = quadratic()
    scale = float(exact.square().sum())
    n, deviation, offset = exact.numel(), 0.5, 0.2
    found = fidelity(step, gradient=Noisy(deviation=deviation, offset=offset), samples=4000)
    bias = offset * float(exact.sum()) / scale
    assert abs(found.bias - bias) < 5 * found.bias_se
    # the projection of the noise has variance deviation^2 / |g|^2
    assert found.bias_se == pytest.approx(deviation / math.sqrt(scale * 4000), rel=0.1)
    variance = n * deviation**2 / scale
    # a sum of n squared normals over 4000 draws: relative deviation sqrt(2 / (n * 4000))
    assert abs(found.variance - variance) < 5 * variance * math.sqrt(2 / (n * 4000))
    squared = n * offset**2 / scale
    # delta method: 2 |offset| deviation sqrt(n / 4000) / |g|^2
    assert abs(found.squared_bias - squared) < 5 * 2 * offset * deviation * math.sqrt(n / 4000) / scale
    assert found.draws == 4000


def test_squared_bias_of_an_unbiased_route_is_centred_on_zero() -> None:
    step, exact = quadratic()
    scale = float(exact.square().sum())
    values = [
        fidelity(step, gradient=Noisy(deviation=1.0), samples=16, key=Key(seed)).squared_bias
        for seed in range(200)
    ]
    n = exact.numel()
    # under no bias the estimate has variance 2 n deviation^4 / draws^2 (and a little more) / |g|^4
    error = math.sqrt(2 * n * 16 / 15) / 16 / scale / math.sqrt(200)
    assert abs(sum(values) / 200) < 5 * error
    assert min(values) < 0 < max(values)


def test_drawing_stops_at_the_standard_error_or_at_the_limit() -> None:
    step, _ = quadratic()
    found = fidelity(step, gradient=Noisy(deviation=1.0), standard_error=0.02)
    assert found.converged
    assert found.bias_se <= 0.02
    assert 32 < found.draws < 10_000
    stopped = fidelity(step, gradient=Noisy(deviation=1.0), standard_error=0.02, limit=40)
    assert (stopped.draws, stopped.converged) == (40, False)
    assert "40, the limit" in str(stopped)


def test_draws_differ_and_the_key_repeats_them() -> None:
    step, _ = quadratic()
    first, again, other = (
        fidelity(step, gradient=Noisy(deviation=1.0), samples=5, key=Key(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.bias != other.bias
    assert first.variance > 0


class Coin(nn.Module):
    """A Bernoulli unit of probability sigmoid(w) with the straight-through gradient of p."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

    def forward(self) -> Tensor:
        p = torch.sigmoid(self.w)
        hard = (torch.rand_like(p) < p).to(p.dtype)
        return hard + p - p.detach()


def test_a_stochastic_forward_against_its_exact_gradient() -> None:
    unit = Coin()
    target = torch.tensor([0.3, 0.8], dtype=torch.float64)
    p = torch.sigmoid(unit.w.detach())
    slope = p * (1 - p)
    # E (b - t)^2 = p (1 - t)^2 + (1 - p) t^2, so its derivative is 1 - 2 t; straight-through has 2 (b - t)
    exact = slope * (1 - 2 * target)
    expected = float((slope * 2 * (p - target) * exact).sum() / exact.square().sum()) - 1
    step = Step(unit, lambda: (unit() - target).square().sum(), [unit.w])
    found = fidelity(step, gradient=Backprop(), reference=[exact], standard_error=0.02)
    assert found.variance > 0
    assert found.converged
    assert abs(found.bias - expected) < 5 * found.bias_se
    assert abs(expected) > 5 * found.bias_se


def test_a_random_closure_is_held_against_the_reference_under_the_same_randomness() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    x = torch.randn(8, 4)
    step = Step(model, lambda: model(x).square().mean(), list(model.parameters()))
    found = fidelity(step, samples=20)
    assert found.paired
    assert (found.cosine, found.bias, found.squared_bias) == (1.0, 0.0, 0.0)
    assert found.variance > 0
    scaled = fidelity(step, gradient=Noisy(scale=0.5), samples=400)
    assert abs(scaled.bias + 0.5) < 5 * scaled.bias_se
    assert scaled.bias_se < 0.05


@dataclass
class Half:
    name: str
    parameters: Sequence[Tensor]
    loss: Callable[[], Tensor]

    def backward(self) -> Tensor:
        loss = self.loss()
        (0.5 * loss).backward(inputs=list(self.parameters))
        return loss.detach()


def test_a_learner_is_judged_by_what_its_phases_leave() -> None:
    step = network()

    def phases() -> Iterator[Half]:
        for index in (0, 2):
            parameters = list(step.model.get_submodule(str(index)).parameters())
            yield Half(str(index), parameters, lambda: step.closure().mean())

    exact = torch.autograd.grad(step.closure().mean(), list(step.parameters))
    learner = Step(step.model, phases, step.parameters)
    found = fidelity(learner, reference=exact)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.bias == pytest.approx(-0.5, abs=1e-6)
    assert found.draws == 2
    with pytest.raises(ArgumentError, match=r"reference: .*learner has no backprop"):
        fidelity(learner)


def test_layers_without_a_gradient_read_nan_and_unused_parameters_count_as_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    x = torch.ones(3, 2)
    step = (model, lambda: model["used"](x).square().mean(), list(model.parameters()))
    found = fidelity(step)
    assert found.cosine_by_layer["used"] == 1.0
    assert math.isnan(found.cosine_by_layer["unused"])
    assert math.isnan(found.norm_ratio_by_layer["unused"])
    assert found.cosine == 1.0


def fingerprint(model: nn.Module) -> list[Any]:
    values = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*values, *gradients, torch.get_rng_state()]


@pytest.mark.parametrize("rule", [None, Noisy(deviation=1.0)])
def test_nothing_changes(rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    model(x).sum().backward()
    owners = [p.grad for p in model.parameters()]
    before = fingerprint(model)
    fidelity((model, lambda: model(x).square().mean(), model.parameters()), gradient=rule, samples=4)
    for old, new in zip(before, fingerprint(model)):
        assert torch.equal(old, new)
    assert all(p.grad is owner for p, owner in zip(model.parameters(), owners))


def test_refusals() -> None:
    step, _ = quadratic()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gradient": 3}, ArgumentTypeError, "gradient: "),
        ({"reference": 3}, ArgumentTypeError, "reference: "),
        ({"reference": Backprop}, ArgumentTypeError, "reference: "),
        ({"reference": [torch.ones(6)]}, ArgumentError, r"reference: expected 2"),
        ({"reference": [torch.ones(6), torch.ones(2, 3)]}, ArgumentError, r"reference\[1\]: .*\(3, 2\)"),
        ({"reference": [torch.ones(6), 1.0]}, ArgumentTypeError, r"reference\[1\]"),
        ({"reference": [torch.ones(6), torch.full((3, 2), math.nan)]}, NonFiniteError, r"reference\[1\]"),
        ({"reference": [torch.zeros(6), torch.zeros(3, 2)]}, ArgumentError, "not zero"),
        ({"samples": 1}, ArgumentError, "samples: "),
        ({"limit": 1}, ArgumentError, "limit: "),
        ({"standard_error": 0.0}, ArgumentError, "standard_error: "),
        ({"key": 7}, ArgumentTypeError, "key: "),
        ({"gradient": Noisy(scale=math.nan)}, NonFiniteError, "the gradient"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            fidelity(step, **arguments)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), min_size=2, max_size=8),
    st.lists(st.floats(0.125, 10, width=32), min_size=3, max_size=3),
)
def test_moments_equal_their_textbook_formulas(draws: list[list[float]], exact: list[float]) -> None:
    g = torch.tensor(exact, dtype=torch.float64)
    h = torch.tensor(draws, dtype=torch.float64)
    moments = Moments(g, torch.tensor([0, 0, 1]))
    for row in h:
        moments.add(row)
    scale = g.square().sum()
    along = (h - g) @ g / scale
    close = {"rel": 1e-9, "abs": 1e-9}
    assert moments.bias() == pytest.approx(float(along.mean()), **close)
    assert moments.bias_se() == pytest.approx(float(along.std() / len(h) ** 0.5), **close)
    variance = h.var(dim=0).sum()
    assert moments.variance() == pytest.approx(float(variance / scale), **close)
    squared = (h.mean(dim=0) - g).square().sum() - variance / len(h)
    assert moments.squared_bias() == pytest.approx(float(squared / scale), **close)
    cosines = [float(row @ g / (row.norm() * g.norm())) if bool(row.any()) else 0.0 for row in h]
    assert moments.cosine() == pytest.approx(sum(cosines) / len(h), rel=1e-6, abs=1e-6)
