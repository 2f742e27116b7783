"""The contract of `backward`: whatever the rule, `.grad` is filled as `loss.backward()` would fill it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thalweg.blackbox import SPSA, EvolutionStrategies, ForwardGradient
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.losses import losses_per_example, mean_loss
from thalweg.noise import Key, rademacher
from thalweg.parameters import vector
from thalweg.step import Backprop, Estimate, Learner, Phase, Rule, Step, backward, draw_key


@dataclass(frozen=True, slots=True)
class Differences:
    """The smallest honest rule: central differences along each coordinate; exact for a quadratic."""

    width: float = 0.5

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        found = []
        with torch.no_grad():
            loss = closure().mean()
            for p in parameters:
                gradient = torch.zeros_like(p)
                for index in range(p.numel()):
                    ends = []
                    for sign in (1, -1):
                        p.view(-1)[index] += sign * self.width
                        ends.append(closure().mean())
                        p.view(-1)[index] -= sign * self.width
                    gradient.view(-1)[index] = (ends[0] - ends[1]) / (2 * self.width)
                found.append(gradient)
        return Estimate(loss, tuple(found), 1 + 2 * sum(p.numel() for p in parameters))


@dataclass(frozen=True, slots=True)
class Noisy:
    """The exact gradient times a keyed sign: what a random rule looks like to `backward`."""

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        exact = Backprop().estimate(closure, parameters, key)
        gradients = tuple(g * (2 + rademacher(g, key.at(call=i))) for i, g in enumerate(exact.gradients))
        return Estimate(exact.loss, gradients, 1)


@dataclass(frozen=True, slots=True)
class Returns:
    """A rule that returns what it was made with, to see what `backward` does with it."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        return Estimate(self.loss, self.gradients, 1)


RULES = {"backprop": Backprop(), "differences": Differences()}
each = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Callable[[], Tensor]]:
    """Linear regression: a quadratic, so that differences are exact."""
    model = nn.Linear(3, 2).to(dtype)
    x, y = torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def exact(closure: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(closure(), list(model.parameters())))


# what it fills


@each
def test_grad_and_loss_are_those_of_loss_backward(rule: Rule) -> None:
    model, closure = problem()
    expected = exact(closure, model)
    loss = backward(closure, model.parameters(), gradient=rule)
    torch.testing.assert_close(loss, closure().detach())
    assert loss.shape == ()
    assert not loss.requires_grad
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_backprop_is_the_default_and_agrees_with_its_own_estimate() -> None:
    model, closure = problem()
    backward(closure, model.parameters())
    estimate = Backprop().estimate(closure, list(model.parameters()), Key(0))
    assert estimate.evaluations == 1
    for p, gradient in zip(model.parameters(), estimate.gradients, strict=True):
        assert torch.equal(p.grad, gradient)


@each
def test_two_calls_accumulate_to_the_sum(rule: Rule) -> None:
    model, closure = problem()
    expected = exact(closure, model)
    for _ in range(2):
        backward(lambda: closure() * 1.5, model.parameters(), gradient=rule)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 3 * gradient)


@each
def test_hooks_fire_once_per_call_and_may_change_the_gradient(rule: Rule) -> None:
    model, closure = problem()
    expected = exact(closure, model)
    log: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: (log.append(f"{name} seen"), 2 * g)[1])
        p.register_post_accumulate_grad_hook(lambda p, name=name: log.append(f"{name} accumulated"))
    backward(closure, model.parameters(), gradient=rule)
    assert sorted(log) == ["bias accumulated", "bias seen", "weight accumulated", "weight seen"]
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


@each
def test_only_the_parameters_named_get_a_gradient(rule: Rule) -> None:
    model, closure = problem()
    backward(closure, [model.bias], gradient=rule)
    assert model.weight.grad is None
    assert model.bias.grad is not None


@each
def test_a_tied_weight_that_comes_twice_counts_once(rule: Rule) -> None:
    model, closure = problem()
    expected = exact(closure, model)
    backward(closure, [model.weight, model.bias, model.weight], gradient=rule)
    torch.testing.assert_close(model.weight.grad, expected[0])


