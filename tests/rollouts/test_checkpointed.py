"""Checkpointed: as many calls as the optimum, as many states as slots, and the gradient of plain autograd."""

import gc
import random
import weakref
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.noise import Key, normal
from thalweg.rollouts import Checkpointed, rollout, step_calls
from thalweg.rollouts.checkpointed import calls_by_pieces, first_part, read_bytes

STORES = {
    "slots": Checkpointed(slots=3),
    "one slot": Checkpointed(slots=1),
    "segments": Checkpointed(segments=3),
    "every state": Checkpointed(),
    "stride": Checkpointed(slots=2, stride=3),
    "one long stride": Checkpointed(slots=2, stride=99),
    "on host": Checkpointed(slots=3, on="host"),
    "segments on host": Checkpointed(segments=3, on="host"),
}
stores = pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())


class Counted:
    """A step that counts its calls."""

    def __init__(self) -> None:
        self.weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
        self.calls = 0

    def __call__(self, x: Tensor, k: int) -> Tensor:
        self.calls += 1
        return (x @ self.weight).sin() + 0.1 * k * x


def start() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def calls(steps: int, slots: int) -> int:
    step = Counted()
    rollout(step, start(), steps, gradient=Checkpointed(slots=slots)).sum().backward()
    return step.calls


@lru_cache(None)
def least_calls(steps: int, slots: int) -> int:
    """The optimum by dynamic programming, knowing nothing of binomials."""
    if steps == 1:
        return 1
    if slots == 1:
        return steps * (steps + 1) // 2
    return min(m + least_calls(m, slots) + least_calls(steps - m, slots - 1) for m in range(1, steps))


@lru_cache(None)
def scheduled_calls(steps: int, slots: int) -> int:
    """What the schedule does, walked without running it."""
    total = 0
    while steps > 1:
        part = first_part(steps, slots)
        total += part + scheduled_calls(part, slots)
        steps, slots = steps - part, max(slots - 1, 1)
    return total + 1


def test_formula_and_schedule_are_the_optimum_below_200_steps_and_up_to_12_slots() -> None:
    for steps in range(1, 200):
        for slots in range(1, 13):
            assert step_calls(steps, slots) == least_calls(steps, slots) == scheduled_calls(steps, slots)


@pytest.mark.parametrize("slots", range(1, 13))
def test_step_is_called_exactly_as_often_as_the_optimum(slots: int) -> None:
    for steps in (*range(1, 14), 40, 71) if slots > 1 else range(1, 25):
        assert calls(steps, slots) == step_calls(steps, slots), (steps, slots)


def test_deep_nesting_meets_the_optimum_and_leaves_the_recursion_limit_alone() -> None:
    import sys

    limit = sys.getrecursionlimit()
    assert calls(199, 1) == 199 * 200 // 2
    assert calls(199, 12) == step_calls(199, 12)
    assert sys.getrecursionlimit() == limit


@pytest.mark.slow
@pytest.mark.parametrize("slots", range(1, 13))
def test_every_number_of_steps_below_200_meets_the_optimum(slots: int) -> None:
    for steps in range(1, 200):
        assert calls(steps, slots) == step_calls(steps, slots), (steps, slots)


