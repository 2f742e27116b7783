"""Whole programs of users, every policy beside a plain loop under plain autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thalweg.errors import ArgumentTypeError, UnsupportedError
from thalweg.noise import Key, normal
from thalweg.rollouts import Checkpointed, Discrete, Reversible, Truncated, integrate, rollout
from thalweg.step import Backprop

STORES = {
    "budget": Checkpointed(budget="30kB"),
    "slots": Checkpointed(slots=4),
    "stride": Checkpointed(slots=3, stride=4),
    "segments": Checkpointed(segments=5),
    "everything": Backprop(),
}
stores = pytest.mark.parametrize("gradient", STORES.values(), ids=STORES.keys())


def plain(step: Any, state: Any, steps: int, then: Any = None) -> Any:
    for k in range(steps):
        state = step(state, k)
    return state if then is None else then(state)


def gradients(loss: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("steps", [60, pytest.param(500, marks=pytest.mark.slow)])
@stores
def test_a_recurrent_network_over_500_steps(gradient: Any, steps: int) -> None:
    cell = nn.GRUCell(6, 12).double()
    readout = nn.Linear(12, 1).double()
    data = torch.randn(steps, 3, 6, dtype=torch.float64)
    start = torch.zeros(3, 12, dtype=torch.float64, requires_grad=True)
    wanted = [start, *cell.parameters(), *readout.parameters()]
    found = rollout(
        lambda h, k, x: cell(x, h),
        start,
        steps,
        inputs=data,
        gradient=gradient,
        then=lambda h: readout(h).square().sum(),
    )
    exact = plain(lambda h, k: cell(data[k], h), start, steps, lambda h: readout(h).square().sum())
    torch.testing.assert_close(gradients(found, wanted), gradients(exact, wanted), rtol=1e-10, atol=1e-12)


@stores
def test_a_training_loop_with_adam_takes_the_same_path(gradient: Any) -> None:
    def train(run: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4)).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        x = torch.randn(8, 4, dtype=torch.float64)
        for _ in range(6):
            optimizer.zero_grad()
            run(lambda s, k: s + 0.1 * net(s), x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    found = train(lambda step, x: rollout(step, x, 10, gradient=gradient))
    torch.testing.assert_close(found, train(lambda step, x: plain(step, x, 10)), rtol=1e-9, atol=1e-12)


@stores
def test_operations_in_place_on_what_the_step_makes(gradient: Any) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, k: int) -> Tensor:
        y = x @ weight
        y.mul_(0.5).add_(x)
        y[:, k % 4] = y[:, k % 4].clone().sin()
        return y

    found = rollout(step, x, 12, gradient=gradient).square().sum()
    exact = plain(step, x, 12).square().sum()
    torch.testing.assert_close(gradients(found, [x, weight]), gradients(exact, [x, weight]))


@stores
def test_a_dictionary_with_a_counter_and_metrics_in_the_state(gradient: Any) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def step(state: dict[str, Any], k: int) -> dict[str, Any]:
        x, speed = state["pair"]
        speed = 0.9 * speed + (x @ weight).tanh()
        x = x + 0.1 * speed
        return {"pair": (x, speed), "steps": state["steps"] + 1, "sizes": state["sizes"] + x.norm()}

    start = {
        "pair": (x, torch.zeros_like(x)),
        "steps": torch.tensor(0),
        "sizes": torch.zeros((), dtype=torch.float64),
    }

    def loss(state: dict[str, Any]) -> Tensor:
        return state["pair"][0].square().sum() + state["sizes"]

    found, exact = rollout(step, start, 9, gradient=gradient), plain(step, start, 9)
    assert int(found["steps"]) == 9
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(gradients(loss(found), [x, weight]), gradients(loss(exact), [x, weight]))


@stores
def test_metrics_beside_the_state_are_refused_and_a_list_outside_gathers_them(gradient: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ArgumentTypeError, match="step"):
        rollout(lambda x, k: (x.sin(), {"norm": x.norm()}), x, 9, gradient=gradient)


@stores
def test_random_numbers_from_torch_are_drawn_again(gradient: Any) -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, k: int) -> Tensor:
        return x * (1 + 0.3 * torch.rand(5, dtype=torch.float64)) + 0.1 * torch.randn_like(x) * x.sin()

    torch.manual_seed(3)
    (exact,) = gradients(plain(step, x, 20).sin().sum(), [x])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    (found,) = gradients(rollout(step, x, 20, gradient=gradient).sin().sum(), [x])
    torch.testing.assert_close(found, exact)
    assert torch.equal(torch.get_rng_state(), after)


@stores
def test_bfloat16_autocast(gradient: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    wanted = [x, *net.parameters()]

    def step(x: Tensor, k: int) -> Tensor:
        return x + 0.1 * net(x)

    with torch.autocast("cpu", torch.bfloat16):
        found = rollout(step, x, 11, gradient=gradient)
        exact = plain(step, x, 11)
    assert torch.equal(found, exact)
    # autocast keeps one low-precision copy of each weight, so that plain autograd sums in another order
    for a, b in zip(gradients(found.square().sum(), wanted), gradients(exact.square().sum(), wanted)):
        assert float((a - b).norm()) < 0.02 * float(b.norm())


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
def test_a_second_derivative_through_a_truncation(store: Any) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)

    def step(x: Tensor, k: int) -> Tensor:
        return x + 0.1 * (x @ weight).tanh()

    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = plain(step, x, 4)
        return plain(step, x, 5)

    found = rollout(step, x, 9, gradient=Truncated(last=5, store=store))
    results = []
    for loss in (found.square().sum(), cut(x).square().sum()):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), weight)])
    torch.testing.assert_close(*results)


@stores
def test_a_gradient_penalty_on_the_initial_state(gradient: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def penalty(run: Any) -> tuple[Tensor, ...]:
        value = run(lambda s, k: s + 0.2 * net(s)).square().sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return gradients(value + (slope.norm(dim=1) - 1).square().mean(), [x, *net.parameters()])

    found = penalty(lambda step: rollout(step, x, 7, gradient=gradient))
    torch.testing.assert_close(found, penalty(lambda step: plain(step, x, 7)))


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(slots=2)], ids=["everything", "slots"])
def test_inside_a_compiled_function(gradient: Any) -> None:
    net = nn.Linear(3, 3).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        y: Tensor = rollout(lambda s, k: s + 0.2 * net(s).tanh(), x, 5, gradient=gradient)
        return y.square().sum()

    wanted = [x, *net.parameters()]
    found = gradients(torch.compile(loss, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(found, gradients(loss(x), wanted))


@stores
def test_keyed_noise_and_conditions_that_were_computed_before(gradient: Any) -> None:
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, k: int, row: Tensor, key: Key) -> Tensor:
        return (x * row).sin() + 0.1 * x * normal(x, key)

    found = rollout(step, x, 6, inputs=table.cos(), key=Key(5), gradient=gradient).sum()
    conditions = table.cos()
    exact = plain(lambda x, k: step(x, k, conditions[k], Key(5).at(step=k)), x, 6).sum()
    torch.testing.assert_close(gradients(found, [x, table]), gradients(exact, [x, table]))


@stores
def test_a_loss_on_every_state_of_the_trajectory(gradient: Any) -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, k: int) -> Tensor:
        return (x @ weight).sin()

    states = rollout(step, x, 8, gradient=gradient, trajectory=True)
    found = sum((i + 1) * s.square().sum() for i, s in enumerate(states))
    state, exact = x, x.square().sum()
    for k in range(8):
        state = step(state, k)
        exact = exact + (k + 2) * state.square().sum()
    torch.testing.assert_close(gradients(found, [x, weight]), gradients(exact, [x, weight]))


@stores
def test_a_wrapper_that_gathers_gradients_over_processes(gradient: Any, single_process: None) -> None:
    """Under DDP a network that is called many times in one forward is right or refused, never wrong."""
    net = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    exact = gradients(plain(lambda s, k: s + net(s).tanh(), x, 4).sum(), list(net.parameters()))
    wrapped = DistributedDataParallel(net)
    try:
        rollout(lambda s, k: s + wrapped(s).tanh(), x, 4, gradient=gradient).sum().backward()
    except (UnsupportedError, RuntimeError):
        return
    torch.testing.assert_close(tuple(p.grad for p in net.parameters()), exact)


@pytest.mark.parametrize(
    ("method", "gradient"), [("rk4", Discrete()), ("reversible_heun", Reversible())], ids=["rk4", "heun"]
)
def test_the_same_wrapper_is_refused_by_sweeps(method: str, gradient: Any, single_process: None) -> None:
    wrapped = DistributedDataParallel(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        integrate(
            lambda x, t: wrapped(x),
            torch.randn(2, 3),
            torch.linspace(0, 1, 5),
            method=method,
            gradient=gradient,
        )


@pytest.fixture
def single_process(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
