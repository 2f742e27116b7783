"""Score function and enumeration, checked by running every joint outcome in float64."""

import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, UnsupportedError
from thalweg.noise import Key
from thalweg.problems import BernoulliNet
from thalweg.score import bernoulli_log_probability, bernoulli_score
from thalweg.step import backward
from thalweg.stochastic import BinaryNeuron, Enumeration, ScoreFunction, StraightThrough, score_function
from thalweg.stochastic.minimum_variance import MinimumVariance
from thalweg.stochastic.tape import Tape, recording


def reinforce(baseline):
    """The estimator of the logits' gradient with a given number per example subtracted."""
    return lambda outcomes, logits, losses: bernoulli_score(outcomes, logits) * (losses - baseline)[..., None]


@pytest.mark.parametrize("gates", [5, 8, 10])
def test_e1_reinforce_is_unbiased_with_any_constant_baseline(gates):
    net = BernoulliNet(gates=gates, seed=3)
    exact = net.exact_logit_gradient()
    mean_loss = (net.probabilities() * net.losses(net._everyone())).sum(0).detach()
    for baseline in (torch.zeros(4, dtype=torch.float64), mean_loss, mean_loss + 100):
        mean, _ = net.moments(reinforce(baseline))
        assert (mean - exact).abs().max() < 1e-12 * (1 + baseline.abs().max())


@pytest.mark.parametrize("seed", range(5))
def test_e1_the_mean_baseline_lowers_the_total_variance(seed):
    net = BernoulliNet(gates=7, seed=seed)
    mean_loss = (net.probabilities() * net.losses(net._everyone())).sum(0).detach()
    variance = {}
    for name, baseline in {"none": torch.zeros_like(mean_loss), "mean": mean_loss}.items():
        variance[name] = net.moments(reinforce(baseline))[1].sum()
    assert variance["mean"] < variance["none"]


class TwoLayers(nn.Module):
    """Two layers of units, the first of which also reaches the loss directly; its own closure."""

    def __init__(self, batch=2, first=2, second=2):
        super().__init__()
        torch.manual_seed(7)
        self.below = nn.Linear(3, first).double()
        self.between = nn.Linear(first, second).double()
        self.above = nn.Linear(first + second, 1).double()
        self.one, self.two = BinaryNeuron(gradient=None), BinaryNeuron(gradient=None)
        self.x = torch.randn(batch, 3, dtype=torch.float64)

    def forward(self):
        first = self.one(self.below(self.x))
        second = self.two(self.between(first))
        return (torch.tanh(self.above(torch.cat([first, second], 1))).squeeze(1) - 1.5) ** 2


def exact_by_hand(net):
    """The gradient of the expected loss, written without the tape."""
    total = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=4):
        h = torch.tensor(bits, dtype=torch.float64).expand(len(net.x), -1)
        first, second = h[:, :2], h[:, 2:]
        log = bernoulli_log_probability(first, net.below(net.x)).sum(1)
        log = log + bernoulli_log_probability(second, net.between(first)).sum(1)
        total = total + (log.exp() * (torch.tanh(net.above(h)).squeeze(1) - 1.5) ** 2).mean()
    return total.detach(), torch.autograd.grad(total, list(net.parameters()))


def test_enumeration_is_exact_with_two_layers():
    net = TwoLayers()
    loss, exact = exact_by_hand(net)
    found = Enumeration().estimate(net, list(net.parameters()), Key(0))
    assert found.evaluations == 16
    torch.testing.assert_close(found.loss, loss, rtol=0, atol=1e-12)
    for a, b in zip(found.gradients, exact):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gates", [1, 6])
def test_enumeration_agrees_with_the_folded_enumeration_of_the_problem(gates):
    net = BernoulliNet(gates=gates)
    found = Enumeration().estimate(net, list(net.parameters()), Key(0))
    torch.testing.assert_close(found.loss, net.expected_loss().detach(), rtol=0, atol=1e-12)
    for a, b in zip(found.gradients, net.exact_gradient()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["none", "mean", "minimum_variance"])