@each
def test_losses_per_example_and_named_losses(rule: Rule) -> None:
    model, _ = problem()
    x = torch.randn(6, 3, dtype=torch.float64)

    def per_example() -> Tensor:
        return (model(x) ** 2).sum(1)

    expected = exact(lambda: per_example().mean(), model)
    backward(per_example, model.parameters(), gradient=rule)
    torch.testing.assert_close(model.weight.grad, expected[0])
    model.zero_grad()
    loss = backward(lambda: {"a": per_example(), "b": per_example().mean()}, model.parameters())
    torch.testing.assert_close(loss, 2 * per_example().mean().detach())
    torch.testing.assert_close(model.weight.grad, 2 * expected[0])


def test_a_parameter_without_a_part_in_the_loss_keeps_none() -> None:
    model, closure = problem()
    idle = nn.Parameter(torch.zeros(2))
    for rule in (Backprop(), Returns(torch.zeros(()), (torch.ones(2, 3), None, None))):
        backward(closure, [model.weight, model.bias, idle], gradient=rule)
        assert idle.grad is None


@each
def test_works_under_no_grad_around_it(rule: Rule) -> None:
    model, closure = problem()
    expected = exact(closure, model)
    with torch.no_grad():
        backward(closure, model.parameters(), gradient=rule)
    torch.testing.assert_close(model.weight.grad, expected[0])


def test_the_gradient_a_rule_returns_stays_the_rules() -> None:
    model, closure = problem()
    mine = torch.ones_like(model.weight)
    for _ in range(2):
        backward(closure, [model.weight], gradient=Returns(torch.zeros(()), (mine,)))
    assert bool((mine == 1).all())
    assert bool((model.weight.grad == 2).all())


# keys


def test_the_key_decides_the_draw_and_manual_seed_decides_the_key() -> None:
    model, closure = problem()

    def draws(*, key: Key | None, seed: int) -> Tensor:
        model.zero_grad()
        torch.manual_seed(seed)
        backward(closure, model.parameters(), gradient=Noisy(), key=key)
        return vector(p.grad for p in model.parameters())

    assert torch.equal(draws(key=Key(1), seed=0), draws(key=Key(1), seed=5))
    assert torch.equal(draws(key=None, seed=0), draws(key=None, seed=0))
    assert len({tuple(draws(key=None, seed=seed).tolist()) for seed in range(8)}) > 1
    assert draw_key() != draw_key()


@each
def test_inference_mode_is_refused_and_no_grad_is_not(rule: Rule) -> None:
    model, closure = problem()
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="inference mode"):
        backward(closure, model.parameters(), gradient=rule)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        backward(closure, model.parameters(), gradient=rule)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rule", [Backprop(), SPSA(), ForwardGradient(), EvolutionStrategies()], ids=repr)
def test_parameters_without_data_get_gradients_without_data(rule: Rule) -> None:
    model = nn.Linear(3, 1, device="meta")
    x = torch.empty(5, 3, device="meta")
    backward(lambda: model(x).square().mean(), model.parameters(), gradient=rule)
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.is_meta
        assert p.grad.shape == p.shape


def test_a_sparse_embedding_accumulates_sparse_gradients() -> None:
    table = nn.Embedding(20, 4, sparse=True)
    dense = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    x = torch.randint(20, (8,))
    for _ in range(2):
        backward(lambda: table(x).square().mean(), table.parameters())
        backward(lambda: dense(x).square().mean(), dense.parameters())
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense.weight.grad)


# in the loops people have


