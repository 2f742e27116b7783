"""Routes: what is cut is cut, what is kept is exact, and a mask that sees nothing is refused."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from thalweg import gates
from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.ledger import saved_bytes
from thalweg.noise import Key
from thalweg.rollouts import (
    Bernoulli,
    Checkpointed,
    Gate,
    Last,
    RandomLast,
    Route,
    Skipped,
    Truncated,
    rollout,
)
from thalweg.step import Backprop

N = 6
A = [0.9 + 0.05 * k for k in range(N)]
B = [0.3 - 0.02 * k for k in range(N)]
STORES = {"backprop": Backprop(), "slots": Checkpointed(slots=2), "segments": Checkpointed(segments=2)}
stores = pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def affine(net: nn.Module, x: Tensor, k: int) -> Tensor:
    return A[k] * x + B[k] * net(x)


def reverse_sweep(
    net: nn.Module, x: Tensor, state: list[float], parameters: list[float]
) -> tuple[Tensor, list[Tensor]]:
    """The table's reverse pass, written out, for the loss sum(x_N^2)."""
    states = [x.detach()]
    with torch.no_grad():
        for k in range(N):
            states.append(affine(net, states[-1], k))
    cotangent = 2 * states[-1]
    total = [torch.zeros_like(p) for p in net.parameters()]
    for k in reversed(range(N)):
        at = states[k].clone().requires_grad_()
        pulled = torch.autograd.grad(net(at), [at, *net.parameters()], B[k] * cotangent)
        cotangent = A[k] * cotangent + state[k] * pulled[0]
        total = [t + parameters[k] * g for t, g in zip(total, pulled[1:])]
    return cotangent, total


@stores
@pytest.mark.parametrize(
    ("state", "parameters"),
    [
        ((0.0, 1.0, 0.5, 0.0, 1.0, 0.25), (1.0, 0.0, 0.5, 0.0, 0.0, 1.0)),
        ((0.0,) * N, (1.0,) * N),
        ((1.0,) * N, (0.0,) * N),
        ((0.3,) * N, (1.0,) * N),
    ],
)
def test_masks_follow_the_reverse_sweep_of_the_table(
    store: Backprop | Checkpointed, state: tuple[float, ...], parameters: tuple[float, ...]
) -> None:
    net = network()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    route = Route(state=state, parameters=parameters, store=store)
    y = rollout(affine, x, N, network=net, gradient=route)
    torch.testing.assert_close(y, rollout(affine, x, N, network=net))
    got = torch.autograd.grad(y.square().sum(), [x, *net.parameters()], allow_unused=True)
    cotangent, total = reverse_sweep(net, x, list(state), list(parameters))
    torch.testing.assert_close(got[0], cotangent, rtol=1e-12, atol=1e-12)
    for found, exact in zip(got[1:], total):
        found = torch.zeros_like(exact) if found is None else found
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@stores
def test_skipped_is_the_product_of_the_skip_gains(store: Backprop | Checkpointed) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    net = network()
    y = rollout(affine, x, N, network=net, gradient=Skipped(store=store))
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    gain = torch.tensor(A, dtype=torch.float64).prod()
    torch.testing.assert_close(x.grad, gain * cotangent, rtol=1e-13, atol=0)
    assert all(p.grad is None for p in net.parameters())


def test_skipped_keeps_nothing_of_the_network() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    net = network()
    assert saved_bytes(lambda: rollout(affine, x, N, network=net, gradient=Skipped()), net) == 0
    assert saved_bytes(lambda: rollout(affine, x, N, network=net), net) > 0


@stores
def test_truncated_equals_a_detached_plain_loop_and_ignores_the_early_steps(
    store: Backprop | Checkpointed,
) -> None:
    net = network()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = rollout(lambda x, k: affine(net, x, k), x, N, gradient=Truncated(last=2, store=store))
    got = torch.autograd.grad(y.square().sum(), [x, *net.parameters()], allow_unused=True)
    assert got[0] is None
    with torch.no_grad():
        late = x
        for k in range(N - 2):
            late = affine(net, late, k)
    late = late.clone()
    for k in range(N - 2, N):
        late = affine(net, late, k)
    exact = torch.autograd.grad(late.square().sum(), list(net.parameters()))
    for found, expected in zip(got[1:], exact):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # the table's row with the skip path kept gives the parameters the same gradient
    masked = Route(state=Last(2), parameters=Last(2), store=store)
    y = rollout(affine, x, N, network=net, gradient=masked)
    for found, expected in zip(torch.autograd.grad(y.square().sum(), list(net.parameters())), exact):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_truncated_over_all_steps_is_exact() -> None:
    net = network()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def found(gradient: Truncated | None) -> tuple[Tensor, ...]:
        y = rollout(lambda x, k: affine(net, x, k), x, N, gradient=gradient)
        return torch.autograd.grad(y.square().sum(), [x, *net.parameters()])

    torch.testing.assert_close(found(Truncated(last=N)), found(None))


