"""Parameters: as a vector, borrowed for a while, given their gradients the way autograd would."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.noise import Key, normal
from thalweg.parameters import (
    all_reduce_gradients_,
    borrowed,
    collect,
    fill_gradients,
    isolated,
    loan,
    unexpanded,
    unvector,
    vector,
)

both_ways = pytest.mark.parametrize("restore", ["copy", "swap"])


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def noisy(index: int, value: Tensor) -> Tensor:
    return value + normal(value, Key(5, step=index))


# collect


def test_collect_keeps_the_order_and_each_tensor_once() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    assert [id(p) for p in collect(iter([b, a, b]))] == [id(b), id(a)]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (nn.Linear(1, 1), ArgumentTypeError),
        (torch.zeros(2, requires_grad=True), ArgumentTypeError),
        ("weights", ArgumentTypeError),
        (None, ArgumentTypeError),
        (3, ArgumentTypeError),
        ([1.0], ArgumentTypeError),
        (dict(nn.Linear(1, 1).named_parameters()), ArgumentTypeError),
        (nn.Linear(1, 1).named_parameters(), ArgumentTypeError),
        ([torch.zeros(2, dtype=torch.int64)], ArgumentTypeError),
        ([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], ArgumentTypeError),
        ([torch.zeros(2)], ArgumentError),
        ([torch.zeros(2, requires_grad=True) * 2], ArgumentError),
        ([], ArgumentError),
    ],
)
def test_collect_refuses_what_cannot_get_a_gradient(wrong: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="parameters"):
        collect(wrong)


def test_collect_says_that_an_iterator_is_used_up() -> None:
    parameters = network().parameters()
    collect(parameters)
    with pytest.raises(ArgumentError, match="used up"):
        collect(parameters)


# vectors


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_vector_comes_apart_again(shapes: list[list[int]], dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    flat = vector(tensors)
    assert flat.shape == (sum(math.prod(shape) for shape in shapes),)
    for back, tensor in zip(unvector(flat, tensors), tensors, strict=True):
        assert torch.equal(back, tensor)
        assert back.dtype == dtype


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: vector([]), "tensors"),
        (lambda: vector(3), "tensors"),
        (lambda: vector(torch.ones(2, 2)), "tensors"),
        (lambda: vector([torch.ones(1), 2.0]), "tensors[1]"),
        (lambda: unvector([1.0], [torch.ones(1)]), "flat"),
        (lambda: fill_gradients([nn.Parameter(torch.ones(1))], [1.0]), "gradients[0]"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(call: Callable[[], object], named: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as refusal:
        call()
    assert refusal.value.argument == named


def test_a_vector_of_another_length_is_refused() -> None:
    for wrong in (torch.zeros(5), torch.zeros(2, 3)):
        with pytest.raises(ArgumentError, match=r"flat: expected a vector of shape \(6,\)"):
            unvector(wrong, [torch.zeros(2, 3)])


# fill_gradients


def test_filling_accumulates_and_fires_the_hooks_that_backward_fires() -> None:
    def fired(fill: bool) -> tuple[list[str], list[Tensor]]:
        model, log = network(), []
        parameters = list(model.parameters())
        for index, p in enumerate(parameters):
            p.register_hook(lambda g, i=index: (log.append(f"tensor {i}"), g * 2)[1])
            p.register_post_accumulate_grad_hook(lambda p, i=index: log.append(f"accumulated {i}"))
        for _ in range(2):
            if fill:
                fill_gradients(parameters, [torch.ones_like(p) for p in parameters])
            else:
                sum(p.sum() for p in parameters).backward()
        return sorted(log), [p.grad for p in parameters]

    log, gradients = fired(fill=True)
    expected_log, expected = fired(fill=False)
    assert log == expected_log
    assert len(log) == 16
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(got, wanted)


def test_filling_leaves_out_none_and_keeps_the_dtype_of_the_parameter() -> None:
    a = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    b = nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        fill_gradients([a, b], [torch.ones(2), None])
    assert a.grad.dtype == torch.bfloat16
    assert b.grad is None
    fill_gradients([a, b], [None, None])


def test_filling_does_not_keep_the_gradient_it_was_given() -> None:
    a, given_gradient = nn.Parameter(torch.zeros(2)), torch.ones(2)
    for _ in range(2):
        fill_gradients([a], [given_gradient])
    assert given_gradient.tolist() == [1, 1]
    assert a.grad.tolist() == [2, 2]


@pytest.mark.parametrize(
    "wrong",
    [[torch.ones(2)], [torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(1, 3)]],
)
def test_filling_refuses_wrong_numbers_and_shapes_and_fills_nothing(wrong: list[Tensor]) -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ArgumentError, match="gradients"):
        fill_gradients([a, b], wrong)
    assert a.grad is None
    assert b.grad is None


def test_filling_refuses_what_overflows_in_the_dtype_of_the_parameter() -> None:
    small, half = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float16))
    with pytest.raises(NonFiniteError, match=r"gradients\[2\]"):
        fill_gradients([small, small, half], [torch.ones(1), None, torch.full((1,), 1e6)])
    assert small.grad is None
    assert half.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_filling_refuses_nonfinite_gradients_and_fills_nothing(bad: float) -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(NonFiniteError, match=r"gradients\[1\]"):
        fill_gradients([a, b], [torch.ones(2), torch.tensor([0, bad, 0])])
    assert a.grad is None


# all_reduce_gradients_


def test_all_reduce_needs_a_process_group() -> None:
    with pytest.raises(UnsupportedError, match="init_process_group"):
        all_reduce_gradients_(network().parameters())


def _average(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    a.grad = torch.full((2,), float(rank + 1))
    if rank == 1:
        b.grad = torch.tensor([2.0, 4.0, 6.0])
    kept = a.grad
    all_reduce_gradients_([a, b])
    assert a.grad is kept
    torch.save((a.grad, b.grad), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_all_reduce_averages_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_average, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        a, b = torch.load(tmp_path / f"{rank}.pt")
        assert a.tolist() == [1.5, 1.5]
        assert b.tolist() == [1.0, 2.0, 3.0]


# borrowed


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_borrowed_weights_come_back_bit_for_bit_even_after_an_exception(
    restore: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    pointers = [p.data_ptr() for p in parameters]
    x = torch.randn(5, 3, dtype=dtype)
    plain = model(x)
    with torch.no_grad(), borrowed(parameters, noisy, restore):
        changed = model(x)

    def interrupted() -> None:
        with torch.no_grad(), borrowed(parameters, noisy, restore):
            model(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not torch.equal(changed, plain)
    for p, value, pointer in zip(parameters, before, pointers, strict=True):
        assert torch.equal(p.detach(), value)
        assert p.data_ptr() == pointer
    assert torch.equal(model(x), plain)


@both_ways
def test_borrowed_weights_are_those_of_the_change(restore: str) -> None:
    model, x = network(), torch.randn(5, 3)
    parameters = list(model.parameters())
    named = {name: noisy(i, p.detach()) for i, (name, p) in enumerate(model.named_parameters())}
    expected = torch.func.functional_call(model, named, x)
    with torch.no_grad(), borrowed(parameters, noisy, restore):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


@both_ways
def test_an_exception_in_the_change_or_in_a_module_restores(restore: str) -> None:
    model = network()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]

    def fails(index: int, value: Tensor) -> Tensor:
        return noisy(index, value) if index < 2 else value + torch.zeros(7)

    with pytest.raises(RuntimeError), torch.no_grad(), borrowed(parameters, fails, restore):
        model(torch.randn(5, 3))
    with pytest.raises(RuntimeError), torch.no_grad(), borrowed(parameters, noisy, restore):
        model(torch.randn(5, 9))
    for p, value in zip(parameters, before, strict=True):
        assert torch.equal(p.detach(), value)
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


@both_ways
def test_a_tied_weight_changes_once_in_both_places(restore: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(3, 3, bias=False)
            self.write = nn.Linear(3, 3, bias=False)
            self.write.weight = self.read.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.write(self.read(x))

    model, x = Tied(), torch.randn(2, 3)
    parameters = collect(model.parameters())
    changed = noisy(0, model.read.weight.detach())
    with torch.no_grad(), borrowed(parameters, noisy, restore):
        torch.testing.assert_close(model(x), x @ changed.T @ changed.T)


@both_ways
def test_a_module_that_calls_itself_keeps_its_borrowed_weight(restore: str) -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            inner = self(x, again=False) if again else x
            return super().forward(inner)

    layer, x = Twice(3, 3, bias=False), torch.randn(2, 3)
    changed = noisy(0, layer.weight.detach())
    with torch.no_grad(), borrowed([layer.weight], noisy, restore):
        torch.testing.assert_close(layer(x), x @ changed.T @ changed.T)


@both_ways
def test_shared_and_expanded_memory_is_refused(restore: str) -> None:
    store = torch.zeros(10)
    shared = [nn.Parameter(store[:6]), nn.Parameter(store[4:])]
    expanded = [nn.Parameter(torch.zeros(1).expand(3))]
    for wrong, why in ((shared, "not shared"), (expanded, "expanded")):
        with pytest.raises(ArgumentError, match=why), borrowed(wrong, noisy, restore):
            pass
        assert all(bool((p == 0).all()) for p in wrong)


def test_an_unknown_way_to_restore_is_refused() -> None:
    with pytest.raises(ArgumentError, match="restore"), borrowed([], noisy, "undo"):
        pass


def test_swapped_weights_read_outside_of_their_module_are_nan_not_silently_the_old_ones() -> None:
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 1, 4)
    before = attention(x, x, x)[0]
    with torch.no_grad(), borrowed(list(attention.parameters()), noisy, "swap"):
        # the output projection's weight is read by the attention itself, its module never runs
        assert bool(attention(x, x, x)[0].isnan().all())
    assert torch.equal(attention(x, x, x)[0], before)
    with torch.no_grad(), borrowed(list(attention.parameters()), noisy, "copy"):
        assert bool(attention(x, x, x)[0].isfinite().all())


def test_swap_holds_one_module_at_a_time_and_copy_the_whole_model() -> None:
    import weakref

    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(8)])
    alive: list[weakref.ref] = []

    def watched(index: int, value: Tensor) -> Tensor:
        changed = value + 1.0
        alive.append(weakref.ref(changed.untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))
        return changed

    most: list[int] = []
    parameters = list(model.parameters())
    with torch.no_grad(), borrowed(parameters, watched, "swap"):
        model(torch.randn(2, 32))
    assert len(alive) == 8
    assert max(most) <= 2


@both_ways
def test_every_move_of_a_loan_starts_from_the_original(restore: str) -> None:
    layer = nn.Linear(2, 1, bias=False)
    before, x = layer.weight.detach().clone(), torch.ones(1, 2)
    with torch.no_grad(), loan([layer.weight], restore) as move:
        assert torch.equal(layer(x), x @ before.T)
        for step in (1.0, -3.0):
            move(lambda index, value, out, step=step: torch.add(value, step, out=out))
            assert torch.equal(layer(x), x @ (before + step).T)
    assert torch.equal(layer.weight, before)


@both_ways
def test_a_graph_made_before_the_loan_stays_valid(restore: str) -> None:
    model, x = network(), torch.randn(5, 3)
    expected = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()))
    loss = model(x).pow(2).sum()
    with torch.no_grad(), borrowed(list(model.parameters()), noisy, restore):
        model(x)
    assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))


@both_ways
def test_autocast_around_the_loan_casts_the_weights_of_the_moment(restore: str) -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    parameters = list(layer.parameters())
    before = [p.detach().clone() for p in parameters]
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with torch.no_grad(), loan(parameters, restore) as move:
            for step in (1.0, 2.0):
                move(lambda index, value, out, step=step: value + step)
                expected = nn.functional.linear(x, *(p + step for p in before))
                assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), plain)


@both_ways
def test_parts_of_one_block_that_do_not_overlap_may_be_borrowed(restore: str) -> None:
    block = torch.arange(6.0)
    layer = nn.Linear(2, 2)
    layer.bias, layer.weight = nn.Parameter(block[4:]), nn.Parameter(block[:4].view(2, 2))
    x = torch.ones(1, 2)
    with torch.no_grad(), borrowed(list(layer.parameters()), lambda i, value: value + 1.0, restore):
        assert layer(x).tolist() == [[3.0 + 5.0, 7.0 + 6.0]]
    assert block.tolist() == list(range(6))
    assert layer.weight.data_ptr() == block.data_ptr()


@both_ways
def test_gradients_flow_to_the_borrowed_values_place(restore: str) -> None:
    layer = nn.Linear(2, 1, bias=False)
    with borrowed([layer.weight], lambda i, value: torch.full_like(value, 3.0), restore):
        x = torch.ones(1, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert gradient.tolist() == [[3.0, 3.0]]


# isolated


def test_isolated_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    extra = torch.zeros(2, requires_grad=True)
    model(torch.randn(8, 3)).sum().backward()
    gradients = {p: p.grad for p in [*model.parameters(), extra]}
    values = {p: None if g is None else g.clone() for p, g in gradients.items()}
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    flags = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()

    def interrupted() -> None:
        with isolated(model, [extra]):
            assert all(p.grad is None for p in [*model.parameters(), extra])
            model.train()
            (model(torch.randn(8, 3)).sum() + extra.sum()).backward()
            assert extra.grad is not None
            model[1].register_buffer("running_mean", torch.full((4,), 7.0))
            model.eval()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for p, gradient in gradients.items():
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, values[p])
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)


def test_isolated_gives_an_expanded_buffer_back() -> None:
    model = nn.Module()
    cell = torch.ones(2, 1)
    model.register_buffer("mask", cell.expand(2, 3))
    with isolated(model, []):
        cell.zero_()
    assert model.mask.tolist() == [[1.0] * 3] * 2
    assert unexpanded(model.mask).data_ptr() == cell.data_ptr()


def test_isolated_without_a_model() -> None:
    x = torch.zeros(2, requires_grad=True)
    with isolated(None, [x]):
        x.sum().backward()
    assert x.grad is None
