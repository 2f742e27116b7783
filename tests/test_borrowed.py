"""Parameters borrowed for a while, and bodies that leave no trace."""

import pytest
import torch
from torch import Tensor, nn

from thalweg.borrowed import borrowed, isolated, loan, unexpanded
from thalweg.errors import ArgumentError
from thalweg.noise import Key, normal
from thalweg.parameters import collect

both_ways = pytest.mark.parametrize("restore", ["copy", "swap"])


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def noisy(index: int, value: Tensor) -> Tensor:
    return value + normal(value, Key(5, step=index))


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


def test_a_graph_made_before_stays_valid_although_buffers_were_written_to() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(8, 3)
    loss = model(x).square().sum()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with isolated(model, []):
        model.train()
        model(x + 1)
        assert int(model[1].num_batches_tracked) == 1
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_isolated_takes_buffers_that_were_made_under_inference_mode() -> None:
    with torch.inference_mode():
        mask = torch.ones(2)
    model = nn.Module()
    model.register_buffer("mask", mask)
    with isolated(model, []), torch.inference_mode():
        model.mask.zero_()
    assert model.mask.tolist() == [1.0, 1.0]