def test_random_truncation_draws_once_per_call_and_from_the_key() -> None:
    net = network()
    rule = Truncated(last=RandomLast(1, N))

    def kept(key: Key | None) -> int:
        graphs = []

        def step(x: Tensor, k: int, *_: object) -> Tensor:
            graphs.append(torch.is_grad_enabled())
            return affine(net, x, k)

        rollout(step, torch.ones(2, 3, dtype=torch.float64), N, gradient=rule, key=key)
        assert graphs == sorted(graphs)
        return sum(graphs)

    assert kept(Key(3)) == kept(Key(3))
    counts = torch.bincount(torch.tensor([kept(Key(seed)) for seed in range(600)]), minlength=N + 1)
    assert counts[0] == 0
    # uniform on 1..N: each count is binomial(600, 1/N)
    error = (600 * (1 / N) * (1 - 1 / N)) ** 0.5
    assert ((counts[1:] - 600 / N).abs() < 5 * error).all()
    torch.manual_seed(7)
    first = [kept(None) for _ in range(8)]
    torch.manual_seed(7)
    assert first == [kept(None) for _ in range(8)]
    assert len(set(first)) > 1


@stores
def test_no_step_at_all_may_be_kept(store: Backprop | Checkpointed) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    rule = Truncated(last=RandomLast(0, 1), store=store)
    seeds = [s for s in range(20) if rule.last.draw(N, Key(s, step=N)) == 0]  # type: ignore[union-attr]
    y = rollout(lambda x, k, _: x, x, N, gradient=rule, key=Key(seeds[0]), then=lambda x: (x * weight).sum())
    assert torch.autograd.grad(y, [x, weight], allow_unused=True)[0] is None


def test_ramp_keeps_late_steps_more_often() -> None:
    draws = torch.tensor([Bernoulli("ramp").values(N, Key(seed)) for seed in range(2000)])
    chances = torch.arange(1, N + 1) / (N + 1)
    error = (chances * (1 - chances) / 2000).sqrt()
    assert ((draws.mean(0) - chances).abs() < 5 * error).all()


def test_equal_random_masks_draw_the_same_steps() -> None:
    route = Route(state=Bernoulli(0.5), parameters=Bernoulli(0.5))
    for seed in range(20):
        state, parameters = route.masks(N, Key(seed))
        assert state == parameters


@stores
def test_the_gate_acts_behind_every_step(store: Backprop | Checkpointed) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    net = network()
    route = Route(cotangent=Gate(gates.scale, factor=0.5), store=store)
    y = rollout(lambda x, k: affine(net, x, k), x, N, gradient=route)
    got = torch.autograd.grad(y.square().sum(), [x, net[0].weight])
    plain = rollout(lambda x, k: affine(net, x, k), x, N)
    exact = torch.autograd.grad(plain.square().sum(), [x, net[0].weight])
    torch.testing.assert_close(got[0], exact[0] * 0.5**N, rtol=1e-12, atol=0)
    assert not torch.allclose(got[1], exact[1] * 0.5**N)


def test_a_clipped_cotangent_is_bounded() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    route = Route(cotangent=Gate(gates.clip, limit=1e-3, per="sample", norm="l2"))
    rollout(lambda x, k: 3 * x, x, 1, gradient=route).square().sum().backward()
    torch.testing.assert_close(x.grad.norm(dim=1), torch.full((2,), 3e-3, dtype=torch.float64))


def test_conditions_count_with_the_parameters_and_the_state_with_the_state() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
            return torch.tanh(self.layer(x) * condition)

    net = Conditioned().double()
    raw = torch.randn(3, dtype=torch.float64, requires_grad=True)
    condition = raw.exp()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def step(net: nn.Module, x: Tensor, k: int) -> Tensor:
        return x + net(2 * x, condition=condition)

    def found(gradient: Route | None) -> tuple[Tensor | None, ...]:
        y = rollout(step, x, 1, network=net, gradient=gradient)
        wanted = [x, raw, net.layer.weight]
        return torch.autograd.grad(y.sum(), wanted, allow_unused=True, retain_graph=True)

    exact = found(None)
    no_state = found(Route(state=0.0))
    torch.testing.assert_close(no_state[0], torch.ones_like(x))
    torch.testing.assert_close(no_state[1:], exact[1:])
    no_parameters = found(Route(parameters=0.0))
    torch.testing.assert_close(no_parameters[0], exact[0])
    assert no_parameters[1:] == (None, None)


