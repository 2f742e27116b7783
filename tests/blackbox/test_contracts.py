"""What every user's training loop relies on: exact restoration, common random numbers, scalers, closures."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import SPSA, EvolutionStrategies, ForwardGradient, LowRank, OnePoint, Sparse, Streamed
from thalweg.errors import NonFiniteError, UnsupportedError
from thalweg.noise import Key, replayed
from thalweg.step import backward

RULES = [
    SPSA(samples=2),
    SPSA(samples=2, restore="swap"),
    SPSA(side="forward"),
    ForwardGradient(samples=2),
    EvolutionStrategies(samples=2),
    EvolutionStrategies(samples=2, restore="swap"),
    SPSA(samples=2, directions=LowRank(2), restore="swap"),
    SPSA(directions="sphere"),
    SPSA(samples=2, directions=Sparse(0.5, keep="largest")),
    OnePoint(samples=2, decay=None),
    Streamed(SPSA(samples=2)),
]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 0, 1, 1, 0])


def test_replayed_draws_again_and_leaves_the_state_of_one_call():
    torch.manual_seed(3)
    expected, after = torch.rand(4), torch.rand(1)
    torch.manual_seed(3)
    draw = replayed(lambda: torch.rand(4), [torch.device("cpu")])
    assert all(torch.equal(draw(), expected) for _ in range(3))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.gpu
def test_replayed_on_cuda():
    draw = replayed(lambda: torch.rand(4, device="cuda"), [torch.device("cuda")])
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("restore", ["copy", "swap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_restore_is_bit_exact_after_100_steps(dtype, restore):
    net = nn.Linear(20, 20).to(dtype)
    nn.init.normal_(net.weight, std=0.02)
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.ones(2, 20, dtype=dtype)
    for seed in range(100):
        SPSA(restore=restore).estimate(lambda: net(x).pow(2).mean(), list(net.parameters()), Key(seed))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_gradients_accumulate_and_hooks_fire(rule):
    net, (x, y) = mlp(), batch()
    seen = []
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    for _ in range(2):
        backward(lambda: nn.functional.cross_entropy(net(x), y), net.parameters(), gradient=rule, key=Key(1))
    once = rule.estimate(lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), Key(1))
    for parameter, gradient in zip(net.parameters(), once.gradients):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert len(seen) == 2


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_scaled_loss_gives_a_scaled_gradient(rule):
    net, (x, y) = mlp(), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(
        lambda: scaler.scale(nn.functional.cross_entropy(net(x), y)),
        net.parameters(),
        gradient=rule,
        key=Key(1),
    )
    scaler.unscale_(optimizer)
    plain = rule.estimate(lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), Key(1))
    for parameter, gradient in zip(net.parameters(), plain.gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    scaler.step(optimizer)
    scaler.update()


def test_lbfgs_closure_with_a_key_is_a_function():
    net, (x, y) = mlp(), batch()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    rule = SPSA(samples=64)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = backward(
            lambda: nn.functional.cross_entropy(net(x), y), net.parameters(), gradient=rule, key=Key(2)
        )
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert min(losses) < losses[0] - 0.05
    first, second = closure(), closure()
    assert first == second


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_dropout_sees_common_random_numbers_and_moves_on_like_one_forward(rule):
    net, (x, y) = nn.Sequential(nn.Dropout(0.5), mlp()), batch()
    masks = []
    net[0].register_forward_hook(lambda m, i, out: masks.append((out != 0).clone()))
    torch.manual_seed(5)
    net(x)
    after_one = torch.rand(3)
    torch.manual_seed(5)
    rule.estimate(lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), Key(0))
    assert torch.equal(torch.rand(3), after_one)
    assert len(masks) > 1
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    torch.manual_seed(6)
    net(x)
    assert not torch.equal(masks[-1], masks[0])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_batch_norm_statistics_move_by_one_forward(rule):
    x, _ = batch()
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin = copy.deepcopy(net)
    twin(x)
    rule.estimate(lambda: net(x).pow(2).mean(), list(net.parameters()), Key(0))
    for (name, buffer), expected in zip(net.named_buffers(), twin.buffers()):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert net[0].num_batches_tracked == 1


@pytest.mark.parametrize("restore", ["copy", "swap"])
def test_a_non_finite_loss_is_named_and_nothing_changes(restore):
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    x, _ = batch()
    calls = []

    def closure():
        calls.append(1)
        loss = net(x).pow(2).mean()
        return loss * float("inf") if len(calls) == 4 else loss

    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"sample 1, sign -"):
        backward(closure, net.parameters(), gradient=SPSA(samples=3, restore=restore))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_tied_weights_count_once(rule):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    net = nn.Sequential(first, nn.Tanh(), second).double()
    x = batch()[0].double()
    # what the rule must equal: one matrix used twice
    weight = first.weight.detach().clone().requires_grad_()
    plain = replace(rule, restore="copy") if hasattr(rule, "restore") else rule
    want = plain.estimate(lambda: (torch.tanh(x @ weight.T) @ weight.T).pow(2).mean(), [weight], Key(0))
    got = rule.estimate(lambda: net(x).pow(2).mean(), [first.weight], Key(0))
    torch.testing.assert_close(got.gradients, want.gradients)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_compiled_models_give_the_same_gradient(rule):
    net, (x, y) = mlp(), batch()
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        got = rule.estimate(
            lambda: nn.functional.cross_entropy(compiled(x), y), list(net.parameters()), Key(0)
        )
    want = rule.estimate(lambda: nn.functional.cross_entropy(net(x), y), list(net.parameters()), Key(0))
    torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_autocast_runs_in_the_closure(rule):
    net, (x, y) = mlp(), batch()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(net(x), y)

    estimate = rule.estimate(closure, list(net.parameters()), Key(0))
    assert estimate.loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in estimate.gradients)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_autocast_around_the_step_is_autocast_in_the_closure(rule):
    net, (x, y) = mlp(), batch()

    def closure():
        return nn.functional.cross_entropy(net(x), y)

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return closure()

    want = rule.estimate(inside, list(net.parameters()), Key(0))
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x)
        got = rule.estimate(closure, list(net.parameters()), Key(0))
        assert torch.equal(net(x), plain)
    assert all(map(torch.equal, got.gradients, want.gradients))
    assert all(g.any() for g in got.gradients)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_buffers_passed_to_functional_call_stay_apart_from_those_of_the_module(rule):
    x, _ = batch()
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    own = [(buffer, buffer.clone()) for buffer in net.buffers()]
    passed = {name: buffer.clone() for name, buffer in net.named_buffers()}
    parameters = dict(net.named_parameters())
    rule.estimate(
        lambda: torch.func.functional_call(net, {**parameters, **passed}, (x,)).pow(3).mean(),
        list(parameters.values()),
        Key(0),
    )
    for buffer, (before, value) in zip(net.buffers(), own):
        assert buffer is before
        assert torch.equal(buffer, value)
    assert passed["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_any_exception_leaves_weights_and_buffers_as_they_were(rule):
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    x, _ = batch()
    calls = []

    def closure():
        calls.append(1)
        loss = net(x).pow(2).mean()
        if len(calls) == 2:
            raise KeyError("interrupted")
        return loss

    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(KeyError, match="interrupted"):
        backward(closure, net.parameters(), gradient=rule)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class Counts(nn.Module):
    """Counts its calls in a new tensor each time, and holds a buffer that repeats one value."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", torch.ones(1).expand(3))

    def forward(self):
        self.calls = self.calls + 1
        return ((self.weight * self.mask) ** 2).sum() * self.calls


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_buffers_that_a_module_replaces_or_expands_start_from_the_same_values(rule):
    net = Counts()
    for step in (1, 2):
        rule.estimate(net, [net.weight], Key(0))
        assert net.calls == step