@each
def test_scaled_loss_then_unscale_and_step(rule: Rule) -> None:
    def train(scaler: torch.amp.GradScaler | None) -> Tensor:
        torch.manual_seed(0)
        model, closure = problem(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            if scaler is None:
                backward(closure, model.parameters(), gradient=rule)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            else:
                backward(closure, model.parameters(), gradient=rule, scaler=scaler)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
        return vector(p.detach() for p in model.parameters())

    scaled = train(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    torch.testing.assert_close(scaled, train(None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [Backprop(), Noisy(), SPSA(), ForwardGradient(), EvolutionStrategies()], ids=repr
)
def test_a_scaler_sees_an_overflow_skips_the_step_and_goes_on_at_a_lower_scale(rule: Rule) -> None:
    model, closure = problem(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    # finite, and infinite in float32 once the loss is multiplied in
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    with torch.no_grad():
        model.weight.mul_(10)
    before = vector(p.detach() for p in model.parameters())
    state = torch.get_rng_state()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = backward(closure, model.parameters(), gradient=rule, key=Key(0), scaler=scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return loss

    assert math.isnan(float(step()))
    assert torch.equal(vector(p.detach() for p in model.parameters()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert scaler.get_scale() == 2.0**27
    assert math.isfinite(float(step()))
    after = vector(p.detach() for p in model.parameters())
    assert bool(after.isfinite().all())
    assert not torch.equal(after, before)


@pytest.mark.parametrize("rule", [Backprop(), Noisy()], ids=repr)
@pytest.mark.parametrize("form", ["mean", "examples", "named"])
def test_a_scaler_scales_the_gradient_and_leaves_the_loss(rule: Rule, form: str) -> None:
    model = nn.Linear(3, 1).double()
    x = torch.randn(6, 3, dtype=torch.float64)

    def closure() -> object:
        losses = model(x).square()[:, 0]
        forms = {"mean": losses.mean(), "examples": losses, "named": {"a": losses, "b": {"c": 2 * losses}}}
        return forms[form]

    parameters = list(model.parameters())
    expected = backward(closure, parameters, gradient=rule, key=Key(0))
    gradients = vector(p.grad for p in parameters)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found = backward(closure, parameters, gradient=rule, key=Key(0), scaler=scaler)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vector(p.grad for p in parameters), 64 * gradients)
    assert not found.requires_grad


@each
def test_what_the_closure_refuses_itself_no_scaler_swallows(rule: Rule) -> None:
    model, _ = problem()

    def closure() -> Tensor:
        raise NonFiniteError("the state at step 3")

    with pytest.raises(NonFiniteError, match="step 3"):
        backward(closure, model.parameters(), gradient=rule, scaler=torch.amp.GradScaler("cpu"))
    assert all(p.grad is None for p in model.parameters())


@each
def test_a_disabled_scaler_lets_no_overflow_pass(rule: Rule) -> None:
    model, closure = problem()
    off = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(NonFiniteError):
        backward(lambda: closure() * math.inf, model.parameters(), gradient=rule, scaler=off)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_scaler_is_refused() -> None:
    model, closure = problem()
    with pytest.raises(ArgumentTypeError, match="scaler"):
        backward(closure, model.parameters(), scaler=1024.0)


@each
def test_lbfgs_with_a_fixed_key_converges_on_a_quadratic(rule: Rule) -> None:
    model, closure = problem()
    # its own tolerances out of the way: how far it gets is then up to the gradients
    options = {"max_iter": 60, "tolerance_grad": 1e-10, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        return backward(closure, model.parameters(), gradient=rule, key=Key(0))

    optimizer.step(step)
    largest = max(float(g.abs().max()) for g in exact(closure, model))
    assert largest < 1e-6


@each
def test_gradient_accumulation_over_micro_batches(rule: Rule) -> None:
    model, _ = problem()
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = exact(lambda: (model(x) ** 2).mean(), model)
    for part in x.chunk(4):
        backward(lambda part=part: (model(part) ** 2).mean() / 4, model.parameters(), gradient=rule)
    torch.testing.assert_close(model.weight.grad, expected[0])


def test_autocast_in_bfloat16() -> None:
    model, _ = problem(torch.float32)
    x = torch.randn(6, 3)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        return out.float().square().mean()

    closure().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    backward(closure, model.parameters())
    assert torch.equal(model.weight.grad, expected)
    loss = backward(lambda: closure().bfloat16(), model.parameters(), gradient=Noisy(), key=Key(0))
    assert loss.dtype == torch.bfloat16
    assert model.weight.grad.dtype == torch.float32


def test_the_closure_may_itself_call_checkpoint_and_compiled_code() -> None:
    from torch.utils.checkpoint import checkpoint

    model, _ = problem()
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = exact(lambda: model(x).sin().mean(), model)
    backward(lambda: checkpoint(lambda y: model(y).sin(), x, use_reentrant=False).mean(), model.parameters())
    torch.testing.assert_close(model.weight.grad, expected[0])
    compiled = torch.compile(lambda y: model(y).sin().mean(), fullgraph=True, backend="aot_eager")
    model.zero_grad()
    backward(lambda: compiled(x), model.parameters())
    torch.testing.assert_close(model.weight.grad, expected[0])
    torch._dynamo.reset()


# data-parallel wrappers


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_data_parallel_module_works_under_backprop_and_is_refused_by_name_under_others() -> None:
    model, _ = problem()
    x = torch.randn(6, 3, dtype=torch.float64)
    wrapped = DistributedDataParallel(model)
    expected = exact(lambda: (model(x) ** 2).mean(), model)
    backward(lambda: (wrapped(x) ** 2).mean(), wrapped.parameters())
    torch.testing.assert_close(model.weight.grad, expected[0])
    kept = model.weight.grad.clone()
    with pytest.raises(UnsupportedError, match=r"Differences under DistributedDataParallel.*all_reduce_grad"):
        backward(lambda: (wrapped(x) ** 2).mean(), wrapped.parameters(), gradient=Differences())
    assert torch.equal(model.weight.grad, kept)
    assert not nn.modules.module._global_forward_pre_hooks
    backward(lambda: (model(x) ** 2).mean(), model.parameters(), gradient=Differences())
    torch.testing.assert_close(model.weight.grad, kept + expected[0])


@pytest.mark.usefixtures("one_process")
def test_a_wrapper_deep_inside_is_found() -> None:
    model = nn.Sequential(nn.Linear(3, 3), DistributedDataParallel(nn.Linear(3, 1)))
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        backward(lambda: model(torch.ones(1, 3)).sum(), model.parameters(), gradient=Noisy())


# refusals: each leaves `.grad` as it was


def untouched(
    call: Callable[[nn.Linear, Callable[[], Tensor]], object], error: type[Exception], says: str
) -> None:
    """`call` raises and neither `.grad` nor a parameter has changed."""
    model, closure = problem()
    model.weight.grad = torch.full_like(model.weight, 7.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=says):
        call(model, closure)
    assert bool((model.weight.grad == 7).all())
    assert model.bias.grad is None
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each
def test_a_nonfinite_loss_is_refused(rule: Rule, bad: float) -> None:
    untouched(
        lambda model, closure: backward(lambda: closure() * bad, model.parameters(), gradient=rule),
        NonFiniteError,
        "the loss|gradients",
    )


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (None, ArgumentTypeError, "closure"),
        (3, ArgumentTypeError, "closure"),
        (0.5, ArgumentTypeError, "closure"),
        (torch.zeros((), dtype=torch.int64), ArgumentTypeError, "closure"),
        (torch.zeros((), dtype=torch.complex64), ArgumentTypeError, "closure"),
        (torch.zeros(2, 2), ArgumentError, "closure"),
        (torch.zeros(0), ArgumentError, "closure"),
        ((torch.zeros(()),), ArgumentTypeError, "closure"),
        ({}, ArgumentTypeError, "closure"),
        ({"a": None}, ArgumentTypeError, r"closure\['a'\]"),
        ({"a": {"b": torch.zeros(2, 2)}}, ArgumentError, r"closure\['a'\]\['b'\]"),
        (torch.zeros(()), ArgumentError, "depends on the parameters"),
    ],
)
def test_what_a_closure_returns_is_checked(wrong: object, error: type[Exception], says: str) -> None:
    untouched(lambda model, closure: backward(lambda: wrong, model.parameters()), error, says)


def test_the_named_loss_that_is_not_finite_is_named() -> None:
    untouched(
        lambda model, closure: backward(
            lambda: {"a": closure(), "b": {"c": closure() * math.nan}}, model.parameters()
        ),
        NonFiniteError,
        r"the loss\['b'\]\['c'\]: 1 of 1",
    )


def test_a_mean_that_overflows_is_refused() -> None:
    untouched(
        lambda model, closure: backward(
            lambda: closure().float() * 0 + torch.full((2,), 3e38), model.parameters()
        ),
        NonFiniteError,
        "the loss",
    )


@pytest.mark.parametrize("rule", [Backprop(), Noisy()], ids=repr)
def test_a_loss_of_other_parameters_is_refused(rule: Rule) -> None:
    other = torch.ones(2, requires_grad=True)
    model = nn.Linear(2, 3)
    with pytest.raises(ArgumentError, match="depends on the parameters"):
        backward(lambda: (other**2).sum(), model.parameters(), gradient=rule)
    assert model.weight.grad is None


def test_an_optimizer_that_steps_in_the_backward_is_served() -> None:
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    backward(lambda: model(torch.ones(4, 2)).pow(2).sum(1), model.parameters())
    assert model.weight.grad is None
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("gradients", "error"),
    [
        ((torch.ones(3, 2), None), ArgumentError),
        ((torch.ones(2, 3),), ArgumentError),
        ((torch.ones(2, 3), torch.ones(2), torch.ones(2)), ArgumentError),
        ((torch.ones(2, 3), torch.tensor([1.0, math.nan])), NonFiniteError),
    ],
)
def test_what_a_rule_returns_is_checked(gradients: tuple[Tensor | None, ...], error: type[Exception]) -> None:
    rule = Returns(torch.zeros(()), gradients)
    untouched(lambda model, closure: backward(closure, model.parameters(), gradient=rule), error, "gradients")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_nonfinite_loss_from_a_rule_is_refused(loss: float) -> None:
    rule = Returns(torch.tensor(loss), (torch.ones(2, 3), None))
    untouched(
        lambda model, closure: backward(closure, model.parameters(), gradient=rule),
        NonFiniteError,
        "the loss",
    )


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        (lambda model: [], ArgumentError),
        (lambda model: model, ArgumentTypeError),
        (lambda model: model.weight, ArgumentTypeError),
        (lambda model: model.named_parameters(), ArgumentTypeError),
        (lambda model: [torch.zeros(2, dtype=torch.int64)], ArgumentTypeError),
        (lambda model: [model.weight * 2], ArgumentError),
        (lambda model: [model.weight.detach()], ArgumentError),
    ],
)
@each
def test_parameters_are_checked(
    rule: Rule, parameters: Callable[[nn.Linear], object], error: type[Exception]
) -> None:
    untouched(lambda model, closure: backward(closure, parameters(model), gradient=rule), error, "parameters")


def test_an_exhausted_iterator_is_refused() -> None:
    model, closure = problem()
    parameters = model.parameters()
    backward(closure, parameters)
    with pytest.raises(ArgumentError, match="used up after one pass"):
        backward(closure, parameters)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Differences, "Make one: Differences"),
        ("spsa", "has no method estimate"),
        (object(), "has no method estimate"),
        (lambda closure, parameters: None, "has no method estimate"),
    ],
)
def test_what_is_no_rule_is_refused(wrong: object, says: str) -> None:
    untouched(
        lambda model, closure: backward(closure, model.parameters(), gradient=wrong), ArgumentTypeError, says
    )