def test_tied_and_compiled_networks_are_masked_whole() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for called in (net, torch.compile(copy.deepcopy(net), backend="eager")):
        y = rollout(affine, x, N, network=called, gradient=Route(parameters=0.0))
        got = torch.autograd.grad(y.sum(), [x, *called.parameters()], allow_unused=True)
        assert all(g is None for g in got[1:])
        exact = torch.autograd.grad(rollout(affine, x, N, network=net).sum(), x)
        torch.testing.assert_close(got[0], exact[0])


@pytest.mark.parametrize("gradient", [Skipped(), Route(state=Last(2)), Route(parameters=(0.0,) * N)])
def test_a_mask_without_network_is_refused(gradient: Skipped | Route) -> None:
    with pytest.raises(ArgumentError, match="network"):
        rollout(lambda x, k: x, torch.ones(3), N, gradient=gradient)


def test_masks_that_would_not_be_seen_are_refused() -> None:
    net = network()
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no step called"):
        rollout(lambda _, x, k: affine(net, x, k), x, N, network=net, gradient=Skipped())
    wrapped = nn.ModuleDict()
    wrapped.layers = net
    with pytest.raises(UnsupportedError, match="layers"):
        rollout(lambda net, x, k: affine(net.layers, x, k), x, N, network=wrapped, gradient=Skipped())
    with pytest.raises(ArgumentTypeError, match="network"):
        rollout(affine, x, N, network=lambda x: net(x), gradient=Route(parameters=0.0))
    # without a graph there is nothing to tell apart
    rollout(affine, x, N, network=lambda x: net(x), gradient=Skipped()).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, torch.tensor(A, dtype=x.dtype).prod().item()))


POLICIES = [
    Backprop(),
    Checkpointed(slots=3),
    Checkpointed(budget="10GiB", on="host"),
    Truncated(last=3, store=Checkpointed(segments=2)),
    Truncated(last=RandomLast(1, 4)),
    Skipped(),
    Route(
        state=(0.0, 1.0),
        parameters=Bernoulli(),
        cotangent=Gate(gates.clip, limit=1.0, per="sample"),
        last=Last(2),
    ),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_policies_print_compare_hash_and_pickle(policy: object) -> None:
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert repr(again) == repr(policy)
    assert hash(again) == hash(policy)
    assert type(policy).__name__ in repr(policy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Route(state=1.5),
        lambda: Route(state=(0.0, float("nan"))),
        lambda: Route(parameters="all"),
        lambda: Route(state=True),
        lambda: Route(state=lambda k: 1.0),
        lambda: Route(cotangent=gates.clip),
        lambda: Route(store=Truncated(last=2)),
        lambda: Route(store=Checkpointed),
        lambda: Route(last=0),
        lambda: Truncated(last=None),
        lambda: Truncated(last=2.0),
        lambda: Last(0),
        lambda: RandomLast(3, 2),
        lambda: Bernoulli(1.2),
        lambda: Gate(lambda x: x),
        lambda: Gate(3),
        lambda: rollout(affine, torch.ones(3), N, network=network(), gradient=Route(state=(1.0, 0.0))),
        lambda: rollout(lambda x, k: x, torch.ones(3), N, gradient=Truncated(last=N + 1)),
        lambda: rollout(lambda x, k: x, torch.ones(3), N, gradient=Truncated(last=RandomLast(1, N + 1))),
    ],
)
def test_wrong_routes_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        make()


def test_a_module_of_two_names_is_masked_and_left_as_it_was():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.second = self.first

        def forward(self, x):
            return torch.tanh(self.first(self.second(x)))

    found = []
    for policy in (Backprop(), Route(parameters=0.5)):
        torch.manual_seed(0)
        net = Twice()
        weight = net.first.weight
        out = rollout(lambda n, x, k: x + n(x), torch.ones(1, 2), 1, gradient=policy, network=net)
        out.sum().backward()
        assert net.first.weight is weight
        found.append(weight.grad)
    torch.testing.assert_close(found[1], found[0] / 2)
