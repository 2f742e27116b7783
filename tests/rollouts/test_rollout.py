"""rollout: the plain loop, with what each step is given, and refusals before anything runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.ledger import price, saved_bytes
from thalweg.noise import Key
from thalweg.rollouts import Checkpointed, Truncated, rollout
from thalweg.step import Backprop


def halve(x: Tensor, k: int) -> Tensor:
    return x / 2 + k


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
    steps=st.integers(1, 9),
    slots=st.integers(1, 5),
)
@settings(deadline=None, max_examples=40)
def test_the_result_is_that_of_the_plain_loop(
    shape: list[int], dtype: torch.dtype, steps: int, slots: int
) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    expected = x
    for k in range(steps):
        expected = halve(expected, k)
    for gradient in (Backprop(), Checkpointed(slots=slots), Checkpointed(segments=slots), Truncated(last=1)):
        assert torch.equal(rollout(halve, x, steps, gradient=gradient), expected)
    assert torch.equal(rollout(halve, x, steps, trajectory=True)[-1], expected)


def test_steps_are_given_what_was_asked_for_in_order() -> None:
    seen = []

    def step(*given: object) -> Tensor:
        seen.append(given)
        return given[1]  # type: ignore[return-value]

    net = nn.Linear(1, 1)
    x = torch.ones(1)
    rollout(step, x, 2, network=net, inputs=["a", "b"], key=Key(4))
    assert seen == [(net, x, 0, "a", Key(4, 0)), (net, x, 1, "b", Key(4, 1))]


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(slots=2), Truncated(last=2)])
def test_trajectory_begins_with_the_initial_state(gradient: Backprop | Checkpointed | Truncated) -> None:
    states = rollout(halve, torch.ones(2), 5, trajectory=True, gradient=gradient)
    expected = [torch.ones(2)]
    for k in range(5):
        expected.append(halve(expected[-1], k))
    assert len(states) == 6
    assert all(torch.equal(a, b) for a, b in zip(states, expected))


def test_backprop_supports_the_transforms_it_promises() -> None:
    x = torch.randn(5, 3)

    def f(x: Tensor) -> Tensor:
        return rollout(lambda x, k: x.sin() * (1 + k), x, 4).sum()

    def plain(x: Tensor) -> Tensor:
        for k in range(4):
            x = x.sin() * (1 + k)
        return x.sum()

    exact = torch.func.grad(plain)(x)
    torch.testing.assert_close(torch.func.grad(f)(x), exact)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(x), exact)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (x,))[1], (exact * x).sum())
    torch.testing.assert_close(
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
        torch.func.grad(lambda x: torch.func.grad(plain)(x).sum())(x),
    )
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(x), plain(x))


def test_then_moves_the_bytes_of_a_decoder_under_the_policy() -> None:
    decoder = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1))
    net = nn.Linear(4, 4)
    x = torch.randn(64, 4, requires_grad=True)
    store = Checkpointed(slots=3)

    def step(x: Tensor, k: int) -> Tensor:
        return x + net(x).tanh()

    def outside() -> Tensor:
        return decoder(rollout(step, x, 9, gradient=store)).sum()

    def inside() -> Tensor:
        return rollout(step, x, 9, gradient=store, then=lambda x: decoder(x).sum())

    torch.testing.assert_close(torch.autograd.grad(inside(), x), torch.autograd.grad(outside(), x))
    states = 3 * 64 * 4 * 4
    assert saved_bytes(inside) <= states
    assert saved_bytes(outside) > 2 * 64 * 512 * 4
    # nor do the graphs of the last step and the read-out live together
    both = [*net.parameters(), *decoder.parameters()]
    peaks = [price((nn.ModuleList([net, decoder]), f, both))[0].peak_bytes for f in (inside, outside)]
    assert peaks[0] <= peaks[1]


def test_kept_bytes_are_states_for_checkpoints_and_graphs_for_backprop() -> None:
    x = torch.randn(1000, requires_grad=True)
    state = 4000

    def step(x: Tensor, k: int) -> Tensor:
        return x.sin().cos().exp().tanh()

    kept = {s: saved_bytes(lambda s=s: rollout(step, x, 40, gradient=Checkpointed(slots=s))) for s in (2, 9)}
    everything = saved_bytes(lambda: rollout(step, x, 40))
    # of the four tensors a step makes, exp does not save what cos made
    assert everything == 40 * 3 * state
    assert kept[9] - kept[2] == 7 * state


def test_prices_are_told_before_anything_runs() -> None:
    net = nn.Linear(64, 64)
    x = torch.randn(8, 64)

    def closure(gradient: Backprop | Checkpointed) -> Tensor:
        return rollout(lambda x, k: net(x).tanh(), x, 20, gradient=gradient).square().mean()

    prices = [
        price((net, lambda g=g: closure(g), net.parameters()))[0] for g in (Backprop(), Checkpointed(slots=4))
    ]
    assert prices[1].saved_bytes < prices[0].saved_bytes / 3


BAD = [
    ({"step": 3}, ArgumentTypeError, "step"),
    ({"steps": 0}, ArgumentError, "steps"),
    ({"steps": 2.0}, ArgumentTypeError, "steps"),
    ({"state": "x"}, ArgumentTypeError, "state"),
    ({"state": (1, 2)}, ArgumentTypeError, "state"),
    ({"gradient": Backprop}, ArgumentTypeError, "Make one"),
    ({"gradient": "checkpointed"}, ArgumentTypeError, "gradient"),
    ({"then": 3}, ArgumentTypeError, "then"),
    ({"network": 3}, ArgumentTypeError, "network"),
    ({"key": 3}, ArgumentTypeError, "key"),
    ({"inputs": [1]}, ArgumentError, "inputs"),
    ({"inputs": torch.ones(3, 2)}, ArgumentError, "inputs"),
    ({"inputs": "ab"}, ArgumentTypeError, "inputs"),
    ({"inputs": iter([1, 2])}, ArgumentTypeError, "inputs"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_wrong_arguments_are_refused_before_any_step(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    ran = []

    def step(x: Tensor, k: int, *_: object) -> Tensor:
        ran.append(k)
        return x

    given = {"step": step, "state": torch.ones(2), "steps": 2, **change}
    with pytest.raises(error, match=match):
        rollout(**given)  # type: ignore[arg-type]
    assert not ran


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(slots=2)])
def test_a_step_that_returns_something_else_is_refused(gradient: Backprop | Checkpointed) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ArgumentTypeError, match="nested like"):
        rollout(lambda x, k: (x, x), x, 3, gradient=gradient)
    with pytest.raises(ArgumentTypeError, match="a tensor where"):
        rollout(lambda x, k: 1.0, x, 3, gradient=gradient)


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(slots=2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_results_are_caught(gradient: Backprop | Checkpointed, bad: float) -> None:
    with pytest.raises(NonFiniteError):
        rollout(lambda x, k: x * bad, torch.ones(2), 3, gradient=gradient)
