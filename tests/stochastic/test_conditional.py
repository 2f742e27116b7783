"""The conditional layer: its formula, its sparsity, its calibration, and work that is really skipped."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from thalweg.errors import NonFiniteError, UnsupportedError
from thalweg.step import backward
from thalweg.stochastic import (
    AdaptiveL1Sparsity,
    BinaryNeuron,
    CategoricalNeuron,
    Concrete,
    ConditionalLinear,
    KLSparsity,
    NoisyRectifier,
    ScoreFunction,
    StochasticTimesSmooth,
    StraightThrough,
)

GATES: dict[str, Callable[[], nn.Module]] = {
    "straight-through": BinaryNeuron,
    "sigmoid": lambda: BinaryNeuron(StraightThrough("sigmoid")),
    "gumbel": lambda: BinaryNeuron(Concrete()),
    "score": lambda: BinaryNeuron(gradient=None),
    "rectifier": NoisyRectifier,
    "times smooth": StochasticTimesSmooth,
}
every = pytest.mark.parametrize("gate", GATES)


def layer_with(gate: str = "straight-through", **options: object) -> ConditionalLinear:
    torch.manual_seed(2)
    return ConditionalLinear(12, 60, 10, GATES[gate](), **{"sparsity": KLSparsity(0.1), **options})


@every
def test_training_is_the_formula(gate: str) -> None:
    layer, x = layer_with(gate), torch.randn(7, 12)
    torch.manual_seed(3)
    out = layer(x)
    scores = torch.tanh(x @ layer.bottleneck.weight.T + layer.bottleneck.bias) @ layer.gater.weight.T
    torch.manual_seed(3)
    gates = layer.gate(scores + layer.gater.bias)
    torch.testing.assert_close(out, gates * (x @ layer.experts.weight.T + layer.experts.bias))
    torch.testing.assert_close(layer.active, (gates != 0).float().mean())
    assert (out == 0).float().mean() > 0.3


@every
def test_initial_weights_are_the_papers(gate: str) -> None:
    layer = ConditionalLinear(30, 200, 50, GATES[gate]())
    for one, fans, gain in ((layer.experts, 230, 1), (layer.bottleneck, 80, 1), (layer.gater, 250, 4)):
        assert (one.bias == 0).all()
        if one is layer.gater and gate == "rectifier":
            assert ((one.weight != 0).sum(1) == 15).all()
            entries = one.weight[one.weight != 0]
            assert abs(entries.mean()) < 5 / math.sqrt(len(entries))
            assert abs(entries.std() - 1) < 5 / math.sqrt(2 * len(entries))
        else:
            limit = gain * math.sqrt(6 / fans)
            assert 0.97 * limit < one.weight.abs().max() <= limit
    narrow = ConditionalLinear(3, 5, 4, NoisyRectifier())
    assert (narrow.gater.weight != 0).all()


def test_constraint_bounds_the_incoming_weights_of_each_unit() -> None:
    layer = layer_with(max_norm=1.5)
    for one in (layer.experts, layer.bottleneck, layer.gater):
        one.weight.data.normal_(std=1.0)
        one.weight.data[0].mul_(1e-3)
    before = copy.deepcopy(layer)
    layer.constrain_()
    for name in ("experts", "bottleneck", "gater"):
        now, then = getattr(layer, name).weight, getattr(before, name).weight
        norms = then.norm(dim=1, keepdim=True)
        torch.testing.assert_close(now, then * (1.5 / norms).clamp(max=1))
        assert torch.equal(now[0], then[0])
    free = layer_with(max_norm=None)
    free.experts.weight.data.mul_(100)
    weight = free.experts.weight.clone()
    free.constrain_()
    assert torch.equal(free.experts.weight, weight)


def trained(layer: ConditionalLinear, steps: int, pull: float) -> list[float]:
    """The fractions of open gates while every expert has something to say about the i.i.d. inputs."""
    teacher = torch.randn(12, 60) / math.sqrt(12)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    fractions = []
    for _ in range(steps):
        x = torch.randn(64, 12)
        loss = pull * (layer(x) - x @ teacher).square().sum(1).mean() + layer.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.constrain_()
        fractions.append(float(layer.active))
    return fractions


@pytest.mark.parametrize("gate", ["straight-through", "sigmoid", "gumbel", "times smooth"])
@pytest.mark.parametrize("target", [0.1, 0.3])
def test_e9_the_kl_cost_brings_the_fraction_of_open_gates_to_its_target(gate: str, target: float) -> None:
    layer = layer_with(gate, sparsity=KLSparsity(target, weight=1.0))
    # a fixed weight: where the loss pulls hard, the fraction settles between the two
    fractions = trained(layer, 500, pull=0.01)
    assert abs(fractions[0] - target) > 0.05
    assert abs(sum(fractions[-100:]) / 100 - target) < 0.01


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_e9_the_adaptive_cost_brings_the_fraction_of_open_gates_to_its_target(target: float) -> None:
    layer = layer_with("rectifier", sparsity=AdaptiveL1Sparsity(target))
    fractions = trained(layer, 900, pull=1.0)
    assert abs(fractions[0] - target) > 0.05
    assert abs(sum(fractions[-500:]) / 500 - target) < 0.01


def test_the_adaptive_weight_follows_its_rule_and_is_saved() -> None:
    sparsity = AdaptiveL1Sparsity(target=0.1, weight=0.5)
    for active, weight in ((0.111, 0.55), (0.105, 0.55), (0.095, 0.55), (0.089, 0.495), (0.0, 0.4455)):
        sparsity.update_(torch.tensor(active))
        torch.testing.assert_close(sparsity.weight, torch.tensor(weight))
    for _ in range(400):
        sparsity.update_(torch.tensor(0.0))
    assert float(sparsity.weight) == pytest.approx(1e-13)
    for _ in range(400):
        sparsity.update_(torch.tensor(1.0))
    assert sparsity.weight == 1
    other = layer_with(sparsity=AdaptiveL1Sparsity())
    layer = layer_with(sparsity=sparsity)
    other.load_state_dict(layer.state_dict())
    assert other.sparsity.weight == 1


@pytest.mark.parametrize("gate", ["straight-through", "times smooth"])
def test_the_kl_cost_is_of_the_mean_over_the_batch(gate: str) -> None:
    # half of the examples surely open, half surely shut: a mean of 1/2, and no cost for deciding
    logits = torch.tensor([[50.0], [-50.0]]).expand(2, 4)
    decided = KLSparsity(0.5, weight=2.0)(GATES[gate](), logits, logits)
    torch.testing.assert_close(decided, torch.tensor(2 * 4 * math.log(2)))
    assert KLSparsity(0.1, weight=2.0)(GATES[gate](), logits, logits) > decided * 0.99


@every
def test_calibration_opens_the_target_fraction_of_gates_on_held_out_data(gate: str) -> None:
    layer = layer_with(gate).eval()
    held, test = torch.randn(500, 12), torch.randn(500, 12)
    found = layer.calibrate(held)
    assert torch.equal(found, layer.threshold)
    with torch.no_grad():
        layer(held)
        assert round(float(layer.active) * 500 * 60) == 3000
        layer(test)
        assert abs(layer.active - 0.1) < 0.01
        layer.calibrate([(held[:100], 1), (held[100:], 2)])
        assert torch.equal(layer.threshold, found)
        layer.calibrate(held.view(5, 100, 12), target=0.37)
        layer(held)
        assert round(float(layer.active) * 500 * 60) == 11100


def test_without_calibration_a_half_as_threshold_opens_another_fraction() -> None:
    layer = layer_with("times smooth").eval()
    layer.threshold.zero_()
    layer._calibrated = True
    with torch.no_grad():
        layer(torch.randn(500, 12))
    assert abs(layer.active - 0.1) > 0.1


@every
@pytest.mark.parametrize("shape", [(1, 12), (64, 12), (12,), (2, 5, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathering_gives_what_masking_gives(gate: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = layer_with(gate).to(dtype).eval()
    layer.experts.bias.data.normal_()
    layer.calibrate(torch.randn(200, 12, dtype=dtype))
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        gathered, masked = layer(x, backend="gather"), layer(x, backend="masked")
        layer.backend = "gather"
        assert torch.equal(layer(x), gathered)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)
    assert torch.equal(gathered == 0, masked == 0)


@pytest.mark.parametrize("threshold", [-1e9, 1e9], ids=["all open", "all shut"])
def test_gathering_where_all_or_none_are_open(threshold: float) -> None:
    layer = layer_with().eval()
    layer.calibrate(torch.randn(10, 12))
    layer.threshold.fill_(threshold)
    x = torch.randn(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, backend="gather"), layer(x))


def sampled_products(pattern: Tensor, rows: Tensor, columns: Tensor, **_: object) -> int:
    """Two operations for each stored entry and each number of its dot product."""
    return 2 * pattern._nnz() * rows.shape[1]


sampled_products._get_raw = True  # the formula wants the pattern, not its shape


@every
def test_gathering_takes_at_most_a_fifth_of_the_multiply_adds(gate: str) -> None:
    layer = layer_with(gate).eval()
    layer.calibrate(torch.randn(500, 12))
    x = torch.randn(64, 12)
    counts = {}
    for backend in ("gather", "masked"):
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.sparse_sampled_addmm: sampled_products}
        )
        with counter, torch.no_grad():
            layer(x, backend=backend)
        counts[backend] = counter.get_total_flops()
    gater = 2 * 64 * (12 * 10 + 10 * 60)
    dense = 2 * 64 * 12 * 60
    assert counts["masked"] == gater + dense
    assert counts["gather"] == gater + round(float(layer.active) * 64 * 60) * 2 * 12
    assert 0 < counts["gather"] - gater <= 0.2 * dense


def test_the_score_function_teaches_the_gater_through_losses_alone() -> None:
    layer, head = layer_with("score"), nn.Linear(60, 2)
    x, y = torch.randn(16, 12), torch.randint(2, (16,))
    parameters = [*layer.parameters(), *head.parameters()]

    def closure() -> Tensor:
        losses = nn.functional.cross_entropy(head(layer(x)), y, reduction="none")
        return losses + layer.penalty()

    backward(closure, parameters, gradient=ScoreFunction(baseline="mean"))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert layer.gater.weight.grad.abs().sum() > 0
    with pytest.raises(UnsupportedError, match="ScoreFunction"):
        layer(x).sum().backward()


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "score"])
def test_gradients_are_the_same_under_checkpoint(gate: str) -> None:
    layer, x = layer_with(gate), torch.randn(8, 12)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        loss = run(x).square().sum() + layer.penalty()
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("gate", ["straight-through", "rectifier", "times smooth"])
def test_compiled(gate: str) -> None:
    layer, x = layer_with(gate), torch.randn(8, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for run in (layer, compiled):
        torch.manual_seed(5)
        loss = run(x).square().sum()
        found.append((layer.active.clone(), *torch.autograd.grad(loss, list(layer.experts.parameters()))))
    for plain, other in zip(*found):
        torch.testing.assert_close(plain, other)
    layer.eval().calibrate(x)
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


def test_autocast() -> None:
    layer = layer_with(sparsity=KLSparsity())
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(8, 12)).float().square().mean() + layer.penalty()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_saving_loading_copying_and_pickling_keep_the_calibration() -> None:
    layer, x = layer_with(), torch.randn(9, 12)
    layer(x)
    layer.calibrate(x)
    layer.eval()
    other = layer_with().eval()
    with pytest.raises(UnsupportedError, match="calibrate"):
        other(x)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other.load_state_dict(layer_with().state_dict())
    with pytest.raises(UnsupportedError, match="calibrate"):
        other(x)


def test_what_cannot_be_served_is_refused() -> None:
    layer, x = layer_with(), torch.randn(9, 12)
    with pytest.raises(UnsupportedError, match="training mode"):
        layer(x, backend="gather")
    with pytest.raises(UnsupportedError, match="has not run"):
        layer.penalty()
    with pytest.raises(UnsupportedError, match="no sparsity cost"):
        layer_with(sparsity=None).penalty()
    layer.eval()
    with pytest.raises(UnsupportedError, match="before calibrate"):
        layer(x)
    layer.calibrate(x)
    with pytest.raises(UnsupportedError, match="no_grad"):
        layer(x, backend="gather")
    layer.requires_grad_(False)
    assert layer(x, backend="gather").shape == (9, 60)
    with pytest.raises(NonFiniteError, match="calibrate"):
        layer.calibrate(x * torch.nan)


def build(**options: object) -> ConditionalLinear:
    return ConditionalLinear(**{"in_features": 12, "experts": 60, "bottleneck": 10, **options})


def calibrated(**options: object) -> ConditionalLinear:
    layer = build(**options).eval()
    layer.calibrate(torch.randn(9, 12, dtype=options.get("dtype")), target=0.1)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: build(in_features=0), "in_features"),
        (lambda: build(experts=1.5), "experts"),
        (lambda: build(bottleneck=True), "bottleneck"),
        (lambda: build(gate="st"), "gate"),
        (lambda: build(gate=BinaryNeuron), "gate"),
        (lambda: build(gate=CategoricalNeuron()), "gate"),
        (lambda: build(sparsity=0.1), "sparsity"),
        (lambda: build(max_norm=0.0), "max_norm"),
        (lambda: build(backend="sparse"), "backend"),
        (lambda: build()(torch.zeros(2, 11)), "x"),
        (lambda: build()(torch.zeros(())), "x"),
        (lambda: build()(torch.zeros(2, 12, dtype=torch.long)), "x"),
        (lambda: build()(torch.zeros(2, 12), backend="dense"), "backend"),
        (lambda: build().calibrate(torch.zeros(2, 12)), "target"),
        (lambda: build().calibrate(torch.zeros(2, 12), target=1.0), "target"),
        (lambda: build().calibrate(torch.zeros(2, 11), target=0.1), "inputs"),
        (lambda: build().calibrate([], target=0.1), "inputs"),
        (lambda: build().calibrate([()], target=0.1), "inputs"),
        (lambda: build().calibrate(torch.zeros(0, 12), target=0.1), "inputs"),
        (lambda: build().calibrate(7, target=0.1), "inputs"),
        (
            lambda: calibrated(dtype=torch.bfloat16)(torch.zeros(2, 12).bfloat16(), backend="gather"),
            "x",
        ),
        (lambda: KLSparsity(target=0.0), "target"),
        (lambda: KLSparsity(target=1.0), "target"),
        (lambda: KLSparsity(weight=0), "weight"),
        (lambda: AdaptiveL1Sparsity(target=-0.1), "target"),
        (lambda: AdaptiveL1Sparsity(target="0.1"), "target"),
        (lambda: AdaptiveL1Sparsity(weight=float("nan")), "weight"),
        (lambda: AdaptiveL1Sparsity(band=0.0), "band"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], object], argument: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected"):
        call()