def test_a_loss_in_place_of_the_closure_is_refused() -> None:
    untouched(
        lambda model, closure: backward(closure(), model.parameters()), ArgumentTypeError, "backward\\(lambda"
    )


@pytest.mark.parametrize("key", [0, torch.zeros(1, dtype=torch.int64), torch.Generator()])
def test_a_key_of_another_kind_is_refused(key: object) -> None:
    untouched(lambda model, closure: backward(closure, model.parameters(), key=key), ArgumentTypeError, "key")


@each
def test_an_exception_in_the_closure_passes_through(rule: Rule) -> None:
    def broken() -> Tensor:
        raise KeyError("batch")

    untouched(lambda model, closure: backward(broken, model.parameters(), gradient=rule), KeyError, "batch")


# the other contracts


def test_named_losses_keep_the_batch_when_all_have_it() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert torch.equal(losses_per_example({"a": a, "b": {"c": b}}), a + b)
    torch.testing.assert_close(losses_per_example({"a": a, "b": b.sum()}), a.mean() + b.sum())
    torch.testing.assert_close(mean_loss({"a": a, "b": b[:3]}), a.mean() + b[:3].mean())


def test_losses_per_example_keeps_the_batch() -> None:
    losses = torch.ones(4)
    assert losses_per_example(losses) is losses
    assert losses_per_example({"a": losses, "b": torch.tensor(2.0)}).item() == 3.0


def test_the_protocols_tell_what_they_are_from_what_they_are_not() -> None:
    class Local:
        name = "one"
        parameters: Sequence[Tensor] = ()

        def backward(self) -> Tensor:
            return torch.zeros(())

        def phases(self, batch: object) -> list["Local"]:
            return [self]

        def predict(self, inputs: Tensor) -> Tensor:
            return inputs

    assert isinstance(Backprop(), Rule)
    assert isinstance(Local(), Phase)
    assert isinstance(Local(), Learner)
    assert not isinstance(nn.Linear(1, 1), Learner)
    assert not isinstance(Local(), Rule)


def test_a_step_is_a_tuple() -> None:
    model, closure = problem()
    parameters = list(model.parameters())
    step = Step(model, closure, parameters)
    assert tuple(step) == (model, closure, parameters)
    assert step.closure is closure
