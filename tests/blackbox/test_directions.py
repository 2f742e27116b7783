"""Directions: their second moments, where they are restricted, and the finite differences of a textbook."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import SPSA, Blocks, Coordinates, ForwardGradient, LowRank, Sparse
from thalweg.blackbox.directions import bind
from thalweg.errors import ArgumentError
from thalweg.ledger import price
from thalweg.noise import Key
from thalweg.step import backward

SIGMAS = 5
PATTERNS = [
    "rademacher",
    "gaussian",
    "sphere",
    "coordinate",
    Coordinates(subset=5),
    LowRank(rank=1),
    LowRank(rank=3),
    Sparse(0.5),
    Sparse(0.5, keep="smallest", of="rademacher"),
    Sparse(0.5, keep="largest", of=LowRank(2), seed=None),
    Sparse(0.3, seed=7),
    Blocks(of="rademacher"),
    Blocks(sizes=(1, 1), order="random", of=Sparse(0.5)),
]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((4, 3), (5,))
    ]


def flat(bound, found, sample=0):
    parts = [bound.part(sample, index, p.detach()) for index, p in enumerate(found)]
    return torch.cat([torch.zeros(p.numel()) if z is None else z.flatten() for z, p in zip(parts, found)])


@pytest.mark.parametrize("directions", ["rademacher", "gaussian", "sphere", LowRank(1), LowRank(3)], ids=repr)
def test_the_covariance_is_the_identity(directions):
    found = parameters()
    z = torch.stack([flat(bind(directions, found, Key(seed), 1), found) for seed in range(6000)])
    products = z[:, :, None] * z[:, None, :]
    error = products.std(0) / math.sqrt(len(z))
    score = (products.mean(0) - torch.eye(17, dtype=torch.float64)) / error.clamp_min(1e-12)
    assert error.max() < 0.06
    assert score.abs().max() < SIGMAS
    assert (z.mean(0) / (z.std(0) / math.sqrt(len(z)))).abs().max() < SIGMAS


def test_a_sphere_has_radius_root_d_over_all_parameters():
    found = parameters()
    z = flat(bind("sphere", found, Key(3), 2), found, sample=1)
    torch.testing.assert_close(z.norm(), torch.tensor(math.sqrt(17), dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 4])
def test_second_moment_law_of_low_rank_directions(rank):
    m, n = 6, 5
    exact, like = torch.randn(m, n, dtype=torch.float64), torch.empty(m, n, dtype=torch.float64)
    z = torch.stack([LowRank(rank).bind([like], Key(seed), 1).part(0, 0, like) for seed in range(20000)])
    found = (z * exact).sum((1, 2), keepdim=True) * z
    ratios = found.pow(2).sum((1, 2)) / exact.pow(2).sum()
    error = ratios.std() / math.sqrt(len(ratios))
    law = m * n + 2 + 2 * (m + n + 1) / rank
    assert error < 0.04 * law
    assert abs(ratios.mean() - law) < SIGMAS * error
    score = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))
    assert score.abs().max() < SIGMAS


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_directions_have_that_rank_and_cover_convolutions(rank):
    like = torch.empty(6, 3, 2, 2)
    drawn = LowRank(rank).bind([like], Key(0), 1).part(0, 0, like)
    assert drawn.shape == like.shape
    assert torch.linalg.matrix_rank(drawn.view(6, 12)) == rank


def net_and_closure():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    return net, lambda: net(x).pow(2).mean()


@pytest.mark.parametrize(("side", "order"), [("forward", 1), ("central", 2)])
def test_cge_equals_autograd_to_the_order_of_the_scale(side, order):
    net, closure = net_and_closure()
    exact = torch.autograd.grad(closure(), list(net.parameters()))
    errors = []
    for scale in (1e-2, 1e-3):
        rule = SPSA(scale=scale, directions="coordinate", side=side)
        found = rule.estimate(closure, list(net.parameters()), Key(0))
        errors.append(max((a - b).abs().max() for a, b in zip(found.gradients, exact)))
    size = sum(p.numel() for p in net.parameters())
    assert found.evaluations == (size + 1 if side == "forward" else 2 * size)
    assert 0.8 * 10**order < errors[0] / errors[1] < 1.2 * 10**order
    assert errors[1] < 1e-2


def test_cge_equals_scipy_approx_fprime():
    optimize = pytest.importorskip("scipy.optimize")
    point = torch.tensor([-1.2, 1.0, 0.7], dtype=torch.float64, requires_grad=True)

    def rosenbrock(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    rule = SPSA(scale=1e-6, directions="coordinate", side="forward")
    found = rule.estimate(lambda: rosenbrock(point), [point], Key(0)).gradients[0]
    want = optimize.approx_fprime(
        point.detach().numpy(), lambda x: rosenbrock(torch.from_numpy(x)).item(), 1e-6
    )
    torch.testing.assert_close(found, torch.from_numpy(want), rtol=1e-9, atol=1e-9)


def test_a_subset_of_coordinates_is_unbiased_and_without_repetition():
    point = torch.randn(6, dtype=torch.float64, requires_grad=True)
    exact = 2 * point.detach()
    rule = SPSA(scale=0.1, directions=Coordinates(subset=4))
    found = []
    for seed in range(3000):
        estimate = rule.estimate(lambda: (point**2).sum(), [point], Key(seed))
        assert estimate.evaluations == 8
        gradient = estimate.gradients[0]
        moved = gradient != 0
        assert moved.sum() == 4
        torch.testing.assert_close(gradient[moved], exact[moved] * 6 / 4)
        found.append(gradient)
    found = torch.stack(found)
    assert ((found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))).abs().max() < SIGMAS


def test_all_coordinates_of_many_weights_are_refused():
    weight = torch.zeros(20, requires_grad=True)
    with pytest.raises(ArgumentError, match=r"^directions: expected at most 10 weights, not 20.*subset"):
        backward(lambda: weight.sum(), [weight], gradient=SPSA(directions=Coordinates(limit=10)))
    with pytest.raises(ArgumentError, match=r"^samples"):
        backward(lambda: weight.sum(), [weight], gradient=SPSA(2, directions="coordinate"))
    with pytest.raises(ArgumentError, match=r"at most 20"):
        backward(lambda: weight.sum(), [weight], gradient=SPSA(directions=Coordinates(subset=21)))
    assert weight.grad is None


@pytest.mark.parametrize("keep", ["smallest", "largest"])
def test_masks_by_magnitude_estimate_the_gradient_on_the_mask_alone(keep):
    point = torch.tensor([0.1, -3.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rule = SPSA(scale=0.1, directions=Sparse(0.5, keep=keep, of="rademacher"))
    found = torch.stack(
        [rule.estimate(lambda: (point**2).sum(), [point], Key(seed)).gradients[0] for seed in range(2000)]
    )
    mask = (point.detach().abs() < 1) if keep == "smallest" else (point.detach().abs() > 1)
    assert torch.equal((found != 0).all(0), mask)
    assert not found[:, ~mask].any()
    want = 2 * point.detach()[mask]
    error = found[:, mask].std(0) / math.sqrt(len(found))
    assert ((found[:, mask].mean(0) - want) / error).abs().max() < SIGMAS


def test_random_masks_keep_their_fraction_and_a_seed_keeps_the_mask():
    weight = torch.zeros(20000)

    def mask(pattern, seed, sample=0):
        return pattern.bind([weight], Key(seed), 2).part(sample, 0, weight) != 0

    drawn = mask(Sparse(0.1), 0)
    spread = math.sqrt(0.1 * 0.9 / weight.numel())
    assert abs(drawn.double().mean() - 0.1) < SIGMAS * spread
    assert torch.equal(drawn, mask(Sparse(0.1), 0, sample=1))
    assert not torch.equal(drawn, mask(Sparse(0.1), 1))
    assert torch.equal(mask(Sparse(0.1, seed=3), 0), mask(Sparse(0.1, seed=3), 1))


def test_blocks_go_round_and_untouched_blocks_have_no_gradient():
    net, closure = net_and_closure()
    pattern = Blocks.per_module(net, of="rademacher")
    assert pattern.sizes == (2, 2)
    found = list(net.parameters())
    for step in range(4):
        gradients = SPSA(directions=pattern).estimate(closure, found, Key(0, step=step)).gradients
        assert [g is not None for g in gradients] == [step % 2 == 0] * 2 + [step % 2 == 1] * 2
    both = SPSA(samples=4, directions=pattern).estimate(closure, found, Key(0)).gradients
    assert all(g is not None for g in both)


def test_each_blocks_gradient_is_the_mean_over_the_samples_that_moved_it():
    bound = Blocks(sizes=(1, 1)).bind(parameters(), Key(0), samples=3)
    assert bound.weights == (0.5, 1.0, 0.5)
    one, two = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rule = SPSA(samples=2, scale=0.1, directions=Blocks())
    pairs = [
        rule.estimate(lambda: (one**2).sum() + (two**3).sum(), [one, two], Key(s)).gradients
        for s in range(3000)
    ]
    for place, exact in ((0, 2 * one.detach()), (1, 3 * two.detach() ** 2 + 0.03)):
        drawn = torch.stack([pair[place] for pair in pairs])
        error = drawn.std(0) / math.sqrt(len(drawn))
        if place == 0:
            assert ((drawn.mean(0) - exact) / error).abs().max() < SIGMAS
        else:
            # of a cube the central difference adds scale^2 E[z^4] to each entry
            assert ((drawn.mean(0) - exact) / error).abs().max() < SIGMAS


def test_random_blocks_visit_all():
    pattern = Blocks(sizes=(1, 1), order="random")
    ranges = [pattern.bind(parameters(), Key(seed), 1).ranges[0] for seed in range(400)]
    share = sum(each == (0, 1) for each in ranges) / len(ranges)
    assert abs(share - 0.5) < SIGMAS * 0.5 / math.sqrt(len(ranges))


def test_blocks_per_module_by_depth_counts_tied_and_frozen_parameters_out():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net = nn.Sequential(inner, nn.Linear(2, 2))
    assert Blocks.per_module(net).sizes == (2, 2, 2)
    assert Blocks.per_module(net, depth=1).sizes == (4, 2)
    net[1].weight = inner[0].weight
    inner[1].bias.requires_grad_(False)
    assert Blocks.per_module(net).sizes == (2, 1, 1)


@pytest.mark.parametrize("directions", PATTERNS, ids=repr)
@pytest.mark.parametrize("restore", ["copy", "swap"])
def test_every_pattern_restores_and_agrees_with_the_forward_gradient(directions, restore):
    net, closure = net_and_closure()
    found = list(net.parameters())
    if isinstance(directions, Blocks) and directions.sizes:
        directions = Blocks((2, 2), directions.order, directions.of)
    before = [p.detach().clone() for p in found]
    central = SPSA(scale=1e-4, directions=directions, restore=restore).estimate(closure, found, Key(4))
    forward = ForwardGradient(directions=directions).estimate(closure, found, Key(4))
    assert all(torch.equal(a, b) for a, b in zip(before, found))
    assert any(g is not None and g.any() for g in forward.gradients)
    for a, b in zip(central.gradients, forward.gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("directions", PATTERNS, ids=repr)
def test_patterns_come_in_the_dtype_of_their_parameter(directions, dtype):
    found = parameters(dtype)
    bound = bind(directions, found, Key(0), 1)
    again = bind(directions, found, Key(0), 1)
    for index, p in enumerate(found):
        for sample in range(len(bound.weights)):
            drawn = bound.part(sample, index, p.detach())
            if drawn is not None:
                assert drawn.dtype is dtype
                assert drawn.shape == p.shape
                assert torch.isfinite(drawn).all()
                assert torch.equal(drawn, again.part(sample, index, p.detach()))


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if not isinstance(p, str)], ids=repr)
def test_patterns_pickle_print_and_compare(pattern):
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert eval(repr(pattern)) == pattern
    assert pattern != type(pattern)() or pattern == type(pattern)()


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: LowRank(0), "rank"),
        (lambda: Coordinates(subset=0), "subset"),
        (lambda: Coordinates(limit=1.5), "limit"),
        (lambda: Sparse(0.0), "fraction"),
        (lambda: Sparse(1.5), "fraction"),
        (lambda: Sparse(keep="top"), "keep"),
        (lambda: Sparse(of="sphere"), "of"),
        (lambda: Sparse(of=Blocks()), "of"),
        (lambda: Sparse(keep="largest", seed=1), "seed"),
        (lambda: Blocks(sizes=(1, 0)), r"sizes\[1\]"),
        (lambda: Blocks(sizes=[1]), "sizes"),
        (lambda: Blocks(order="x"), "order"),
        (lambda: Blocks(of="coordinate"), "of"),
        (lambda: Blocks(of=Blocks()), "of"),
        (lambda: Blocks(sizes=(1,)).bind(parameters(), Key(0), 1), "directions"),
        (lambda: Blocks.per_module(nn.ReLU()), "model"),
        (lambda: Blocks.per_module(3), "model"),
    ],
)
def test_bad_fields_are_refused_by_name(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        make()


SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (7,), (3, 2), (2, 3, 2), (4, 0, 2)]), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES,
    directions=st.sampled_from(
        [
            "sphere",
            "coordinate",
            Coordinates(subset=1),
            LowRank(2),
            Sparse(0.3),
            Sparse(0.3, keep="largest"),
            Blocks(),
        ]
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**40),
)
def test_any_shapes_and_dtypes_come_back_bit_for_bit(shapes, directions, dtype, seed):
    found = [torch.full(shape, 0.5, dtype=dtype, requires_grad=True) for shape in shapes]
    before = [p.detach().clone() for p in found]

    def closure():
        return sum((p.double() ** 2).sum() for p in found)

    if not sum(p.numel() for p in found) and isinstance(bind_name(directions), Coordinates):
        with pytest.raises(ArgumentError, match=r"^directions: expected at least one weight"):
            SPSA(directions=directions).estimate(closure, found, Key(seed))
        return
    estimate = SPSA(scale=0.25, directions=directions).estimate(closure, found, Key(seed))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, found))
    for p, gradient in zip(found, estimate.gradients):
        if gradient is not None:
            assert gradient.shape == p.shape
            assert gradient.dtype is dtype
            assert torch.isfinite(gradient).all()


def bind_name(directions):
    return Coordinates() if directions == "coordinate" else directions


@pytest.mark.parametrize("directions", PATTERNS, ids=repr)
def test_every_pattern_can_be_priced_on_fake_tensors(directions):
    if isinstance(directions, Blocks) and directions.sizes:
        directions = Blocks((2, 2), directions.order, directions.of)
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        found = SPSA(directions=directions).estimate(
            lambda: net(torch.ones(2, 3)).mean(), list(net.parameters()), Key(0)
        )
        shapes = [None if g is None else g.shape for g in found.gradients]
    assert any(shape is not None for shape in shapes)
    assert all(shape in (None, p.shape) for shape, p in zip(shapes, net.parameters()))
    own = net_and_closure()[0].float()
    step = (own, lambda: own(torch.ones(2, 3)).mean(), own.parameters())
    assert "SPSA" in str(price(step, routes=[SPSA(directions=directions)]))