@pytest.mark.parametrize("rule", [*RULES, EvolutionStrategies(2, weights="ranks")], ids=repr)
def test_estimates_run_on_fake_tensors(rule):
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        x = torch.randn(6, 4)
        found = rule.estimate(lambda: net(x).pow(2).mean(1), list(net.parameters()), Key(0))
        assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def test_a_transformers_language_model_under_swap_equals_copy():
    model, tokens = gpt2(), torch.arange(24).view(2, 12)
    model.train()
    found = []
    for restore in ("copy", "swap"):
        torch.manual_seed(0)
        rule = SPSA(samples=2, restore=restore)
        found.append(
            rule.estimate(
                lambda: model(input_ids=tokens, labels=tokens).loss, list(model.parameters()), Key(0)
            )
        )
    assert found[0].loss == found[1].loss
    assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, found[1].gradients))


def test_a_transformers_language_model_under_forward_gradient_equals_backprop():
    model, tokens = gpt2().double().eval(), torch.arange(24).view(2, 12)
    assert model.config._attn_implementation == "sdpa"
    parameters = list(model.parameters())

    def closure():
        return model(input_ids=tokens, labels=tokens).loss

    exact = torch.autograd.grad(closure(), parameters)
    found = ForwardGradient().estimate(closure, parameters, Key(0))
    # one direction v with entries +-1: g = (grad . v) v
    signs = [gradient.sign() for gradient in found.gradients]
    slope = sum((g * s).sum() for g, s in zip(exact, signs)).abs()
    for gradient in found.gradients:
        # transformers computes the loss itself in float32
        torch.testing.assert_close(gradient.abs(), slope.expand_as(gradient), rtol=1e-5, atol=0)


def test_in_place_refuses_parameters_that_overlap_in_memory():
    whole = torch.zeros(4)
    one, two = whole[:3].requires_grad_(), whole[2:].requires_grad_()
    with pytest.raises(ValueError, match="memory not shared"):
        SPSA(restore="inplace").estimate(lambda: one.sum() + two.sum(), [one, two], Key(0))


def test_spsa_refuses_swap_outside_of_the_owning_module_by_a_named_non_finite_loss():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = batch()[0][None]
    with pytest.raises(NonFiniteError, match="sample 0"):
        SPSA(restore="swap").estimate(
            lambda: attention(x, x, x)[0].pow(2).mean(), list(attention.parameters()), Key(0)
        )


def test_an_unsupported_nesting_is_refused():
    import torch.autograd.forward_ad as forward_ad

    weight = torch.ones(2, requires_grad=True)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="nest"):
        ForwardGradient().estimate(lambda: weight.sum(), [weight], Key(0))
    assert weight.requires_grad