def test_e1_score_function_is_unbiased_through_two_layers(baseline, monkeypatch):
    """Every joint outcome of all units of both examples, each weighed by its probability."""
    net = TwoLayers(batch=2)
    _, exact = exact_by_hand(net)
    parameters = list(net.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    for bits in itertools.product([0.0, 1.0], repeat=8):
        plan = torch.tensor(bits, dtype=torch.float64).view(2, 2, 2)
        tapes = []

        def forced(salt, plan=plan, tapes=tapes):
            tapes.append(Tape(lambda index, logits, numbers: plan[index], salt=salt))
            return tapes[0]

        monkeypatch.setattr(score_function, "Tape", forced)
        found = ScoreFunction(baseline).estimate(net, parameters, Key(0))
        logs = [bernoulli_log_probability(h, a).sum() for h, a in zip(tapes[0].outcomes, tapes[0].logits)]
        chance = sum(logs).exp().detach()
        mean = [m + chance * g for m, g in zip(mean, found.gradients)]
    for a, b in zip(mean, exact):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_e7_leave_one_out_is_unbiased_through_two_layers(monkeypatch):
    """Two runs of one example: all pairs of joint outcomes, each pair weighed by its probability."""
    net = TwoLayers(batch=1)
    _, exact = exact_by_hand(net)
    parameters = list(net.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    for bits in itertools.product([0.0, 1.0], repeat=8):
        plans = torch.tensor(bits, dtype=torch.float64).view(2, 2, 1, 2)
        tapes = []

        def forced(salt, plans=plans, tapes=tapes):
            plan = plans[len(tapes)]
            tapes.append(Tape(lambda index, logits, numbers: plan[index], salt=salt))
            return tapes[-1]

        monkeypatch.setattr(score_function, "Tape", forced)
        found = ScoreFunction("leave_one_out", samples=2).estimate(net, parameters, Key(0))
        logs = [bernoulli_log_probability(h, a).sum() for t in tapes for h, a in zip(t.outcomes, t.logits)]
        mean = [m + sum(logs).exp().detach() * g for m, g in zip(mean, found.gradients)]
    for a, b in zip(mean, exact):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        ScoreFunction(),
        ScoreFunction("mean"),
        ScoreFunction("minimum_variance"),
        ScoreFunction(MinimumVariance()),
        ScoreFunction("leave_one_out", samples=3),
    ],
    ids=["none", "mean", "minimum_variance", "moving", "leave_one_out"],
)
def test_score_function_by_sampling_lies_within_five_standard_errors(rule):
    net = BernoulliNet(gates=4, batch=3, seed=1)
    parameters = list(net.parameters())
    found = [rule.estimate(net, parameters, Key(0)).gradients for _ in range(2000)]
    for index, exact in enumerate(net.exact_gradient()):
        samples = torch.stack([gradients[index] for gradients in found])
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - exact).abs() < 5 * error).all()


def test_downstream_parameters_get_the_ordinary_gradient():
    net = BernoulliNet(gates=4)
    twin = BernoulliNet(gates=4, gradient=StraightThrough())
    torch.manual_seed(3)
    # a given key: a fresh one would be drawn before the units draw
    loss = backward(net, net.parameters(), gradient=ScoreFunction("mean"), key=Key(0))
    torch.manual_seed(3)
    expected = backward(twin, twin.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(net.output_weights.grad, twin.output_weights.grad)
    torch.testing.assert_close(net.hidden_weights.grad, twin.hidden_weights.grad)
    assert not torch.allclose(net.gate_weights.grad, twin.gate_weights.grad)


def test_a_loss_without_derivative_still_teaches_the_units():
    logits = torch.zeros(1, requires_grad=True)
    unit = BinaryNeuron(gradient=None)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        backward(
            lambda: (unit(logits.expand(64)) < 0.5).float().detach(), [logits], gradient=ScoreFunction("mean")
        )
        optimizer.step()
    assert torch.sigmoid(logits) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_function_under_checkpoint_and_compile_draws_the_same_bits(dtype):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), BinaryNeuron(gradient=None), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(8, 4, dtype=dtype)
    found = []
    compiled = torch.compile(body, backend="aot_eager")
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=False), compiled):
        torch.manual_seed(2)
        rule = ScoreFunction("mean")
        found.append(rule.estimate(lambda r=run: r(x).pow(2).mean(1), list(body.parameters()), Key(0)))
    for other in found[1:]:
        assert torch.equal(found[0].loss, other.loss)
        assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, other.gradients))