@pytest.mark.parametrize(("steps", "slots"), [(2, 1), (9, 1), (20, 3), (35, 4), (30, 12), (12, 12)])
def test_never_more_states_than_slots_are_kept(steps: int, slots: int) -> None:
    alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
    most = 0

    class Watch(torch.autograd.Function):
        """Saves the state only, and looks at what lives when the graph of its step is all there is."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x + 1

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(inputs[0])
            storage = output.untyped_storage()
            alive[storage._cdata] = weakref.ref(storage)

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            nonlocal most
            live = {s._cdata for ref in alive.values() if (s := ref()) is not None}
            # the state whose step is being reversed is no checkpoint; neither is the result, which is ours
            live -= {x.untyped_storage()._cdata, result.untyped_storage()._cdata}
            most = max(most, len(live))
            return cotangent * x.detach()

    x = torch.ones(3, requires_grad=True)
    result = rollout(lambda x, k: Watch.apply(x), x, steps, gradient=Checkpointed(slots=slots))
    gc.collect()
    result.sum().backward()
    # the initial state takes one slot and was not made by the process
    assert most == min(slots, steps - 1) - 1


def test_segments_cost_what_checkpoint_sequential_costs() -> None:
    for steps, segments in [(10, 1), (10, 3), (10, 5), (7, 7), (3, 9)]:
        step = Counted()
        rollout(step, start(), steps, gradient=Checkpointed(segments=segments)).sum().backward()
        parts = min(segments, steps)
        last = steps - steps * (parts - 1) // parts
        assert step.calls == 2 * steps - last


@pytest.mark.parametrize("read_out", [False, True])
def test_calls_with_a_stride_are_told_as_they_are_made(read_out: bool) -> None:
    then = Tensor.sum if read_out else None
    for steps, slots, stride in product((1, 6, 10, 17), (1, 2, 3, 17), (1, 2, 3, 5, 17)):
        step = Counted()
        store = Checkpointed(slots=slots, stride=stride)
        rollout(step, start(), steps, gradient=store, then=then).sum().backward()
        assert step.calls == calls_by_pieces(steps, slots, min(stride, steps), read_out)


@stores
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_gradient_and_double_backward_equal_backprop(store: Checkpointed, steps: int) -> None:
    step, x = Counted(), start()

    def both(gradient: Checkpointed | None) -> list[Tensor]:
        y = rollout(step, x, steps, gradient=gradient)
        first = torch.autograd.grad(y.square().sum(), [x, step.weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, step.weight])
        return [y, *first, *second]

    for got, exact in zip(both(store), both(None)):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@stores
def test_read_out_trajectory_and_nested_states_equal_backprop(store: Checkpointed) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def step(state: tuple[Tensor, dict[str, Tensor]], k: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, rest = state
        return (x @ weight).tanh(), {"sum": rest["sum"] + x * k, "count": rest["count"] + 1}

    def found(gradient: Checkpointed | None, trajectory: bool) -> list[Tensor]:
        x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)

        def then(states: object) -> Tensor:
            every = states if trajectory else (states,)
            return sum((s[0].square().sum() + s[1]["sum"].sin().sum()) for s in every)  # type: ignore[attr-defined]

        state = (x, {"sum": torch.zeros_like(x), "count": torch.tensor(0)})
        y = rollout(step, state, 9, gradient=gradient, then=then, trajectory=trajectory)
        return [y, *torch.autograd.grad(y, [x, weight])]

    for trajectory in (False, True):
        for got, exact in zip(found(store, trajectory), found(None, trajectory)):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@stores
def test_dropout_is_replayed_and_the_generator_stands_where_plain_autograd_leaves_it(
    store: Checkpointed,
) -> None:
    layer = nn.Linear(4, 4)

    def found(gradient: Checkpointed | None) -> list[Tensor]:
        torch.manual_seed(3)
        x = torch.ones(8, 4, requires_grad=True)
        y = rollout(lambda x, k: nn.functional.dropout(layer(x), 0.5), x, 9, gradient=gradient)
        return [*torch.autograd.grad(y.square().sum(), [x, layer.weight]), torch.rand(3)]

    for got, exact in zip(found(store), found(None)):
        torch.testing.assert_close(got, exact)


@stores
def test_keyed_noise_is_drawn_again(store: Checkpointed) -> None:
    weight = torch.randn(4, 4, requires_grad=True)

    def step(x: Tensor, k: int, key: Key) -> Tensor:
        return x @ weight * 0.4 + normal(x, key) * x

    def found(gradient: Checkpointed | None) -> list[Tensor]:
        x = torch.ones(2, 4, requires_grad=True)
        y = rollout(step, x, 9, gradient=gradient, key=Key(5))
        return [y, *torch.autograd.grad(y.sum(), [x, weight])]

    for got, exact in zip(found(store), found(None)):
        torch.testing.assert_close(got, exact)


@stores
def test_autocast_is_replayed(store: Checkpointed) -> None:
    layer = nn.Linear(16, 16)
    x = torch.randn(4, 16, requires_grad=True)

    def found(gradient: Checkpointed | None) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = rollout(lambda x, k: layer(x).float().tanh(), x, 7, gradient=gradient)
        return [y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])]

    for got, exact in zip(found(store), found(None)):
        torch.testing.assert_close(got, exact)


@stores
def test_compiled_networks(store: Checkpointed) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(4, 8, requires_grad=True)

    def found(network: nn.Module, gradient: Checkpointed | None) -> list[Tensor]:
        net.eval()
        y = rollout(lambda x, k: x + 0.1 * network(x), x, 7, gradient=gradient)
        return [y, *torch.autograd.grad(y.square().sum(), [x, net[0].weight])]

    for got, exact in zip(found(compiled, store), found(net, None)):
        torch.testing.assert_close(got, exact)


@stores
def test_tied_weights_conditions_and_parameters_in_closures_and_partials(store: Checkpointed) -> None:
    from functools import partial

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    raw = torch.randn(4, requires_grad=True)
    inputs = torch.randn(9, 4, requires_grad=True)
    condition = raw.sin()

    def step(x: Tensor, k: int, given: Tensor, scale: Tensor) -> Tensor:
        return second(first(x).tanh()) + condition * scale + given

    scale = torch.tensor(0.3, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    wanted = [x, raw, inputs, scale, *first.parameters(), second.bias]

    def found(gradient: Checkpointed | None) -> list[Tensor]:
        y = rollout(partial(step, scale=scale), x, 9, gradient=gradient, inputs=inputs)
        return list(torch.autograd.grad(y.square().sum(), wanted, retain_graph=True))

    for got, exact in zip(found(store), found(None)):
        torch.testing.assert_close(got, exact)


@stores
def test_hooks_fire_and_gradients_accumulate(store: Checkpointed) -> None:
    step = Counted()
    fired: list[Tensor] = []
    step.weight.register_hook(fired.append)
    x = start()
    for _ in range(2):
        rollout(step, x, 5, gradient=store).sum().backward()
    once = Counted()
    once.weight = step.weight.detach().requires_grad_()
    rollout(once, x.detach(), 5).sum().backward()
    torch.testing.assert_close(step.weight.grad, 2 * once.weight.grad)
    assert fired


@stores
def test_batch_normalisation_updates_its_statistics_once(store: Checkpointed) -> None:
    def found(gradient: Checkpointed | None) -> list[Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        x = torch.randn(16, 4, requires_grad=True)
        y = rollout(lambda x, k: x + net(x), x, 6, gradient=gradient)
        gradients = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
        return [*gradients, *net.buffers()]

    for got, exact in zip(found(store), found(None)):
        torch.testing.assert_close(got, exact)


@stores
def test_other_buffers_that_change_are_refused_by_name(store: Checkpointed) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * self.seen

    net = Counter()
    with pytest.raises(UnsupportedError, match="Counter changes its buffer 'seen'"):
        rollout(lambda x, k: net(x), torch.ones(2, requires_grad=True), 6, gradient=store)
    spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="weight_u"):
        rollout(lambda x, k: spectral(x), torch.ones(2, 4, requires_grad=True), 6, gradient=store)


@stores
@pytest.mark.parametrize("source", ["generator", "python", "numpy"])
def test_random_numbers_that_are_not_replayed_are_refused(store: Checkpointed, source: str) -> None:
    generator = torch.Generator()

    def step(x: Tensor, k: int) -> Tensor:
        if source == "generator":
            return x * torch.randn(2, generator=generator)
        return x * (random.random() if source == "python" else np.random.rand())  # noqa: NPY002 - this is what is refused

    with pytest.raises(UnsupportedError, match="key="):
        rollout(step, torch.ones(2, requires_grad=True), 6, gradient=store)


@stores
def test_a_step_that_raises_raises_and_leaves_nothing_behind(store: Checkpointed) -> None:
    step, x = Counted(), start()

    def failing(x: Tensor, k: int) -> Tensor:
        if k == 4:
            raise KeyError("four")
        return step(x, k)

    with pytest.raises(KeyError, match="four"):
        rollout(failing, x, 9, gradient=store)
    y = rollout(step, x, 9, gradient=store)
    exact = rollout(step, x, 9)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(exact.sum(), x))


def test_a_step_that_raises_only_when_it_is_repeated_raises_in_the_backward() -> None:
    step = Counted()

    def once(x: Tensor, k: int) -> Tensor:
        if step.calls >= 5:
            raise KeyError("again")
        return step(x, k)

    y = rollout(once, start(), 5, gradient=Checkpointed(slots=2))
    with pytest.raises(KeyError, match="again"):
        y.sum().backward()


def test_no_graph_is_made_without_gradients() -> None:
    step = Counted()
    with torch.no_grad():
        y = rollout(step, start(), 5, gradient=Checkpointed(slots=2))
    assert step.calls == 5
    assert not y.requires_grad


def test_functional_gradients_are_refused_and_not_wrong() -> None:
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: rollout(lambda x, k: x.sin(), x, 5, gradient=Checkpointed(slots=2)).sum())(
            torch.ones(3)
        )


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"slots": 0}, ArgumentError),
        ({"slots": True}, ArgumentTypeError),
        ({"slots": 2.0}, ArgumentTypeError),
        ({"segments": -1}, ArgumentError),
        ({"slots": 2, "segments": 2}, ArgumentError),
        ({"budget": "10 apples"}, ArgumentError),
        ({"budget": 0}, ArgumentError),
        ({"budget": "nan GB"}, ArgumentError),
        ({"budget": 1.5}, ArgumentTypeError),
        ({"on": "disk"}, ArgumentError),
        ({"stride": 0}, ArgumentError),
        ({"stride": 2, "budget": 10}, ArgumentError),
        ({"stride": 2, "segments": 2}, ArgumentError),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        Checkpointed(**fields)  # type: ignore[arg-type]


@given(number=st.integers(1, 10**6), unit=st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
@settings(deadline=None, max_examples=30)
def test_sizes_read_as_written(number: int, unit: str) -> None:
    scale = {"B": 1, "k": 1000, "K": 1024, "M": 1024**2 if "i" in unit else 1000**2}
    expected = number * scale.get(unit[0], 1024**3 if "i" in unit else 1000**3)
    assert read_bytes(f"{number}{unit}") == read_bytes(f"{number} {unit}") == expected
