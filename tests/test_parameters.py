"""Parameters: as a vector, and given their gradients the way autograd would."""

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
from thalweg.parameters import all_reduce_gradients_, collect, fill_gradients, unvector, vector


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


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
