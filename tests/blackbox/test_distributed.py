"""Zeroth-order steps on two processes: the same bits on both, and the result of one process."""

import pickle
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import (
    SPSA,
    EvolutionStrategies,
    ForwardGradient,
    MeZO,
    NodePerturbation,
    OnePoint,
    Streamed,
)
from thalweg.blackbox.distributed import Distributed, rank_key
from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.noise import Key
from thalweg.parameters import fill_gradients
from thalweg.step import backward

WORLD = 2
STEPS = 5
SPLITS = ("batch", "directions")
RULES = {
    "central": SPSA(samples=2),
    "in place": SPSA(samples=2, restore="inplace"),
    "swapped, one-sided": SPSA(samples=3, directions="gaussian", side="forward", restore="swap"),
    "signs": SPSA(weights="sign"),
    "strategies": EvolutionStrategies(samples=3),
    "ranks": EvolutionStrategies(samples=3, weights="ranks"),
    "forward gradient": ForwardGradient(samples=2),
}
# where each rank goes its own way, adding and subtracting would round another way on each
CASES = [(name, split) for name in RULES for split in SPLITS if (name, split) != ("in place", "directions")]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def whole_batch():
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, x[:, :1] * x[:, 1:2]


def closure_on(net, rows):
    x, y = (each[rows].to(net[0].weight.dtype) for each in whole_batch())
    return lambda: (net(x) - y).square().mean(1)


def part_of(rank):
    return slice(6 * rank, 6 * rank + 6)


def rows_of(split, rank):
    return part_of(rank) if split == "batch" else slice(None)