def test_scaler_accumulation_and_random_state():
    net = BernoulliNet(gates=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(2):
        torch.manual_seed(0)
        backward(lambda: scaler.scale(net()), net.parameters(), gradient=ScoreFunction(), key=Key(0))
    scaler.unscale_(optimizer)
    torch.manual_seed(0)
    once = ScoreFunction().estimate(net, list(net.parameters()), Key(0))
    for parameter, gradient in zip(net.parameters(), once.gradients):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    after_estimate = torch.rand(1)
    torch.manual_seed(0)
    net()
    assert torch.equal(after_estimate, torch.rand(1))


def test_enumeration_replays_dropout():
    net = nn.Sequential(
        nn.Linear(3, 2), BinaryNeuron(gradient=None), nn.Linear(2, 4), nn.Dropout(0.5)
    ).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    masks = []
    net[3].register_forward_hook(lambda m, i, out: masks.append(out.detach() != 0))
    found = Enumeration().estimate(lambda: net(x).pow(2).sum(1), list(net.parameters()), Key(0))
    assert found.evaluations == len(masks) == 4
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_enumeration_inside_a_checkpoint_is_exact():
    net = TwoLayers()
    expected = Enumeration().estimate(net, list(net.parameters()), Key(0))
    found = Enumeration().estimate(
        lambda: checkpoint(net, use_reentrant=False), list(net.parameters()), Key(0)
    )
    assert torch.equal(found.loss, expected.loss)
    for a, b in zip(found.gradients, expected.gradients):
        assert torch.equal(a, b)


def unit_net(*middle):
    return nn.Sequential(nn.Linear(3, 2), BinaryNeuron(gradient=None), *middle, nn.Linear(2, 1))


@pytest.mark.parametrize("rule", [ScoreFunction(), Enumeration()])
@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda net, x: net(x).mean(), "one loss per example"),
        (lambda net, x: net[0](x).pow(2).sum(1), "at least one unit with gradient=None"),
        (lambda net, x: net(x).pow(2).sum(1)[:3], r"random unit 0: expected logits of shape \(3, ...\)"),
        (lambda net, x: net(x).expand(-1, 2), "one loss per example"),
    ],
)
def test_wrong_closures_are_refused(rule, closure, message):
    net, x = unit_net(), torch.randn(5, 3)
    with pytest.raises(ArgumentError, match=message):
        backward(lambda: closure(net, x), net.parameters(), gradient=rule)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("rule", [ScoreFunction(), Enumeration()], ids=repr)
