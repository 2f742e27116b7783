"""Keyed noise: the same bits whoever asks again, and nothing in common otherwise."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.noise import Key, fresh_key, normal, rademacher, replayed, uniform

DRAWS = {"uniform": uniform, "normal": normal, "rademacher": rademacher}
MEAN = {"uniform": 0.5, "normal": 0.0, "rademacher": 0.0}
VARIANCE = {"uniform": 1 / 12, "normal": 1.0, "rademacher": 1.0}
# E[(x - mean)^4]
FOURTH = {"uniform": 1 / 80, "normal": 3.0, "rademacher": 1.0}
each = pytest.mark.parametrize("kind", DRAWS)
Draw = Callable[[Tensor, Key | Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_key_same_bits_and_the_global_state_is_left_alone(kind: str, dtype: torch.dtype) -> None:
    like = torch.full((5, 7), math.nan, dtype=dtype)
    state = torch.random.get_rng_state()
    first = DRAWS[kind](like, Key(3, step=2, call=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(DRAWS[kind](like.clone().t().contiguous().t(), Key(3, 2, 1)), first)
    assert first.dtype == dtype
    assert first.shape == like.shape
    assert not first.requires_grad


@each
def test_a_fresh_key_follows_manual_seed_and_never_repeats(kind: str) -> None:
    like = torch.empty(64)
    torch.manual_seed(5)
    keys = [fresh_key(like) for _ in range(3)]
    drawn = [DRAWS[kind](like, key) for key in keys]
    torch.manual_seed(5)
    assert torch.equal(DRAWS[kind](like, fresh_key(like)), drawn[0])
    assert torch.equal(DRAWS[kind](like, keys[0]), drawn[0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@each
def test_mean_variance_and_bounds(kind: str) -> None:
    n = 200_000
    drawn = DRAWS[kind](torch.empty(n, dtype=torch.float64), Key(1))
    assert abs(float(drawn.mean()) - MEAN[kind]) <= 5 * math.sqrt(VARIANCE[kind] / n)
    spread = (drawn - MEAN[kind]) ** 2
    error = math.sqrt((FOURTH[kind] - VARIANCE[kind] ** 2) / n)
    assert abs(float(spread.mean()) - VARIANCE[kind]) <= 5 * error + 1e-12
    if kind == "uniform":
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) < 1
    if kind == "rademacher":
        assert drawn.unique().tolist() == [-1, 1]


@each
def test_neighbouring_keys_are_uncorrelated(kind: str) -> None:
    n = 100_000
    like = torch.empty(n, dtype=torch.float64)
    keys = [Key(0), Key(1), Key(0, step=1), Key(0, call=1), Key(1, step=1), Key(2**40)]
    rows = torch.stack([(DRAWS[kind](like, key) - MEAN[kind]) / math.sqrt(VARIANCE[kind]) for key in keys])
    correlation = rows @ rows.T / n
    off = correlation[~torch.eye(len(keys), dtype=torch.bool)]
    assert float(off.abs().max()) <= 5 / math.sqrt(n)


def test_first_numbers_of_consecutive_keys_are_themselves_uniform() -> None:
    # a generator whose seeds are only counted up starts alike; the folded key must not
    n = 4000
    firsts = torch.stack([uniform(torch.empty(1), Key(0, step=i)) for i in range(n)]).double().flatten()
    assert abs(float(firsts.mean()) - 0.5) <= 5 * math.sqrt(1 / 12 / n)
    lagged = ((firsts[1:] - 0.5) * (firsts[:-1] - 0.5)).mean()
    assert abs(float(lagged)) <= 5 / 12 / math.sqrt(n - 1)


def test_keys_that_differ_fold_differently() -> None:
    fields = range(12)
    bits = {Key(a, b, c).bits() for a in fields for b in fields for c in fields}
    assert len(bits) == len(fields) ** 3
    assert all(0 <= value < 2**63 for value in bits)
    assert Key(2**64 - 1).bits() < 2**63


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_uniform_draw_is_never_one(dtype: torch.dtype) -> None:
    drawn = uniform(torch.empty(1_000_000, dtype=dtype), Key(0))
    assert float(drawn.max()) < 1
    # the clamp must not have been what kept a coarse dtype away from its largest value below 1
    assert float(drawn.max()) >= 1 - 2 * torch.finfo(dtype).eps or dtype is torch.float32


def noisy(kind: str, key: Key | None) -> Callable[[Tensor], Tensor]:
    """A function whose gradient reveals the draw: a unit with fresh or with named noise."""

    def run(x: Tensor) -> Tensor:
        drawn = DRAWS[kind](x, fresh_key(x) if key is None else key)
        return torch.sin(x) * (1 + drawn)

    return run


@each
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("key", [None, Key(7)])
def test_recomputed_under_checkpoint_with_the_same_bits(kind: str, reentrant: bool, key: Key | None) -> None:
    x = torch.randn(50, requires_grad=True)
    run = noisy(kind, key)
    torch.manual_seed(11)
    run(run(x)).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(11)
    out = checkpoint(lambda y: run(run(y)), x, use_reentrant=reentrant)
    torch.rand(3)  # the world moves on between forward and backward
    out.sum().backward()
    assert torch.equal(x.grad, expected)


@each
@pytest.mark.parametrize("key", [None, Key(7)])
def test_double_backward_sees_the_same_bits(kind: str, key: Key | None) -> None:
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    out = noisy(kind, key)(x)
    drawn = out.detach() / torch.sin(x.detach()) - 1
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -torch.sin(x.detach()) * (1 + drawn))


@each
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("key", [None, Key(7)])
@pytest.mark.parametrize("inside", ["plain", "checkpoint"])
def test_compiled_gives_the_bits_of_eager(kind: str, backend: str, key: Key | None, inside: str) -> None:
    draw = DRAWS[kind]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        def body(y: Tensor) -> Tensor:
            first = draw(y, fresh_key(y) if key is None else key)
            second = draw(y, fresh_key(y) if key is None else key.at(call=1))
            return y * first + 3 * y * second

        out = checkpoint(body, x, use_reentrant=False) if inside == "checkpoint" else body(x)
        return out, out.sum()

    def both(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x = torch.ones(40, requires_grad=True)
        torch.manual_seed(21)
        out, loss = function(x)
        loss.backward()
        return out.detach(), x.grad

    eager = both(run)
    compiled = both(torch.compile(run, fullgraph=True, backend=backend))
    # value and gradient are the same function of the draws: equal bits mean equal draws, twice each
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    assert torch.equal(eager[0], eager[1])


@each
def test_vmap_gives_the_bits_of_the_whole_batch(kind: str) -> None:
    draw, like, key = DRAWS[kind], torch.randn(4, 6), Key(3)
    whole = draw(like, key)
    assert torch.equal(vmap(lambda x: draw(x, key))(like), whole)
    assert torch.equal(vmap(lambda x: draw(x, key), in_dims=1)(like), draw(like.t(), key))
    nested = vmap(vmap(lambda x: draw(x, key)))(like)
    assert torch.equal(nested, whole)
    torch.manual_seed(4)
    fresh = vmap(lambda x: draw(x, fresh_key(x)))(like)
    torch.manual_seed(4)
    assert torch.equal(fresh, draw(like, fresh_key(like)))


@each
def test_vmap_over_keys_draws_each_by_itself(kind: str) -> None:
    draw = DRAWS[kind]
    keys = torch.stack([fresh_key(torch.empty(0)) for _ in range(3)])
    like = torch.empty(3, 5)
    expected = torch.stack([draw(one, key) for one, key in zip(like, keys)])
    assert torch.equal(vmap(draw)(like, keys), expected)
    assert torch.equal(vmap(draw, in_dims=(None, 0))(like[0], keys), expected)


@each
def test_functional_derivatives_treat_the_draw_as_a_constant(kind: str) -> None:
    x, key = torch.randn(3, 4, dtype=torch.float64), Key(3)
    run = noisy(kind, key)
    slope = torch.cos(x) * (1 + DRAWS[kind](x, key))
    torch.testing.assert_close(grad(lambda y: run(y).sum())(x), slope)
    torch.testing.assert_close(vmap(grad(lambda y: run(y).sum()))(x), slope)
    torch.testing.assert_close(jvp(run, (x,), (torch.ones_like(x),))[1], slope)
    assert torch.autograd.gradcheck(run, x.clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, x.clone().requires_grad_())


@each
def test_fake_and_meta_tensors(kind: str) -> None:
    with FakeTensorMode():
        like = torch.empty(2, 3, dtype=torch.bfloat16)
        drawn = DRAWS[kind](like, fresh_key(like))
        assert drawn.shape == (2, 3)
        assert drawn.dtype == torch.bfloat16
        assert DRAWS[kind](like, Key(0)).shape == (2, 3)
    meta = torch.empty(2, 3, device="meta")
    assert DRAWS[kind](meta, Key(0)).is_meta


@each
def test_autocast_does_not_change_a_draw(kind: str) -> None:
    like = torch.empty(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DRAWS[kind](like, Key(0)), DRAWS[kind](like, Key(0)))
        assert DRAWS[kind](like, Key(0)).dtype == torch.float32


@each
def test_a_result_may_be_changed_in_place_without_harm(kind: str) -> None:
    drawn = DRAWS[kind](torch.empty(6), Key(0))
    kept = drawn.clone()
    drawn.zero_()
    assert torch.equal(DRAWS[kind](torch.empty(6), Key(0)), kept)


@each
def test_empty_and_scalar_shapes(kind: str) -> None:
    assert DRAWS[kind](torch.empty(0, 3), Key(0)).shape == (0, 3)
    assert DRAWS[kind](torch.empty(()), Key(0)).shape == ()


@each
def test_a_key_of_another_device_is_refused(kind: str) -> None:
    with pytest.raises(ArgumentError, match="cuda") as refusal:
        DRAWS[kind](torch.empty(2), Key(0, device="cuda"))
    assert refusal.value.argument == "key"
    here = DRAWS[kind](torch.empty(2), Key(0, device="cpu"))
    assert torch.equal(here, DRAWS[kind](torch.empty(2), Key(0)))


@each
def test_refuses_wrong_arguments(kind: str) -> None:
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64), 3.0):
        with pytest.raises(ArgumentTypeError, match="like"):
            DRAWS[kind](wrong, Key(0))
    generator = torch.Generator()
    for wrong in (0, None, generator, torch.zeros(1), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ArgumentTypeError, match="key"):
            DRAWS[kind](torch.empty(2), wrong)


@pytest.mark.parametrize("field", ["seed", "step", "call"])
def test_fields_of_a_key_are_integers_of_at_least_zero(field: str) -> None:
    for wrong, error in ((-1, ArgumentError), (1.0, ArgumentTypeError), (True, ArgumentTypeError)):
        with pytest.raises(error) as refusal:
            Key(**({"seed": 0} | {field: wrong}))
        assert refusal.value.argument == field


def test_what_is_no_tensor_or_no_function_is_refused_by_name() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^like: expected a tensor"):
        fresh_key(None)
    with pytest.raises(ArgumentTypeError, match=r"^body: expected a function"):
        replayed(torch.zeros(1))


def test_a_device_no_torch_knows_is_refused() -> None:
    for wrong in ("gpu", "", 3.5):
        with pytest.raises((ArgumentError, ArgumentTypeError)) as refusal:
            Key(0, device=wrong)
        assert refusal.value.argument == "device"


def test_a_key_is_a_value() -> None:
    key = Key(1, 2, 3, "cpu")
    assert pickle.loads(pickle.dumps(key)) == key == copy.deepcopy(key)
    assert hash(key) == hash(Key(1, 2, 3, "cpu"))
    assert key.at(step=5) == Key(1, 5, 3, "cpu")
    assert key.at(call=0) == Key(1, 2, 0, "cpu")
    assert str(key) == "Key(seed=1, step=2, call=3, device='cpu')"


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 2**70),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(sorted(DRAWS)),
)
def test_any_shape_and_seed_repeats(shape: list[int], seed: int, dtype: torch.dtype, kind: str) -> None:
    like = torch.empty(shape, dtype=dtype)
    drawn = DRAWS[kind](like, Key(seed))
    assert drawn.shape == like.shape
    assert torch.equal(drawn, DRAWS[kind](like, Key(seed)))


@pytest.mark.gpu
@each
def test_on_cuda(kind: str) -> None:
    like = torch.empty(1000, device="cuda")
    drawn = DRAWS[kind](like, Key(3, device="cuda"))
    assert drawn.is_cuda
    assert torch.equal(drawn, DRAWS[kind](like, Key(3)))
    compiled = torch.compile(lambda x: DRAWS[kind](x, Key(3)), fullgraph=True)
    assert torch.equal(compiled(like), drawn)
    with pytest.raises(ArgumentError):
        DRAWS[kind](like, Key(3, device="cpu"))