def train(net, estimate):
    """A few steps of SGD; `estimate(key)` fills `.grad` and returns the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(estimate(Key(9, step)))
        optimizer.step()
    return torch.stack(losses), [p.detach() for p in net.parameters()]


def by_backward(net, rule, rows):
    return lambda key: backward(closure_on(net, rows), net.parameters(), gradient=rule, key=key)


def alone(rule, split):
    """What one process finds with the same directions."""
    net = network()
    parameters = list(net.parameters())
    if split == "batch":
        return train(net, by_backward(net, rule, slice(None)))

    def mean_over_ranks(key):
        found = [
            rule.estimate(closure_on(net, slice(None)), parameters, rank_key(key, rank))
            for rank in range(WORLD)
        ]
        fill_gradients(parameters, [sum(g) / WORLD for g in zip(*(each.gradients for each in found))])
        return torch.stack([each.loss for each in found]).mean()

    return train(net, mean_over_ranks)


def _training(rank):
    found = {}
    for name, split in CASES:
        net, shared = network(), Distributed(RULES[name], split)
        losses, weights = train(net, by_backward(net, shared, rows_of(split, rank)))
        found[name, split] = losses, weights, shared.traffic
    for split in SPLITS:
        net = network(torch.float32)
        rule = Streamed(Distributed(SPSA(samples=2), split))
        found["streamed", split] = train(net, by_backward(net, rule, rows_of(split, rank)))
        net = network()
        rule = Distributed(SPSA(samples=2, restore="inplace" if split == "batch" else "swap"), split)
        optimizer = MeZO(net.parameters(), lr=0.02, gradient=rule, seed=5)
        losses = [optimizer.step(closure_on(net, rows_of(split, rank))) for _ in range(STEPS)]
        found["mezo", split] = torch.stack(losses), [p.detach() for p in net.parameters()]
        # no key given, another torch seed on each rank
        net = network()
        torch.manual_seed(rank)
        rule = Distributed(SPSA(), split)
        unkeyed = lambda key: backward(closure_on(net, part_of(rank)), net.parameters(), gradient=rule)  # noqa: B023, E731
        found["own seeds", split] = train(net, unkeyed)
    return found


@pytest.fixture(scope="module")
def trained(processes):
    return [found["trained"] for found in processes]


OTHERS = [(name, split) for name in ("streamed", "mezo", "own seeds") for split in SPLITS]


@pytest.mark.parametrize(("name", "split"), [*CASES, *OTHERS])
def test_weights_are_bit_identical_on_every_rank(trained, name, split):
    one, other = (found[name, split] for found in trained)
    assert torch.equal(one[0], other[0])
    assert all(map(torch.equal, one[1], other[1]))
    assert not any(torch.equal(a, b) for a, b in zip(one[1], network().parameters()))


@pytest.mark.parametrize(("name", "split"), CASES)
def test_two_processes_equal_one_with_the_same_directions(trained, name, split):
    losses, weights = alone(RULES[name], split)
    found = trained[0][name, split]
    torch.testing.assert_close(found[0], losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], weights, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "split", "numbers"),
    [
        # 5 integers to agree; then per evaluation a state and a loss, or once a state, a loss and the slopes
        ("central", "batch", 5 + 4 * 2),
        ("central", "directions", 5 + 1 + 1 + 2),
        ("strategies", "batch", 5 + 6 * 2),
        ("strategies", "directions", 5 + 1 + 1 + 3),
        ("forward gradient", "batch", 5 + 2 * 3),
    ],
)
def test_a_step_sends_keys_and_scalars_only(trained, name, split, numbers):
    traffic = trained[0][name, split][2]
    assert traffic.steps == STEPS
    assert traffic.sent == STEPS * numbers * 8
    assert traffic.per_step() == numbers * 8


FAILURES = [("batch", "copy"), ("batch", "inplace"), ("directions", "copy"), ("directions", "swap")]


class Interrupted(Exception):
    pass


def _failing(rank):
    found = {}

    def attempt(name, closure, parameters, rule):
        try:
            backward(closure, parameters, gradient=rule, key=Key(0))
        except Exception as error:
            found[name] = type(error).__name__, str(error), all(p.grad is None for p in parameters)
        else:
            found[name] = None

    for split in SPLITS:
        for restore in ("copy", "inplace" if split == "batch" else "swap"):
            net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
            x, calls = whole_batch()[0], []

            def closure(what="", calls=calls, net=net, x=x):
                calls.append(1)
                if rank == 1 and len(calls) == 2 and what == "raise":
                    raise Interrupted("here")
                return net(x).square().sum(1) * (
                    float("nan") if what == "nan" and len(calls) == 2 and rank else 1
                )

            torch.manual_seed(0)
            nn.init.normal_(net[1].weight)
            parameters, rule = list(net.parameters()), Distributed(SPSA(restore=restore), split)
            for p in parameters:
                dist.broadcast(p.data, 0)
            before = [t.clone() for t in net.state_dict().values()]
            for what in ("nan", "raise"):
                calls.clear()
                attempt((what, split, restore), lambda what=what: closure(what), parameters, rule)
                after = net.state_dict().values()
                found[what, split, restore] += (
                    all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(before, after)),
                )
    net = network()
    rule = Distributed(SPSA())
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-12 * rank
    attempt("weights", closure_on(net, slice(None)), list(net.parameters()), rule)
    net = network()
    attempt("order", closure_on(net, slice(None)), list(net.parameters())[:: 1 - 2 * rank], rule)
    scaled = Distributed(SPSA(scale=1e-3 * (1 + rank)))
    attempt("rule", closure_on(net, slice(None)), list(net.parameters()), scaled)
    attempt("none", closure_on(net, slice(None)), list(net.parameters()), rule)
    return found


def _process(rank, folder):
    torch.set_num_threads(1)
    start, timeout = f"file://{folder}/start", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=start, rank=rank, world_size=WORLD, timeout=timeout)
    # the failures first: what they leave behind must not disturb the training
    torch.save({"failed": _failing(rank), "trained": _training(rank)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Everything that takes two processes, in one start of them."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def failed(processes):
    return [found["failed"] for found in processes]


@pytest.mark.parametrize(("split", "restore"), FAILURES)
def test_a_non_finite_loss_of_one_rank_raises_on_all(failed, split, restore):
    for rank, found in enumerate(failed):
        name, text, empty, restored = found["nan", split, restore]
        assert name == "NonFiniteError"
        assert empty
        assert restored
        assert rank == 1 or "the loss of rank 1 is nan or infinite" in text


@pytest.mark.parametrize(("split", "restore"), FAILURES)
def test_an_exception_on_one_rank_raises_on_all(failed, split, restore):
    name, text, empty, restored = failed[0]["raise", split, restore]
    assert (name, empty, restored) == ("RuntimeError", True, True)
    assert "rank 1 failed" in text
    assert failed[1]["raise", split, restore][0] == "Interrupted"
    assert failed[1]["raise", split, restore][3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weights", "the same weights, bit for bit.*broadcast"),
        ("order", "the same rule, shapes and dtypes"),
        ("rule", "the same rule, shapes and dtypes"),
    ],
)
def test_ranks_that_differ_are_refused_on_all(failed, name, text):
    for found in failed:
        assert found[name][0] == "ArgumentError"
        assert re.search(text, found[name][1])
    assert failed[0]["none"] is failed[1]["none"] is None


@pytest.fixture
def single(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/start", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_finds_what_the_bare_rule_finds(single):
    net = network()
    parameters, closure = list(net.parameters()), closure_on(net, slice(None))
    want = SPSA(samples=2).estimate(closure, parameters, Key(2**63 + 5, 1, 2))
    found = Distributed(SPSA(samples=2)).estimate(closure, parameters, Key(2**63 + 5, 1, 2))
    assert all(map(torch.equal, found.gradients, want.gradients))
    found = Distributed(SPSA(samples=2), "directions").estimate(closure, parameters, Key(0))
    want = SPSA(samples=2).estimate(closure, parameters, rank_key(Key(0), 0))
    assert all(map(torch.equal, found.gradients, want.gradients))
    assert found.evaluations == 4


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rule", [SPSA(samples=2), EvolutionStrategies(samples=2)], ids=repr)
def test_estimates_run_on_fake_tensors(single, rule, split):
    shared = Distributed(rule, split)
    with FakeTensorMode():
        net = nn.Linear(4, 2)
        x = torch.randn(6, 4)
        found = shared.estimate(lambda: net(x).square().mean(1), list(net.parameters()), Key(0))
    assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]
    assert shared.traffic.sent == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_layout_has_a_checksum(single, dtype):
    weight = torch.randn(3, 4).to(dtype).T.requires_grad_()
    loss = backward(lambda: weight.double().square().sum(), [weight], gradient=Distributed(SPSA(scale=0.1)))
    assert loss.ndim == 0
    assert weight.grad.any()


def test_without_a_process_group_it_says_what_to_call():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(UnsupportedError, match="init_process_group"):
        backward(lambda: weight.sum(), [weight], gradient=Distributed(SPSA()))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((NodePerturbation(),), ArgumentTypeError, "all_reduce_gradients_"),
        ((SPSA,), ArgumentTypeError, "^gradient"),
        ((None,), ArgumentTypeError, "^gradient"),
        ((SPSA(), "weights"), ArgumentError, "^split"),
        ((SPSA(restore="inplace"), "directions"), ArgumentError, "'swap'"),
        ((OnePoint(restore="inplace"), "directions"), ArgumentError, "'swap'"),
    ],
    ids=str,
)
def test_fields_out_of_range(arguments, error, text):
    with pytest.raises(error, match=text):
        Distributed(*arguments)


def test_it_is_a_policy():
    rule = Distributed(SPSA(samples=3), "directions")
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert repr(rule) == f"Distributed(gradient={SPSA(samples=3)!r}, split='directions')"
    assert rule.traffic.per_step() == 0.0