def test_parameters_that_the_losses_do_not_reach_are_refused(rule):
    logits, other = torch.zeros(4, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    unit = BinaryNeuron(gradient=None)
    with pytest.raises(ArgumentError, match="closure: expected a loss that depends on the parameters"):
        backward(lambda: unit(logits).sum(1), [other], gradient=rule)
    assert other.grad is None


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_named_losses_per_example_stay_per_example(baseline):
    logits = torch.zeros(6, 2, requires_grad=True)
    unit, rule = BinaryNeuron(gradient=None), ScoreFunction(baseline)
    found = []
    for closure in (
        lambda: {"a": unit(logits).sum(1), "b": torch.ones(6)},
        lambda: unit(logits).sum(1) + 1,
    ):
        torch.manual_seed(3)
        found.append(rule.estimate(closure, [logits], Key(0)).gradients[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", [ScoreFunction(), Enumeration()])
def test_units_whose_score_would_be_lost_are_refused(rule):
    net, x = unit_net(), torch.randn(5, 3)

    def closure():
        with torch.no_grad():
            bits = net[1](net[0](x))
        return net[2](bits).squeeze(1)

    with pytest.raises(UnsupportedError, match="no_grad"):
        backward(closure, net.parameters(), gradient=rule)
    net.eval()
    with pytest.raises(ArgumentError, match=r"model\.train"):
        backward(lambda: net(x).squeeze(1), net.parameters(), gradient=rule)


def test_enumeration_refuses_what_it_cannot_do_exactly():
    x = torch.randn(5, 3)
    large = nn.Sequential(nn.Linear(3, 9), BinaryNeuron(gradient=None))
    with pytest.raises(ArgumentError, match=r"^limit: expected at least the number of units, 9"):
        backward(lambda: large(x).sum(1), large.parameters(), gradient=Enumeration(limit=8))
    mixing = unit_net(nn.BatchNorm1d(2))
    with pytest.raises(UnsupportedError, match="BatchNorm1d"):
        backward(lambda: mixing(x).squeeze(1), mixing.parameters(), gradient=Enumeration())
    branching = unit_net()

    def closure():
        bits = branching[1](branching[0](x))
        return bits.sum(1) if not bits.any() else branching[1](branching[0](x)).sum(1)

    with pytest.raises(UnsupportedError, match="depends on their outcomes"):
        backward(closure, branching.parameters(), gradient=Enumeration())


@pytest.mark.parametrize("rule", [ScoreFunction("mean"), Enumeration()])
def test_estimates_run_on_fake_tensors(rule):
    with FakeTensorMode():
        net, x = unit_net(), torch.randn(5, 3)
        found = rule.estimate(lambda: net(x).squeeze(1), list(net.parameters()), Key(0))
    assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]


@pytest.mark.parametrize("rule", [ScoreFunction("mean"), Enumeration(limit=3)])
def test_policies_pickle_print_and_compare(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert eval(repr(rule)) == rule
    assert rule != type(rule)()


def test_bad_fields_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"^baseline"):
        ScoreFunction(baseline="median")
    with pytest.raises(ArgumentError, match=r"^limit"):
        Enumeration(limit=0)
    net = BernoulliNet(batch=1)
    with pytest.raises(ArgumentError, match=r"^losses"):
        backward(net, net.parameters(), gradient=ScoreFunction("mean"))


def test_a_closed_tape_records_no_rerun():
    unit, logits, tape = BinaryNeuron(gradient=None), torch.zeros(4, 2, requires_grad=True), Tape()
    tape.run(lambda: unit(logits).sum(1))
    with recording(tape):
        unit(logits)
    assert len(tape.logits) == len(tape.outcomes) == len(tape.numbers) == 1


def test_a_tape_draws_the_bits_of_a_plain_forward_whatever_it_then_forces():
    body = nn.Sequential(nn.Linear(3, 4), BinaryNeuron(gradient=None), nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.randn(64, 3)
    torch.manual_seed(5)
    plain, after = body(x).squeeze(1), torch.rand(1)
    tapes = {
        "plain": Tape(),
        "forced": Tape(lambda index, logits, numbers: torch.ones_like(logits)),
        "salted": Tape(salt=3),
    }
    for name, tape in tapes.items():
        torch.manual_seed(5)
        losses = tape.run(lambda: body(x).squeeze(1))
        assert torch.equal(after, torch.rand(1))
        assert torch.equal(losses, plain) == (name == "plain")
