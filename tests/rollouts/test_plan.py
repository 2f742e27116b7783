"""A budget is met, as counted under fake tensors and on real ones; or refused before anything runs."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from thalweg.errors import ArgumentError, UnsupportedError
from thalweg.ledger import cost, price
from thalweg.rollouts import Checkpointed, Route, Truncated, plan, rollout
from thalweg.step import Backprop

STEPS = 8


def small(steps: int = 16) -> tuple[nn.Module, object, Tensor, int]:
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    return net, lambda x, k: x + 0.1 * net(x), torch.randn(16, 32, requires_grad=True), steps


def counted(net: nn.Module, closure: object) -> int:
    return price((net, closure, list(net.parameters())))[0].peak_bytes


def test_small_budgets_are_met_on_real_tensors_too() -> None:
    net, step, x, steps = small()
    least = plan(step, x, steps, gradient=Checkpointed(budget=10**9)).peak_bytes
    everything = counted(net, lambda: rollout(step, x, steps).sum())
    previous = 0
    for budget in torch.linspace(60_000, everything * 1.1, 6).long().tolist():
        found = plan(step, x, steps, gradient=Checkpointed(budget=budget))
        assert found.peak_bytes <= budget

        def closure(found=found) -> Tensor:  # type: ignore[no-untyped-def]
            return rollout(step, x, steps, gradient=found.store).sum()

        real = cost((net, closure, list(net.parameters())), repeats=0)
        # `sum` and its cotangent are the test's own
        assert real.peak_bytes <= budget + 64
        # a larger budget never leads to more calls
        assert previous == 0 or found.step_calls <= previous
        previous = found.step_calls
    assert found.store == Backprop()
    assert found.peak_bytes == least


def test_calls_are_told_as_they_are_made() -> None:
    net, _, x, steps = small()
    made = [0]

    def step(x: Tensor, k: int) -> Tensor:
        made[0] += 1
        return x + 0.1 * net(x)

    for then in (None, lambda x: x.square().sum()):
        for gradient in (Checkpointed(budget="80kB"), Truncated(last=9, store=Checkpointed(budget="80kB"))):
            found = plan(step, x, steps, gradient=gradient, then=then)
            made[0] = 0
            rollout(step, x, steps, gradient=gradient, then=then).sum().backward()
            assert made[0] == found.step_calls


def test_nothing_fits_is_said_before_anything_runs_and_what_would_fit_does() -> None:
    net, _, x, steps = small()
    ran = []

    def step(x: Tensor, k: int) -> Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            ran.append(k)
        return x + 0.1 * net(x)

    with pytest.raises(ArgumentError, match="What would fit") as caught:
        rollout(step, x, steps, gradient=Checkpointed(budget="4kB"))
    assert not ran
    assert x.grad is None
    fits = int(re.search(r"budget=(\d+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert plan(step, x, steps, gradient=Checkpointed(budget=fits)).peak_bytes <= fits
    with pytest.raises(ArgumentError):
        plan(step, x, steps, gradient=Checkpointed(budget=fits - 1))


def test_planning_leaves_no_trace_and_leaves_the_callers_graph_alone() -> None:
    net, _, x, steps = small(9)
    norm = nn.BatchNorm1d(32)
    raw = torch.randn(32, requires_grad=True)
    condition = raw.exp()

    def step(x: Tensor, k: int) -> Tensor:
        return nn.functional.dropout(norm(x + 0.1 * net(x) * condition), 0.1)

    before = [b.clone() for b in norm.buffers()]
    net[0].weight.grad = marked = torch.ones(64, 32)
    state = torch.get_rng_state()
    plan(step, x, steps, gradient=Checkpointed(budget="90kB"))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers()))
    assert net[0].weight.grad is marked
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    # the graph above the condition was neither run nor freed
    assert raw.grad is None
    y = rollout(step, x, steps, gradient=Checkpointed(budget="90kB"))
    y.square().sum().backward()
    assert raw.grad is not None


def test_a_budget_gives_the_exact_gradient() -> None:
    net, step, x, steps = small()

    def found(gradient: Route | Checkpointed | None) -> tuple[Tensor, ...]:
        y = rollout(step, x, steps, gradient=gradient, then=lambda x: x.square().sum())
        return torch.autograd.grad(y, [x, *net.parameters()])

    torch.testing.assert_close(found(Checkpointed(budget="70kB")), found(None))


def test_a_counter_around_the_rollout_does_not_see_the_planning() -> None:
    net, step, x, steps = small()

    def closure(gradient: Checkpointed | Backprop) -> Tensor:
        return rollout(step, x, steps, gradient=gradient, then=lambda x: x.square().sum())

    def operations(gradient: Checkpointed | Backprop) -> int:
        with FlopCounterMode(display=False) as counter:
            closure(gradient).backward()
        return counter.get_total_flops()

    gradient = Checkpointed(budget=70_001)
    model = (net, lambda: closure(gradient), [x, *net.parameters()])
    first = cost(model, repeats=0)  # plans inside the count
    assert first.peak_bytes <= 70_001
    again = cost(model, repeats=0)  # remembers the plan
    assert (first.peak_bytes, first.operations) == (again.peak_bytes, again.operations)
    assert first.operations > cost((net, lambda: closure(Backprop()), model[2]), repeats=0).operations
    # a new step, so that nothing is remembered
    net, step, x, steps = small()
    assert operations(gradient) == operations(gradient) == first.operations


def test_a_model_that_is_only_priced_gets_the_plan_of_the_real_one() -> None:
    def build() -> tuple[nn.Module, object, list[Tensor]]:
        net, step, x, steps = small()
        gradient = Checkpointed(budget=70_002)

        def closure() -> Tensor:
            return rollout(step, x, steps, gradient=gradient, then=lambda x: x.square().sum())

        return net, closure, [x, *net.parameters()]

    fake = price(build)[0]
    real = price(build())[0]
    assert fake.peak_bytes <= 70_002
    assert (fake.saved_bytes, fake.peak_bytes) == (real.saved_bytes, real.peak_bytes)
    assert fake.operations == real.operations


def test_plans_are_remembered_until_shapes_change() -> None:
    net, _, x, steps = small()
    ran = [0]

    def step(x: Tensor, k: int) -> Tensor:
        ran[0] += 1
        return x + 0.1 * net(x)

    def again(x: Tensor) -> int:
        ran[0] = 0
        plan(lambda x, k: step(x, k), x, steps, gradient=Checkpointed(budget="90kB"))
        return ran[0]

    assert again(x) > 0
    assert again(x) == 0
    assert again(torch.randn(8, 32, requires_grad=True)) > 0


def test_without_gradients_nothing_is_planned() -> None:
    _, step, x, steps = small()
    with torch.no_grad():
        rollout(step, x, steps, gradient=Checkpointed(budget=1))


def test_a_step_that_reads_values_is_refused_by_name() -> None:
    def step(x: Tensor, k: int) -> Tensor:
        return x * x.detach().sum().item()

    with pytest.raises(UnsupportedError, match="item"):
        rollout(step, torch.ones(3, requires_grad=True), 5, gradient=Checkpointed(budget="1MB"))


def test_plan_wants_a_budget() -> None:
    with pytest.raises(ArgumentError, match="budget"):
        plan(lambda x, k: x, torch.ones(3), 5, gradient=Checkpointed(slots=2))


@pytest.fixture(scope="module")
def sampler() -> tuple[nn.Module, object, Tensor, int]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    text = torch.randn(2, 7, 16)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps.tolist()

    def step(x: Tensor, k: int) -> Tensor:
        return scheduler.step(unet(x, times[k], text).sample, times[k], x).prev_sample

    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    return unet, step, x, counted(unet, lambda: rollout(step, x, STEPS).sum())


@pytest.mark.parametrize("share", [0.15, 0.25, 0.4, 0.7, 1.0])
def test_five_budgets_on_a_diffusion_sampler(
    share: float, sampler: tuple[nn.Module, object, Tensor, int]
) -> None:
    unet, step, x, everything = sampler
    budget = int(share * everything)
    gradient = Checkpointed(budget=budget)
    found = plan(step, x, STEPS, gradient=gradient)
    assert found.peak_bytes <= budget
    model = (unet, lambda: rollout(step, x, STEPS, gradient=gradient).sum(), [x, *unet.parameters()])
    assert cost(model, repeats=0).peak_bytes <= budget
    # what is left of the budget is too little for one more step's graph, or for one more state
    assert found.step_calls < 2 * STEPS or found.peak_bytes > 0.9 * budget
